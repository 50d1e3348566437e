"""Kernels of the scans: a program goes through all tokens with the state of a block of channels in registers.

Tokens are taken `CHUNK` at a time, so that what they need is under way together. Behind the last token the step is
zero, which leaves the state as it is.
"""

# Triton unrolls loops over `static_range` and knows no unpacking in tuples; type checkers know neither.
# ruff: noqa: RUF005
# pyright: reportGeneralTypeIssues=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOperatorIssue=false, reportIndexIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
FASTEST = tl.constexpr(-1e30)
"""In place of a rate of minus infinity, which times a step of zero would be no number."""


@triton.jit
def selective_scan_forward(
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    state,
    starts,
    out,
    final,
    entering,
    tokens,
    channels,
    state_dim,
    chunks,
    x_row,
    delta_row,
    B_row,
    C_row,
    z_row,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    KEEP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """`h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t`, `out_t = (C_t h_t + D x_t) silu(z_t)`.

    With `KEEP` the state that enters each chunk is kept, `[batch, chunks, channels, state_dim]`.
    """
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    index = tl.arange(0, BLOCK_STATE)
    there = channel < channels
    used = index < state_dim
    mask = there[:, None] & used[None, :]
    place = channel[:, None] * state_dim + index[None, :]
    of_batch = batch * channels * state_dim
    end = (batch + 1) * tokens
    rate = tl.maximum(tl.load(A + place, mask=mask, other=0.0).to(tl.float32), FASTEST) * LOG2E
    if HAS_D:
        skip = tl.load(D + channel, mask=there, other=0.0).to(tl.float32)
    if HAS_STATE:
        h = tl.load(state + of_batch + place, mask=mask, other=0.0).to(tl.float32)
    else:
        h = tl.zeros([BLOCK_CHANNELS, BLOCK_STATE], dtype=tl.float32)
    for chunk in range(chunks):
        if KEEP:
            tl.store(entering + (batch * chunks + chunk) * channels * state_dim + place, h, mask=mask)
        inputs, steps, gates, keys, queries, cleared = (), (), (), (), (), ()
        for token in tl.static_range(CHUNK):
            row = batch * tokens + (chunk * CHUNK + token)
            live = row < end
            inside = channel < tl.where(live, channels, 0)
            within = index < tl.where(live, state_dim, 0)
            inputs = inputs + (tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32),)
            steps = steps + (tl.load(delta + row * delta_row + channel, mask=inside, other=0.0).to(tl.float32),)
            keys = keys + (tl.load(B + row * B_row + index, mask=within, other=0.0).to(tl.float32),)
            queries = queries + (tl.load(C + row * C_row + index, mask=within, other=0.0).to(tl.float32),)
            if HAS_Z:
                gates = gates + (tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32),)
            if HAS_STARTS:
                cleared = cleared + (tl.load(starts + row, mask=live, other=0) != 0,)
        for token in tl.static_range(CHUNK):
            decay = tl.exp2(steps[token][:, None] * rate)
            if HAS_STARTS:
                decay = tl.where(cleared[token], 0.0, decay)
            h = decay * h + (steps[token] * inputs[token])[:, None] * keys[token][None, :]
            value = tl.sum(h * queries[token][None, :], 1)
            if HAS_D:
                value += skip * inputs[token]
            if HAS_Z:
                value = value * (gates[token] / (1.0 + tl.exp2(gates[token] * -LOG2E)))
            row = batch * tokens + (chunk * CHUNK + token)
            inside = channel < tl.where(row < end, channels, 0)
            tl.store(out + row * channels + channel, value.to(out.dtype.element_ty), mask=inside)
    tl.store(final + of_batch + place, h, mask=mask)


