"""Norms, activations and rotary embedding as their formulas read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from zoo.kernels.checks import at_least_float32


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(at_least_float32(x.dtype))
    out = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (offset + weight.to(wide.dtype))
    return out.to(x.dtype) if residual is None else (out.to(x.dtype), total)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else x + residual
    wide = total.to(at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * (offset + weight.to(wide.dtype))
    if bias is not None:
        out = out + bias
    return out.to(x.dtype) if residual is None else (out.to(x.dtype), total)


def rotary(x: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool) -> Tensor:
    dtype = at_least_float32(x.dtype)
    rotated = x.to(dtype).clone()
    for pair in range(dim // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
        angle = positions.to(dtype).unsqueeze(-1) * base ** (-2 * pair / dim)
        rotated[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
        rotated[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
    return rotated.to(x.dtype)


def rotary_pair(
    q: Tensor, k: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return rotary(q, positions, base, dim, interleaved), rotary(k, positions, base, dim, interleaved)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.relu(),
    "relu2": lambda x: x.relu() ** 2,
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "linear": lambda x: x,
}


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    dtype = at_least_float32(gate.dtype)
    return (ACTIVATIONS[kind](gate.to(dtype)) * up.to(dtype)).to(gate.dtype)


def polynomial_activation(x: Tensor, coefficients: Tensor, normalized: bool, eps: float) -> Tensor:
    wide, factors = x.to(at_least_float32(x.dtype)), coefficients.to(at_least_float32(x.dtype))
    out = factors[0].expand(x.shape)
    for power in (1, 2, 3):
        if normalized:
            raised = wide**power
            term = raised / torch.sqrt(raised.square().mean(-1, keepdim=True) + eps)
        else:
            term = wide.relu() ** power
        out = out + factors[power] * term
    return out.to(x.dtype)
