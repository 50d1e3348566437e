"""Norms and rotary embedding in few passes over memory."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    dtype = at_least_float32(x.dtype)
    return F.rms_norm(x.to(dtype), x.shape[-1:], _as(weight, dtype), eps).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    dtype = at_least_float32(x.dtype)
    return F.layer_norm(x.to(dtype), x.shape[-1:], _as(weight, dtype), _as(bias, dtype), eps).to(x.dtype)


def rotary(x: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool) -> Tensor:
    if dim == 0:
        return x
    dtype = at_least_float32(x.dtype)
    frequencies = base ** (torch.arange(0, dim, 2, device=x.device, dtype=dtype) / -dim)
    # [batch or 1, tokens, 1, dim / 2]
    angles = (positions.to(dtype).unsqueeze(-1) * frequencies).unsqueeze(-2)
    cos, sin = angles.cos(), angles.sin()
    turned = x[..., :dim].to(dtype)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = first * cos - second * sin, second * cos + first * sin
    out = (torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)).to(x.dtype)
    return out if dim == x.shape[-1] else torch.cat([out, x[..., dim:]], -1)


def _as(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)
