"""Kernels of the delta rule: chunks of 64 rows, a row being one step of a token.

With `G` the sum of the log decays from the chunk's start, `S` the state that enters it, `weight_ij = exp(G_i - G_j)`
where row `i` sees row `j` and 0 elsewhere, a chunk computes

    A = beta_i weight_ij k_i k_j^T (j < i)      P = weight_ij q_i k_j^T (j <= i)
    right = beta (v - exp(G) k S)               update = (I + A)^-1 right
    out = scale (exp(G) q S + P update)         S <- exp(G_last) S + (exp(G_last - G) k)^T update

Sums of decays come in two float32 numbers, base 2, so that their differences are as exact as the decays. Matrix
products are those of half precision, of operands that are split into as many parts as their dtype asks for.
"""

# Triton's types do not know what its compiler makes of loops, flags and indices.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false

from __future__ import annotations

import triton
import triton.language as tl

CHUNK = tl.constexpr(64)
SUB = tl.constexpr(16)


@triton.jit
def _product(a, b, EXACT: tl.constexpr):
    """`a b` in float32; an operand in float32 is split into parts that tensor cores take.

    Half precision inputs (EXACT is their dtype) need two parts of what was computed from them, 16 bits or more; inputs
    in float32 (EXACT is float32) need three of bfloat16, 24 bits. Products of parts below the last bit are left out.
    """
    if tl.float32 == EXACT:
        # In an order in which few parts are in use at a time.
        b_1 = b.to(tl.bfloat16)
        b_rest = b - b_1.to(tl.float32)
        b_2 = b_rest.to(tl.bfloat16)
        a_1 = a.to(tl.bfloat16)
        found = tl.dot(a_1, (b_rest - b_2.to(tl.float32)).to(tl.bfloat16))
        a_rest = a - a_1.to(tl.float32)
        a_2 = a_rest.to(tl.bfloat16)
        found = tl.dot((a_rest - a_2.to(tl.float32)).to(tl.bfloat16), b_1, found)
        found = tl.dot(a_2, b_2, found)
        found = tl.dot(a_2, b_1, found)
        found = tl.dot(a_1, b_2, found)
        found = tl.dot(a_1, b_1, found)
    else:
        a_1 = a.to(EXACT)
        b_1 = b.to(EXACT)
        found = tl.dot(a_1, b_1)
        if a.dtype == tl.float32:
            found = tl.dot((a - a_1.to(tl.float32)).to(EXACT), b_1, found)
        if b.dtype == tl.float32:
            found = tl.dot(a_1, (b - b_1.to(tl.float32)).to(EXACT), found)
    return found


@triton.jit
def _chunk_vectors(
    beta,
    total,
    total_rest,
    runs,
    at,
    chunk,
    left,
    heads,
    head,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
):
    """Of the rows of a chunk, the first of which is `at`: beta, the sum of decays in two parts, the run; the factors of
    the state that enters as each row sees it, of each row's update at the chunk's end, and of the state there.

    Rows beyond the `left` last ones have beta 0 and otherwise what the last row has, so that they change nothing.
    """
    inner = tl.arange(0, CHUNK)
    near = tl.minimum(inner, left - 1)
    final = tl.minimum(CHUNK, left) - 1
    first = at * heads + head
    rate = tl.load(beta + first + inner * heads, mask=inner < left, other=0.0).to(tl.float32)
    from_start = tl.full([CHUNK], 1.0, tl.float32)
    to_end = tl.full([CHUNK], 1.0, tl.float32)
    whole = tl.full([], 1.0, tl.float32)
    high = from_start
    low = from_start
    run = near
    if HAS_DECAY:
        high = tl.load(total + first + near * heads)
        low = tl.load(total_rest + first + near * heads)
        high_end = tl.load(total + first + final * heads)
        low_end = tl.load(total_rest + first + final * heads)
        from_start = tl.exp2(high) * tl.exp2(low)
        to_end = tl.exp2((high_end - high) + (low_end - low))
        whole = tl.exp2(high_end) * tl.exp2(low_end)
    if HAS_SEGMENTS:
        run = tl.load(runs + at + near)
        before = tl.load(runs + at - tl.minimum(chunk, 1))
        last = tl.load(runs + at + final)
        from_start = tl.where(run == before, from_start, 0.0)
        to_end = tl.where(run == last, to_end, 0.0)
        whole = tl.where(before == last, whole, 0.0)
    return rate, high, low, run, from_start, to_end, whole


