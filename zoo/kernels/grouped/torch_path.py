"""Grouped products as custom operators: how many rows a group has is known only when they run.

As operators they stay whole in a compiled graph and on the `meta` device, where the sizes of the groups do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.grouped.bounds import bounds_of, widths_of
from zoo.kernels.grouped.operators import complete, empty_gradient


@torch.library.custom_op("zoo::grouped_matmul", mutates_args=())
def grouped_matmul(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    output_widths: Tensor | None = None,
    input_widths: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    rows = (x if source is None else source).shape[0]
    out = x.new_empty(rows, weight.shape[-2])
    for group, low, high, width, depth in _parts(rows, weight, offsets, output_widths, input_widths):
        if low < high:
            used = (weight if weight.dim() == 2 else weight[group])[:width, :depth]
            torch.mm(_rows(x, source, low, high)[:, :depth], used.T, out=out[low:high, :width])
            out[low:high, width:] = 0
    return out


@torch.library.custom_op("zoo::grouped_outer", mutates_args=())
def _grouped_outer(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    output_widths: Tensor | None = None,
    input_widths: Tensor | None = None,
    source: Tensor | None = None,
) -> Tensor:
    """For each group the sum of its rows' outer products, for a shared weight the sum over all rows; like `weight`."""
    shared = weight.dim() == 2
    out = empty_gradient(weight)
    if shared or output_widths is not None or input_widths is not None:
        out.zero_()
    for group, low, high, width, depth in _parts(grad.shape[0], weight, offsets, output_widths, input_widths):
        one, other = grad[low:high, :width].T, _rows(x, source, low, high)[:, :depth]
        if shared:
            out[:width, :depth].addmm_(one, other)
        elif low < high:
            torch.mm(one, other, out=out[group, :width, :depth])
        else:
            out[group] = 0
    return out


def _rows(x: Tensor, source: Tensor | None, low: int, high: int) -> Tensor:
    """The rows of a group."""
    return x[low:high] if source is None else x.index_select(0, source[low:high])


def _parts(
    rows: int, weight: Tensor, offsets: Tensor, output_widths: Tensor | None, input_widths: Tensor | None
) -> Iterator[tuple[int, int, int, int, int]]:
    """Each group's number, first row, end, and how many outputs and inputs of the weight it uses."""
    bounds = bounds_of(offsets, rows)
    widths = widths_of(output_widths, len(bounds), weight.shape[-2])
    depths = widths_of(input_widths, len(bounds), weight.shape[-1])
    for group, ((low, high), width, depth) in enumerate(zip(bounds, widths, depths)):
        yield group, low, high, width, depth


complete(grouped_matmul, _grouped_outer)


def route(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    chosen = scores.topk(top_k, dim=-1).indices
    sorted_choices, order = torch.sort(chosen.flatten(), stable=True)
    numbers = torch.arange(order.shape[0], device=scores.device)
    place = torch.empty_like(order).scatter_(0, order, numbers).view_as(chosen)
    bounds = torch.arange(scores.shape[-1] + 1, device=scores.device)
    return chosen, order, place, torch.searchsorted(sorted_choices, bounds)


def block_diagonal_matmul(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return _block_diagonal(rows, weight).view(*x.shape[:-1], weight.shape[0] * weight.shape[2])


@torch.library.custom_op("zoo::block_diagonal_matmul", mutates_args=())
def _block_diagonal(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2])
    # Straight to its place: what `bmm` returns would have to be copied there.
    torch.bmm(_parts_of(x, weight.shape[0]), weight, out=_parts_of(out, weight.shape[0]))
    return out


@_block_diagonal.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2])


def _parts_of(x: Tensor, blocks: int) -> Tensor:
    """`[rows, blocks * width]` as `[blocks, rows, width]`, a view."""
    return x.unflatten(1, (blocks, -1)).transpose(0, 1)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    to_x, to_weight = ctx.needs_input_grad
    blocks = weight.shape[0]
    return (
        _block_diagonal(grad, weight.mT) if to_x else None,
        torch.bmm(_parts_of(x, blocks).mT, _parts_of(grad, blocks)) if to_weight else None,
    )


_block_diagonal.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(_block_diagonal._opoverload.overloadpacket)
def _(x: tuple[int, int], weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[2]
