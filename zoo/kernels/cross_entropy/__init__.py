"""Cross entropy of a linear layer's outputs that are never held together; see `linear_cross_entropy`."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from zoo.errors import did_you_mean
from zoo.kernels import checks, launch
from zoo.kernels.cross_entropy import reference, torch_path
from zoo.kernels.dispatch import Call, Implementation, Primitive

_REDUCTIONS = ("mean", "sum", "none")


def _kernel(*arguments: Any) -> Tensor:
    from zoo.kernels.cross_entropy import triton_path

    return triton_path.linear_cross_entropy(*arguments)


_LINEAR_CROSS_ENTROPY = Primitive(
    "linear_cross_entropy",
    (
        Implementation("triton", _kernel, launch.refusal),
        Implementation("torch", torch_path.linear_cross_entropy),
        Implementation("reference", reference.linear_cross_entropy),
    ),
)
PRIMITIVES = (_LINEAR_CROSS_ENTROPY,)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: Literal["mean", "sum", "none"] = "mean",
    chunk: int | None = None,
) -> Tensor:
    """`cross_entropy(x weight^T + bias, targets)`, computed in chunks of rows.

    With `z` a row's logits, `l = log sum exp z` and `s = label_smoothing`, a row's loss is
    `l - (1 - s) z_target - s mean(z) + z_loss l^2`.

    Args:
        x: `[rows, width]`; flatten batch and tokens.
        weight: `[vocab, width]`.
        targets: integers `[rows]` from 0 to `vocab - 1`, or `ignore_index`: the row's loss and gradients are zero.
        bias: `[vocab]`, None for 0.
        softcap: logits become `softcap tanh(z / softcap)` first (Gemma 2, arXiv 2408.00118).
        z_loss: keeps the normaliser near 1 (PaLM, arXiv 2204.02311, section 5).
        reduction: `mean` is that over the rows that count, 0 if none does; `none` gives `[rows]`.
        chunk: rows computed together; None for a good number, which hangs on the shapes and the kind of device.

    Returns:
        The loss in float32, in float64 for float64. For `mean` and `sum` its gradients are computed along with it,
        since they hang on what comes later by a factor only; `none` computes the logits again in the backward pass.
        Differentiable once.

    Memory: one chunk of logits, and a gradient of `weight` that is added up in float32. Nothing waits for the device.
    Under autocast `x`, `weight` and `bias` are cast to its dtype, as those of a linear layer are.
    `O(rows width vocab)`. Raises `ZooError` for shapes, dtypes, devices and settings that do not fit, and for targets
    out of range where the host sees them; on a GPU such a row's loss is undefined. Chunks with gradients in the forward
    pass: Hsu et al. 2024, Liger, arXiv 2410.10989, section 3.2.
    """
    name = "linear_cross_entropy"
    checks.rank(name, "x", x, "rows, width")
    rows, width = x.shape
    checks.rank(name, "weight", weight, "vocab, width")
    vocab = weight.shape[0]
    checks.shape(name, "weight", weight, "vocab, width", (vocab, width))
    checks.shape(name, "targets", targets, "rows", (rows,))
    checks.integers(name, "targets", targets)
    if bias is not None:
        checks.shape(name, "bias", bias, "vocab", (vocab,))
    if vocab == 0:
        checks.fail(name, "weight has shape [0, width], expected at least one class")
    checks.positive(name, "softcap", softcap)
    checks.positive(name, "chunk", chunk)
    if not 0 <= label_smoothing <= 1:
        checks.fail(name, f"label_smoothing is {label_smoothing}, expected a number from 0 to 1")
    if not z_loss >= 0:
        checks.fail(name, f"z_loss is {z_loss}, expected a number of at least 0")
    if reduction not in _REDUCTIONS:
        hint = did_you_mean(str(reduction), _REDUCTIONS)
        checks.fail(name, f"reduction is {reduction!r}, expected one of {', '.join(_REDUCTIONS)}{hint}")
    kind = x.device.type
    if (dtype := checks.autocast_dtype(kind)) is not None:
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    checks.one_device(name, x=x, weight=weight, bias=bias, targets=targets)
    checks.floats(name, x=x, weight=weight, bias=bias)
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            checks.fail(name, f"{argument} has dtype {tensor.dtype}, expected {x.dtype}, as x has")
    call = Call(kind, x.dtype, {"rows": rows, "width": width, "vocab": vocab})
    each = reduction == "none"
    loss: Tensor = _LINEAR_CROSS_ENTROPY.select(call)(
        x, weight, bias, targets, ignore_index, softcap, z_loss, label_smoothing, chunk, each
    )
    return loss / (targets != ignore_index).sum().clamp(min=1) if reduction == "mean" else loss
