"""Kernels of the short convolution: a tile of tokens by channels for each program, sums in float32.

Positions count from the first token; those from `1 - KERNEL` to -1 are the rows of the state, which belong to the run
of the first token. Taps are told by their lag: the last column of the weight has lag 0.
"""

# Triton unrolls loops over `static_range` and knows no unpacking in tuples; type checkers know neither.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def _inputs(x, state, x_row, position, tokens, columns, channels, batch, KERNEL: tl.constexpr, HAS_STATE: tl.constexpr):
    """Inputs at some positions, zero where there are none. `[positions, channels]`."""
    there = (columns < channels)[None, :]
    start = (batch * tokens + position) * x_row
    inside = ((position >= 0) & (position < tokens))[:, None] & there
    value = tl.load(x + start[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_STATE:
        start = (batch * (KERNEL - 1) + (position + (KERNEL - 1))) * channels
        before = ((position < 0) & (position > -KERNEL))[:, None] & there
        value += tl.load(state + start[:, None] + columns[None, :], mask=before, other=0.0).to(tl.float32)
    return value


@triton.jit
def _run(runs, position, tokens, batch):
    inside = (position >= 0) & (position < tokens)
    return tl.load(runs + batch * tokens + position, mask=inside, other=0)


@triton.jit
def causal_convolution_forward(
    x,
    weight,
    bias,
    state,
    runs,
    out,
    tokens,
    channels,
    x_row,
    tiles,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """`out_t = act(bias + sum_lag weight_lag x_(t - lag))`, over inputs of the same run."""
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    columns = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = columns < channels
    tile = tl.program_id(0) // blocks
    batch = (tile // tiles).to(tl.int64)
    position = (tile % tiles) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    if HAS_RUNS:
        run = _run(runs, position, tokens, batch)
    value = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], dtype=tl.float32)
    if HAS_BIAS:
        value += tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    last_taps = weight + columns.to(tl.int64) * KERNEL + (KERNEL - 1)
    for lag in tl.static_range(KERNEL):
        factor = tl.load(last_taps - lag, mask=there, other=0.0).to(tl.float32)
        seen = _inputs(x, state, x_row, position - lag, tokens, columns, channels, batch, KERNEL, HAS_STATE)
        if HAS_RUNS:
            seen = tl.where((_run(runs, position - lag, tokens, batch) == run)[:, None], seen, 0.0)
        value += factor[None, :] * seen
    if SILU:
        value = value * _sigmoid(value)
    row = batch * tokens + position
    mask = (position < tokens)[:, None] & there[None, :]
    tl.store(out + row[:, None] * channels + columns[None, :], value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def causal_convolution_backward(
    grad,
    x,
    weight,
    bias,
    state,
    runs,
    grad_x,
    grad_state,
    shares,
    tokens,
    channels,
    grad_row,
    x_row,
    groups,
    KERNEL: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_RUNS: tl.constexpr,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """With `g` the gradient before the activation: `grad_x_t = sum_lag weight_lag g_(t + lag)` within the run of `t`.

    What is before the activation is computed again. Each program goes through `TILES` tiles and leaves its share of the
    gradients of the taps, by lag, and of the bias, behind them, in `KERNEL + 1` rows of `shares`.
    """
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    columns = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = columns < channels
    program = tl.program_id(0) // blocks
    batch = (program // groups).to(tl.int64)
    first = (program % groups) * (TILES * BLOCK_TOKENS) - (KERNEL - 1)
    factors = ()
    share = ()
    last_taps = weight + columns.to(tl.int64) * KERNEL + (KERNEL - 1)
    for lag in tl.static_range(KERNEL):
        factor = tl.load(last_taps - lag, mask=there, other=0.0).to(tl.float32)
        factors = factors + (factor[None, :],)
    for _ in tl.static_range(KERNEL + 1):
        share = share + (tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], dtype=tl.float32),)
    if HAS_BIAS:
        offset = tl.load(bias + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    for tile in range(tl.minimum(TILES, tl.cdiv(tokens - first, BLOCK_TOKENS))):
        position = first + tile * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        # Inputs, and their runs, at `position + 1 - KERNEL` and on.
        seen = ()
        run = ()
        for step in tl.static_range(2 * KERNEL - 1 if SILU else KERNEL):
            at = position + (step + 1 - KERNEL)
            seen = seen + (_inputs(x, state, x_row, at, tokens, columns, channels, batch, KERNEL, HAS_STATE),)
        if HAS_RUNS:
            for step in tl.static_range(2 * KERNEL - 1):
                run = run + (_run(runs, position + (step + 1 - KERNEL), tokens, batch),)
        total = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], dtype=tl.float32)
        for ahead in tl.static_range(KERNEL):
            inside = ((position + ahead >= 0) & (position + ahead < tokens))[:, None] & there[None, :]
            start = (batch * tokens + position + ahead) * grad_row
            given = tl.load(grad + start[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            if SILU:
                value = tl.zeros([BLOCK_TOKENS, BLOCK_CHANNELS], dtype=tl.float32)
                if HAS_BIAS:
                    value += offset
                for lag in tl.static_range(KERNEL):
                    one = seen[KERNEL - 1 + ahead - lag]
                    if HAS_RUNS:
                        same = run[KERNEL - 1 + ahead - lag] == run[KERNEL - 1 + ahead]
                        one = tl.where(same[:, None], one, 0.0)
                    value += factors[lag] * one
                gate = _sigmoid(value)
                given = given * (gate * (1.0 + value * (1.0 - gate)))
            if ahead == 0:
                more = ()
                for lag in tl.static_range(KERNEL):
                    one = seen[KERNEL - 1 - lag]
                    if HAS_RUNS:
                        one = tl.where((run[KERNEL - 1 - lag] == run[KERNEL - 1])[:, None], one, 0.0)
                    more = more + (share[lag] + given * one,)
                share = more + (share[KERNEL] + given,)
            if HAS_RUNS:
                given = tl.where((run[KERNEL - 1 + ahead] == run[KERNEL - 1])[:, None], given, 0.0)
            total += factors[ahead] * given
        row = (batch * tokens + position) * channels
        mask = ((position >= 0) & (position < tokens))[:, None] & there[None, :]
        tl.store(grad_x + row[:, None] + columns[None, :], total.to(grad_x.dtype.element_ty), mask=mask)
        if HAS_STATE:
            row = (batch * (KERNEL - 1) + (position + (KERNEL - 1))) * channels
            mask = (position < 0)[:, None] & there[None, :]
            tl.store(grad_state + row[:, None] + columns[None, :], total.to(grad_state.dtype.element_ty), mask=mask)
    for lag in tl.static_range(KERNEL + 1):
        row = (program.to(tl.int64) * (KERNEL + 1) + lag) * channels
        tl.store(shares + row + columns, tl.sum(share[lag], 0), mask=there)
