"""Grouped products in a form that autograd follows: one loop over groups, one weight for each row."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.grouped.bounds import bounds_of, widths_of


def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    output_widths: Tensor | None,
    input_widths: Tensor | None,
    source: Tensor | None,
) -> Tensor:
    x = x if source is None else x[source]
    bounds = bounds_of(offsets, x.shape[0])
    outputs, inputs = weight.shape[-2:]
    found = [x.new_zeros(0, outputs)]
    for group, ((low, high), width, depth) in enumerate(
        zip(bounds, widths_of(output_widths, len(bounds), outputs), widths_of(input_widths, len(bounds), inputs))
    ):
        used = (weight if weight.dim() == 2 else weight[group])[:width, :depth]
        found.append(F.pad(x[low:high, :depth] @ used.T, (0, outputs - width)))
    return torch.cat(found)


def subset_matmul(x: Tensor, weight: Tensor, subsets: Tensor, transposed: bool) -> Tensor:
    takes = F.one_hot(subsets, weight.shape[0]).to(x.dtype)
    if transposed:
        return torch.einsum("rtb,rbi->rti", takes, torch.einsum("ro,boi->rbi", x, weight))
    return torch.einsum("rbi,boi->ro", torch.einsum("rtb,rti->rbi", takes, x), weight)


def block_diagonal_matmul(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    if interleaved:
        parts = x.unflatten(-1, (weight.shape[1], weight.shape[0])).unbind(-1)
        return torch.stack([part @ block for part, block in zip(parts, weight)], dim=-1).flatten(-2)
    parts = x.unflatten(-1, (weight.shape[0], weight.shape[1])).unbind(-2)
    return torch.cat([part @ block for part, block in zip(parts, weight)], dim=-1)


def route(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[:, :top_k]
    order = chosen.flatten().argsort(stable=True)
    counts = torch.stack([(chosen == choice).sum() for choice in range(scores.shape[-1])])
    return chosen.contiguous(), order, order.argsort().view_as(chosen), F.pad(counts.cumsum(0), (1, 0))
