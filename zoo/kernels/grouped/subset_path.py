"""Products with the blocks that each row takes, as custom operators: which rows agree is known only when they run.

Adjoining rows of one subset are multiplied by its blocks side by side, in one product as deep, or as wide, as the whole
subset. Where such runs are too short to pay for laying blocks together, each block meets the rows that take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise, zip_longest
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels.grouped.operators import empty_gradient, keep_inputs
from zoo.kernels.work import subset_matmul_flops


def least_run(width: int) -> int:
    """The mean number of rows of a run from which on it pays to lay blocks of `width` inputs together.

    Laying a block together moves `width` numbers for each output, once for all rows of a run; handing the products of
    single blocks to their rows moves a few for each output and row. That they are equal at a sixteenth of the width is
    measured, in zoo/kernels/grouped.
    """
    return max(4, width // 16)


_APART = 16
"""Numbers between the rows of blocks that are laid together."""

Shape = tuple[int, ...]


class Run(NamedTuple):
    """Adjoining rows that take the same blocks."""

    low: int
    high: int
    blocks: list[int]


def subset_matmul(x: Tensor, weight: Tensor, subsets: Tensor, transposed: bool) -> Tensor:
    return _subset_parts(x, weight, subsets) if transposed else _subset_sums(x, weight, subsets)


@torch.library.custom_op("zoo::subset_sums", mutates_args=())
def _subset_sums(x: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    out = x.new_empty(x.shape[0], weight.shape[1])
    runs = _runs(subsets, weight)
    if _long(runs, weight.shape[2]):
        x = x.flatten(1)
        for low, high, joined in _joined(runs, weight):
            torch.mm(x[low:high], joined.T, out=out[low:high])
    else:
        out.zero_()
        for block, rows, slots in _takers(subsets, weight):
            out.index_add_(0, rows, x[rows, slots] @ block.T)
    return out


@torch.library.custom_op("zoo::subset_parts", mutates_args=())
def _subset_parts(x: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    out = x.new_empty(*subsets.shape, weight.shape[2])
    runs = _runs(subsets, weight)
    if _long(runs, weight.shape[2]):
        flat = out.flatten(1)
        for low, high, joined in _joined(runs, weight):
            torch.mm(x[low:high], joined, out=flat[low:high])
    else:
        for block, rows, slots in _takers(subsets, weight):
            out[rows, slots] = x[rows] @ block
    return out


@torch.library.custom_op("zoo::subset_outer", mutates_args=())
def _subset_outer(wide: Tensor, narrow: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    """The gradient of `weight`, of which no number is read: for each block the sum of its rows' outer products."""
    out = empty_gradient(weight).zero_()
    runs = _runs(subsets, weight)
    if _long(runs, weight.shape[2]):
        narrow, none = narrow.flatten(1), [-1] * subsets.shape[1]
        joined, parts = _side_by_side(weight, subsets.shape[1])
        joined.zero_()
        for (low, high, blocks), after in zip_longest(runs, runs[1:]):
            joined.addmm_(wide[low:high].T, narrow[low:high])
            for part, block, following in zip(parts, blocks, after.blocks if after else none):
                if block != following:
                    out[block].add_(part)
                    part.zero_()
    else:
        for block, (_, rows, slots) in enumerate(_takers(subsets, weight)):
            torch.mm(wide[rows].T, narrow[rows, slots], out=out[block])
    return out


def _runs(subsets: Tensor, weight: Tensor) -> list[Run]:
    rows, blocks = subsets.shape[0], weight.shape[0]
    if not subsets.numel():
        return [Run(0, rows, [])] if rows else []
    low, high = (int(end) for end in subsets.aminmax())
    if low < 0 or high >= blocks:
        raise ZooError(f"subset_matmul: subsets are from {low} to {high}, expected 0 to {blocks - 1}, blocks of weight")
    starts = F.pad((subsets[1:] != subsets[:-1]).any(1).nonzero().flatten() + 1, (1, 0))
    ends = pairwise([*starts.tolist(), rows])
    return [Run(*each, taken) for each, taken in zip(ends, subsets[starts].tolist(), strict=True)]


def _long(runs: list[Run], width: int) -> bool:
    return not runs or runs[-1].high >= least_run(width) * len(runs)


def _joined(runs: list[Run], weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """Ends of each run, and its blocks side by side, `[outputs, taken * width]`, in memory that the next one reuses."""
    joined, parts = _side_by_side(weight, len(runs[0].blocks) if runs else 0)
    held: list[int] = [-1] * len(parts)
    for low, high, blocks in runs:
        for part, block, before in zip(parts, blocks, held):
            if block != before:
                part.copy_(weight[block])
        held = blocks
        yield low, high, joined


def _side_by_side(weight: Tensor, taken: int) -> tuple[Tensor, list[Tensor]]:
    """Room for blocks in columns, laid out as `weight` is, and the part of each."""
    _, outputs, width = weight.shape
    by_rows = weight.stride(-1) == 1
    rows, columns = (outputs, taken * width) if by_rows else (taken * width, outputs)
    # Apart, since products are slower on rows whose distance is a power of two.
    joined = weight.new_empty(rows, columns + _APART)[:, :columns]
    joined = joined if by_rows else joined.T
    return joined, [joined[:, slot * width : (slot + 1) * width] for slot in range(taken)]


def _takers(subsets: Tensor, weight: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each block with the rows that take it and the slots in which they do."""
    chosen, order = subsets.flatten().sort(stable=True)
    counts = torch.bincount(chosen, minlength=weight.shape[0]).tolist()
    for block, pairs in zip(weight, order.split(counts), strict=True):
        yield block, pairs // subsets.shape[1], pairs % subsets.shape[1]


@_subset_sums.register_fake
def _(x: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    del subsets
    return x.new_empty(x.shape[0], weight.shape[1])


@_subset_parts.register_fake
def _(x: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    return x.new_empty(*subsets.shape, weight.shape[2])


@_subset_outer.register_fake
def _(wide: Tensor, narrow: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    del wide, narrow, subsets
    return empty_gradient(weight)


def _sums_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, subsets = ctx.saved_tensors
    to_x, to_weight, _ = ctx.needs_input_grad
    grad_x = _subset_parts(grad, weight, subsets) if to_x else None
    return grad_x, _subset_outer(grad, x, weight, subsets) if to_weight else None, None


def _parts_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, subsets = ctx.saved_tensors
    to_x, to_weight, _ = ctx.needs_input_grad
    grad_x = _subset_sums(grad, weight, subsets) if to_x else None
    return grad_x, _subset_outer(x, grad, weight, subsets) if to_weight else None, None


_subset_sums.register_autograd(_sums_backward, setup_context=keep_inputs)
_subset_parts.register_autograd(_parts_backward, setup_context=keep_inputs)


@register_flop_formula(
    [each._opoverload.overloadpacket for each in (_subset_sums, _subset_parts)],
)
def _(x: Shape, weight: Shape, subsets: Shape, *_: Any, **__: Any) -> int:
    del x
    return subset_matmul_flops(*subsets, *weight[1:])


@register_flop_formula(_subset_outer._opoverload.overloadpacket)
def _(wide: Shape, narrow: Shape, weight: Shape, subsets: Shape, *_: Any, **__: Any) -> int:
    del wide, narrow
    return subset_matmul_flops(*subsets, *weight[1:])
