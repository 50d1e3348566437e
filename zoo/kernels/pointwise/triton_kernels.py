"""Kernels of the norms: a block of rows for each program, held in registers; statistics in float32."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.constexpr_function
def rows_of(tile: Any, block: Any) -> Any:
    """Rows of a tile of about `tile` elements whose rows take `block`."""
    return max(1, tile // block)


@triton.jit
def _tile(tensor, row, rows, column, width):
    """Elements of a contiguous `[rows, width]` tensor in float32, zero where it ends."""
    inside = (row < rows)[:, None] & (column < width)[None, :]
    return tl.load(tensor + row[:, None] * width + column[None, :], mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store(tensor, value, row, rows, column, width):
    inside = (row < rows)[:, None] & (column < width)[None, :]
    tl.store(tensor + row[:, None] * width + column[None, :], value.to(tensor.dtype.element_ty), mask=inside)


@triton.jit
def _factor(weight, column, width, OFFSET: tl.constexpr, HAS_WEIGHT: tl.constexpr):
    """What a column is multiplied by, `[1, columns]`."""
    factor = tl.full([column.shape[0]], 1.0, tl.float32)
    if HAS_WEIGHT:
        factor = OFFSET + tl.load(weight + column, mask=column < width, other=0.0).to(tl.float32)
    return factor[None, :]


@triton.jit
def norm_forward(
    x,
    residual,
    weight,
    bias,
    out,
    total,
    mean,
    inverse,
    rows,
    width,
    eps,
    CENTRED: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """`total = x + residual`; `out = n * (OFFSET + weight) + bias` with `n = (total - mean) * inverse`.

    What is normed is `total` as it is stored, so that the result is that of adding and norming one after the other.
    """
    ROWS: tl.constexpr = rows_of(TILE, BLOCK)
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    value = _tile(x, row, rows, column, width)
    if HAS_RESIDUAL:
        value += _tile(residual, row, rows, column, width)
        _store(total, value, row, rows, column, width)
        value = value.to(total.dtype.element_ty).to(tl.float32)
    if CENTRED:
        centre = tl.sum(value, 1) / width
        tl.store(mean + row, centre, mask=row < rows)
        value = tl.where((column < width)[None, :], value - centre[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 1) / width + eps)
    tl.store(inverse + row, scale, mask=row < rows)
    value = value * scale[:, None]
    if HAS_WEIGHT:
        value = value * _factor(weight, column, width, OFFSET, HAS_WEIGHT)
    if HAS_BIAS:
        value += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)[None, :]
    _store(out, value, row, rows, column, width)


@triton.jit
def _normal(total, mean, inverse, row, rows, column, width, CENTRED: tl.constexpr):
    """The rows without weight, zero where they end, and what they were multiplied by, `[rows, 1]`."""
    value = _tile(total, row, rows, column, width)
    scale = tl.load(inverse + row, mask=row < rows, other=0.0)[:, None]
    if CENTRED:
        centre = tl.load(mean + row, mask=row < rows, other=0.0)[:, None]
        value = tl.where((column < width)[None, :], value - centre, 0.0)
    return value * scale, scale


@triton.jit
def norm_backward(
    grad,
    grad_total,
    total,
    weight,
    mean,
    inverse,
    grad_x,
    grad_weight,
    grad_bias,
    rows,
    width,
    CENTRED: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """With `g = grad * (OFFSET + weight)`: `grad_x = inverse * (g - mean(g) - n mean(g n)) + grad_total`.

    Each program goes through every `programs`-th block of rows and leaves its shares of `sum(grad n)` and `sum(grad)`
    in a row of `grad_weight` and `grad_bias`. Without CENTRED `mean(g)` is left out.
    """
    ROWS: tl.constexpr = rows_of(TILE, BLOCK)
    program, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    share = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    share_bias = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for block in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.full([], block, tl.int64) * ROWS + tl.arange(0, ROWS)
        normal, scale = _normal(total, mean, inverse, row, rows, column, width, CENTRED)
        given = _tile(grad, row, rows, column, width)
        if HAS_BIAS:
            share_bias += given
        if HAS_WEIGHT:
            share += given * normal
            given = given * _factor(weight, column, width, OFFSET, HAS_WEIGHT)
        change = given - normal * (tl.sum(given * normal, 1) / width)[:, None]
        if CENTRED:
            change -= (tl.sum(given, 1) / width)[:, None]
        change *= scale
        if HAS_TOTAL:
            change += _tile(grad_total, row, rows, column, width)
        _store(grad_x, change, row, rows, column, width)
    own = program.to(tl.int64) * width + column
    if HAS_WEIGHT:
        tl.store(grad_weight + own, tl.sum(share, 0), mask=column < width)
    if HAS_BIAS:
        tl.store(grad_bias + own, tl.sum(share_bias, 0), mask=column < width)


@triton.jit
def norm_backward_wide(
    grad,
    grad_total,
    total,
    weight,
    mean,
    inverse,
    grad_x,
    grad_weight,
    grad_bias,
    rows,
    width,
    CENTRED: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    OFFSET: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`norm_backward` for rows that registers do not hold three of: in two passes over blocks of columns.

    The second pass finds the block of rows in the cache; the shares are added up in memory, each by one program.
    """
    program, programs = tl.program_id(0), tl.num_programs(0)
    for block in range(program, tl.cdiv(rows, ROWS), programs):
        row = tl.full([], block, tl.int64) * ROWS + tl.arange(0, ROWS)
        along = tl.zeros([ROWS], dtype=tl.float32)
        level = tl.zeros([ROWS], dtype=tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            normal, _ = _normal(total, mean, inverse, row, rows, column, width, CENTRED)
            given = _tile(grad, row, rows, column, width) * _factor(weight, column, width, OFFSET, HAS_WEIGHT)
            along += tl.sum(given * normal, 1)
            if CENTRED:
                level += tl.sum(given, 1)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            normal, scale = _normal(total, mean, inverse, row, rows, column, width, CENTRED)
            given = _tile(grad, row, rows, column, width)
            own = program.to(tl.int64) * width + column
            # The first block of rows finds nothing to add to.
            before = (column < width) & (tl.full([BLOCK], block, tl.int32) != program)
            if HAS_WEIGHT:
                share = tl.load(grad_weight + own, mask=before, other=0.0) + tl.sum(given * normal, 0)
                tl.store(grad_weight + own, share, mask=column < width)
            if HAS_BIAS:
                share = tl.load(grad_bias + own, mask=before, other=0.0) + tl.sum(given, 0)
                tl.store(grad_bias + own, share, mask=column < width)
            given = given * _factor(weight, column, width, OFFSET, HAS_WEIGHT)
            change = given - normal * (along / width)[:, None]
            if CENTRED:
                change -= (level / width)[:, None]
            change *= scale
            if HAS_TOTAL:
                change += _tile(grad_total, row, rows, column, width)
            _store(grad_x, change, row, rows, column, width)
        # The threads that go on may not be those that wrote.
        tl.debug_barrier()