@triton.jit
def selective_scan_backward(
    grad,
    grad_final,
    x,
    delta,
    A,
    B,
    C,
    D,
    z,
    starts,
    entering,
    grad_x,
    grad_delta,
    grad_z,
    grad_state,
    share_A,
    share_B,
    share_C,
    share_D,
    tokens,
    channels,
    state_dim,
    chunks,
    grad_row,
    x_row,
    delta_row,
    B_row,
    C_row,
    z_row,
    HAS_D: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_STATE: tl.constexpr,
):
    """With `g_t = C_t dy_t + exp(delta_(t+1) A) g_(t+1)` the gradients are sums of `g_t` times what made `h_t`.

    The states of a chunk are computed again from the one that enters it. Each program leaves its share of the gradients
    of B and C, `[blocks, batch, tokens, state_dim]`, and of A and D, `[batch, channels, ...]`.
    """
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    block = tl.program_id(0) % blocks
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    batches = tl.num_programs(0) // blocks
    channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    index = tl.arange(0, BLOCK_STATE)
    there = channel < channels
    used = index < state_dim
    mask = there[:, None] & used[None, :]
    place = channel[:, None] * state_dim + index[None, :]
    of_batch = batch * channels * state_dim
    end = (batch + 1) * tokens
    rate = tl.maximum(tl.load(A + place, mask=mask, other=0.0).to(tl.float32), FASTEST) * LOG2E
    change = tl.zeros([BLOCK_CHANNELS, BLOCK_STATE], dtype=tl.float32)
    if HAS_D:
        skip = tl.load(D + channel, mask=there, other=0.0).to(tl.float32)
        change_D = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
        lost = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    # What the state receives from the tokens behind it.
    arriving = tl.load(grad_final + of_batch + place, mask=mask, other=0.0).to(tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        h = tl.load(entering + (batch * chunks + chunk) * channels * state_dim + place, mask=mask, other=0.0)
        states = (h,)
        for token in tl.static_range(CHUNK):
            row = batch * tokens + (chunk * CHUNK + token)
            live = row < end
            inside = channel < tl.where(live, channels, 0)
            within = index < tl.where(live, state_dim, 0)
            step = tl.load(delta + row * delta_row + channel, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
            key = tl.load(B + row * B_row + index, mask=within, other=0.0).to(tl.float32)
            decay = tl.exp2(step[:, None] * rate)
            if HAS_STARTS:
                decay = tl.where(tl.load(starts + row, mask=live, other=0) != 0, 0.0, decay)
            h = decay * h + (step * value)[:, None] * key[None, :]
            states = states + (h,)
        for token in tl.static_range(CHUNK - 1, -1, -1):
            row = batch * tokens + (chunk * CHUNK + token)
            live = row < end
            inside = channel < tl.where(live, channels, 0)
            within = index < tl.where(live, state_dim, 0)
            step = tl.load(delta + row * delta_row + channel, mask=inside, other=0.0).to(tl.float32)
            value = tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32)
            given = tl.load(grad + row * grad_row + channel, mask=inside, other=0.0).to(tl.float32)
            key = tl.load(B + row * B_row + index, mask=within, other=0.0).to(tl.float32)
            query = tl.load(C + row * C_row + index, mask=within, other=0.0).to(tl.float32)
            if HAS_Z:
                gate = tl.load(z + row * z_row + channel, mask=inside, other=0.0).to(tl.float32)
                opening = 1.0 / (1.0 + tl.exp2(gate * -LOG2E))
                ungated = tl.sum(states[token + 1] * query[None, :], 1)
                if HAS_D:
                    ungated += skip * value
                slope = opening * (1.0 + gate * (1.0 - opening))
                change_z = (given * ungated * slope).to(grad_z.dtype.element_ty)
                tl.store(grad_z + row * channels + channel, change_z, mask=inside)
                given = given * (gate * opening)
            share = (block.to(tl.int64) * batches * tokens + row) * state_dim + index
            tl.store(share_C + share, tl.sum(given[:, None] * states[token + 1], 0), mask=within)
            adjoint = arriving + given[:, None] * query[None, :]
            tl.store(share_B + share, tl.sum(adjoint * (step * value)[:, None], 0), mask=within)
            update = tl.sum(adjoint * key[None, :], 1)
            change_x = update * step
            if HAS_D:
                change_x += skip * given
                # Kahan's sum: as exact over thousands of tokens as a sum by halves.
                term = given * value - lost
                larger = change_D + term
                lost = (larger - change_D) - term
                change_D = larger
            tl.store(grad_x + row * channels + channel, change_x.to(grad_x.dtype.element_ty), mask=inside)
            decay = tl.exp2(step[:, None] * rate)
            if HAS_STARTS:
                decay = tl.where(tl.load(starts + row, mask=live, other=0) != 0, 0.0, decay)
            arriving = adjoint * decay
            exponent = arriving * states[token]
            change += exponent * step[:, None]
            change_delta = tl.sum(exponent * rate, 1) * LN2 + update * value
            tl.store(grad_delta + row * channels + channel, change_delta.to(grad_delta.dtype.element_ty), mask=inside)
    tl.store(grad_state + of_batch + place, arriving, mask=mask)
    tl.store(share_A + of_batch + place, change, mask=mask)
    if HAS_D:
        tl.store(share_D + batch * channels + channel, change_D, mask=there)


@triton.jit
def diagonal_scan_forward(
    x,
    decay,
    state,
    starts,
    out,
    final,
    tokens,
    channels,
    chunks,
    x_row,
    decay_row,
    CONSTANT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """`h_t = decay_t h_(t-1) + x_t`; `CONSTANT` decays are `[channels]`."""
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = channel < channels
    end = (batch + 1) * tokens
    h = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    if HAS_STATE:
        h += tl.load(state + batch * channels + channel, mask=there, other=0.0).to(tl.float32)
    if CONSTANT:
        factor = tl.load(decay + channel, mask=there, other=0.0).to(tl.float32)
    for chunk in range(chunks):
        inputs = ()
        factors = ()
        for token in tl.static_range(CHUNK):
            row = batch * tokens + (chunk * CHUNK + token)
            live = row < end
            inside = channel < tl.where(live, channels, 0)
            inputs = inputs + (tl.load(x + row * x_row + channel, mask=inside, other=0.0).to(tl.float32),)
            if not CONSTANT:
                factor = tl.load(decay + row * decay_row + channel, mask=inside, other=1.0).to(tl.float32)
            effective = tl.where(live, factor, 1.0)
            if HAS_STARTS:
                effective = tl.where(tl.load(starts + row, mask=live, other=0) != 0, 0.0, effective)
            factors = factors + (effective,)
        for token in tl.static_range(CHUNK):
            row = batch * tokens + (chunk * CHUNK + token)
            inside = channel < tl.where(row < end, channels, 0)
            h = factors[token] * h + inputs[token]
            tl.store(out + row * channels + channel, h.to(out.dtype.element_ty), mask=inside)
    tl.store(final + batch * channels + channel, h, mask=there)


@triton.jit
def diagonal_scan_backward(
    grad,
    grad_final,
    decay,
    state,
    starts,
    out,
    grad_x,
    grad_decay,
    grad_state,
    tokens,
    channels,
    chunks,
    grad_row,
    decay_row,
    CONSTANT: tl.constexpr,
    HAS_STATE: tl.constexpr,
    HAS_STARTS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """`g_t = dh_t + decay_(t+1) g_(t+1)` is the gradient of `x_t`, and `g_t h_(t-1)` that of `decay_t`.

    Of a `CONSTANT` decay each program leaves its share in `grad_decay`, `[batch, channels]`.
    """
    blocks = tl.cdiv(channels, BLOCK_CHANNELS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    there = channel < channels
    first = batch * tokens
    end = first + tokens
    initial = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    if HAS_STATE:
        initial += tl.load(state + batch * channels + channel, mask=there, other=0.0).to(tl.float32)
    if CONSTANT:
        factor = tl.load(decay + channel, mask=there, other=0.0).to(tl.float32)
        change = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
        lost = tl.zeros([BLOCK_CHANNELS], dtype=tl.float32)
    # What the state receives from the tokens behind it.
    arriving = tl.load(grad_final + batch * channels + channel, mask=there, other=0.0).to(tl.float32)
    for back in range(chunks):
        chunk = chunks - 1 - back
        given = ()
        factors = ()
        previous = ()
        for token in tl.static_range(CHUNK):
            row = batch * tokens + (chunk * CHUNK + token)
            live = row < end
            inside = channel < tl.where(live, channels, 0)
            given = given + (tl.load(grad + row * grad_row + channel, mask=inside, other=0.0).to(tl.float32),)
            if not CONSTANT:
                factor = tl.load(decay + row * decay_row + channel, mask=inside, other=1.0).to(tl.float32)
            effective = tl.where(live, factor, 1.0)
            earlier = channel < tl.where(live & (row > first), channels, 0)
            before = tl.load(out + (row - 1) * channels + channel, mask=earlier, other=0.0).to(tl.float32)
            before = tl.where(row == first, initial, before)
            if HAS_STARTS:
                begins = tl.load(starts + row, mask=live, other=0) != 0
                effective = tl.where(begins, 0.0, effective)
                before = tl.where(begins, 0.0, before)
            factors = factors + (effective,)
            previous = previous + (before,)
        for token in tl.static_range(CHUNK - 1, -1, -1):
            row = batch * tokens + (chunk * CHUNK + token)
            inside = channel < tl.where(row < end, channels, 0)
            adjoint = given[token] + arriving
            tl.store(grad_x + row * channels + channel, adjoint.to(grad_x.dtype.element_ty), mask=inside)
            slope = adjoint * previous[token]
            if CONSTANT:
                # Kahan's sum: as exact over thousands of tokens as a sum by halves.
                term = slope - lost
                larger = change + term
                lost = (larger - change) - term
                change = larger
            else:
                tl.store(grad_decay + row * channels + channel, slope.to(grad_decay.dtype.element_ty), mask=inside)
            arriving = adjoint * factors[token]
    tl.store(grad_state + batch * channels + channel, arriving, mask=there)
    if CONSTANT:
        tl.store(grad_decay + batch * channels + channel, change, mask=there)
