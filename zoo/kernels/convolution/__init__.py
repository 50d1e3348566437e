"""Short depthwise causal convolution; see `causal_convolution`."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from zoo.kernels import checks
from zoo.kernels import segments as packing
from zoo.kernels.convolution import reference, torch_path
from zoo.kernels.dispatch import Call, Implementation, Primitive

_CONVOLUTION = Primitive(
    "causal_convolution",
    (
        Implementation("torch", torch_path.causal_convolution),
        Implementation("reference", reference.causal_convolution),
    ),
)
PRIMITIVES = (_CONVOLUTION,)


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    activation: Literal["silu"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Each channel is filtered over its last few tokens: `o_t = act(bias + sum_k weight_k x_(t - kernel + 1 + k))`.

    Args:
        x: `[batch, tokens, channels]`.
        weight: `[channels, kernel]`; the last tap meets the current token.
        bias: `[channels]`.
        state: the inputs before the first token, `[batch, kernel - 1, channels]`; None is zeros.
        segments: integer ids `[batch, tokens]`; no tap reaches into another segment. `state` belongs to the segment
            of the first token.
        activation: applied to the result.

    Returns:
        The output like `x`, and the state after the last token: the last `kernel - 1` inputs of its segment.

    `O(tokens channels kernel)`. Meant for a handful of taps, as in Mamba (arXiv 2312.00752, section 3.4).
    Raises `ZooError` for shapes that do not fit and for an unknown activation.
    """
    name = "causal_convolution"
    checks.rank(name, "x", x, "batch, tokens, channels")
    checks.rank(name, "weight", weight, "channels, kernel")
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    checks.shape(name, "weight", weight, "channels, kernel", (channels, kernel))
    if kernel == 0:
        checks.fail(name, "weight has no taps; expected a kernel of at least 1")
    if bias is not None:
        checks.shape(name, "bias", bias, "channels", (channels,))
    if state is not None:
        checks.shape(name, "state", state, "batch, kernel - 1, channels", (batch, kernel - 1, channels))
    packing.check(name, segments, batch, tokens)
    if activation not in (None, "silu"):
        checks.fail(name, f"activation is {activation!r}, expected None or 'silu'")
    call = Call(x.device.type, x.dtype, {"kernel": kernel, "tokens": tokens, "segments": segments is not None})
    return _CONVOLUTION.select(call)(x, weight, bias, state, segments, activation == "silu")
