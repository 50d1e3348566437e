"""Cross entropy of a linear layer's outputs as its formula reads."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    chunk: int | None,
    each: bool,
) -> Tensor:
    del chunk
    z = F.linear(x, weight, bias).to(at_least_float32(x.dtype))
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    normaliser = z.logsumexp(-1)
    counts = targets != ignore_index
    chosen = z.gather(-1, torch.where(counts, targets, 0).long().unsqueeze(-1)).squeeze(-1)
    losses = normaliser - (1 - label_smoothing) * chosen - label_smoothing * z.mean(-1) + z_loss * normaliser.square()
    losses = torch.where(counts, losses, 0.0)
    return losses if each else losses.sum()
