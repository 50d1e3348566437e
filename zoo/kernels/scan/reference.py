"""The scans one token after another, as the formulas read."""

from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    h = state
    outputs = [x.new_empty(batch, 0, channels)]
    for t, (x_t, delta_t, B_t, C_t) in enumerate(zip(*(each.unbind(1) for each in (x, delta, B, C)), strict=True)):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None], 0)
        step = delta_t[:, :, None]
        h = torch.exp(step * A) * h + step * B_t[:, None, :] * x_t[:, :, None]
        outputs.append((h * C_t[:, None, :]).sum(-1)[:, None])
    return torch.cat(outputs, 1), h


def diagonal_scan(x: Tensor, decay: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    h = state
    outputs = [x.new_empty(x.shape[0], 0, x.shape[2])]
    for t, (x_t, decay_t) in enumerate(zip(x.unbind(1), decay.expand_as(x).unbind(1), strict=True)):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None], 0)
        h = decay_t * h + x_t
        outputs.append(h[:, None])
    return torch.cat(outputs, 1), h
