"""Kernel of the softmax between the two matrix products: a row of logits for each program, its gradient in place."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _tanh(x):
    """The hyperbolic tangent; near zero by its series, where the quotient has lost its digits."""
    square = x * x
    series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    decayed = tl.exp2(tl.abs(x) * (-2 * LOG2E))
    quotient = (1 - decayed) / (1 + decayed)
    return tl.where(tl.abs(x) < 0.3, series, tl.where(x < 0, -quotient, quotient))


@triton.jit
def cross_entropy_chunk(
    logits,
    targets,
    scales,
    losses,
    vocab,
    ignore_index,
    softcap,
    z_loss,
    smoothing,
    HAS_SCALES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SMOOTHED: tl.constexpr,
    GRADIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`loss = l - (1 - smoothing) z_target - smoothing mean(z) + z_loss l^2` with `l = log sum exp z`.

    The logits become `scale (softmax(z) (1 + 2 z_loss l) - smoothing / vocab - (1 - smoothing) [target])`, times the
    derivative of the soft cap. A row that does not count is not read and becomes zero.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    target = tl.load(targets + row)
    counts = target != ignore_index
    chosen = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    if HAS_SOFTCAP:
        chosen = softcap * _tanh(chosen / softcap)
    peak = tl.full([], -1e30, tl.float32)
    total = tl.zeros([], tl.float32)
    mean = tl.zeros([], tl.float32)
    seen = tl.where(counts, vocab, 0)
    for start in range(0, seen, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(logits + column, mask=column < vocab, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            value = softcap * _tanh(value / softcap)
        if SMOOTHED:
            mean += tl.sum(value, 0) / vocab
        value = tl.where(column < vocab, value, -1e30)
        higher = tl.maximum(peak, tl.max(value, 0))
        total = total * tl.exp2((peak - higher) * LOG2E) + tl.sum(tl.exp2((value - higher) * LOG2E), 0)
        peak = higher
    normaliser = tl.where(counts, peak + tl.log2(tl.where(counts, total, 1.0)) * LN2, 0.0)
    loss = normaliser - (1 - smoothing) * chosen - smoothing * mean + z_loss * normaliser * normaliser
    tl.store(losses + row, tl.where(counts, loss, 0.0))
    if GRADIENTS:
        factor = tl.full([], 1.0, tl.float32)
        if HAS_SCALES:
            factor = tl.load(scales + row).to(tl.float32)
        rise = (1 + 2 * z_loss * normaliser) * factor
        for start in range(0, vocab, BLOCK):
            column = start + tl.arange(0, BLOCK)
            value = tl.load(logits + column, mask=column < seen, other=0.0).to(tl.float32)
            slope = tl.full([BLOCK], 1.0, tl.float32)
            if HAS_SOFTCAP:
                bent = _tanh(value / softcap)
                slope = 1 - bent * bent
                value = softcap * bent
            change = tl.exp2((value - normaliser) * LOG2E) * rise
            if SMOOTHED:
                change -= factor * (smoothing / vocab)
            change = tl.where(column == target, change - factor * (1 - smoothing), change) * slope
            tl.store(logits + column, tl.where(counts, change, 0.0).to(logits.dtype.element_ty), mask=column < vocab)
