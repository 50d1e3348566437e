"""The softmax pass over a chunk of logits in PyTorch: one exponential for each logit, in place where dtypes allow."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from zoo.kernels.cross_entropy import chunks
from zoo.kernels.cross_entropy.chunks import Settings

linear_cross_entropy = partial(chunks.linear_cross_entropy, __name__)


def softmax_pass(
    logits: Tensor, targets: Tensor, scales: Tensor | None, losses: Tensor, settings: Settings, gradients: bool
) -> None:
    ignore_index, softcap, z_loss, smoothing = settings
    z, counts = logits.to(losses.dtype), targets != ignore_index
    place = torch.where(counts, targets, 0).long().unsqueeze(1)
    slope = None
    if softcap is not None:
        bent = z.div_(softcap).tanh_()
        slope = 1 - bent.square() if gradients else None
        z = bent.mul_(softcap)
    chosen = z.gather(1, place).squeeze(1)
    mean = z.mean(1) if smoothing else 0.0
    peak = z.amax(1, keepdim=True)
    share = z.sub_(peak).exp_()
    total = share.sum(1, keepdim=True)
    normaliser = (total.log() + peak).squeeze(1)
    loss = normaliser - (1 - smoothing) * chosen - smoothing * mean + z_loss * normaliser.square()
    losses.copy_(torch.where(counts, loss, 0.0))
    if not gradients:
        return
    factor = counts.to(z.dtype) if scales is None else counts * scales
    share.mul_((factor * (1 + 2 * z_loss * normaliser)).unsqueeze(1) / total)
    if smoothing:
        share.sub_((factor * (smoothing / z.shape[1])).unsqueeze(1))
    share.scatter_add_(1, place, ((smoothing - 1) * factor).unsqueeze(1))
    if slope is not None:
        share.mul_(slope)
    if share is not logits:
        logits.copy_(share)
