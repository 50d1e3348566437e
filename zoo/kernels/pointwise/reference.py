"""Norms and rotary embedding as their formulas read."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import at_least_float32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    wide = x.to(at_least_float32(x.dtype))
    out = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (out if weight is None else out * weight).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    wide = x.to(at_least_float32(x.dtype))
    centred = wide - wide.mean(-1, keepdim=True)
    out = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        out = out * weight
    return (out if bias is None else out + bias).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool) -> Tensor:
    dtype = at_least_float32(x.dtype)
    rotated = x.to(dtype).clone()
    for pair in range(dim // 2):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + dim // 2)
        angle = positions.to(dtype).unsqueeze(-1) * base ** (-2 * pair / dim)
        rotated[..., first] = x[..., first] * angle.cos() - x[..., second] * angle.sin()
        rotated[..., second] = x[..., second] * angle.cos() + x[..., first] * angle.sin()
    return rotated.to(x.dtype)
