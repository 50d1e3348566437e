"""Norms, rotary embedding and activations: primitives that read their input once and write as much."""

from __future__ import annotations

from typing import Any, overload

from torch import Tensor

from zoo.errors import did_you_mean
from zoo.kernels import checks, launch
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.pointwise import reference, torch_path

WIDEST_ROW = 32768
"""Widest row that a program of a norm holds in registers."""
WIDEST_POLYNOMIAL = 16384
"""The same for normalised polynomial activations, whose backward pass holds its gradient as well."""
KINDS = tuple(reference.ACTIVATIONS)
"""What `gated_activation` knows."""


def _serves_rows(call: Call, widest: int = WIDEST_ROW) -> str | None:
    width = call.facts.get("width", 0)
    too_wide = f"takes rows up to {widest} wide, not {width}" if width > widest else None
    return launch.refusal(call) or too_wide


def _serves_polynomials(call: Call) -> str | None:
    return _serves_rows(call, WIDEST_POLYNOMIAL) if call.facts.get("normalized") else launch.refusal(call)


def _rms_norm_kernel(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    from zoo.kernels.pointwise import triton_path

    return triton_path.rms_norm(*arguments)


def _layer_norm_kernel(*arguments: Any) -> Tensor | tuple[Tensor, Tensor]:
    from zoo.kernels.pointwise import triton_path

    return triton_path.layer_norm(*arguments)


_RMS_NORM = Primitive(
    "rms_norm",
    (
        Implementation("triton", _rms_norm_kernel, _serves_rows),
        Implementation("torch", torch_path.rms_norm),
        Implementation("reference", reference.rms_norm),
    ),
)
_LAYER_NORM = Primitive(
    "layer_norm",
    (
        Implementation("triton", _layer_norm_kernel, _serves_rows),
        Implementation("torch", torch_path.layer_norm),
        Implementation("reference", reference.layer_norm),
    ),
)


def _rotary_kernel(*arguments: Any) -> Tensor:
    from zoo.kernels.pointwise import rotary_path

    return rotary_path.rotary(*arguments)


def _rotary_pair_kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    from zoo.kernels.pointwise import rotary_path

    return rotary_path.rotary_pair(*arguments)


def _gated_kernel(*arguments: Any) -> Tensor:
    from zoo.kernels.pointwise import activation_path

    return activation_path.gated_activation(*arguments)


def _polynomial_kernel(*arguments: Any) -> Tensor:
    from zoo.kernels.pointwise import activation_path

    return activation_path.polynomial_activation(*arguments)


_ROTARY = Primitive(
    "rotary",
    (
        Implementation("triton", _rotary_kernel, launch.refusal),
        Implementation("torch", torch_path.rotary),
        Implementation("reference", reference.rotary),
    ),
)
_ROTARY_PAIR = Primitive(
    "rotary_pair",
    (
        Implementation("triton", _rotary_pair_kernel, launch.refusal),
        Implementation("torch", torch_path.rotary_pair),
        Implementation("reference", reference.rotary_pair),
    ),
)
_GATED_ACTIVATION = Primitive(
    "gated_activation",
    (
        Implementation("triton", _gated_kernel, launch.refusal),
        Implementation("torch", torch_path.gated_activation),
        Implementation("reference", reference.gated_activation),
    ),
)
_POLYNOMIAL_ACTIVATION = Primitive(
    "polynomial_activation",
    (
        Implementation("triton", _polynomial_kernel, _serves_polynomials),
        Implementation("torch", torch_path.polynomial_activation),
        Implementation("reference", reference.polynomial_activation),
    ),
)
PRIMITIVES = (_RMS_NORM, _LAYER_NORM, _ROTARY, _ROTARY_PAIR, _GATED_ACTIVATION, _POLYNOMIAL_ACTIVATION)


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
) -> Tensor: ...


@overload
def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    Args:
        x: `[..., width]`.
        weight: `[width]`, None for 1.
        eps: added to the mean square.
        residual: like `x`, perhaps in a wider dtype. What is normed is then `x + residual`, and the result is the norm
            and this sum, which the next layer adds to.
        weight_offset: added to the weight; 1 for weights that start at 0, such as Gemma's.

    Half precision is computed in float32 and rounded once. Raises `ZooError` for shapes that do not fit.
    """
    _check_norm("rms_norm", x, residual, weight=weight)
    call = Call(x.device.type, x.dtype, {"width": x.shape[-1]})
    return _RMS_NORM.select(call)(x, weight, eps, residual, weight_offset)


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    weight_offset: float = 0.0,
) -> Tensor: ...


@overload
def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    weight_offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv 1607.06450).

    `x` is `[..., width]`, `weight` and `bias` are `[width]` or None for 1 and 0; the variance is the biased one.
    `residual` and `weight_offset` are those of `rms_norm`. Half precision is computed in float32 and rounded once.
    Raises `ZooError` for shapes that do not fit.
    """
    _check_norm("layer_norm", x, residual, weight=weight, bias=bias)
    call = Call(x.device.type, x.dtype, {"width": x.shape[-1]})
    return _LAYER_NORM.select(call)(x, weight, bias, eps, residual, weight_offset)


def rotary(
    x: Tensor, positions: Tensor, *, base: float = 10000.0, dim: int | None = None, interleaved: bool = False
) -> Tensor:
    """Rotate pairs of features by angles that grow with position: pair `i` by `position * base^(-2 i / dim)`.

    Args:
        x: `[batch, tokens, heads, head_dim]`.
        positions: integers `[tokens]` or `[batch, tokens]`.
        base: the slowest pair turns once in about `2 pi base` tokens.
        dim: how many of the first features turn, an even number; the others pass. None is all.
        interleaved: pairs are neighbours (GPT-J); otherwise feature `i` pairs with `i + dim / 2` (GPT-NeoX, Llama).

    Angles are computed in float32, in float64 for float64. Source: Su et al. 2021, arXiv 2104.09864, equation 34.
    Raises `ZooError` for shapes that do not fit.
    """
    dim = _check_rotary("rotary", positions, base, dim, x=x)
    return _ROTARY.select(Call(x.device.type, x.dtype, {"dim": dim}))(x, positions, base, dim, interleaved)


