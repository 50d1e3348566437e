"""Kernels of the recurrence, in chunks of tokens.

Weights are powers of two of differences of cumulative sums within a chunk. A sum is kept as whole numbers, which add
without error, and what they leave of each step, at most one half, so a strong decay costs those after it no digits.
Where nothing passes on, because the decay is zero or another segment begins, the whole number is `RESET`, whose power
of two is zero.

The backward pass is the forward pass with the roles of the tensors exchanged and time reversed (`REVERSE`): the
gradient of the state comes from queries and output gradients as the state comes from keys and values.
"""

# Triton's types do not know that its `range` is one.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LEAST_STEP = tl.constexpr(-126.0)
"""Logarithm of the least normal float32: a decay below it is zero."""
RESET = tl.constexpr(-256.0)
BACKWARDS = tl.constexpr(True)
GRAIN = tl.constexpr(1.0 / 1024)
"""Steps are sums of whole grains, which add without error in float32: 64 resets are 2 ** 24 grains."""


@triton.jit
def _steps(
    log_decay,
    segments,
    rows,
    first,
    tokens,
    heads,
    head,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """The logarithm of each token's decay, as a whole number and the rest. `rows` are places in `[batch * tokens]`."""
    position = first + tl.arange(0, CHUNK)
    inside = position < tokens
    step = tl.zeros([CHUNK], dtype=tl.float32)
    if DECAY == "heads":
        step += tl.load(log_decay + head).to(tl.float32)
    if DECAY == "tokens":
        step += tl.load(log_decay + rows * heads + head, mask=inside, other=0.0).to(tl.float32)
    step = tl.where(inside, tl.minimum(step * LOG2_E, 0.0), 0.0)
    gone = step < LEAST_STEP
    if SEGMENTS:
        gone = gone | _begins(segments, rows, position, tokens)
    whole = tl.where(gone, RESET, tl.floor(step / GRAIN + 0.5) * GRAIN)
    return whole, tl.where(gone, 0.0, step - whole)


@triton.jit
def _begins(segments, rows, position, tokens):
    """Whether another segment begins with a token; never with the first."""
    later = (position < tokens) & (position > 0)
    return tl.load(segments + rows, mask=later, other=0) != tl.load(segments + rows - 1, mask=later, other=0)


@triton.jit
def _channel_steps(log_decay, places, inside, begins):
    """The logarithm of the decay of each channel, `RESET` where nothing passes."""
    step = tl.minimum(tl.load(log_decay + places, mask=inside, other=0.0).to(tl.float32) * LOG2_E, 0.0)
    return tl.where((step < LEAST_STEP) | begins, RESET, step)


@triton.jit
def _weights(whole, rest):
    return tl.exp2(tl.minimum(whole + rest, 0.0))


@triton.jit
def _update(state, left, weights, right, keep, factor, EXACT: tl.constexpr, WEIGHTED: tl.constexpr):
    """`keep state + factor (left weights) right`, for `left [key_dim, tokens]` and `right [tokens, value_dim]`.

    EXACT: in half precision the weighted operand is taken as a sum of three numbers, which is all of its digits.
    """
    if WEIGHTED:
        weighted = left.to(tl.float32) * weights
        high = weighted.to(left.dtype)
        added = tl.dot(high, right, input_precision="ieee")
        if EXACT and left.dtype != tl.float32:
            remainder = weighted - high.to(tl.float32)
            middle = remainder.to(left.dtype)
            low = (remainder - middle.to(tl.float32)).to(left.dtype)
            added += tl.dot(middle, right)
            added += tl.dot(low, right)
        return state * keep + added * factor
    return state + tl.dot(left, right, input_precision="ieee") * factor


@triton.jit
def recurrence_states(
    keys,
    values,
    log_decay,
    segments,
    initial,
    states,
    final,
    tokens,
    groups,
    heads,
    key_dim,
    value_dim,
    factor,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    INITIAL: tl.constexpr,
    REVERSE: tl.constexpr,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The state that enters each chunk, `states [batch, heads, chunks, key_dim, value_dim]`, and the one after all.

    Reversed, with queries for keys and output gradients for values: the gradient of the state that leaves each chunk,
    and of the one before the first. A program goes through the chunks of a slice of one head's state.
    """
    row = tl.program_id(0).to(tl.int64)
    batch, head = row // heads, row % heads
    group = head // (heads // groups)
    in_key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    in_value = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    key_inside, value_inside = in_key < key_dim, in_value < value_dim
    inner = in_key[:, None] * value_dim + in_value[None, :]
    inner_inside = key_inside[:, None] & value_inside[None, :]
    size = tl.full([], key_dim, tl.int64) * value_dim
    if INITIAL:
        state = tl.load(initial + row * size + inner, mask=inner_inside, other=0.0).to(tl.float32)
    else:
        state = tl.zeros([BLOCK_K, BLOCK_V], dtype=tl.float32)
    WEIGHTED: tl.constexpr = DECAY != "none" or SEGMENTS

    chunks = tl.cdiv(tokens, CHUNK)
    for index in range(chunks):
        chunk = index
        if REVERSE:
            chunk = chunks - 1 - index
        tl.store(states + (row * chunks + chunk) * size + inner, state.to(states.dtype.element_ty), mask=inner_inside)
        first = chunk * CHUNK
        position = first + tl.arange(0, CHUNK)
        inside = position < tokens
        rows = batch * tokens + position
        left = tl.load(
            keys + (rows[None, :] * groups + group) * key_dim + in_key[:, None],
            mask=key_inside[:, None] & inside[None, :],
            other=0.0,
        )
        right = tl.load(
            values + (rows[:, None] * heads + head) * value_dim + in_value[None, :],
            mask=inside[:, None] & value_inside[None, :],
            other=0.0,
        )
        weights, keep = 1.0, 1.0
        if DECAY == "channels":
            begins = position < 0
            if SEGMENTS:
                begins = _begins(segments, rows, position, tokens)
            places = (rows[None, :] * groups + group) * key_dim + in_key[:, None]
            mask = key_inside[:, None] & inside[None, :]
            step = _channel_steps(log_decay, places, mask, begins[None, :])
            keep = tl.exp2(tl.sum(step, 1))[:, None]
            if not REVERSE:
                # What comes after each token, without what it would take to subtract the token's own.
                after = tl.arange(0, CHUNK) < CHUNK - 1
                if SEGMENTS:
                    begins = _begins(segments, rows + 1, position + 1, tokens)
                mask = key_inside[:, None] & ((position + 1 < tokens) & after)[None, :]
                step = _channel_steps(log_decay, places + groups * key_dim, mask, (begins & after)[None, :])
            weights = tl.exp2(tl.cumsum(step, 1, reverse=not REVERSE))
        elif WEIGHTED:
            whole, rest = _steps(log_decay, segments, rows, first, tokens, heads, head, DECAY, SEGMENTS, CHUNK)
            all_whole, all_rest = tl.sum(whole, 0), tl.sum(rest, 0)
            whole, rest = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
            if REVERSE:
                weights = _weights(whole, rest)[None, :]
            else:
                weights = _weights(all_whole - whole, all_rest - rest)[None, :]
            keep = _weights(all_whole, all_rest)
        state = _update(state, left, weights, right, keep, factor, EXACT, WEIGHTED)
    tl.store(final + row * size + inner, state, mask=inner_inside)


@triton.jit
def _sums(
    log_decay,
    segments,
    rows,
    first,
    tokens,
    heads,
    head,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Factors between the tokens of a chunk, `[CHUNK, CHUNK]`, and of what comes from outside of it, `[CHUNK]`.

    Reversed, from later tokens to earlier ones.
    """
    whole, rest = _steps(log_decay, segments, rows, first, tokens, heads, head, DECAY, SEGMENTS, CHUNK)
    all_whole, all_rest = tl.sum(whole, 0), tl.sum(rest, 0)
    whole, rest = tl.cumsum(whole, 0), tl.cumsum(rest, 0)
    if REVERSE:
        between = _weights(whole[None, :] - whole[:, None], rest[None, :] - rest[:, None])
        outside = _weights(all_whole - whole, all_rest - rest)
    else:
        between = _weights(whole[:, None] - whole[None, :], rest[:, None] - rest[None, :])
        outside = _weights(whole, rest)
    return between, outside


@triton.jit
def _channel_weights(
    log_decay,
    segments,
    rows,
    first,
    tokens,
    groups,
    group,
    key_dim,
    in_key,
    SEGMENTS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Factors of each channel from the beginning of a chunk to its tokens, reversed from those to its end."""
    order = tl.arange(0, CHUNK)
    if REVERSE:
        shift = 1
        used = order < CHUNK - 1
    else:
        shift = 0
        used = order < CHUNK
    rows, position = rows + shift, first + order + shift
    begins = position < 0
    if SEGMENTS:
        begins = _begins(segments, rows, position, tokens) & used
    mask = ((position < tokens) & used)[:, None] & (in_key < key_dim)[None, :]
    places = (rows[:, None] * groups + group) * key_dim + in_key[None, :]
    step = _channel_steps(log_decay, places, mask, begins[:, None])
    if REVERSE:
        return tl.exp2(tl.cumsum(step, 0, reverse=True))
    return tl.exp2(tl.cumsum(step, 0))


@triton.jit
def recurrence_output(
    left,
    right,
    values,
    log_decay,
    segments,
    states,
    pairs,
    out,
    tokens,
    groups,
    heads,
    key_dim,
    value_dim,
    scale,
    heads_each,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """`out_i = scale (sum_(j <= i) decay_ij (left_i right_j) values_j + decay_i left_i S)` for queries and keys.

    Reversed, for keys, queries and output gradients, with the sum over `j >= i`: the gradient of the values; there `S`
    is scaled already. A program takes a chunk and a slice of the values of `heads_each` heads of a group, whose
    products of queries and keys are the same. With a decay for each channel they come from `recurrence_scores`.
    """
    chunks = tl.cdiv(tokens, CHUNK)
    per_group = heads // groups
    parts = tl.cdiv(per_group, heads_each)
    chunk, place = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    part, group = place % parts, place // parts % groups
    batch = (place // (parts * groups)).to(tl.int64)
    first = chunk * CHUNK
    order = tl.arange(0, CHUNK)
    inside = first + order < tokens
    rows = batch * tokens + first + order
    in_value = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    value_inside = in_value < value_dim

    if DECAY == "channels":
        table = pairs + ((batch * groups + group) * chunks + chunk) * CHUNK * CHUNK
        if REVERSE:
            scores = tl.load(table + order[None, :] * CHUNK + order[:, None])
        else:
            scores = tl.load(table + order[:, None] * CHUNK + order[None, :])
    else:
        scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        for start in range(0, key_dim, BLOCK_K):
            in_key = start + tl.arange(0, BLOCK_K)
            key_inside = in_key < key_dim
            one = tl.load(
                left + (rows[:, None] * groups + group) * key_dim + in_key[None, :],
                mask=inside[:, None] & key_inside[None, :],
                other=0.0,
            )
            other = tl.load(
                right + (rows[None, :] * groups + group) * key_dim + in_key[:, None],
                mask=key_inside[:, None] & inside[None, :],
                other=0.0,
            )
            scores = tl.dot(one, other, scores, input_precision="ieee")
        visible = order[:, None] <= order[None, :] if REVERSE else order[:, None] >= order[None, :]
        scores = tl.where(visible, scores * scale, 0.0)

    first_head = group * per_group + part * heads_each
    for head in range(first_head, min(first_head + heads_each, (group + 1) * per_group)):
        given = tl.load(
            values + (rows[:, None] * heads + head) * value_dim + in_value[None, :],
            mask=inside[:, None] & value_inside[None, :],
            other=0.0,
        )
        found = tl.zeros([CHUNK, BLOCK_V], dtype=tl.float32)
        for start in range(0, key_dim, BLOCK_K):
            in_key = start + tl.arange(0, BLOCK_K)
            key_inside = in_key < key_dim
            one = tl.load(
                left + (rows[:, None] * groups + group) * key_dim + in_key[None, :],
                mask=inside[:, None] & key_inside[None, :],
                other=0.0,
            )
            state = tl.load(
                states
                + (((batch * heads + head) * chunks + chunk) * key_dim + in_key[:, None]) * value_dim
                + in_value[None, :],
                mask=key_inside[:, None] & value_inside[None, :],
                other=0.0,
            )
            if DECAY == "channels":
                outside = _channel_weights(
                    log_decay, segments, rows, first, tokens, groups, group, key_dim, in_key, SEGMENTS, REVERSE, CHUNK
                )
                one = (one.to(tl.float32) * outside).to(state.dtype)
            found = tl.dot(one, state, found, input_precision="ieee")
        if not REVERSE:
            found = found * scale
        weighted = scores
        if DECAY != "channels" and (DECAY != "none" or SEGMENTS):
            between, outside = _sums(
                log_decay, segments, rows, first, tokens, heads, head, DECAY, SEGMENTS, REVERSE, CHUNK
            )
            weighted = scores * between
            found = found * outside[:, None]
        found = tl.dot(weighted.to(given.dtype), given, found, input_precision="ieee")
        tl.store(
            out + (rows[:, None] * heads + head) * value_dim + in_value[None, :],
            found.to(out.dtype.element_ty),
            mask=inside[:, None] & value_inside[None, :],
        )


@triton.jit
def recurrence_backward(
    left,
    right,
    own,
    other,
    log_decay,
    segments,
    states,
    entering,
    grad,
    grad_decay,
    tokens,
    groups,
    heads,
    key_dim,
    value_dim,
    scale,
    heads_each,
    DECAY: tl.constexpr,
    SEGMENTS: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradient of the queries (`own`), or reversed that of the keys, summed over `heads_each` heads of a group.

    `left` and `right` are output gradients and values, reversed values and output gradients, and `other` are the keys,
    reversed the queries: `grad_i = scale (sum_(j <= i) decay_ij (left_i right_j) other_j + decay_i left_i S^T)`.
    Programs of one group write to different parts of `grad [parts, batch, tokens, groups, key_dim]`.

    Its share of the gradient of the decay goes to `grad_decay [slices of key_dim, batch, tokens, heads]`: what passes
    a token from earlier ones in the chunk, or from before it, to it or later ones, and reversed, what passes to the
    state that leaves the chunk; `entering` is the state that enters it.
    """
    chunks = tl.cdiv(tokens, CHUNK)
    per_group = heads // groups
    parts = tl.cdiv(per_group, heads_each)
    chunk, place = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    part, group = place % parts, place // parts % groups
    batch = (place // (parts * groups)).to(tl.int64)
    first = chunk * CHUNK
    order = tl.arange(0, CHUNK)
    inside = first + order < tokens
    rows = batch * tokens + first + order
    in_key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    key_inside = in_key < key_dim
    visible = order[:, None] <= order[None, :] if REVERSE else order[:, None] >= order[None, :]
    key_places = (rows[:, None] * groups + group) * key_dim + in_key[None, :]
    key_mask = inside[:, None] & key_inside[None, :]

    if DECAY_GRADIENT:
        mine = tl.load(own + key_places, mask=key_mask, other=0.0)
        if not REVERSE:
            theirs = tl.load(
                other + (rows[None, :] * groups + group) * key_dim + in_key[:, None],
                mask=key_inside[:, None] & inside[None, :],
                other=0.0,
            )
            products = tl.dot(mine, theirs, input_precision="ieee")
            # A token's own product passes no decay.
            products = tl.where(order[:, None] > order[None, :], products, 0.0)

    found = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    shared = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    first_head = group * per_group + part * heads_each
    for head in range(first_head, min(first_head + heads_each, (group + 1) * per_group)):
        scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
        through = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
        overlap = tl.zeros([BLOCK_V], dtype=tl.float32)
        for start in range(0, value_dim, BLOCK_V):
            in_value = start + tl.arange(0, BLOCK_V)
            value_inside = in_value < value_dim
            one = tl.load(
                left + (rows[:, None] * heads + head) * value_dim + in_value[None, :],
                mask=inside[:, None] & value_inside[None, :],
                other=0.0,
            )
            two = tl.load(
                right + (rows[None, :] * heads + head) * value_dim + in_value[:, None],
                mask=value_inside[:, None] & inside[None, :],
                other=0.0,
            )
            state_places = ((batch * heads + head) * chunks + chunk) * key_dim * value_dim + (
                in_key[None, :] * value_dim + in_value[:, None]
            )
            state_mask = value_inside[:, None] & key_inside[None, :]
            state = tl.load(states + state_places, mask=state_mask, other=0.0)
            scores = tl.dot(one, two, scores, input_precision="ieee")
            through = tl.dot(one, state, through, input_precision="ieee")
            if DECAY_GRADIENT and REVERSE:
                before = tl.load(entering + state_places, mask=state_mask, other=0.0).to(tl.float32)
                overlap += tl.sum(before * state.to(tl.float32), 1)
        scores = tl.where(visible, scores * scale, 0.0)
        if not REVERSE:
            through = through * scale
        if DECAY != "none" or SEGMENTS:
            between, outside = _sums(
                log_decay, segments, rows, first, tokens, heads, head, DECAY, SEGMENTS, REVERSE, CHUNK
            )
            scores = scores * between
            through = through * outside[:, None]
        if DECAY_GRADIENT:
            whole, rest = _steps(log_decay, segments, rows, first, tokens, heads, head, DECAY, SEGMENTS, CHUNK)
            passing = tl.sum(mine.to(tl.float32) * through, 1)
            if REVERSE:
                kept = _weights(tl.sum(whole, 0), tl.sum(rest, 0)) * tl.sum(overlap, 0)
                passed = tl.cumsum(passing, 0) - passing + kept
            else:
                # Summed as they stand, for the difference of sums over rows and columns would cost digits.
                pairs = scores * products
                earlier = tl.where(visible, tl.cumsum(pairs, 1) - pairs, 0.0)
                passed = tl.cumsum(passing, 0, reverse=True) + tl.sum(earlier, 0)
            # The reset of a token takes what would pass it, and a decay above one counts as one.
            if DECAY == "heads":
                raw = tl.zeros([CHUNK], dtype=tl.float32) + tl.load(log_decay + head).to(tl.float32)
            else:
                raw = tl.load(log_decay + rows * heads + head, mask=inside, other=0.0).to(tl.float32)
            passed = tl.where((raw <= 0.0) & (whole > RESET), passed, 0.0)
            slot = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // (chunks * parts * groups))
            tl.store(grad_decay + (slot * tokens + rows) * heads + head, passed, mask=inside)
        shared += scores
        found += through
    given = tl.load(other + key_places, mask=key_mask, other=0.0)
    found = tl.dot(shared.to(given.dtype), given, found, input_precision="ieee")
    batches = tl.num_programs(0) // (chunks * parts * groups)
    slot = (part.to(tl.int64) * batches * tokens) * groups * key_dim
    tl.store(grad + slot + key_places, found.to(grad.dtype.element_ty), mask=key_mask)


@triton.jit
def _crossed(row, column, half):
    """Whether the decay of token `column` lies between token `row` and the middle of its block of `2 half` tokens."""
    middle = row // (2 * half) * (2 * half) + half
    return tl.where(row >= middle, (column >= middle) & (column <= row), (column > row) & (column < middle))


@triton.jit
def _across(row, column, half):
    """Whether two tokens are in one block of `2 half` tokens, `row` in its second and `column` in its first half."""
    same = row // (2 * half) == column // (2 * half)
    return same & (row // half % 2 == 1) & (column // half % 2 == 0)


@triton.jit
def _sum_of(first, second):
    """A product of which one operand is zeros and ones in half precision, and the other is in float32.

    In half precision 16 of its digits count, more than of what the power of two of the product multiplies.
    """
    if first.dtype == second.dtype:
        return tl.dot(first, second, input_precision="ieee")
    if first.dtype == tl.float32:
        high = first.to(second.dtype)
        low = (first - high.to(tl.float32)).to(second.dtype)
        return tl.dot(low, second, tl.dot(high, second))
    high = second.to(first.dtype)
    low = (second - high.to(tl.float32)).to(first.dtype)
    return tl.dot(first, low, tl.dot(first, high))


@triton.jit
def recurrence_scores(
    queries,
    keys,
    log_decay,
    segments,
    pairs,
    tokens,
    groups,
    heads,
    key_dim,
    value_dim,
    scale,
    SEGMENTS: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`scale sum_d q_id k_jd decay_ijd` for `j <= i` in a chunk, zero for others: `pairs [batch, groups, chunks, ...]`.

    By halves: from the first half of a block of tokens to the second, a pair's decay is that from the first token to
    the middle times that from the middle to the second. Neither is above 1, so none overflows, whatever the decays.
    """
    chunks = tl.cdiv(tokens, CHUNK)
    chunk, place = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    group = place % groups
    batch = (place // groups).to(tl.int64)
    order = tl.arange(0, CHUNK)
    position = chunk * CHUNK + order
    inside = position < tokens
    rows = batch * tokens + position
    begins = position < 0
    if SEGMENTS:
        begins = _begins(segments, rows, position, tokens)
    own_place = ((batch * tokens + chunk * CHUNK) * groups + group) * key_dim
    queries, keys, log_decay = queries + own_place, keys + own_place, log_decay + own_place
    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    # Hoisting what does not change would spill registers.
    for start in tl.range(0, key_dim, BLOCK_K, disable_licm=True):
        in_key = start + tl.arange(0, BLOCK_K)
        key_inside = in_key < key_dim
        places = order[:, None] * (groups * key_dim) + in_key[None, :]
        mask = inside[:, None] & key_inside[None, :]
        turned = order[None, :] * (groups * key_dim) + in_key[:, None]
        turned_mask = key_inside[:, None] & inside[None, :]
        query = tl.load(queries + places, mask=mask, other=0.0)
        key = tl.load(keys + turned, mask=turned_mask, other=0.0)
        step = _channel_steps(log_decay, places, mask, begins[:, None])
        turned_step = _channel_steps(log_decay, turned, turned_mask, begins[None, :])
        own = tl.dot(query, key, input_precision="ieee")
        scores += tl.where(order[:, None] == order[None, :], own, 0.0)
        for level in range(LEVELS):
            half = (CHUNK // 2) >> level
            crossed = _crossed(order[:, None], order[None, :], half).to(query.dtype)
            turned_crossed = _crossed(order[None, :], order[:, None], half).to(query.dtype)
            one = query.to(tl.float32) * tl.exp2(_sum_of(crossed, step))
            other = key.to(tl.float32) * tl.exp2(_sum_of(turned_step, turned_crossed))
            # Zeros for what the mask below takes out: on sm_80 registers would spill without them.
            one = tl.where((order // half % 2 == 1)[:, None], one, 0.0)
            other = tl.where((order // half % 2 == 0)[None, :], other, 0.0)
            found = tl.dot(one.to(query.dtype), other.to(query.dtype), input_precision="ieee")
            scores += tl.where(_across(order[:, None], order[None, :], half), found, 0.0)
    table = pairs + ((batch * groups + group) * chunks + chunk) * CHUNK * CHUNK
    tl.store(table + order[:, None] * CHUNK + order[None, :], (scores * scale).to(pairs.dtype.element_ty))


@triton.jit
def recurrence_channels_backward(
    queries,
    keys,
    values,
    grad,
    log_decay,
    segments,
    states,
    leaving,
    grad_queries,
    grad_keys,
    grad_decay,
    tokens,
    groups,
    heads,
    key_dim,
    value_dim,
    scale,
    SEGMENTS: tl.constexpr,
    DECAY_GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The gradients of queries, keys and decays where each channel has its own, for a chunk and a slice of channels.

    With `P = scale sum_heads grad v^T` the gradient of a pair's score, the halves of `recurrence_scores` again:
    queries behind the middle of a block get `P` times the keys before it, each with its decay to the middle, and keys
    the other way round. A decay gets what passes it: a sum of positive and negative numbers, but of no differences.
    """
    chunks = tl.cdiv(tokens, CHUNK)
    chunk, place = tl.program_id(0) % chunks, tl.program_id(0) // chunks
    group = place % groups
    batch = (place // groups).to(tl.int64)
    per_group = heads // groups
    order = tl.arange(0, CHUNK)
    first = chunk * CHUNK
    position = first + order
    inside = position < tokens
    rows = batch * tokens + position
    begins = position < 0
    if SEGMENTS:
        begins = _begins(segments, rows, position, tokens)
    in_key = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    key_inside = in_key < key_dim

    scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    turned_scores = tl.zeros([CHUNK, CHUNK], dtype=tl.float32)
    grad_query = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    grad_key = tl.zeros([CHUNK, BLOCK_K], dtype=tl.float32)
    overlap = tl.zeros([BLOCK_K], dtype=tl.float32)
    for head in range(group * per_group, (group + 1) * per_group):
        for start in range(0, value_dim, BLOCK_V):
            in_value = start + tl.arange(0, BLOCK_V)
            value_inside = in_value < value_dim
            places = (rows[:, None] * heads + head) * value_dim + in_value[None, :]
            mask = inside[:, None] & value_inside[None, :]
            turned = (rows[None, :] * heads + head) * value_dim + in_value[:, None]
            turned_mask = value_inside[:, None] & inside[None, :]
            given, value = tl.load(grad + places, mask=mask, other=0.0), tl.load(values + places, mask=mask, other=0.0)
            turned_value = tl.load(values + turned, mask=turned_mask, other=0.0)
            turned_given = tl.load(grad + turned, mask=turned_mask, other=0.0)
            state_places = ((batch * heads + head) * chunks + chunk) * key_dim * value_dim + (
                in_key[None, :] * value_dim + in_value[:, None]
            )
            state_mask = value_inside[:, None] & key_inside[None, :]
            state = tl.load(states + state_places, mask=state_mask, other=0.0)
            after = tl.load(leaving + state_places, mask=state_mask, other=0.0)
            scores = tl.dot(given, turned_value, scores, input_precision="ieee")
            turned_scores = tl.dot(value, turned_given, turned_scores, input_precision="ieee")
            grad_query = tl.dot(given, state, grad_query, input_precision="ieee")
            grad_key = tl.dot(value, after, grad_key, input_precision="ieee")
            overlap += tl.sum(state.to(tl.float32) * after.to(tl.float32), 0)

    places = (rows[:, None] * groups + group) * key_dim + in_key[None, :]
    mask = inside[:, None] & key_inside[None, :]
    query = tl.load(queries + places, mask=mask, other=0.0)
    key = tl.load(keys + places, mask=mask, other=0.0)
    step = _channel_steps(log_decay, places, mask, begins[:, None])
    grad_query = grad_query * tl.exp2(tl.cumsum(step, 0)) * scale
    grad_key = grad_key * _channel_weights(
        log_decay, segments, rows, first, tokens, groups, group, key_dim, in_key, SEGMENTS, BACKWARDS, CHUNK
    )
    if DECAY_GRADIENT:
        leaves = key.to(tl.float32) * grad_key
        passed = tl.cumsum(query.to(tl.float32) * grad_query, 0, reverse=True) + tl.cumsum(leaves, 0) - leaves
        passed += (tl.exp2(tl.sum(step, 0)) * overlap)[None, :]
    scores, turned_scores = scores * scale, turned_scores * scale
    own = tl.expand_dims(tl.sum(tl.where(order[:, None] == order[None, :], scores, 0.0), 1), 1)
    grad_query += own * key.to(tl.float32)
    grad_key += own * query.to(tl.float32)
    for level in range(LEVELS):
        half = (CHUNK // 2) >> level
        crossed = _crossed(order[:, None], order[None, :], half).to(query.dtype)
        factor = tl.exp2(_sum_of(crossed, step))
        across = _across(order[:, None], order[None, :], half)
        turned_across = _across(order[None, :], order[:, None], half)
        one = tl.where(across, scores, 0.0).to(query.dtype)
        other = tl.where(turned_across, turned_scores, 0.0).to(query.dtype)
        to_query = factor * tl.dot(one, (key.to(tl.float32) * factor).to(query.dtype), input_precision="ieee")
        to_key = factor * tl.dot(other, (query.to(tl.float32) * factor).to(query.dtype), input_precision="ieee")
        grad_query += to_query
        grad_key += to_key
        if DECAY_GRADIENT:
            through = query.to(tl.float32) * to_query + key.to(tl.float32) * to_key
            passing = _crossed(order[None, :], order[:, None], half).to(query.dtype)
            passed += tl.dot(passing, through.to(query.dtype), input_precision="ieee")
    tl.store(grad_queries + places, grad_query.to(grad_queries.dtype.element_ty), mask=mask)
    tl.store(grad_keys + places, grad_key.to(grad_keys.dtype.element_ty), mask=mask)
    if DECAY_GRADIENT:
        raw = tl.load(log_decay + places, mask=mask, other=0.0).to(tl.float32)
        passed = tl.where((raw <= 0.0) & (step > RESET), passed, 0.0)
        tl.store(grad_decay + places, passed.to(grad_decay.dtype.element_ty), mask=mask)
