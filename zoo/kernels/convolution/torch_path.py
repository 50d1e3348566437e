"""The convolution as one element-wise pass for each tap, which beats grouped convolutions on the CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.segments import runs


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    taps = weight.to(at_least_float32(x.dtype)).unbind(1)
    before = len(taps) - 1
    state = x.new_zeros(batch, before, channels) if state is None else state.to(x.dtype)
    # [batch, kernel - 1 + tokens, channels]
    inputs = torch.cat([state, x], 1)
    run = None if segments is None else F.pad(runs(segments), (before, 0))

    out = x * taps[-1] if bias is None else torch.addcmul(bias.to(taps[-1].dtype), x, taps[-1])
    for lag in range(1, len(taps)):
        shifted = inputs[:, before - lag : before - lag + tokens]
        if run is not None:
            other = run[:, before - lag : before - lag + tokens] != run[:, before:]
            shifted = shifted.masked_fill(other.unsqueeze(-1), 0)
        out = torch.addcmul(out, shifted, taps[-1 - lag])
    if silu:
        out = F.silu(out)

    kept = inputs[:, tokens:]
    if run is not None and tokens:
        kept = kept.masked_fill((run[:, tokens:] != run[:, -1:]).unsqueeze(-1), 0)
    return out.to(x.dtype), kept.contiguous()
