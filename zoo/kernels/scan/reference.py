"""The selective scan one token after another, as the formula reads."""

# ruff: noqa: N803 - the paper's names
from __future__ import annotations

import torch
from torch import Tensor


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    batch, tokens, channels = x.shape
    h = state
    outputs = [x.new_empty(batch, 0, channels)]
    for t in range(tokens):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None], 0)
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * B[:, t, None, :] * x[:, t, :, None]
        outputs.append((h * C[:, t, None, :]).sum(-1)[:, None])
    return torch.cat(outputs, 1), h
