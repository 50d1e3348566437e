"""Grouped products as custom operators: how many rows a group has is known only when they run.

As operators they stay whole in a compiled graph and on the `meta` device, where the sizes of the groups do not exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.grouped.bounds import bounds_of
from zoo.kernels.work import grouped_matmul_flops


@torch.library.custom_op("zoo::grouped_matmul", mutates_args=())
def grouped_matmul(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    for group, (low, high) in enumerate(bounds_of(offsets, x.shape[0])):
        if low < high:
            torch.mm(x[low:high], weight[group].T, out=out[low:high])
    return out


@torch.library.custom_op("zoo::grouped_outer", mutates_args=())
def _grouped_outer(rows: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """For each group the sum of its rows' outer products, `[groups, rows' width, x' width]`."""
    out = rows.new_zeros(offsets.shape[0] - 1, rows.shape[1], x.shape[1])
    for group, (low, high) in enumerate(bounds_of(offsets, x.shape[0])):
        if low < high:
            torch.mm(rows[low:high].T, x[low:high], out=out[group])
    return out


@grouped_matmul.register_fake
def _(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    del offsets
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(rows: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(offsets.shape[0] - 1, rows.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, offsets = ctx.saved_tensors
    to_x, to_weight, _ = ctx.needs_input_grad
    return (
        grouped_matmul(grad, weight.transpose(1, 2), offsets) if to_x else None,
        _grouped_outer(grad, x, offsets) if to_weight else None,
        None,
    )


grouped_matmul.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.zoo.grouped_matmul)
def _(x: tuple[int, int], weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    return grouped_matmul_flops(x[0], x[1], weight[1])


@register_flop_formula(torch.ops.zoo.grouped_outer)
def _(rows: tuple[int, int], x: tuple[int, int], *_: Any, **__: Any) -> int:
    return grouped_matmul_flops(rows[0], rows[1], x[1])