@triton.jit
def _weights(high, low, run, visible, ROWS_SEE: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """What an update weighs where it is seen, `[64, 64]`: rows see columns, or columns rows."""
    if HAS_SEGMENTS:
        visible = visible & (run[:, None] == run[None, :])
    if HAS_DECAY:
        if ROWS_SEE:
            gone = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        else:
            gone = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
        weights = tl.where(visible, tl.exp2(tl.minimum(gone, 0.0)), 0.0)
    else:
        weights = tl.where(visible, 1.0, 0.0)
    return weights


@triton.jit
def delta_inverse(
    k,
    beta,
    total,
    total_rest,
    runs,
    inverse,
    length,
    heads,
    per_group,
    key_dim,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`(I + A)^-1` of one chunk and head, `[batch * heads, chunks, 64, 64]`.

    Blocks of 16 on the diagonal by forward substitution, all at once. With their inverse `D` and the other blocks `O`,
    `N = D O` has a fourth power of zero, so that the inverse is `D - N (D - N (D - N D))`.
    """
    EXACT: tl.constexpr = k.dtype.element_ty
    chunks = tl.cdiv(length, CHUNK)
    index, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    head = index % heads
    start = (index // heads).to(tl.int64) * length
    inner = tl.arange(0, CHUNK)
    at, left = start + chunk * CHUNK, length - chunk * CHUNK
    inside = inner < left
    groups = heads // per_group
    keys_at = (at * groups + head // per_group) * key_dim
    pairs = tl.zeros([CHUNK, CHUNK], tl.float32)
    for base in tl.range(0, key_dim, BLOCK_K, disable_licm=True):
        features = base + tl.arange(0, BLOCK_K)
        wide = features < key_dim
        key_tile = inner[:, None] * (groups * key_dim) + features[None, :]
        keys = tl.load(k + keys_at + key_tile, mask=inside[:, None] & wide[None, :], other=0.0)
        key_tile_t = inner[None, :] * (groups * key_dim) + features[:, None]
        keys_t = tl.load(k + keys_at + key_tile_t, mask=inside[None, :] & wide[:, None], other=0.0)
        pairs += _product(keys, keys_t, EXACT)
    rate, high, low, run, _, _, _ = _chunk_vectors(
        beta, total, total_rest, runs, at, chunk, left, heads, head, HAS_DECAY, HAS_SEGMENTS
    )

    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    same_block = row // SUB == column // SUB
    system = pairs * rate[:, None] * _weights(high, low, run, row > column, True, HAS_DECAY, HAS_SEGMENTS)
    # The same the other way round; the products of keys are symmetric.
    turned = pairs * rate[None, :] * _weights(high, low, run, row < column, False, HAS_DECAY, HAS_SEGMENTS)
    turned = tl.where(same_block, turned, 0.0)
    diagonal = tl.where(row == column, 1.0, 0.0)
    for step in range(1, SUB):
        factors = tl.sum(tl.where(column % SUB == step, turned, 0.0), 1)
        change = tl.sum(factors[:, None] * diagonal, 0)
        diagonal = tl.where((row % SUB == step) & same_block, diagonal - change[None, :], diagonal)

    between = _product(diagonal, tl.where(same_block, 0.0, system), EXACT)
    found = diagonal
    for _ in tl.range(CHUNK // SUB - 1, disable_licm=True):
        found = diagonal - _product(between, found, EXACT)
    number = tl.program_id(0).to(tl.int64)
    tl.store(inverse + number * CHUNK * CHUNK + row * CHUNK + column, found)


@triton.jit
def delta_states(
    k,
    v,
    beta,
    total,
    total_rest,
    runs,
    inverse,
    state,
    states,
    updates,
    final,
    length,
    heads,
    per_group,
    key_dim,
    value_dim,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The states that enter the chunks `[batch * heads, chunks, key_dim, value_dim]`, the one after the last, and the
    updates `[batch, length, heads, value_dim]`, of a slice of the values of one head."""
    EXACT: tl.constexpr = k.dtype.element_ty
    chunks = tl.cdiv(length, CHUNK)
    index = tl.program_id(0)
    head = index % heads
    start = (index // heads).to(tl.int64) * length
    features = tl.arange(0, BLOCK_K)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    wide, here = features < key_dim, values < value_dim
    inner = tl.arange(0, CHUNK)
    groups = heads // per_group
    key_tile = inner[:, None] * (groups * key_dim) + features[None, :]
    value_tile = inner[:, None] * (heads * value_dim) + values[None, :]
    in_state = features[:, None] * value_dim + values[None, :]
    whole_state = wide[:, None] & here[None, :]
    first = index.to(tl.int64) * key_dim * value_dim
    S = tl.load(state + first + in_state, mask=whole_state, other=0.0)
    for chunk in tl.range(chunks, disable_licm=True):
        number = index.to(tl.int64) * chunks + chunk
        tl.store(states + number * key_dim * value_dim + in_state, S, mask=whole_state)
        at, left = start + chunk * CHUNK, length - chunk * CHUNK
        inside = inner < left
        keys_at = (at * groups + head // per_group) * key_dim
        values_at = (at * heads + head) * value_dim
        keys = tl.load(k + keys_at + key_tile, mask=inside[:, None] & wide[None, :], other=0.0)
        given = inside[:, None] & here[None, :]
        wanted = tl.load(v + values_at + value_tile, mask=given, other=0.0).to(tl.float32)
        rate, _, _, _, from_start, to_end, whole = _chunk_vectors(
            beta, total, total_rest, runs, at, chunk, left, heads, head, HAS_DECAY, HAS_SEGMENTS
        )
        right = rate[:, None] * (wanted - from_start[:, None] * _product(keys, S, EXACT))
        solver = tl.load(inverse + number * CHUNK * CHUNK + inner[:, None] * CHUNK + inner[None, :])
        update = _product(solver, right, EXACT)
        tl.store(updates + values_at + value_tile, update, mask=given)
        S = whole * S + _product(tl.trans(keys), to_end[:, None] * update, EXACT)
    tl.store(final + first + in_state, S, mask=whole_state)


@triton.jit
def delta_output(
    q,
    k,
    total,
    total_rest,
    beta,
    runs,
    states,
    updates,
    out,
    scale,
    length,
    heads,
    per_group,
    key_dim,
    value_dim,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The outputs of one chunk, for a slice of the values of one head."""
    EXACT: tl.constexpr = k.dtype.element_ty
    chunks = tl.cdiv(length, CHUNK)
    number = tl.program_id(0).to(tl.int64)
    index, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    head = index % heads
    start = (index // heads).to(tl.int64) * length
    inner = tl.arange(0, CHUNK)
    at, left = start + chunk * CHUNK, length - chunk * CHUNK
    features = tl.arange(0, BLOCK_K)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside, wide, here = inner < left, features < key_dim, values < value_dim
    groups = heads // per_group
    key_tile = inner[:, None] * (groups * key_dim) + features[None, :]
    key_tile_t = inner[None, :] * (groups * key_dim) + features[:, None]
    value_tile = inner[:, None] * (heads * value_dim) + values[None, :]
    keys_at = (at * groups + head // per_group) * key_dim
    values_at = (at * heads + head) * value_dim
    queries = tl.load(q + keys_at + key_tile, mask=inside[:, None] & wide[None, :], other=0.0)
    keys_t = tl.load(k + keys_at + key_tile_t, mask=inside[None, :] & wide[:, None], other=0.0)
    in_state = number * key_dim * value_dim + features[:, None] * value_dim + values[None, :]
    S = tl.load(states + in_state, mask=wide[:, None] & here[None, :], other=0.0)
    given = inside[:, None] & here[None, :]
    update = tl.load(updates + values_at + value_tile, mask=given, other=0.0)
    _, high, low, run, from_start, _, _ = _chunk_vectors(
        beta, total, total_rest, runs, at, chunk, left, heads, head, HAS_DECAY, HAS_SEGMENTS
    )
    row, column = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    scores = _product(queries, keys_t, EXACT)
    scores = scores * _weights(high, low, run, row >= column, True, HAS_DECAY, HAS_SEGMENTS)
    found = scale * (from_start[:, None] * _product(queries, S, EXACT) + _product(scores, update, EXACT))
    tl.store(out + values_at + value_tile, found.to(out.dtype.element_ty), mask=given)


@triton.jit
def delta_states_backward(
    q,
    k,
    beta,
    total,
    total_rest,
    runs,
    inverse,
    grad_out,
    grad_final,
    grad_states,
    grad_rights,
    grad_state,
    scale,
    length,
    heads,
    per_group,
    key_dim,
    value_dim,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients, from the last chunk to the first, of the states that leave the chunks, of `right`, and of the state
    before the first, for a slice of the values of one head:

        grad_update = scale P^T grad_out + exp(G_last - G) k grad_S'      grad_right = (I + A)^-T grad_update
        grad_S = exp(G_last) grad_S' + (exp(G) q)^T scale grad_out - (exp(G) k)^T beta grad_right
    """
    EXACT: tl.constexpr = k.dtype.element_ty
    chunks = tl.cdiv(length, CHUNK)
    index = tl.program_id(0)
    head = index % heads
    start = (index // heads).to(tl.int64) * length
    features = tl.arange(0, BLOCK_K)
    values = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    wide, here = features < key_dim, values < value_dim
    inner = tl.arange(0, CHUNK)
    row, column = inner[:, None], inner[None, :]
    groups = heads // per_group
    key_tile = inner[:, None] * (groups * key_dim) + features[None, :]
    key_tile_t = inner[None, :] * (groups * key_dim) + features[:, None]
    value_tile = inner[:, None] * (heads * value_dim) + values[None, :]
    in_state = features[:, None] * value_dim + values[None, :]
    whole_state = wide[:, None] & here[None, :]
    first = index.to(tl.int64) * key_dim * value_dim
    grad_S = tl.load(grad_final + first + in_state, mask=whole_state, other=0.0)
    for back in tl.range(chunks, disable_licm=True):
        chunk = chunks - 1 - back
        number = index.to(tl.int64) * chunks + chunk
        tl.store(grad_states + number * key_dim * value_dim + in_state, grad_S, mask=whole_state)
        at, left = start + chunk * CHUNK, length - chunk * CHUNK
        inside = inner < left
        keys_at = (at * groups + head // per_group) * key_dim
        values_at = (at * heads + head) * value_dim
        upright, turned = inside[:, None] & wide[None, :], inside[None, :] & wide[:, None]
        keys = tl.load(k + keys_at + key_tile, mask=upright, other=0.0)
        queries_t = tl.load(q + keys_at + key_tile_t, mask=turned, other=0.0)
        given = inside[:, None] & here[None, :]
        grad = tl.load(grad_out + values_at + value_tile, mask=given, other=0.0)
        rate, high, low, run, from_start, to_end, whole = _chunk_vectors(
            beta, total, total_rest, runs, at, chunk, left, heads, head, HAS_DECAY, HAS_SEGMENTS
        )
        scores_t = _product(keys, queries_t, EXACT)
        scores_t = scores_t * _weights(high, low, run, row <= column, False, HAS_DECAY, HAS_SEGMENTS)
        grad_update = scale * _product(scores_t, grad, EXACT) + to_end[:, None] * _product(keys, grad_S, EXACT)
        solver_t = tl.load(inverse + number * CHUNK * CHUNK + column * CHUNK + row)
        grad_right = _product(solver_t, grad_update, EXACT)
        tl.store(grad_rights + values_at + value_tile, grad_right, mask=given)
        grad_S = whole * grad_S + _product(queries_t, (scale * from_start)[:, None] * grad.to(tl.float32), EXACT)
        grad_S -= _product(tl.trans(keys), (from_start * rate)[:, None] * grad_right, EXACT)
    tl.store(grad_state + first + in_state, grad_S, mask=whole_state)


@triton.jit
def delta_pairs_backward(
    q,
    k,
    v,
    beta,
    total,
    total_rest,
    runs,
    states,
    updates,
    grad_out,
    grad_states,
    grad_rights,
    grad_pairs,
    grad_v,
    grad_beta,
    grad_decay,
    scale,
    length,
    heads,
    per_group,
    key_dim,
    value_dim,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Of one chunk and head, the gradients of the values, of beta, of the decays and of the products of keys with keys
    and of queries with keys, two matrices `[64, 64]`.

    They follow from `grad_A = -grad_right update^T` and `grad_P = scale grad_out update^T`. That of a decay is the sum
    over all pairs that it stands between, added up as such: differences of longer sums would lose digits.
    """
    EXACT: tl.constexpr = k.dtype.element_ty
    chunks = tl.cdiv(length, CHUNK)
    number = tl.program_id(0).to(tl.int64)
    index, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    head = index % heads
    start = (index // heads).to(tl.int64) * length
    inner = tl.arange(0, CHUNK)
    row, column = inner[:, None], inner[None, :]
    at, left = start + chunk * CHUNK, length - chunk * CHUNK
    features = tl.arange(0, BLOCK_K)
    inside, wide = inner < left, features < key_dim
    groups = heads // per_group
    keys_at = (at * groups + head // per_group) * key_dim
    values_at = (at * heads + head) * value_dim
    states_at = number * key_dim * value_dim
    key_tile = inner[:, None] * (groups * key_dim) + features[None, :]
    upright = inside[:, None] & wide[None, :]
    rate, high, low, run, from_start, to_end, whole = _chunk_vectors(
        beta, total, total_rest, runs, at, chunk, left, heads, head, HAS_DECAY, HAS_SEGMENTS
    )

    right_update = tl.zeros([CHUNK, CHUNK], tl.float32)
    out_update = tl.zeros([CHUNK, CHUNK], tl.float32)
    change_beta = tl.zeros([CHUNK], tl.float32)
    entered = tl.zeros([CHUNK], tl.float32)
    kept = tl.zeros([CHUNK], tl.float32)
    carried = tl.zeros([BLOCK_K], tl.float32)
    for base in tl.range(0, value_dim, BLOCK_V, disable_licm=True):
        values = base + tl.arange(0, BLOCK_V)
        here = values < value_dim
        given, whole_state = inside[:, None] & here[None, :], wide[:, None] & here[None, :]
        cells = values_at + inner[:, None] * (heads * value_dim) + values[None, :]
        cells_t = values_at + inner[None, :] * (heads * value_dim) + values[:, None]
        in_state = states_at + features[:, None] * value_dim + values[None, :]
        S = tl.load(states + in_state, mask=whole_state, other=0.0)
        grad_right = tl.load(grad_rights + cells, mask=given, other=0.0)
        grad = tl.load(grad_out + cells, mask=given, other=0.0)
        update_t = tl.load(updates + cells_t, mask=inside[None, :] & here[:, None], other=0.0)
        right_update += _product(grad_right, update_t, EXACT)
        out_update += _product(grad, update_t, EXACT)
        wanted = tl.load(v + cells, mask=given, other=0.0).to(tl.float32)
        keys = tl.load(k + keys_at + key_tile, mask=upright, other=0.0)
        expected = from_start[:, None] * _product(keys, S, EXACT)
        change_beta += tl.sum(grad_right * (wanted - expected), 1)
        tl.store(grad_v + cells, (rate[:, None] * grad_right).to(grad_v.dtype.element_ty), mask=given)
        if HAS_DECAY:
            queries = tl.load(q + keys_at + key_tile, mask=upright, other=0.0)
            found = (scale * from_start)[:, None] * _product(queries, S, EXACT)
            entered += tl.sum(grad.to(tl.float32) * found - rate[:, None] * grad_right * expected, 1)
            grad_S = tl.load(grad_states + in_state, mask=whole_state, other=0.0)
            carried += tl.sum(S * grad_S, 1)
            update = tl.load(updates + cells, mask=given, other=0.0)
            kept += tl.sum(update * _product(keys, grad_S, EXACT), 1)

    key_tile_t = inner[None, :] * (groups * key_dim) + features[:, None]
    keys_t = tl.load(k + keys_at + key_tile_t, mask=inside[None, :] & wide[:, None], other=0.0)
    keys = tl.load(k + keys_at + key_tile, mask=upright, other=0.0)
    pairs = _product(keys, keys_t, EXACT)
    change = -right_update * _weights(high, low, run, row > column, True, HAS_DECAY, HAS_SEGMENTS)
    tl.store(grad_beta + at * heads + head + inner * heads, change_beta + tl.sum(change * pairs, 1), mask=inside)
    change = rate[:, None] * change
    tile = grad_pairs + number * (2 * CHUNK * CHUNK) + row * CHUNK + column
    tl.store(tile, change)
    within = change * pairs
    change = scale * out_update * _weights(high, low, run, row >= column, True, HAS_DECAY, HAS_SEGMENTS)
    tl.store(tile + CHUNK * CHUNK, change)
    if HAS_DECAY:
        queries = tl.load(q + keys_at + key_tile, mask=upright, other=0.0)
        within += change * _product(queries, keys_t, EXACT)
        # Row `i`, column `t`: what row `i` has of all rows before `t`.
        across = _product(within, tl.where(row < column, 1.0, 0.0).to(EXACT), EXACT)
        found = tl.sum(tl.where(row >= column, across + entered[:, None], (to_end * kept)[:, None]), 0)
        found += whole * tl.sum(carried, 0)
        tl.store(grad_decay + at * heads + head + inner * heads, found, mask=inside)


@triton.jit
def delta_keys_backward(
    q,
    k,
    beta,
    total,
    total_rest,
    runs,
    states,
    updates,
    grad_out,
    grad_states,
    grad_rights,
    grad_pairs,
    grad_q,
    grad_k,
    scale,
    length,
    heads,
    per_group,
    key_dim,
    value_dim,
    HAS_DECAY: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Gradients of a slice of the queries and keys of one chunk that are due to one head,
    `[batch, length, heads, key_dim]`: those of their products, and

        exp(G) scale grad_out S^T      exp(G_last - G) update grad_S'^T - exp(G) beta grad_right S^T
    """
    EXACT: tl.constexpr = k.dtype.element_ty
    chunks = tl.cdiv(length, CHUNK)
    number = tl.program_id(0).to(tl.int64)
    index, chunk = tl.program_id(0) // chunks, tl.program_id(0) % chunks
    head = index % heads
    start = (index // heads).to(tl.int64) * length
    inner = tl.arange(0, CHUNK)
    row, column = inner[:, None], inner[None, :]
    at, left = start + chunk * CHUNK, length - chunk * CHUNK
    features = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, wide = inner < left, features < key_dim
    groups = heads // per_group
    values_at = (at * heads + head) * value_dim
    states_at = number * key_dim * value_dim
    rate, _, _, _, from_start, to_end, _ = _chunk_vectors(
        beta, total, total_rest, runs, at, chunk, left, heads, head, HAS_DECAY, HAS_SEGMENTS
    )
    of_queries = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    of_keys = tl.zeros([CHUNK, BLOCK_K], tl.float32)
    for base in tl.range(0, value_dim, BLOCK_V, disable_licm=True):
        values = base + tl.arange(0, BLOCK_V)
        here = values < value_dim
        given, whole_state = inside[:, None] & here[None, :], wide[None, :] & here[:, None]
        cells = values_at + inner[:, None] * (heads * value_dim) + values[None, :]
        in_state_t = states_at + features[None, :] * value_dim + values[:, None]
        S_t = tl.load(states + in_state_t, mask=whole_state, other=0.0)
        grad = tl.load(grad_out + cells, mask=given, other=0.0)
        of_queries += _product(grad, S_t, EXACT)
        grad_right = tl.load(grad_rights + cells, mask=given, other=0.0)
        of_keys -= _product((from_start * rate)[:, None] * grad_right, S_t, EXACT)
        grad_S_t = tl.load(grad_states + in_state_t, mask=whole_state, other=0.0)
        update = tl.load(updates + cells, mask=given, other=0.0)
        of_keys += _product(to_end[:, None] * update, grad_S_t, EXACT)

    keys_at = (at * groups + head // per_group) * key_dim
    key_tile = inner[:, None] * (groups * key_dim) + features[None, :]
    upright = inside[:, None] & wide[None, :]
    keys = tl.load(k + keys_at + key_tile, mask=upright, other=0.0)
    cells = (at * heads + head) * key_dim + inner[:, None] * (heads * key_dim) + features[None, :]
    tile = grad_pairs + number * (2 * CHUNK * CHUNK)
    tile_t = tile + column * CHUNK + row
    tile += row * CHUNK + column
    of_queries = (scale * from_start)[:, None] * of_queries + _product(tl.load(tile + CHUNK * CHUNK), keys, EXACT)
    tl.store(grad_q + cells, of_queries.to(grad_q.dtype.element_ty), mask=upright)
    of_keys += _product(tl.load(tile) + tl.load(tile_t), keys, EXACT)
    queries = tl.load(q + keys_at + key_tile, mask=upright, other=0.0)
    of_keys += _product(tl.load(tile_t + CHUNK * CHUNK), queries, EXACT)
    tl.store(grad_k + cells, of_keys.to(grad_k.dtype.element_ty), mask=upright)
