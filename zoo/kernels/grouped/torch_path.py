"""Grouped products as custom operators: how many rows a group has is known only when they run.

As operators they stay whole in a compiled graph and on the `meta` device, where the sizes of the groups do not exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.checks import at_least_float32
from zoo.kernels.grouped.bounds import bounds_of, widths_of
from zoo.kernels.grouped.operators import complete, empty_gradient, keep_inputs
from zoo.kernels.work import block_diagonal_matmul_flops


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


def block_diagonal_matmul(x: Tensor, weight: Tensor, interleaved: bool) -> Tensor:
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    product = _interleaved(rows, weight) if interleaved else _block_diagonal(rows, weight)
    return product.view(*x.shape[:-1], weight.shape[0] * weight.shape[2])


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


_CHUNK = 256
"""Rows that a processor turns over together: a chunk and what becomes of it stay in the cache."""


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Rows in pieces; elsewhere than on a CPU all at once, in as few launches as there are."""
    return x.split(_CHUNK) if x.device.type == "cpu" else (x,)


@torch.library.custom_op("zoo::interleaved_matmul", mutates_args=())
def _interleaved(x: Tensor, weight: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2])
    for part, given in zip(_chunks(out), _chunks(x)):
        _turn_back(torch.bmm(weight.mT, _turned(given, weight.shape[0])), part)
    return out


@_interleaved.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2])


@torch.library.custom_op("zoo::interleaved_backward", mutates_args=())
def _interleaved_gradients(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of `x` and `weight`, for which rows of `grad` are transposed once."""
    blocks, to_x = weight.shape[0], torch.empty_like(x)
    to_weight = weight.new_zeros(weight.shape, dtype=at_least_float32(weight.dtype))
    for part, given, pull in zip(_chunks(to_x), _chunks(x), _chunks(grad)):
        turned = _turned(pull, blocks)
        to_weight += torch.bmm(_turned(given, blocks), turned.mT)
        _turn_back(torch.bmm(weight, turned), part)
    return to_x, to_weight.to(weight.dtype)


@_interleaved_gradients.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    del grad
    return torch.empty_like(x), weight.new_empty(weight.shape)


def _turned(x: Tensor, blocks: int) -> Tensor:
    """`[rows, width * blocks]` as `[blocks, width, rows]`, with the rows innermost: both others are strided in `x`."""
    return x.T.contiguous().view(x.shape[1] // blocks, blocks, len(x)).transpose(0, 1)


def _turn_back(products: Tensor, out: Tensor) -> None:
    """`[blocks, width, rows]` into `[rows, width * blocks]`.

    Lines of rows are put into the order of the channels first, which leaves the transpose of a matrix: PyTorch has a
    fast way for that, tile by tile, and none for three dimensions in reverse.
    """
    out.copy_(products.transpose(0, 1).reshape(out.shape[1], -1).T)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    to_x, to_weight = ctx.needs_input_grad
    blocks = weight.shape[0]
    return (
        _block_diagonal(grad, weight.mT) if to_x else None,
        torch.bmm(_parts_of(x, blocks).mT, _parts_of(grad, blocks)) if to_weight else None,
    )


def _interleaved_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    to_x, to_weight = ctx.needs_input_grad
    if to_x and to_weight:
        return _interleaved_gradients(grad, x, weight)
    return (
        _interleaved(grad, weight.mT) if to_x else None,
        _interleaved_gradients(grad, x, weight)[1] if to_weight else None,
    )


_block_diagonal.register_autograd(_backward, setup_context=keep_inputs)
_interleaved.register_autograd(_interleaved_backward, setup_context=keep_inputs)


@register_flop_formula([each._opoverload.overloadpacket for each in (_block_diagonal, _interleaved)])
def _(x: tuple[int, int], weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    return block_diagonal_matmul_flops(x[0], *weight)


@register_flop_formula(_interleaved_gradients._opoverload.overloadpacket)
def _(grad: tuple[int, int], x: tuple[int, int], weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    del grad
    return 2 * block_diagonal_matmul_flops(x[0], *weight)
