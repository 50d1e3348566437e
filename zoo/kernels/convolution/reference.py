"""The convolutions as the formulas read: the short one token after another, the long one lag after lag."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.segments import runs, starts


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    dtype = at_least_float32(x.dtype)
    recent = x.new_zeros(batch, kernel - 1, channels) if state is None else state.to(x.dtype)
    begins = None if segments is None else starts(segments)
    outputs = [x.new_empty(batch, 0, channels, dtype=dtype)]
    for t in range(tokens):
        if begins is not None:
            recent = recent.masked_fill(begins[:, t, None, None], 0)
        seen = torch.cat([recent, x[:, t : t + 1]], 1)
        outputs.append(torch.einsum("bkc,ck->bc", seen.to(dtype), weight.to(dtype))[:, None])
        recent = seen[:, 1:]
    out = torch.cat(outputs, 1)
    if bias is not None:
        out = out + bias.to(dtype)
    return (F.silu(out) if silu else out).to(x.dtype), recent


def long_convolution(x: Tensor, filters: Tensor, segments: Tensor | None) -> Tensor:
    run = None if segments is None else runs(segments)
    tokens = x.shape[1]
    out = torch.zeros_like(x)
    for lag in range(min(filters.shape[1], tokens)):
        seen = F.pad(x[:, : tokens - lag], (0, 0, lag, 0))
        if run is not None:
            seen = seen.masked_fill((F.pad(run[:, : tokens - lag], (lag, 0)) != run).unsqueeze(-1), 0)
        out = out + filters[:, lag] * seen
    return out
