"""Kernel of rotary embedding: the waves of a few tokens, computed once and used for all heads of queries and keys."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _waves(turns):
    """Cosine and sine in float32 of angles in turns in float64, by their series within an eighth of a turn of an axis.

    Nothing is left to reduce, which is most of what the library's functions do.
    """
    axis = tl.floor(4.0 * turns + 0.5)
    angle = ((4.0 * turns - axis) * 1.5707963267948966).to(tl.float32)
    square = angle * angle
    sin = angle * (1 + square * (-1 / 6 + square * (1 / 120 + square * (-1 / 5040 + square * (1 / 362880)))))
    cos = 1 + square * (-1 / 2 + square * (1 / 24 + square * (-1 / 720 + square * (1 / 40320))))
    quarter = axis.to(tl.int64) & 3
    one, other = tl.where(quarter % 2 == 0, cos, sin), tl.where(quarter % 2 == 0, sin, cos)
    return tl.where((quarter == 1) | (quarter == 2), -one, one), tl.where(quarter > 1, -other, other)


@triton.jit
def _turned(
    x,
    out,
    start,
    stride,
    token,
    count,
    heads,
    cos,
    sin,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """Turn the heads of the tokens that begin at `start`; `cos` and `sin` are `[tokens, 1, HALF]`.

    A few heads at a time: each thread has the waves of its pairs and uses them for as many heads as it can.
    """
    pair = tl.arange(0, HALF)[None, None, :]
    for low in range(0, heads, HEADS):
        head = (low + tl.arange(0, HEADS))[None, :, None]
        inside = (token < count)[:, None, None] & (head < heads)
        source = start[:, None, None] + head.to(tl.int64) * stride
        target = (token[:, None, None] * heads + head) * HEAD_DIM
        if INTERLEAVED:
            feature = tl.arange(0, 2 * HALF)[None, None, :]
            turning = inside & (feature < DIM)
            value = tl.load(x + source + feature, mask=turning, other=0.0).to(tl.float32)
            first, second = tl.split(tl.reshape(value, [cos.shape[0], HEADS, HALF, 2]))
            value = tl.join(first * cos - second * sin, second * cos + first * sin)
            value = tl.reshape(value, [cos.shape[0], HEADS, 2 * HALF])
            tl.store(out + target + feature, value.to(out.dtype.element_ty), mask=turning)
        else:
            turning = inside & (pair < DIM // 2)
            first = tl.load(x + source + pair, mask=turning, other=0.0).to(tl.float32)
            second = tl.load(x + source + DIM // 2 + pair, mask=turning, other=0.0).to(tl.float32)
            tl.store(out + target + pair, (first * cos - second * sin).to(out.dtype.element_ty), mask=turning)
            second = second * cos + first * sin
            tl.store(out + target + DIM // 2 + pair, second.to(out.dtype.element_ty), mask=turning)
        if REST > 0:
            feature = DIM + tl.arange(0, REST)[None, None, :]
            passing = inside & (feature < HEAD_DIM)
            tl.store(out + target + feature, tl.load(x + source + feature, mask=passing), mask=passing)


@triton.jit
def rotary_turn(
    q,
    k,
    out_q,
    out_k,
    positions,
    count,
    tokens,
    position_batch,
    q_batch,
    q_token,
    q_head,
    q_heads,
    k_batch,
    k_token,
    k_head,
    k_heads,
    RATE: tl.constexpr,
    INVERSE: tl.constexpr,
    HAS_K: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Pair `i` of a token turns by `position * 2^(RATE i)`, backwards if INVERSE.

    Angles are reduced to one turn in float64, which costs nothing for a few numbers in each token: in float32 a late
    position would leave them few digits.
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    batch, place = token // tokens, token % tokens
    position = tl.load(positions + batch * position_batch + place, mask=token < count, other=0).to(tl.float64)
    frequency = tl.exp2(tl.arange(0, HALF).to(tl.float64) * RATE) * 0.15915494309189535
    cos, sin = _waves((position[:, None] * frequency[None, :])[:, None, :])
    if INVERSE:
        sin = -sin
    start = batch * q_batch + place * q_token
    _turned(q, out_q, start, q_head, token, count, q_heads, cos, sin, HEAD_DIM, DIM, HALF, REST, HEADS, INTERLEAVED)
    if HAS_K:
        start = batch * k_batch + place * k_token
        _turned(k, out_k, start, k_head, token, count, k_heads, cos, sin, HEAD_DIM, DIM, HALF, REST, HEADS, INTERLEAVED)
