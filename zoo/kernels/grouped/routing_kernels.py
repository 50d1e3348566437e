"""Kernels of `route`: the best choices of each row, and a counting sort of the (row, choice) pairs without atomics.

Each block of rows counts its choices; one program turns the counts into where each block's pairs begin; then each block
puts its own pairs into place. A row takes a choice at most once, so a pair comes behind those of the rows before it.
"""

# Triton's stubs say that a maximum may come with its index.
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def route_choose(
    scores,
    chosen,
    counts,
    rows,
    choices,
    score_row,
    TOP_K: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    TILE: tl.constexpr,
):
    """`chosen[r]`: the `TOP_K` choices with the highest scores, best first, of equals the first; `counts[block]`."""
    BLOCK_ROWS: tl.constexpr = TILE // BLOCK_CHOICES
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    choice = tl.arange(0, BLOCK_CHOICES)
    free = (row < rows)[:, None] & (choice < choices)[None, :]
    score = tl.load(scores + row[:, None] * score_row + choice[None, :], mask=free, other=0.0).to(tl.float32)
    score = tl.where(score == score, score, float("inf"))
    count = tl.zeros([BLOCK_CHOICES], dtype=tl.int32)
    for k in range(TOP_K):
        best = tl.max(tl.where(free, score, -float("inf")), 1)
        first = tl.min(tl.where(free & (score == best[:, None]), choice[None, :], BLOCK_CHOICES), 1)
        tl.store(chosen + row * TOP_K + k, first.to(tl.int64), mask=row < rows)
        here = choice[None, :] == first[:, None]
        count += tl.sum(here.to(tl.int32), 0)
        free = free & (here == 0)
    tl.store(counts + block.to(tl.int64) * choices + choice, count, mask=choice < choices)


@triton.jit
def route_scan(counts, starts, offsets, blocks, choices, BLOCK_CHOICES: tl.constexpr, TILE: tl.constexpr):
    """`starts[b, c]`: pairs of choice `c` in blocks before `b`; `offsets`: where each choice's pairs begin."""
    BLOCK: tl.constexpr = TILE // BLOCK_CHOICES
    choice = tl.arange(0, BLOCK_CHOICES)
    total = tl.zeros([BLOCK_CHOICES], dtype=tl.int64)
    for first in range(0, blocks, BLOCK):
        block = first + tl.arange(0, BLOCK)
        inside = (block < blocks)[:, None] & (choice < choices)[None, :]
        place = block.to(tl.int64)[:, None] * choices + choice[None, :]
        count = tl.load(counts + place, mask=inside, other=0).to(tl.int64)
        tl.store(starts + place, total[None, :] + tl.cumsum(count, 0) - count, mask=inside)
        total += tl.sum(count, 0)
    tl.store(offsets + choice, tl.cumsum(total, 0) - total, mask=choice < choices)
    tl.store(offsets + choices, tl.sum(total, 0))


@triton.jit
def route_place(
    chosen,
    starts,
    offsets,
    order,
    place,
    rows,
    choices,
    TOP_K: tl.constexpr,
    BLOCK_CHOICES: tl.constexpr,
    TILE: tl.constexpr,
):
    """`place[r, k]`: where the pair stands when pairs are sorted by choice, `order` the pair that stands there."""
    BLOCK_ROWS: tl.constexpr = TILE // BLOCK_CHOICES
    block = tl.program_id(0)
    row = block.to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    choice = tl.arange(0, BLOCK_CHOICES)
    taken = tl.zeros([BLOCK_ROWS, BLOCK_CHOICES], dtype=tl.int32)
    for k in range(TOP_K):
        own = tl.load(chosen + row * TOP_K + k, mask=row < rows, other=-1)
        taken += (choice[None, :] == own[:, None]).to(tl.int32)
    start = tl.load(starts + block.to(tl.int64) * choices + choice, mask=choice < choices, other=0)
    start += tl.load(offsets + choice, mask=choice < choices, other=0)
    ahead = start[None, :] + (tl.cumsum(taken, 0) - taken)
    for k in range(TOP_K):
        pair = row * TOP_K + k
        own = tl.load(chosen + pair, mask=row < rows, other=-1)
        found = tl.sum(tl.where(choice[None, :] == own[:, None], ahead, 0), 1)
        tl.store(place + pair, found, mask=row < rows)
        tl.store(order + found, pair, mask=row < rows)
