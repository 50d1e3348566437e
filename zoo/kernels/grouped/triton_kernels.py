"""Kernels of grouped products: tiles that never span groups, found from the offsets alone.

Group `g` owns the slots from `offsets[g] // BLOCK + g` on. That is strictly increasing in `g` and leaves each group
enough slots for its rows in tiles of `BLOCK`, so a program finds its group by bisection: no table, no prefix sum,
nothing that the host would have to know but the number of rows. At most one slot for each group stays empty.

Tiles are given in bytes where the dtype decides how many numbers shared memory and registers hold: half as many in
float32, whose products are exact and use no tensor cores.

Offsets, widths and sources are clamped, so that wrong ones cannot make a program leave its tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _clamped(values, index, most):
    return tl.minimum(tl.maximum(tl.load(values + index).to(tl.int64), 0), most)


@triton.jit
def _taken(source, row, inside, x_rows):
    """Which rows of `x` are the rows of a product; 0 where not `inside`."""
    found = tl.load(source + row, mask=inside, other=0).to(tl.int64)
    return tl.minimum(tl.maximum(found, 0), x_rows - 1)


@triton.jit
def _group_of(slot, offsets, rows, groups, BLOCK: tl.constexpr):
    """The last group whose slots begin at or before `slot`."""
    low = tl.full([], 0, tl.int32)
    beyond = low + groups
    while beyond - low > 1:
        middle = (low + beyond) // 2
        here = _clamped(offsets, middle, rows) // BLOCK + middle <= slot
        low = tl.where(here, middle, low)
        beyond = tl.where(here, beyond, middle)
    return low


@triton.jit
def grouped_product(
    x,
    source,
    weight,
    offsets,
    output_widths,
    input_widths,
    out,
    x_rows,
    rows,
    groups,
    outputs,
    inputs,
    x_row,
    weight_group,
    weight_output,
    weight_input,
    HAS_SOURCE: tl.constexpr,
    HAS_OUTPUT_WIDTHS: tl.constexpr,
    HAS_INPUT_WIDTHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    OUTPUT_BYTES: tl.constexpr,
    DEPTH_BYTES: tl.constexpr,
    STRIP: tl.constexpr,
):
    """`out[r, :width] = weight[g, :width, :depth] x[r, :depth]` and 0 beyond `width`, for a tile of group `g`'s rows.

    `x` is `[x_rows, inputs]`, `out` `[rows, outputs]`; with `source` row `r` reads `x[source[r]]`. The strides of
    `weight` decide in which direction it is read, so that the gradient of `x` is this kernel with outputs and inputs
    exchanged. Programs go through `STRIP` slots before they move to the next columns, which keeps both operands in the
    cache.
    """
    ELEMENT_BYTES: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    BLOCK_OUTPUTS: tl.constexpr = OUTPUT_BYTES // ELEMENT_BYTES
    DEPTH: tl.constexpr = DEPTH_BYTES // ELEMENT_BYTES
    program = tl.program_id(0)
    slots = rows // BLOCK_ROWS + groups
    in_strip = STRIP * tl.cdiv(outputs, BLOCK_OUTPUTS)
    before = program // in_strip * STRIP
    height = tl.minimum(slots - before, STRIP)
    slot = before + program % in_strip % height
    first_column = program % in_strip // height * BLOCK_OUTPUTS

    group = _group_of(slot, offsets, rows, groups, BLOCK_ROWS)
    start = _clamped(offsets, group, rows)
    end = _clamped(offsets, group + 1, rows)
    first_row = start + (slot - group - start // BLOCK_ROWS) * BLOCK_ROWS
    if first_row >= end:
        return

    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = first_column + tl.arange(0, BLOCK_OUTPUTS)
    inside = column < outputs
    k = tl.arange(0, DEPTH)
    depth = tl.full([], 0, tl.int32) + inputs
    if HAS_INPUT_WIDTHS:
        depth = _clamped(input_widths, group, inputs).to(tl.int32)
    if HAS_OUTPUT_WIDTHS:
        width = _clamped(output_widths, group, outputs).to(tl.int32)
        depth = tl.where(first_column < width, depth, 0)
    # Rows behind the group's last are read as its last, which needs no mask, and not stored.
    read = tl.minimum(row, end - 1)
    if HAS_SOURCE:
        read = _taken(source, read, read >= 0, x_rows)
    x_tile = x + read[:, None] * x_row + k[None, :]
    weight_tile = weight + group.to(tl.int64) * weight_group + first_column.to(tl.int64) * weight_output
    weight_tile = weight_tile + tl.arange(0, BLOCK_OUTPUTS)[None, :].to(tl.int64) * weight_output
    weight_tile = weight_tile + k[:, None].to(tl.int64) * weight_input
    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], dtype=tl.float32)
    for _ in range(depth // DEPTH):
        left = tl.load(x_tile)
        right = tl.load(weight_tile, mask=inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        x_tile += DEPTH
        weight_tile += tl.full([], DEPTH, tl.int64) * weight_input
    # Apart from the loop: a mask that depends on a width read from memory would break its wide loads.
    rest = depth % DEPTH
    if rest > 0:
        left = tl.load(x_tile, mask=k[None, :] < rest, other=0.0)
        right = tl.load(weight_tile, mask=(k[:, None] < rest) & inside[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
    if HAS_OUTPUT_WIDTHS:
        total = tl.where(column[None, :] < width, total, 0.0)
    out_tile = out + row[:, None] * outputs + column[None, :]
    tl.store(out_tile, total.to(out.dtype.element_ty), mask=(row < end)[:, None] & inside[None, :])


@triton.jit
def _outer_of_group(
    grad,
    x,
    source,
    offsets,
    output_widths,
    input_widths,
    group,
    x_rows,
    rows,
    outputs,
    inputs,
    first_output,
    first_input,
    grad_row,
    x_row,
    HAS_SOURCE: tl.constexpr,
    HAS_OUTPUT_WIDTHS: tl.constexpr,
    HAS_INPUT_WIDTHS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """The sum over a group's rows of `grad^T x`, 0 beyond the group's widths, for one tile."""
    start = _clamped(offsets, group, rows)
    count = (_clamped(offsets, group + 1, rows) - start).to(tl.int32)
    i = first_output + tl.arange(0, BLOCK_OUTPUTS)
    j = first_input + tl.arange(0, BLOCK_INPUTS)
    if HAS_OUTPUT_WIDTHS:
        width = _clamped(output_widths, group, outputs).to(tl.int32)
        count = tl.where(first_output < width, count, 0)
    if HAS_INPUT_WIDTHS:
        depth = _clamped(input_widths, group, inputs).to(tl.int32)
        count = tl.where(first_input < depth, count, 0)
    r = tl.arange(0, DEPTH)
    row = start + r
    # Read as its transpose: transposing what is loaded goes wrong on some layouts of tensor cores.
    grad_tile = grad + row[None, :] * grad_row + i[:, None]
    x_tile = x + row[:, None] * x_row + j[None, :]
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], dtype=tl.float32)
    for done in range(0, count, DEPTH):
        here = r < count - done
        if HAS_SOURCE:
            x_tile = x + _taken(source, row + done, here, x_rows)[:, None] * x_row + j[None, :]
        left = tl.load(grad_tile, mask=here[None, :] & (i < outputs)[:, None], other=0.0)
        right = tl.load(x_tile, mask=here[:, None] & (j < inputs)[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision="ieee")
        grad_tile += tl.full([], DEPTH, tl.int64) * grad_row
        if not HAS_SOURCE:
            x_tile += tl.full([], DEPTH, tl.int64) * x_row
    if HAS_OUTPUT_WIDTHS:
        total = tl.where((i < width)[:, None], total, 0.0)
    if HAS_INPUT_WIDTHS:
        total = tl.where((j < depth)[None, :], total, 0.0)
    return total


@triton.jit
def grouped_outer(
    grad,
    x,
    source,
    offsets,
    output_widths,
    input_widths,
    out,
    x_rows,
    rows,
    groups,
    outputs,
    inputs,
    grad_row,
    x_row,
    out_group,
    out_output,
    out_input,
    HAS_SOURCE: tl.constexpr,
    HAS_OUTPUT_WIDTHS: tl.constexpr,
    HAS_INPUT_WIDTHS: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    INPUT_BYTES: tl.constexpr,
    DEPTH_BYTES: tl.constexpr,
):
    """`out[g] = grad_g^T x_g` over the rows of group `g`; if `SHARED` the sum of these over all groups.

    `grad` is `[rows, outputs]`, `x` `[x_rows, inputs]`; with `source` row `r` reads `x[source[r]]`. A program goes
    through the rows of its tile in order: there are no atomics, and the result does not hang on how they are scheduled.
    """
    ELEMENT_BYTES: tl.constexpr = x.dtype.element_ty.primitive_bitwidth // 8
    BLOCK_INPUTS: tl.constexpr = INPUT_BYTES // ELEMENT_BYTES
    DEPTH: tl.constexpr = DEPTH_BYTES // ELEMENT_BYTES
    across = tl.cdiv(inputs, BLOCK_INPUTS)
    tiles = tl.cdiv(outputs, BLOCK_OUTPUTS) * across
    own, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    first_output, first_input = tile // across * BLOCK_OUTPUTS, tile % across * BLOCK_INPUTS
    total = tl.zeros([BLOCK_OUTPUTS, BLOCK_INPUTS], dtype=tl.float32)
    for step in range(groups if SHARED else 1):
        total += _outer_of_group(
            grad,
            x,
            source,
            offsets,
            output_widths,
            input_widths,
            step if SHARED else own,
            x_rows,
            rows,
            outputs,
            inputs,
            first_output,
            first_input,
            grad_row,
            x_row,
            HAS_SOURCE,
            HAS_OUTPUT_WIDTHS,
            HAS_INPUT_WIDTHS,
            BLOCK_OUTPUTS,
            BLOCK_INPUTS,
            DEPTH,
        )
    i = first_output + tl.arange(0, BLOCK_OUTPUTS)
    j = first_input + tl.arange(0, BLOCK_INPUTS)
    place = (
        out + own.to(tl.int64) * out_group + i.to(tl.int64)[:, None] * out_output + j[None, :].to(tl.int64) * out_input
    )
    tl.store(place, total.to(out.dtype.element_ty), mask=(i < outputs)[:, None] & (j < inputs)[None, :])
