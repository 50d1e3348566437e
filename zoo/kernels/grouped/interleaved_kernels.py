"""Kernels of interleaved blocks: channels next to each other belong to different blocks, and threads take one each.

No tensor core multiplies such blocks, and none need: blocks are so small that the plain multiplications, in float32,
take no longer than what they multiply takes to arrive.
"""

from __future__ import annotations

import triton
import triton.language as tl

from zoo.kernels.pointwise.triton_kernels import rows_of


@triton.jit
def interleaved_product(
    x,
    weight,
    out,
    rows,
    blocks,
    inputs,
    outputs,
    x_row,
    weight_block,
    weight_input,
    weight_output,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    """`out[r, o, j] = sum_i x[r, i, j] weight[j, i, o]` for some rows and some blocks `j`.

    The gradient of `x` is this kernel with the strides of inputs and outputs exchanged.
    """
    ROWS: tl.constexpr = rows_of(TILE, OUTPUTS * BLOCK)
    across = tl.cdiv(blocks, BLOCK)
    row = (tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    block = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    output = tl.arange(0, OUTPUTS)
    mask = (row < rows)[:, None] & (block < blocks)[None, :]
    weight_mask = (output < outputs)[:, None] & (block < blocks)[None, :]
    x_tile = x + row[:, None] * x_row + block[None, :]
    weight_tile = weight + block[None, :].to(tl.int64) * weight_block + output[:, None].to(tl.int64) * weight_output
    total = tl.zeros([ROWS, OUTPUTS, BLOCK], dtype=tl.float32)
    for _ in range(inputs):
        value = tl.load(x_tile, mask=mask, other=0.0).to(tl.float32)
        factor = tl.load(weight_tile, mask=weight_mask, other=0.0).to(tl.float32)
        total += value[:, None, :] * factor[None, :, :]
        x_tile += blocks
        weight_tile += weight_input
    place = (row[:, None, None] * outputs + output[None, :, None]) * blocks + block[None, None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=mask[:, None, :] & weight_mask[None, :, :])


@triton.jit
def interleaved_outer(
    x,
    grad,
    shares,
    rows,
    blocks,
    inputs,
    outputs,
    x_row,
    grad_row,
    INPUTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`shares[s, i, o, j]`: the sum of `x[r, i, j] grad[r, o, j]` over every `programs`-th row from `s` on."""
    across = tl.cdiv(blocks, BLOCK)
    share, programs = tl.program_id(0) // across, tl.num_programs(0) // across
    block = (tl.program_id(0) % across) * BLOCK + tl.arange(0, BLOCK)
    there = (block < blocks)[None, :]
    i, o = tl.arange(0, INPUTS)[:, None], tl.arange(0, OUTPUTS)[:, None]
    x_place, grad_place = i.to(tl.int64) * blocks + block[None, :], o.to(tl.int64) * blocks + block[None, :]
    x_mask, grad_mask = (i < inputs) & there, (o < outputs) & there
    total = tl.zeros([INPUTS, OUTPUTS, BLOCK], dtype=tl.float32)
    for index in range(share, rows, programs):
        row = tl.full([], index, tl.int64)
        value = tl.load(x + row * x_row + x_place, mask=x_mask, other=0.0).to(tl.float32)
        given = tl.load(grad + row * grad_row + grad_place, mask=grad_mask, other=0.0).to(tl.float32)
        total += value[:, None, :] * given[None, :, :]
    place = (share.to(tl.int64) * inputs + tl.arange(0, INPUTS)[:, None, None]) * outputs
    place = (place + tl.arange(0, OUTPUTS)[None, :, None]) * blocks + block[None, None, :]
    tl.store(shares + place, total, mask=x_mask[:, None, :] & grad_mask[None, :, :])
