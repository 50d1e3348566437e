"""Softmax attention: grouped heads, visibility patterns, score changes and the log-sum-exp; see `attention`."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from zoo.kernels import checks, launch
from zoo.kernels import segments as packing
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.softmax_attention import reference, torch_path
from zoo.kernels.softmax_attention.terms import Extras, Rules

TILE = 128
"""Block-sparse patterns on the kernels are in multiples of it: no tile of theirs is longer."""
WIDEST_HEAD = 256
MOST_PROGRAMS = {"sequences": 65535, "heads": 65535}
"""What CUDA launches along the second and the third axis of a grid."""


def _kernel_serves(call: Call) -> str | None:
    facts = call.facts
    if (reason := launch.refusal(call)) is not None or not facts:
        return reason
    widest = max(facts["head_dim"], facts["value_dim"])
    if widest > WIDEST_HEAD:
        return f"takes heads up to {WIDEST_HEAD} wide, not {widest}"
    if (reason := launch.too_many(facts, MOST_PROGRAMS)) is not None:
        return reason
    extras = facts["extras"]
    if "blocks" in extras:
        if facts["block"] % TILE or facts["past"] % TILE or facts["first"] % TILE:
            return f"takes block patterns in multiples of {TILE} positions, with past and dropped keys in multiples too"
        if facts["dilation"] > 1:
            return "takes block patterns or dilation, not both"
    changed = facts["softcap"] or facts["clip"] or facts["lse"] or extras or facts["dilation"] > 1
    order = facts["causal"] and facts["tokens"] != facts["keys"] and facts["tokens"] > 1
    if facts["window"] is None and not changed and not order:
        return "plain attention is served by PyTorch's own"
    return None


def _kernel(q: Tensor, k: Tensor, v: Tensor, extras: Extras, rules: Rules) -> tuple[Tensor, Tensor | None]:
    from zoo.kernels.softmax_attention import triton_path

    return triton_path.attention(q, k, v, extras, rules)


_ATTENTION = Primitive(
    "attention",
    (
        Implementation("triton", _kernel, _kernel_serves),
        Implementation("torch", torch_path.attention),
        Implementation("reference", reference.attention),
    ),
)
PRIMITIVES = (_ATTENTION,)
_NAME = "attention"


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    dilation: int = 1,
    prefix: int | Tensor | None = None,
    blocks: Tensor | None = None,
    block: int | None = None,
    past: int = 0,
    segments: Tensor | None = None,
    key_length: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    log_forget: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    clip: tuple[float, float] | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    dilation: int = 1,
    prefix: int | Tensor | None = None,
    blocks: Tensor | None = None,
    block: int | None = None,
    past: int = 0,
    segments: Tensor | None = None,
    key_length: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    log_forget: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    clip: tuple[float, float] | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    dilation: int = 1,
    prefix: int | Tensor | None = None,
    blocks: Tensor | None = None,
    block: int | None = None,
    past: int = 0,
    segments: Tensor | None = None,
    key_length: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    bias: Tensor | None = None,
    log_forget: Tensor | None = None,
    sink: Tensor | None = None,
    softcap: float | None = None,
    clip: tuple[float, float] | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention: `o_i = sum_j softmax_j(s_ij) v_j` over visible keys `j`, with scores

        s_ij = cap(scale q_i k_j) - slope |d| + bias[d] + sum_(j < t <= i) log_forget_t,    d = p_i - p_j

    Query `i` is at position `past + i`. Keys end with the newest token: key `j` is at `past + tokens - keys + j`, so
    that a cache that dropped its oldest keys is passed as it is. A query that sees no key gives zeros.

    Which keys a query sees: `(causal and window allow it, or it is in the prefix) and every other rule allows it`.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        k: `[batch, keys, kv_heads, head_dim]`; query head `h` uses key head `h // (heads / kv_heads)`.
        v: `[batch, keys, kv_heads, value_dim]`.
        causal: whether keys after the query are hidden.
        window: only keys with `p_i - p_j < window` are visible, `|p_i - p_j| < window` if not causal.
        prefix: keys at positions below it, a number or integers `[batch]`, are visible whatever `causal` and `window`
            say (prefix language models; global tokens).
        dilation: only keys at distances that are multiples of it are visible (LongNet, arXiv 2307.02486).
        blocks: booleans `[query_blocks, key_blocks]` or `[heads, query_blocks, key_blocks]`: whether the queries at
            positions `[a block, (a + 1) block)` see the keys at `[b block, (b + 1) block)` (BigBird, arXiv 2007.14062).
        block: the positions in one of the `blocks`.
        past: number of tokens before the first query, whether their keys are still there or dropped.
        segments: integer ids `[batch, keys]`, those of the queries last; only keys of the query's segment are visible.
        key_length: integers `[batch]`; in each row only the first so many keys are real, the others are padding.
        alibi_slopes: `[heads]`; scores fall by slope times distance (Press et al. 2022, arXiv 2108.12409).
        bias: `[heads, distances]`; scores gain the entry of their distance, far distances that of the nearest entry.
            Entry 0 is distance 0 if causal, else the middle one, `distances // 2`, is, and entries before it are those
            of keys after the query (Shaw et al. 2018, arXiv 1803.02155; T5).
        log_forget: `[batch, keys, heads]`, logarithms of forget gates, at most 0; -inf forgets all before it. Causal
            only (Forgetting Transformer, Lin et al. 2025, arXiv 2503.02130).
        sink: `[heads]`, a logit that takes part in the softmax but has no value (gpt-oss, arXiv 2508.10925).
        softcap: `cap(s) = softcap * tanh(s / softcap)` (Gemma 2, arXiv 2408.00118, section 2).
        clip: `(zeta, gamma)`: weights become `clip((zeta - gamma) softmax + gamma, 0, 1)`, `zeta >= 1`, `gamma <= 0`
            (Bondarenko et al. 2023, arXiv 2306.12929).
        scale: factor of the scores, `head_dim ** -0.5` if None.
        return_lse: return also the logarithm of `sum_j exp(s_ij)`, with the sink's share, before any clip. Results
            for parts of the keys merge by it: weigh each with `exp(lse - max)`, in any order.

    Returns:
        `[batch, tokens, heads, value_dim]` in `q`'s dtype; with `return_lse` also `[batch, tokens, heads]`, in float32
        for half precision, -inf where no key is seen and no sink given.

    `O(tokens keys (head_dim + value_dim))` for each head; a long causal window costs `O(tokens window)`.
    Differentiable in all tensors of floating point. Source: Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped
    heads, arXiv 2305.13245. Raises `ZooError` for shapes, dtypes or devices that do not fit.
    """
    name = _NAME
    checks.rank(name, "q", q, "batch, tokens, heads, head_dim")
    checks.rank(name, "k", k, "batch, keys, kv_heads, head_dim")
    checks.rank(name, "v", v, "batch, keys, kv_heads, value_dim")
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    checks.shape(name, "k", k, "batch, keys, kv_heads, head_dim", (batch, keys, kv_heads, head_dim))
    checks.shape(name, "v", v, "batch, keys, kv_heads, value_dim", (batch, keys, kv_heads, v.shape[3]))
    if kv_heads == 0 or heads % kv_heads:
        checks.fail(name, f"q has {heads} heads and k has {kv_heads}; expected q's to be a multiple of k's")
    checks.floats(name, q=q, k=k, v=v, alibi_slopes=alibi_slopes, bias=bias, log_forget=log_forget, sink=sink)
    if q.dtype != k.dtype or q.dtype != v.dtype:
        checks.fail(name, f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; expected one")
    if window is not None and window < 1:
        checks.fail(name, f"window is {window}, expected at least 1, or None for no window")
    if dilation < 1:
        checks.fail(name, f"dilation is {dilation}, expected at least 1")
    if past < 0:
        checks.fail(name, f"past is {past}, expected at least 0")
    if causal and keys > past + tokens:
        checks.fail(
            name, f"{keys} keys end at position {past + tokens - 1}; expected past to be at least {keys - tokens}"
        )
    packing.check(name, segments, batch, keys)
    if segments is not None and keys < tokens:
        checks.fail(name, f"segments need a key for each query, but there are {tokens} queries and {keys} keys")
    checks.positive(name, "softcap", softcap)
    if key_length is not None:
        checks.integers(name, "key_length", key_length)
        checks.shape(name, "key_length", key_length, "batch", (batch,))
    if clip is not None and not clip[1] <= 0 < 1 <= clip[0]:
        checks.fail(name, f"clip is {clip}, expected (zeta, gamma) with zeta at least 1 and gamma at most 0")
    given = {
        "segments": segments,
        "key_length": key_length,
        "prefix": _prefix(prefix, q),
        "blocks": _blocks(blocks, block, heads, past + tokens, past + tokens - keys),
        "alibi_slopes": alibi_slopes,
        "bias": bias,
        "log_forget": log_forget,
        "sink": sink,
    }
    extras = Extras(**given)
    _check_score_terms(extras, causal, batch, tokens, keys, heads)
    checks.one_device(name, q=q, k=k, v=v, **given)
    rules = Rules(
        causal=causal,
        scale=head_dim**-0.5 if scale is None else scale,
        window=window,
        dilation=dilation,
        block=1 if block is None else block,
        softcap=softcap,
        clip=clip,
        first=past + tokens - keys,
        lse=return_lse,
    )
    facts = {
        "sequences": batch,
        "tokens": tokens,
        "keys": keys,
        "heads": heads,
        "head_dim": head_dim,
        "value_dim": v.shape[3],
        "causal": causal,
        "window": window,
        "dilation": dilation,
        "block": block,
        "past": past,
        "first": rules.first,
        "softcap": softcap is not None,
        "clip": clip is not None,
        "lse": return_lse,
        "extras": tuple(other for other, tensor in given.items() if tensor is not None),
    }
    out, lse = _ATTENTION.select(Call(q.device.type, q.dtype, facts))(q, k, v, extras, rules)
    return (out, lse) if return_lse else out


def _prefix(prefix: int | Tensor | None, q: Tensor) -> Tensor | None:
    if isinstance(prefix, Tensor):
        checks.integers(_NAME, "prefix", prefix)
        checks.shape(_NAME, "prefix", prefix, "batch", (q.shape[0],))
        return prefix
    if prefix is None:
        return None
    if not isinstance(prefix, int | torch.SymInt):
        checks.fail(_NAME, f"prefix is of type {type(prefix).__name__}, expected an integer or a tensor [batch]")
    if prefix < 0:
        checks.fail(_NAME, f"prefix is {prefix}, expected at least 0")
    return torch.full((q.shape[0],), prefix, device=q.device)


def _blocks(blocks: Tensor | None, block: int | None, heads: int, end: int, first: int) -> Tensor | None:
    """The pattern as `[heads or 1, query_blocks, key_blocks]`; positions go up to `end`."""
    if blocks is None or block is None:
        if blocks is not None or block is not None:
            checks.fail(_NAME, "blocks and block come together: a pattern and the positions in one of its blocks")
        return None
    if block < 1:
        checks.fail(_NAME, f"block is {block}, expected at least 1")
    if blocks.dtype != torch.bool:
        checks.fail(_NAME, f"blocks has dtype {blocks.dtype}, expected torch.bool")
    if blocks.dim() == 2:
        blocks = blocks[None]
    checks.rank(_NAME, "blocks", blocks, "heads, query_blocks, key_blocks")
    if first < 0:
        checks.fail(_NAME, f"blocks need keys at positions from 0, but the first key is at {first}")
    if blocks.shape[0] not in (1, heads) or min(blocks.shape[1:]) * block < end:
        checks.fail(
            _NAME,
            f"blocks has shape {list(blocks.shape)}, expected [heads, query_blocks, key_blocks] = "
            f"{[heads, -(-end // block), -(-end // block)]} or more for {end} positions in blocks of {block}",
        )
    return blocks


def _check_score_terms(extras: Extras, causal: bool, batch: int, tokens: int, keys: int, heads: int) -> None:
    if extras.alibi_slopes is not None:
        checks.shape(_NAME, "alibi_slopes", extras.alibi_slopes, "heads", (heads,))
    if extras.sink is not None:
        checks.shape(_NAME, "sink", extras.sink, "heads", (heads,))
    if extras.bias is not None:
        checks.rank(_NAME, "bias", extras.bias, "heads, distances")
        checks.shape(_NAME, "bias", extras.bias, "heads, distances", (heads, max(1, extras.bias.shape[1])))
    if extras.log_forget is not None:
        checks.shape(_NAME, "log_forget", extras.log_forget, "batch, keys, heads", (batch, keys, heads))
        if not causal or extras.prefix is not None:
            checks.fail(_NAME, "log_forget goes from earlier to later tokens; expected causal=True and no prefix")
        if keys < tokens:
            checks.fail(_NAME, f"log_forget needs a key for each query, but there are {tokens} queries, {keys} keys")