def rotary_pair(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    *,
    base: float = 10000.0,
    dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """`rotary` of queries `[batch, tokens, heads, head_dim]` and keys `[batch, tokens, kv_heads, head_dim]` at once.

    The angles are computed once for both. Arguments and errors are those of `rotary`.
    """
    dim = _check_rotary("rotary_pair", positions, base, dim, q=q, k=k)
    call = Call(q.device.type, q.dtype, {"dim": dim})
    return _ROTARY_PAIR.select(call)(q, k, positions, base, dim, interleaved)


def gated_activation(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """`activation(gate) * up`, elementwise (Shazeer 2020, arXiv 2002.05202).

    Args:
        gate, up: of one shape, `[..., width]`; they may be the halves of one projection, which are read where they are.
        kind: `silu` (SwiGLU), `gelu` (exact), `gelu_tanh` (as in Gemma), `relu`, `relu2`, `sigmoid` or `linear`.

    Each operation is computed in float32 at least. The backward pass keeps `gate` and `up` and nothing else. Raises
    `ZooError` for shapes that differ and unknown kinds.
    """
    name = "gated_activation"
    if kind not in KINDS:
        checks.fail(name, f"kind is {kind!r}, expected one of {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    checks.is_tensor(name, "gate", gate)
    if gate.dim() == 0:
        checks.fail(name, "gate is a scalar, expected [..., width]")
    checks.shape(name, "up", up, "..., width", tuple(gate.shape))
    checks.floats(name, gate=gate, up=up)
    checks.one_device(name, gate=gate, up=up)
    return _GATED_ACTIVATION.select(Call(gate.device.type, gate.dtype))(gate, up, kind)


def polynomial_activation(x: Tensor, coefficients: Tensor, *, normalized: bool = False, eps: float = 1e-6) -> Tensor:
    """A cubic with learned coefficients: PolyReLU or PolyNorm (Zhuo et al. 2024, arXiv 2411.03884, equations 2 and 3).

    Args:
        x: `[..., width]`.
        coefficients: `[4]`, of the powers 0 to 3; the paper starts from 0, 1/3, 1/3, 1/3.
        normalized: PolyNorm, `sum c_i x^i / sqrt(mean(x^(2 i)) + eps)` with the mean over the last dimension; otherwise
            PolyReLU, `sum c_i relu(x)^i`. Power 0 is 1 in both.
        eps: added to the mean squares of the powers.

    Half precision is computed in float32 and rounded once; the backward pass keeps `x` only. Raises `ZooError` for
    shapes that do not fit.
    """
    name = "polynomial_activation"
    checks.is_tensor(name, "x", x)
    if x.dim() == 0:
        checks.fail(name, "x is a scalar, expected [..., width]")
    checks.shape(name, "coefficients", coefficients, "powers", (4,))
    checks.positive(name, "eps", eps)
    checks.floats(name, x=x, coefficients=coefficients)
    checks.one_device(name, x=x, coefficients=coefficients)
    call = Call(x.device.type, x.dtype, {"width": x.shape[-1], "normalized": normalized})
    return _POLYNOMIAL_ACTIVATION.select(call)(x, coefficients, normalized, eps)


def _check_rotary(name: str, positions: Tensor, base: float, dim: int | None, **tensors: Tensor) -> int:
    """How many features turn."""
    first, x = next(iter(tensors.items()))
    for argument, tensor in tensors.items():
        checks.rank(name, argument, tensor, "batch, tokens, heads, head_dim")
    batch, tokens, _, head_dim = x.shape
    for argument, tensor in tensors.items():
        if (*tensor.shape[:2], tensor.shape[3]) != (batch, tokens, head_dim):
            checks.fail(
                name,
                f"{argument} has shape {list(tensor.shape)}, expected [batch, tokens, heads, head_dim] = "
                f"[{batch}, {tokens}, any, {head_dim}], as {first} has",
            )
    checks.is_tensor(name, "positions", positions)
    if positions.shape not in ((tokens,), (batch, tokens)):
        checks.fail(
            name,
            f"positions has shape {list(positions.shape)}, expected [tokens] = [{tokens}] "
            f"or [batch, tokens] = {[batch, tokens]}",
        )
    checks.integers(name, "positions", positions)
    checks.positive(name, "base", base)
    checks.floats(name, **tensors)
    checks.one_device(name, **tensors, positions=positions)
    dim = head_dim if dim is None else dim
    if dim % 2 or not 0 <= dim <= head_dim:
        checks.fail(name, f"dim is {dim}, expected an even number from 0 to head_dim = {head_dim}")
    return dim


def _check_norm(name: str, x: Tensor, residual: Tensor | None, **parameters: Tensor | None) -> None:
    checks.is_tensor(name, "x", x)
    if x.dim() == 0:
        checks.fail(name, "x is a scalar, expected [..., width]")
    for parameter, value in parameters.items():
        if value is not None:
            checks.shape(name, parameter, value, "width", (x.shape[-1],))
    if residual is not None:
        checks.shape(name, "residual", residual, "..., width", tuple(x.shape))
    checks.floats(name, x=x, residual=residual, **parameters)
    checks.one_device(name, x=x, residual=residual, **parameters)
