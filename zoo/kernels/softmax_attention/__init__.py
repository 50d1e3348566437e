"""Softmax attention with grouped heads, windows, packed sequences, ALiBi and soft cap; see `attention`."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels import checks
from zoo.kernels import segments as packing
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.softmax_attention import reference, torch_path

_ATTENTION = Primitive(
    "attention",
    (
        Implementation("torch", torch_path.attention),
        Implementation("reference", reference.attention),
    ),
)
PRIMITIVES = (_ATTENTION,)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    past: int = 0,
    segments: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    key_length: Tensor | None = None,
) -> Tensor:
    """Softmax attention: `o_i = sum_j softmax_j(cap(scale * q_i k_j) - slope |p_i - p_j|) v_j` over visible keys `j`.

    Query `i` is at position `past + i`. Keys end with the newest token: key `j` is at `past + tokens - keys + j`, so
    that a cache that dropped its oldest keys is passed as it is. With `causal` a query sees keys at most at its own
    position. A query that sees no key gives zeros.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        k: `[batch, keys, kv_heads, head_dim]`; query head `h` uses key head `h // (heads / kv_heads)`.
        v: `[batch, keys, kv_heads, value_dim]`.
        causal: whether keys after the query are hidden.
        window: only keys with `p_i - p_j < window` are visible, `|p_i - p_j| < window` if not causal.
        past: number of tokens before the first query, whether their keys are still there or dropped.
        segments: integer ids `[batch, keys]`, those of the queries last; only keys of the query's segment are visible.
        alibi_slopes: `[heads]`; scores fall by slope times distance (Press et al. 2022, arXiv 2108.12409).
        softcap: `cap(s) = softcap * tanh(s / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        scale: factor of the scores, `head_dim ** -0.5` if None.
        key_length: integers `[batch]`; in each row only the first so many keys are real, the others are padding.

    Returns:
        `[batch, tokens, heads, value_dim]` in `q`'s dtype.

    `O(tokens keys (head_dim + value_dim))` for each head; a long causal window costs `O(tokens window)`.
    Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped heads, arXiv 2305.13245.
    Raises `ZooError` for shapes that do not fit.
    """
    name = "attention"
    checks.rank(name, "q", q, "batch, tokens, heads, head_dim")
    checks.rank(name, "k", k, "batch, keys, kv_heads, head_dim")
    checks.rank(name, "v", v, "batch, keys, kv_heads, value_dim")
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    checks.shape(name, "k", k, "batch, keys, kv_heads, head_dim", (batch, keys, kv_heads, head_dim))
    checks.shape(name, "v", v, "batch, keys, kv_heads, value_dim", (batch, keys, kv_heads, v.shape[3]))
    if kv_heads == 0 or heads % kv_heads:
        checks.fail(name, f"q has {heads} heads and k has {kv_heads}; expected q's to be a multiple of k's")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        checks.fail(name, f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; expected one")
    if window is not None and window < 1:
        checks.fail(name, f"window is {window}, expected at least 1, or None for no window")
    if past < 0:
        checks.fail(name, f"past is {past}, expected at least 0")
    if causal and keys > past + tokens:
        checks.fail(
            name, f"{keys} keys end at position {past + tokens - 1}; expected past to be at least {keys - tokens}"
        )
    packing.check(name, segments, batch, keys)
    if segments is not None and keys < tokens:
        checks.fail(name, f"segments need a key for each query, but there are {tokens} queries and {keys} keys")
    if alibi_slopes is not None:
        checks.shape(name, "alibi_slopes", alibi_slopes, "heads", (heads,))
    checks.positive(name, "softcap", softcap)
    if key_length is not None:
        checks.integers(name, "key_length", key_length)
        checks.shape(name, "key_length", key_length, "batch", (batch,))
    if scale is None:
        scale = head_dim**-0.5
    call = Call(
        q.device.type,
        q.dtype,
        {
            "tokens": tokens,
            "keys": keys,
            "head_dim": head_dim,
            "value_dim": v.shape[3],
            "causal": causal,
            "window": window,
            "segments": segments is not None,
            "alibi": alibi_slopes is not None,
            "softcap": softcap is not None,
            "key_length": key_length is not None,
        },
    )
    function = _ATTENTION.select(call)
    return function(q, k, v, causal, window, segments, alibi_slopes, softcap, scale, key_length)
