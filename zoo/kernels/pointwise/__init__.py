"""Norms and rotary position embedding; see `rms_norm`, `layer_norm` and `rotary`."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.pointwise import reference, torch_path

_RMS_NORM = Primitive(
    "rms_norm",
    (Implementation("torch", torch_path.rms_norm), Implementation("reference", reference.rms_norm)),
)
_LAYER_NORM = Primitive(
    "layer_norm",
    (Implementation("torch", torch_path.layer_norm), Implementation("reference", reference.layer_norm)),
)
_ROTARY = Primitive(
    "rotary",
    (Implementation("torch", torch_path.rotary), Implementation("reference", reference.rotary)),
)
PRIMITIVES = (_RMS_NORM, _LAYER_NORM, _ROTARY)


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467).

    `x` is `[..., width]`, `weight` `[width]` or None for 1. Half precision is computed in float32 and rounded once.
    Raises `ZooError` if `weight` does not fit.
    """
    _check_norm("rms_norm", x, weight=weight)
    return _RMS_NORM.select(Call(x.device.type, x.dtype))(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """`(x - mean(x)) / sqrt(var(x) + eps) * weight + bias` over the last dimension (arXiv 1607.06450).

    `x` is `[..., width]`, `weight` and `bias` are `[width]` or None for 1 and 0; the variance is the biased one. Half
    precision is computed in float32 and rounded once. Raises `ZooError` if `weight` or `bias` does not fit.
    """
    _check_norm("layer_norm", x, weight=weight, bias=bias)
    return _LAYER_NORM.select(Call(x.device.type, x.dtype))(x, weight, bias, eps)


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
    name = "rotary"
    checks.rank(name, "x", x, "batch, tokens, heads, head_dim")
    batch, tokens, _, head_dim = x.shape
    if positions.shape not in ((tokens,), (batch, tokens)):
        checks.fail(
            name,
            f"positions has shape {list(positions.shape)}, expected [tokens] = [{tokens}] "
            f"or [batch, tokens] = {[batch, tokens]}",
        )
    checks.integers(name, "positions", positions)
    checks.positive(name, "base", base)
    dim = head_dim if dim is None else dim
    if dim % 2 or not 0 <= dim <= head_dim:
        checks.fail(name, f"dim is {dim}, expected an even number from 0 to head_dim = {head_dim}")
    return _ROTARY.select(Call(x.device.type, x.dtype, {"dim": dim}))(x, positions, base, dim, interleaved)


def _check_norm(name: str, x: Tensor, **parameters: Tensor | None) -> None:
    if x.dim() == 0:
        checks.fail(name, "x is a scalar, expected [..., width]")
    for parameter, value in parameters.items():
        if value is not None:
            checks.shape(name, parameter, value, "width", (x.shape[-1],))
