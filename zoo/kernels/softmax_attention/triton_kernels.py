"""Kernels of attention: scores in units of log2, rows of queries against tiles of keys.

With a dilation of `step` each program serves one residue class of positions, in which positions are `step` apart:
`tile`, `row` and `key` count within the class. A row of queries is at the coordinate `row + shift`, in which key 0 has
0. Visits to tiles of which every pair is visible skip the mask, if there may be such tiles (`WHOLE`); `_key_tiles` and
`_query_tiles` tell which those are. In float32 products take so long that masks do not count: every visit has one.
"""

# Parameters that are declared as constants of compilation are given plain values, and what is None is compiled out.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportOptionalOperand=false
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
HIDDEN = tl.constexpr(-1e30)
"""Where running maxima start, and the log-sum-exp of rows that see no key."""


@triton.jit
def _tanh(x, EXACT: tl.constexpr):
    """`tanh(x)` with an error of a few roundings of 1, or if `EXACT` of the result."""
    found = 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))
    if EXACT:
        square = x * x
        series = 0.0210432713 + square * -0.00616372234
        series = 0.133328348 + square * (-0.0538606780 + square * series)
        series = -0.333333296 + square * series
        found = tl.where(square < 0.36, x + x * square * series, found)
    return found


@triton.jit
def _score(product, distance, slope, table, distances, center, query_decay, key_decay, scale, cap, EXACT: tl.constexpr):
    """Scores in units of log2, and the tanh of a soft cap, from the products of queries and keys."""
    bend = product
    if cap is not None:
        bend = _tanh(product * scale, EXACT)
        score = bend * cap
    else:
        score = product * scale
    if slope is not None:
        score -= slope * tl.abs(distance).to(tl.float32)
    if table is not None:
        entry = tl.minimum(tl.maximum(distance + center, 0), distances - 1)
        score += tl.load(table + entry).to(tl.float32) * LOG2E
    if query_decay is not None:
        score += (query_decay - key_decay).to(tl.float32)
    return score, bend


@triton.jit
def _visible(distance, key, limit, window, prefix_end, query_segment, key_segment, CAUSAL: tl.constexpr):
    """Which keys, all in front of `limit`, are visible; distances in the units of `window`."""
    visible = key < limit
    if CAUSAL or window is not None:
        if not CAUSAL:
            near = tl.abs(distance) < window
        elif window is not None:
            near = (distance >= 0) & (distance < window)
        else:
            near = distance >= 0
        if prefix_end is not None:
            near = near | (key < prefix_end)
        visible = visible & near
    if query_segment is not None:
        visible = visible & (query_segment == key_segment)
    return visible


@triton.jit
def _key_tiles(first, last, limit, window, prefix_end, CAUSAL: tl.constexpr, SIZE: tl.constexpr):
    """Tiles of keys for queries at `first` to `last`: partly visible below `before`, from `start` to `full` and from
    `rest` to `end`, wholly visible from `full` to `rest`.
    """
    near_start, near_full = 0, 0
    near_end, near_rest = limit, limit
    if CAUSAL:
        near_end, near_rest = tl.minimum(limit, last + 1), tl.minimum(limit, first + 1)
    elif window is not None:
        near_end, near_rest = tl.minimum(limit, last + window), tl.minimum(limit, first + window)
    if window is not None:
        near_start, near_full = tl.maximum(0, first - window + 1), tl.maximum(0, last - window + 1)
    if prefix_end is not None:
        near_end = tl.maximum(near_end, prefix_end)
        if window is None:
            near_rest = tl.maximum(near_rest, prefix_end)
    near_end = tl.maximum(near_end, 0)
    end = (near_end + SIZE - 1) // SIZE
    start = tl.minimum(near_start, near_end) // SIZE
    full = tl.minimum(tl.maximum((near_full + SIZE - 1) // SIZE, start), end)
    rest = tl.minimum(tl.maximum(tl.maximum(near_rest, 0) // SIZE, full), end)
    before = start * 0
    if prefix_end is not None and window is not None:
        before = tl.minimum((prefix_end + SIZE - 1) // SIZE, start)
    return before, start, full, rest, end


@triton.jit
def _query_tiles(
    first, tokens, shift, limit, window, prefix_end, CAUSAL: tl.constexpr, KEYS: tl.constexpr, SIZE: tl.constexpr
):
    """Tiles of queries for the `KEYS` keys from `first`: partly visible from `start` to `full` and from `rest` to
    `end`, wholly visible from `full` to `rest`.
    """
    last = first + KEYS - 1
    near_start, near_full = shift, shift
    near_end, near_rest = tokens + shift, tokens + shift
    if CAUSAL:
        near_start, near_full = first, last
    elif window is not None:
        near_start, near_full = first - window + 1, last - window + 1
    if window is not None:
        near_end, near_rest = last + window, first + window
    if prefix_end is not None:
        reached, covered = first < prefix_end, last < prefix_end
        near_start = tl.where(reached, shift, near_start)
        near_end = tl.where(reached, tokens + shift, near_end)
        near_full = tl.where(covered, shift, near_full)
        near_rest = tl.where(covered, tokens + shift, near_rest)
    near_rest = tl.where(last < limit, near_rest, shift)
    near_end = tl.where(first < limit, near_end, shift)
    near_start = tl.minimum(tl.maximum(near_start - shift, 0), tokens)
    near_end = tl.maximum(tl.minimum(near_end - shift, tokens), near_start)
    near_full = tl.maximum(near_full - shift, 0)
    near_rest = tl.minimum(tl.maximum(near_rest - shift, 0), tokens)
    start, end = near_start // SIZE, (near_end + SIZE - 1) // SIZE
    full = tl.minimum(tl.maximum((near_full + SIZE - 1) // SIZE, start), end)
    rest = tl.minimum(tl.maximum(near_rest // SIZE, full), end)
    return start, full, rest, end


@triton.jit
def _edge(n, before, start, full, rest):
    """The `n`-th of the partly visible tiles."""
    n = tl.full([], n, tl.int32)
    later = n - before
    return tl.where(n < before, n, tl.where(later < full - start, later + start, later - (full - start) + rest))


@triton.jit
def _visited(n, listed, before, start, full, rest, MASKED: tl.constexpr):
    """The `n`-th of the partly visible tiles if `MASKED`, else of the wholly visible ones."""
    if listed is not None:
        return tl.load(listed + (rest if MASKED else full) + n)
    if MASKED:
        return _edge(n, before, start, full, rest)
    return full + n


@triton.jit
def _rows(pointer, row, stride, column, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """A tile of rows; `column` is zero beyond `WIDTH`, rows are zero where not `inside`."""
    pointers = pointer + row.to(tl.int64) * stride + column
    if MASKED:
        if WIDTH == BLOCK:
            return tl.load(pointers, mask=inside, other=0.0)
        return tl.load(pointers, mask=inside & (column < WIDTH), other=0.0)
    if WIDTH == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=column < WIDTH, other=0.0)


@triton.jit
def _residue_class(tokens, keys, step, ahead):
    """Tile and residue of this program; first query, number of queries and keys, and shift of its residue class."""
    program = tl.program_id(0)
    residue = program % step
    first = (residue + ahead) % step
    own_tokens, own_keys = (tokens - first + step - 1) // step, (keys - residue + step - 1) // step
    return program // step, residue, first, own_tokens, own_keys, (first + keys - tokens - residue) // step


@triton.jit
def _apart(stride, step):
    """How far apart tokens of a residue class are in memory, in 64 bits."""
    return tl.full([], stride, tl.int64) * step


@triton.jit
def _below(ends, batch, residue, step, most):
    """How many keys of the residue class are in front of the row's entry of `ends`, at most `most`."""
    end = tl.load(ends + batch).to(tl.int32)
    return tl.minimum((tl.maximum(end, 0) - residue + step - 1) // step, most)


@triton.jit
def _gates(decay, index, inside, origin, EXACT: tl.constexpr):
    """Sums of log gates relative to `origin`, in float32 after a difference in float64, which loses nothing.

    If `EXACT` they stay in float64, for each pair's difference to be rounded alike in every kernel.
    """
    sums = tl.load(decay + index, mask=inside, other=0.0) - origin
    return sums if EXACT else sums.to(tl.float32)


@triton.jit
def _sum(values, EXACT: tl.constexpr):
    """Sums of rows for the gradients of gates, which add up over the tokens, with what they lost."""
    return tl.sum(values.to(tl.float64) if EXACT else values, 1)


@triton.jit
def _attend(
    total, most, mass, query, tile, k, v, segments, slope, table, decay, query_index, query_segment, query_decay,
    origin, k_stride, v_stride, step, limit, window, prefix_end, distances, center, scale, cap, spread, floor,
    SUMS: tl.constexpr, VALUES: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Take a tile of keys into running maximum and mass if `SUMS`, and into the total if `VALUES`.

    Without `SUMS`, `most` is the log-sum-exp of the rows, and the weights are the clipped ones.
    """
    EXACT: tl.constexpr = query.dtype == tl.float32
    start, lane = tl.full([], tile, tl.int64) * BLOCK_N, tl.arange(0, BLOCK_N)
    key = start.to(tl.int32) + lane
    inside = key < limit
    near = _rows(
        k + start * k_stride, lane[None, :], k_stride, tl.arange(0, BLOCK_D)[:, None], inside[None, :],
        HEAD_DIM, BLOCK_D, MASKED,
    )  # fmt: skip
    product = tl.dot(query, near, input_precision="ieee")
    distance = query_index[:, None] - key[None, :]
    key_decay, key_segment = None, None
    if decay is not None:
        key_decay = _gates(decay, ((start + lane) * step)[None, :], inside[None, :], origin, EXACT)
    score, _ = _score(
        product, distance * step, slope, table, distances, center, query_decay, key_decay, scale, cap, EXACT
    )  # fmt: skip
    if MASKED:
        if segments is not None:
            key_segment = tl.load(segments + (start + lane) * step, mask=inside, other=0)[None, :]
        visible = _visible(distance, key[None, :], limit, window, prefix_end, query_segment, key_segment, CAUSAL)
        score = tl.where(visible, score, float("-inf"))
    if SUMS:
        higher = tl.maximum(most, tl.max(score, 1))
        shrink = tl.exp2(most - higher)
        weight = tl.exp2(score - higher[:, None])
        mass = mass * shrink + tl.sum(weight, 1)
        most = higher
        if VALUES:
            total = total * shrink[:, None]
    else:
        weight = tl.exp2(score - most[:, None]) * spread + floor
        weight = tl.minimum(tl.maximum(weight, 0.0), 1.0)
    if VALUES:
        value = _rows(
            v + start * v_stride, lane[:, None], v_stride, tl.arange(0, BLOCK_V)[None, :], inside[:, None],
            VALUE_DIM, BLOCK_V, MASKED,
        )  # fmt: skip
        total = tl.dot(weight.to(value.dtype), value, total, input_precision="ieee")
    return total, most, mass


@triton.jit
def attention_forward(
    q, k, v, out, log_sum, segments, key_length, prefix, slopes, bias, decay, sink, listed, counts,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, list_batch, list_head, list_width,
    tokens, keys, group, step, ahead, window, distances, center, scale, cap, spread, floor,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile of queries of one head against all keys that it sees; the log-sum-exp, in log2, is for what comes after.

    The tiles of keys follow from the pattern, or are listed: those wholly visible, then those partly.
    """
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, residue, first, tokens_here, keys_here, shift = _residue_class(tokens, keys, step, ahead)
    q_row, k_row, v_row = _apart(q_token, step), _apart(k_token, step), _apart(v_token, step)
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    limit, prefix_end = keys_here, None
    if key_length is not None:
        limit = _below(key_length, batch, residue, step, keys_here)
    if prefix is not None:
        prefix_end = _below(prefix, batch, residue, step, limit)
    start, lane = tile.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    row = start.to(tl.int32) + lane
    inside = row < tokens_here
    query_index = row + shift
    k += batch * k_batch + (head // group).to(tl.int64) * k_head + residue.to(tl.int64) * k_token
    v += batch * v_batch + (head // group).to(tl.int64) * v_head + residue.to(tl.int64) * v_token
    q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_token + start * q_row
    query = _rows(q, lane[:, None], q_row, tl.arange(0, BLOCK_D)[None, :], inside[:, None], HEAD_DIM, BLOCK_D, True)
    slope, table, query_segment, query_decay, origin = None, None, None, None, None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * LOG2E
    if bias is not None:
        table = bias + head.to(tl.int64) * distances
    if segments is not None:
        segments += batch * keys + residue
        query_segment = tl.load(segments + query_index * step, mask=inside, other=0)[:, None]
    if decay is not None:
        decay += (batch * heads + head) * keys + residue
        origin = tl.load(decay + (start + shift) * step, mask=start < tokens_here, other=0.0)
        query_decay = _gates(decay, query_index * step, inside, origin, EXACT)[:, None]
    LISTED: tl.constexpr = listed is not None
    WHOLE: tl.constexpr = not EXACT and (LISTED or segments is None)
    FIRST: tl.constexpr = 0 if WHOLE else 1
    if LISTED:
        at = batch * list_batch + head * list_head + tile
        listed += at * list_width
        before, begin, full, rest = 0, 0, 0, 0
        if WHOLE:
            rest = tl.load(counts + 2 * at)
        edges = tl.load(counts + 2 * at + 1) - rest
    else:
        last = tl.minimum(start.to(tl.int32) + BLOCK_M, tokens_here) - 1 + shift
        before, begin, full, rest, end = _key_tiles(
            start.to(tl.int32) + shift, last, limit, window, prefix_end, CAUSAL, BLOCK_N
        )
        if not WHOLE:
            full, rest = begin, begin
        edges = before + (full - begin) + (end - rest)

    total = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    most = tl.full([BLOCK_M], HIDDEN, tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    PLAIN: tl.constexpr = spread is None
    for MASKED in tl.static_range(FIRST, 2):
        for n in range(edges if MASKED else rest - full):
            visited = _visited(n, listed, before, begin, full, rest, MASKED)
            total, most, mass = _attend(
                total, most, mass, query, visited, k, v, segments, slope, table, decay, query_index, query_segment,
                query_decay, origin, k_row, v_row, step, limit, window, prefix_end, distances, center,
                scale, cap, spread, floor,
                True, PLAIN, MASKED, CAUSAL, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N,
            )  # fmt: skip

    if sink is not None:
        logit = tl.load(sink + head).to(tl.float32) * LOG2E
        higher = tl.maximum(most, logit)
        shrink = tl.exp2(most - higher)
        mass = mass * shrink + tl.exp2(logit - higher)
        total = total * shrink[:, None]
        most = higher
    unseen = mass == 0.0
    mass = tl.where(unseen, 1.0, mass)
    sums = tl.where(unseen, HIDDEN, most + tl.log2(mass))
    tl.store(log_sum + (batch * heads + head) * tokens + first + row * step, sums, mask=inside)
    if PLAIN:
        total = total / mass[:, None]
    else:
        for MASKED in tl.static_range(FIRST, 2):
            for n in range(edges if MASKED else rest - full):
                visited = _visited(n, listed, before, begin, full, rest, MASKED)
                total, _, _ = _attend(
                    total, sums, mass, query, visited, k, v, segments, slope, table, decay, query_index, query_segment,
                    query_decay, origin, k_row, v_row, step, limit, window, prefix_end, distances,
                    center, scale, cap, spread, floor,
                    False, True, MASKED, CAUSAL, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N,
                )  # fmt: skip
    column = tl.arange(0, BLOCK_V)
    index = (batch * tokens + first + (start + lane) * step) * heads + head
    tl.store(
        out + index[:, None] * VALUE_DIM + column[None, :],
        total.to(out.dtype.element_ty),
        mask=inside[:, None] & (column < VALUE_DIM)[None, :],
    )


@triton.jit
def _clipped(weight, given, spread, floor):
    """The clipped weights and the gradient of the weights before the clip."""
    raised = weight * spread + floor
    kept = (raised >= 0.0) & (raised <= 1.0)
    return tl.minimum(tl.maximum(raised, 0.0), 1.0), tl.where(kept, given * spread, 0.0)


@triton.jit
def _descend(
    grad_query, delta, slope_sum, gate_sum, low_sum, high_sum, query, given, log_sum, tile, k, v, segments, slope,
    table, decay, query_index, query_segment, query_decay, origin, rows_inside, share, k_stride, v_stride, step, limit,
    window, prefix_end, distances, center, scale, cap, spread, floor,
    DELTA: tl.constexpr, SLOPES: tl.constexpr, GATES: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr,
    HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add what a tile of keys means for the gradients of the queries; `DELTA`: only for `sum(weight * gradient)`."""
    EXACT: tl.constexpr = query.dtype == tl.float32
    start, lane = tl.full([], tile, tl.int64) * BLOCK_N, tl.arange(0, BLOCK_N)
    key = start.to(tl.int32) + lane
    inside = key < limit
    near = _rows(
        k + start * k_stride, lane[None, :], k_stride, tl.arange(0, BLOCK_D)[:, None], inside[None, :],
        HEAD_DIM, BLOCK_D, MASKED,
    )  # fmt: skip
    value = _rows(
        v + start * v_stride, lane[None, :], v_stride, tl.arange(0, BLOCK_V)[:, None], inside[None, :],
        VALUE_DIM, BLOCK_V, MASKED,
    )  # fmt: skip
    product = tl.dot(query, near, input_precision="ieee")
    grad_weight = tl.dot(given, value, input_precision="ieee")
    distance = query_index[:, None] - key[None, :]
    key_decay, key_segment = None, None
    if decay is not None:
        key_decay = _gates(decay, (start + lane) * step, inside, origin, EXACT)[None, :]
    score, bend = _score(
        product, distance * step, slope, table, distances, center, query_decay, key_decay, scale, cap, EXACT
    )  # fmt: skip
    if MASKED:
        if segments is not None:
            key_segment = tl.load(segments + (start + lane) * step, mask=inside, other=0)[None, :]
        visible = _visible(distance, key[None, :], limit, window, prefix_end, query_segment, key_segment, CAUSAL)
        score = tl.where(visible, score, float("-inf"))
    weight = tl.exp2(score - log_sum[:, None])
    if spread is not None:
        _, grad_weight = _clipped(weight, grad_weight, spread, floor)
    if DELTA:
        delta += tl.sum(weight * grad_weight, 1)
    else:
        change = weight * (grad_weight - delta[:, None])
        if SLOPES:
            slope_sum -= tl.sum(change * tl.abs(distance * step).to(tl.float32), 1)
        if GATES:
            gate_sum += _sum(change, EXACT)
        if share is not None:
            low_sum, high_sum = _diagonals(
                tl.where(rows_inside[:, None], change, 0.0), low_sum, high_sum, share,
                tl.min(query_index, 0) - start.to(tl.int32), step, distances, center, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        if cap is not None:
            change = change * (1.0 - bend * bend)
        grad_query = tl.dot(change.to(near.dtype), tl.trans(near), grad_query, input_precision="ieee")
    return grad_query, delta, slope_sum, gate_sum, low_sum, high_sum


@triton.jit
def _diagonals(
    change, low_sum, high_sum, share, apart, step, distances, center, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Add the sums along a tile's diagonals to their entries of `share`; the first and the last are kept aside.

    Turning each row brings the diagonals `c` and `c` plus multiples of the width into column `c`.
    """
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_N)[None, :]
    turned = tl.gather(change, (row - column + BLOCK_N) % BLOCK_N, 1)
    for part in tl.static_range((BLOCK_M + BLOCK_N - 1) // BLOCK_N + 1):
        sums = tl.sum(tl.where((row - column + BLOCK_N) // BLOCK_N == part, turned, 0.0), 0)
        entry = (apart + tl.arange(0, BLOCK_N) + (part - 1) * BLOCK_N) * step + center
        between = (entry > 0) & (entry < distances - 1)
        low_sum += tl.where(entry <= 0, sums, 0.0)
        high_sum += tl.where((entry > 0) & (entry >= distances - 1), sums, 0.0)
        found = tl.load(share + entry, mask=between, other=0.0, volatile=True)
        # Another thread may be the next to touch an entry.
        tl.debug_barrier()
        tl.store(share + entry, found + sums, mask=between)
        tl.debug_barrier()
    return low_sum, high_sum


@triton.jit
def attention_backward_queries(
    q, k, v, out, grad_out, log_sum, grad_log_sum, delta, grad_q, grad_slopes, grad_bias, grad_decay,
    segments, key_length, prefix, slopes, bias, decay, listed, counts,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, list_batch, list_head, list_width,
    tokens, keys, group, step, ahead, window, distances, center, scale, factor, cap, spread, floor,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of a tile of queries, its rows' shares of those of slopes, bias and gates, and `delta`.

    `delta` is `sum_j weight_j grad_weight_j` less the gradient of the log-sum-exp, so that a score's gradient is
    `weight (grad_weight - delta)`.
    """
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, residue, first, tokens_here, keys_here, shift = _residue_class(tokens, keys, step, ahead)
    q_row, k_row, v_row = _apart(q_token, step), _apart(k_token, step), _apart(v_token, step)
    head, heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    limit, prefix_end = keys_here, None
    if key_length is not None:
        limit = _below(key_length, batch, residue, step, keys_here)
    if prefix is not None:
        prefix_end = _below(prefix, batch, residue, step, limit)
    start, lane = tile.to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    row = start.to(tl.int32) + lane
    inside = row < tokens_here
    query_index = row + shift
    k += batch * k_batch + (head // group).to(tl.int64) * k_head + residue.to(tl.int64) * k_token
    v += batch * v_batch + (head // group).to(tl.int64) * v_head + residue.to(tl.int64) * v_token
    q += batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_token + start * q_row
    query = _rows(q, lane[:, None], q_row, tl.arange(0, BLOCK_D)[None, :], inside[:, None], HEAD_DIM, BLOCK_D, True)
    index = (batch * tokens + first + (start + lane) * step) * heads + head
    given = _rows(
        grad_out, index[:, None], VALUE_DIM, tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, True
    )
    line = (batch * heads + head) * tokens + first + row * step
    sums = tl.load(log_sum + line, mask=inside, other=0.0)
    slope, table, query_segment, query_decay, origin, share = None, None, None, None, None, None
    if slopes is not None:
        slope = tl.load(slopes + head).to(tl.float32) * LOG2E
    if bias is not None:
        table = bias + head.to(tl.int64) * distances
    if grad_bias is not None:
        share = grad_bias + ((batch * heads + head) * tl.num_programs(0) + tl.program_id(0)) * distances
    if segments is not None:
        segments += batch * keys + residue
        query_segment = tl.load(segments + query_index * step, mask=inside, other=0)[:, None]
    if decay is not None:
        decay += (batch * heads + head) * keys + residue
        origin = tl.load(decay + (start + shift) * step, mask=start < tokens_here, other=0.0)
        query_decay = _gates(decay, query_index * step, inside, origin, EXACT)[:, None]
    LISTED: tl.constexpr = listed is not None
    WHOLE: tl.constexpr = not EXACT and (LISTED or segments is None)
    FIRST: tl.constexpr = 0 if WHOLE else 1
    if LISTED:
        at = batch * list_batch + head * list_head + tile
        listed += at * list_width
        before, begin, full, rest = 0, 0, 0, 0
        if WHOLE:
            rest = tl.load(counts + 2 * at)
        edges = tl.load(counts + 2 * at + 1) - rest
    else:
        last = tl.minimum(start.to(tl.int32) + BLOCK_M, tokens_here) - 1 + shift
        before, begin, full, rest, end = _key_tiles(
            start.to(tl.int32) + shift, last, limit, window, prefix_end, CAUSAL, BLOCK_N
        )
        if not WHOLE:
            full, rest = begin, begin
        edges = before + (full - begin) + (end - rest)

    grad_query = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    slope_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
    gate_sum = tl.zeros([BLOCK_M], dtype=tl.float64 if EXACT else tl.float32)
    low_sum, high_sum = tl.zeros([BLOCK_N], dtype=tl.float32), tl.zeros([BLOCK_N], dtype=tl.float32)
    dots = tl.zeros([BLOCK_M], dtype=tl.float32)
    if spread is None and grad_slopes is None and grad_bias is None:
        result = _rows(
            out, index[:, None], VALUE_DIM, tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, True
        )
        dots = tl.sum(result.to(tl.float32) * given.to(tl.float32), 1)
    else:
        for MASKED in tl.static_range(FIRST, 2):
            for n in range(edges if MASKED else rest - full):
                visited = _visited(n, listed, before, begin, full, rest, MASKED)
                grad_query, dots, slope_sum, gate_sum, low_sum, high_sum = _descend(
                    grad_query, dots, slope_sum, gate_sum, low_sum, high_sum, query, given, sums, visited, k, v,
                    segments, slope, table, decay, query_index, query_segment, query_decay, origin, inside, share,
                    k_row, v_row, step, limit, window, prefix_end, distances, center, scale, cap,
                    spread, floor, True, False, False, MASKED, CAUSAL, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M,
                    BLOCK_N,
                )  # fmt: skip
    if grad_log_sum is not None:
        dots -= tl.load(grad_log_sum + line, mask=inside, other=0.0) * LOG2E
    tl.store(delta + line, dots, mask=inside)

    SLOPES: tl.constexpr = grad_slopes is not None
    GATES: tl.constexpr = grad_decay is not None
    for MASKED in tl.static_range(FIRST, 2):
        for n in range(edges if MASKED else rest - full):
            visited = _visited(n, listed, before, begin, full, rest, MASKED)
            grad_query, dots, slope_sum, gate_sum, low_sum, high_sum = _descend(
                grad_query, dots, slope_sum, gate_sum, low_sum, high_sum, query, given, sums, visited, k, v, segments,
                slope, table, decay, query_index, query_segment, query_decay, origin, inside, share, k_row, v_row,
                step, limit, window, prefix_end, distances, center, scale, cap, spread, floor,
                False, SLOPES, GATES, MASKED, CAUSAL, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    column = tl.arange(0, BLOCK_D)
    tl.store(
        grad_q + index[:, None] * HEAD_DIM + column[None, :],
        (grad_query * factor).to(grad_q.dtype.element_ty),
        mask=inside[:, None] & (column < HEAD_DIM)[None, :],
    )
    if SLOPES:
        tl.store(grad_slopes + line, slope_sum, mask=inside)
    if GATES:
        tl.store(grad_decay + line, gate_sum, mask=inside)
    if share is not None:
        low_total, high_total = tl.sum(low_sum, 0), tl.sum(high_sum, 0)
        if distances == 1:
            tl.store(share, low_total + high_total)
        else:
            tl.store(share, low_total)
            tl.store(share + distances - 1, high_total)


@triton.jit
def _ascend(
    grad_key, grad_value, gate_sum, key_tile, value_tile, tile, q, grad_out, log_sum, delta, segments, slope, table,
    decay, key, key_segment, key_decay, origin, tokens_here, shift, heads, q_stride, step, limit, window, prefix_end,
    distances, center, scale, cap, spread, floor,
    GATES: tl.constexpr, MASKED: tl.constexpr, CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add what a tile of queries means for the gradients of the keys and values; tiles are `[keys, queries]`."""
    EXACT: tl.constexpr = key_tile.dtype == tl.float32
    start, lane = tl.full([], tile, tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    row = start.to(tl.int32) + lane
    inside = row < tokens_here
    query = _rows(
        q + start * q_stride, lane[:, None], q_stride, tl.arange(0, BLOCK_D)[None, :], inside[:, None],
        HEAD_DIM, BLOCK_D, MASKED,
    )  # fmt: skip
    given_row = _apart(heads * VALUE_DIM, step)
    given = _rows(
        grad_out + start * given_row, lane[:, None], given_row,
        tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, MASKED,
    )  # fmt: skip
    sums = tl.load(log_sum + row * step, mask=inside, other=0.0)
    dots = tl.load(delta + row * step, mask=inside, other=0.0)
    product = tl.dot(key_tile, tl.trans(query), input_precision="ieee")
    grad_weight = tl.dot(value_tile, tl.trans(given), input_precision="ieee")
    query_index = row + shift
    distance = query_index[None, :] - key[:, None]
    query_decay, query_segment = None, None
    if decay is not None:
        query_decay = _gates(decay, (start + lane + shift) * step, inside, origin, EXACT)[None, :]
    score, bend = _score(
        product, distance * step, slope, table, distances, center, query_decay, key_decay, scale, cap, EXACT
    )  # fmt: skip
    if MASKED:
        if segments is not None:
            query_segment = tl.load(segments + (start + lane + shift) * step, mask=inside, other=0)[None, :]
        visible = _visible(distance, key[:, None], limit, window, prefix_end, query_segment, key_segment, CAUSAL)
        score = tl.where(visible & inside[None, :], score, float("-inf"))
    weight = tl.exp2(score - sums[None, :])
    shown = weight
    if spread is not None:
        shown, grad_weight = _clipped(weight, grad_weight, spread, floor)
    grad_value = tl.dot(shown.to(given.dtype), given, grad_value, input_precision="ieee")
    change = weight * (grad_weight - dots[None, :])
    if GATES:
        gate_sum -= _sum(change, EXACT)
    if cap is not None:
        change = change * (1.0 - bend * bend)
    grad_key = tl.dot(change.to(query.dtype), query, grad_key, input_precision="ieee")
    return grad_key, grad_value, gate_sum


@triton.jit
def attention_backward_keys(
    q, k, v, grad_out, log_sum, delta, grad_k, grad_v, grad_decay,
    segments, key_length, prefix, slopes, bias, decay, listed, counts,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head, list_batch, list_head, list_width,
    tokens, keys, group, step, ahead, window, distances, center, scale, factor, cap, spread, floor,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradients of a tile of keys and values: over all heads that use them, so that nothing is added twice."""
    EXACT: tl.constexpr = q.dtype.element_ty == tl.float32
    tile, residue, first, tokens_here, keys_here, shift = _residue_class(tokens, keys, step, ahead)
    q_row, k_row, v_row = _apart(q_token, step), _apart(k_token, step), _apart(v_token, step)
    kv_head, kv_heads, batch = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    heads = kv_heads * group
    limit, prefix_end = keys_here, None
    if key_length is not None:
        limit = _below(key_length, batch, residue, step, keys_here)
    if prefix is not None:
        prefix_end = _below(prefix, batch, residue, step, limit)
    start, lane = tile.to(tl.int64) * BLOCK_N, tl.arange(0, BLOCK_N)
    key = start.to(tl.int32) + lane
    inside = key < limit
    key_tile = _rows(
        k + batch * k_batch + kv_head.to(tl.int64) * k_head + residue.to(tl.int64) * k_token + start * k_row,
        lane[:, None], k_row, tl.arange(0, BLOCK_D)[None, :], inside[:, None], HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    value_tile = _rows(
        v + batch * v_batch + kv_head.to(tl.int64) * v_head + residue.to(tl.int64) * v_token + start * v_row,
        lane[:, None], v_row, tl.arange(0, BLOCK_V)[None, :], inside[:, None], VALUE_DIM, BLOCK_V, True,
    )  # fmt: skip
    key_segment = None
    if segments is not None:
        segments += batch * keys + residue
        key_segment = tl.load(segments + (start + lane) * step, mask=inside, other=0)[:, None]
    LISTED: tl.constexpr = listed is not None
    WHOLE: tl.constexpr = not EXACT and (LISTED or segments is None)
    FIRST: tl.constexpr = 0 if WHOLE else 1
    GATES: tl.constexpr = grad_decay is not None
    if not LISTED:
        begin, full, rest, end = _query_tiles(
            start.to(tl.int32), tokens_here, shift, limit, window, prefix_end, CAUSAL, BLOCK_N, BLOCK_M
        )
        if not WHOLE:
            full, rest = begin, begin
        edges = (full - begin) + (end - rest)

    grad_key = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    grad_value = tl.zeros([BLOCK_N, BLOCK_V], dtype=tl.float32)
    for member in range(group):
        head = kv_head * group + member
        slope, table, own_decay, key_decay, origin = None, None, None, None, None
        own_list = None
        if LISTED:
            at = batch * list_batch + head * list_head + tile
            own_list = listed + at * list_width
            begin, full, rest = 0, 0, 0
            if WHOLE:
                rest = tl.load(counts + 2 * at)
            edges = tl.load(counts + 2 * at + 1) - rest
        if slopes is not None:
            slope = tl.load(slopes + head).to(tl.float32) * LOG2E
        if bias is not None:
            table = bias + head.to(tl.int64) * distances
        if decay is not None:
            own_decay = decay + (batch * heads + head) * keys + residue
            origin = tl.load(own_decay + start * step, mask=start < keys_here, other=0.0)
            key_decay = _gates(own_decay, (start + lane) * step, inside, origin, EXACT)[:, None]
        own_q = q + batch * q_batch + head.to(tl.int64) * q_head + first.to(tl.int64) * q_token
        own_given = grad_out + ((batch * tokens + first) * heads + head) * VALUE_DIM
        line = (batch * heads + head) * tokens + first
        gate_sum = tl.zeros([BLOCK_N], dtype=tl.float64 if EXACT else tl.float32)
        for MASKED in tl.static_range(FIRST, 2):
            for n in range(edges if MASKED else rest - full):
                visited = _visited(n, own_list, 0, begin, full, rest, MASKED)
                grad_key, grad_value, gate_sum = _ascend(
                    grad_key, grad_value, gate_sum, key_tile, value_tile, visited, own_q, own_given, log_sum + line,
                    delta + line, segments, slope, table, own_decay, key, key_segment, key_decay, origin, tokens_here,
                    shift, heads, q_row, step, limit, window, prefix_end, distances, center, scale, cap,
                    spread, floor, GATES, MASKED, CAUSAL, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_M,
                )  # fmt: skip
        if GATES:
            tl.store(
                grad_decay + (batch * heads + head) * keys + residue + (start + lane) * step,
                gate_sum,
                mask=key < keys_here,
            )
    stored = key < keys_here
    index = (batch * keys + residue + (start + lane) * step) * kv_heads + kv_head
    column = tl.arange(0, BLOCK_D)
    tl.store(
        grad_k + index[:, None] * HEAD_DIM + column[None, :],
        (grad_key * factor).to(grad_k.dtype.element_ty),
        mask=stored[:, None] & (column < HEAD_DIM)[None, :],
    )
    column = tl.arange(0, BLOCK_V)
    tl.store(
        grad_v + index[:, None] * VALUE_DIM + column[None, :],
        grad_value.to(grad_v.dtype.element_ty),
        mask=stored[:, None] & (column < VALUE_DIM)[None, :],
    )


@triton.jit
def attention_decode(
    q, k, v, parts, log_sums, segments, key_length, prefix, slopes, bias, decay,
    q_batch, q_token, q_head, k_batch, k_token, k_head, v_batch, v_token, v_head,
    tokens, keys, group, window, distances, center, scale, cap, begin, count,
    CAUSAL: tl.constexpr, HEAD_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A few queries against a share of the keys: `count` tiles from a multiple of it after `begin`.

    The heads that share keys and the tokens together are the rows, so that keys are read once.
    """
    split, kv_head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    heads = tl.num_programs(1) * group
    limit, prefix_end = keys, None
    if key_length is not None:
        limit = _below(key_length, batch, 0, 1, keys)
    if prefix is not None:
        prefix_end = _below(prefix, batch, 0, 1, limit)
    row = tl.arange(0, BLOCK_M)
    token, head = row // group, kv_head * group + row % group
    inside = token < tokens
    query_index = token + keys - tokens
    k += batch * k_batch + kv_head.to(tl.int64) * k_head
    v += batch * v_batch + kv_head.to(tl.int64) * v_head
    offset = token.to(tl.int64) * q_token + head.to(tl.int64) * q_head
    query = _rows(
        q + batch * q_batch, offset[:, None], 1, tl.arange(0, BLOCK_D)[None, :], inside[:, None],
        HEAD_DIM, BLOCK_D, True,
    )  # fmt: skip
    slope, table, query_segment, query_decay, origin = None, None, None, None, None
    if slopes is not None:
        slope = tl.load(slopes + head, mask=inside, other=0.0).to(tl.float32)[:, None] * LOG2E
    if bias is not None:
        table = bias + tl.where(inside, head.to(tl.int64) * distances, 0)[:, None]
    if segments is not None:
        segments += batch * keys
        query_segment = tl.load(segments + query_index, mask=inside, other=0)[:, None]
    if decay is not None:
        decay += (batch * heads + tl.where(inside, head, 0)[:, None]) * keys
        origin = tl.load(decay + query_index[:, None], mask=inside[:, None], other=0.0)
        query_decay = tl.zeros([BLOCK_M, 1], dtype=tl.float32)

    total = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    most = tl.full([BLOCK_M], HIDDEN, tl.float32)
    mass = tl.zeros([BLOCK_M], dtype=tl.float32)
    start = begin + split * count
    for n in range(start, tl.minimum(start + count, (limit + BLOCK_N - 1) // BLOCK_N)):
        total, most, mass = _attend(
            total, most, mass, query, n, k, v, segments, slope, table, decay, query_index, query_segment, query_decay,
            origin, k_token, v_token, 1, limit, window, prefix_end, distances, center, scale, cap, None, None,
            True, True, True, CAUSAL, HEAD_DIM, VALUE_DIM, BLOCK_D, BLOCK_V, BLOCK_N,
        )  # fmt: skip
    unseen = mass == 0.0
    mass = tl.where(unseen, 1.0, mass)
    here = split.to(tl.int64) * tl.num_programs(2) + batch
    line = (here * heads + head) * tokens + token
    tl.store(log_sums + line, tl.where(unseen, HIDDEN, most + tl.log2(mass)), mask=inside)
    column = tl.arange(0, BLOCK_V)
    index = (here * tokens + token) * heads + head
    tl.store(
        parts + index[:, None] * VALUE_DIM + column[None, :],
        total / mass[:, None],
        mask=inside[:, None] & (column < VALUE_DIM)[None, :],
    )


@triton.jit
def attention_merge(
    parts, log_sums, out, log_sum, sink, splits, tokens, heads,
    VALUE_DIM: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Merge results for parts of the keys, and the sink, by their log-sum-exps: in any grouping it gives the same."""
    head, token, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    batches = tl.num_programs(2)
    split, column = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_V)
    there = split < splits
    step = batches.to(tl.int64) * tokens * heads
    line = (batch * heads + head) * tokens + token
    sums = tl.load(log_sums + split * step + line, mask=there, other=HIDDEN)
    most = tl.max(sums, 0)
    if sink is not None:
        logit = tl.load(sink + head).to(tl.float32) * LOG2E
        most = tl.maximum(most, logit)
    share = tl.exp2(sums - most)
    mass = tl.sum(tl.where(there, share, 0.0), 0)
    if sink is not None:
        mass += tl.exp2(logit - most)
    index = (batch * tokens + token) * heads + head
    part = tl.load(
        parts + (split * step + index)[:, None] * VALUE_DIM + column[None, :],
        mask=there[:, None] & (column < VALUE_DIM)[None, :],
        other=0.0,
    )
    total = tl.sum(part * (share / mass)[:, None], 0)
    tl.store(out + index * VALUE_DIM + column, total.to(out.dtype.element_ty), mask=column < VALUE_DIM)
    tl.store(log_sum + line, tl.where(most > HIDDEN, most + tl.log2(mass), HIDDEN))
