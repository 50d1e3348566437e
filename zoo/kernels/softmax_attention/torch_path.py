"""Attention on `scaled_dot_product_attention`, in blocks where a window leaves most keys unseen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.softmax_attention.terms import Extras, Rules, middle
from zoo.kernels.work import attention_block


def attention(q: Tensor, k: Tensor, v: Tensor, extras: Extras, rules: Rules) -> tuple[Tensor, Tensor | None]:
    batch, tokens, heads = q.shape[:3]
    keys = k.shape[1]
    dtype, wide = q.dtype, at_least_float32(q.dtype)
    if batch == 0 or tokens == 0 or keys == 0:
        lse = torch.full((batch, tokens, heads), float("-inf"), dtype=wide, device=q.device)
        if extras.sink is not None:
            lse = lse.logaddexp(extras.sink.to(wide))
        return q.new_zeros(batch, tokens, heads, v.shape[3]), lse
    causal, window, dilation = rules.causal, rules.window, rules.dilation
    if window is not None and window >= max(keys, tokens):
        window = None
    if tokens == 1 and window is None:
        causal = False

    fused = rules.softcap is None and rules.clip is None and not rules.lse
    ruled = window is not None or dilation > 1 or (causal and tokens != keys)
    if fused and not ruled and extras == Extras():
        return _product(q, k, v, rules.scale, None, None, causal), None

    scored = any(x is not None for x in (extras.alibi_slopes, extras.bias, extras.log_forget, extras.sink))
    if scored or not fused:
        # Distances, decays and scores out of a fused product need more digits than half precision has.
        q, k, v = (x.to(wide) for x in (q, k, v))
    sink = None if extras.sink is None else extras.sink.to(wide)
    if fused and window is not None and extras.prefix is None and extras.blocks is None:
        cut = attention_block(tokens, keys, window, causal)
        if cut is not None:
            return _in_blocks(q, k, v, *cut, window, sink, extras, rules).to(dtype), None

    key_index = torch.arange(keys, device=q.device)
    query_index = torch.arange(keys - tokens, keys, device=q.device)
    # [tokens, keys]
    distance = query_index[:, None] - key_index
    visible = _within(distance, causal, window)
    if extras.prefix is not None and visible is not None:
        visible = visible | (key_index + rules.first < extras.prefix[:, None])[:, None, None]
    if dilation > 1:
        visible = _both(visible, (distance % dilation == 0)[None, None])
    if extras.blocks is not None:
        rows, columns = (query_index + rules.first) // rules.block, (key_index + rules.first) // rules.block
        visible = _both(visible, extras.blocks[:, rows[:, None], columns][None])
    if extras.segments is not None:
        segments = extras.segments
        visible = _both(visible, segments[:, None, keys - tokens :, None] == segments[:, None, None, :])
    if extras.key_length is not None:
        visible = _both(visible, key_index < extras.key_length[:, None, None, None])
    added = _of_distance(distance, extras, rules, wide)
    if extras.log_forget is not None:
        decay, closures = _decay(extras.log_forget.to(wide))
        decay, closures = decay.transpose(1, 2), closures.transpose(1, 2)
        change = decay[..., keys - tokens :, None] - decay[..., None, :]
        added = change if added is None else added + change
        visible = _both(visible, closures[..., keys - tokens :, None] == closures[..., None, :])
    # A causal query whose own key is there always sees that one, and a sink is always seen.
    seen = None
    own = causal and keys >= tokens and extras.key_length is None and extras.blocks is None
    if visible is not None and sink is None and not own:
        seen = visible.any(-1, keepdim=True)
        visible = visible | ~seen
    mask = _mask(visible, added)
    if fused:
        out, lse = _product(q, k, v, rules.scale, mask, sink), None
    else:
        out, lse = _written_out(q, k, v, mask, sink, rules)
    if seen is not None:
        out = out.masked_fill(~seen.transpose(1, 2), 0)
        lse = None if lse is None else lse.masked_fill(~seen[..., 0].transpose(1, 2), float("-inf"))
    return out.to(dtype), lse


def _of_distance(distance: Tensor, extras: Extras, rules: Rules, dtype: torch.dtype) -> Tensor | None:
    """What scores gain by their distance, `[heads, *distance.shape]`."""
    added = None
    if extras.alibi_slopes is not None:
        added = -extras.alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    if extras.bias is not None:
        entry = (distance + middle(rules, extras.bias)).clamp(0, extras.bias.shape[1] - 1)
        found = extras.bias.to(dtype)[:, entry]
        added = found if added is None else added + found
    return added


def _decay(log_forget: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the logarithms of the gates up to each key, and how many gates were shut, `[batch, keys, heads]`."""
    closed = log_forget == float("-inf")
    return log_forget.masked_fill(closed, 0).cumsum(1), closed.cumsum(1)


def _within(distance: Tensor, causal: bool, window: int | None) -> Tensor | None:
    """Which distances from query to key are visible, as `[1, 1, tokens, keys]`; None: all."""
    if causal:
        visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    elif window is not None:
        visible = distance.abs() < window
    else:
        return None
    return visible[None, None]


def _both(first: Tensor | None, second: Tensor) -> Tensor:
    return second if first is None else first & second


def _mask(visible: Tensor | None, added: Tensor | None) -> Tensor | None:
    """What the scores meet: where keys are visible, or what is added, `-inf` where a key is hidden."""
    if added is None or visible is None:
        return visible if added is None else added
    return torch.where(visible, added, float("-inf"))


def _product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    sink: Tensor | None,
    causal: bool = False,
) -> Tensor:
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    if sink is not None:
        # One more key and value of zeros, whose score is the sink's logit.
        k, v = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
        if mask is None or mask.dtype == torch.bool:
            zeros = q.new_zeros(1, 1, 1, keys)
            mask = zeros if mask is None else torch.where(mask, zeros, float("-inf"))
        mask = torch.broadcast_to(mask, (*mask.shape[:-3], heads, tokens, keys))
        mask = torch.cat((mask, sink[:, None, None].expand(*mask.shape[:-1], 1)), -1)
    if mask is not None and mask.dim() == 3:
        mask = mask[None]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if tokens > 1 or heads == kv_heads:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2)
    # One query: the heads that share keys become its rows, and no key is repeated.
    rows = q.reshape(batch, kv_heads, heads // kv_heads, -1)
    if mask is not None and mask.shape[-3] != 1:
        mask = mask.reshape(-1, *rows.shape[1:3], mask.shape[-1])
    elif mask is not None:
        mask = mask.expand(-1, 1, rows.shape[2], -1)
    return F.scaled_dot_product_attention(rows, k, v, mask, scale=scale).reshape(batch, 1, heads, -1)


def _written_out(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sink: Tensor | None, rules: Rules
) -> tuple[Tensor, Tensor]:
    """The result and `[batch, tokens, heads]` log-sum-exps, with the scores in memory."""
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # The heads that share keys become rows: [batch, kv_heads, rows, keys].
    q = q.reshape(batch, tokens, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores = q @ k.permute(0, 2, 3, 1)
    if rules.softcap is None:
        scores = scores * rules.scale
    else:
        scores = rules.softcap * torch.tanh(scores * (rules.scale / rules.softcap))
    scores = scores.view(batch, heads, tokens, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sink is not None:
        scores = torch.cat((scores, sink[:, None, None].expand(batch, heads, tokens, 1)), -1)
    weights = scores.softmax(-1)[..., :keys]
    if rules.clip is not None:
        zeta, gamma = rules.clip
        # A hidden key's weight is 0, and stays 0 since gamma is not above it.
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1)
    out = weights.reshape(batch, kv_heads, -1, keys) @ v.transpose(1, 2)
    return out.view(batch, heads, tokens, -1).transpose(1, 2), scores.logsumexp(-1).transpose(1, 2)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    reach: int,
    window: int,
    sink: Tensor | None,
    extras: Extras,
    rules: Rules,
) -> Tensor:
    """Causal attention in a window: each block of queries meets only the `reach` keys that end with the block's."""
    batch, tokens = q.shape[:2]
    keys = k.shape[1]
    blocks = -(-tokens // block)
    back = blocks * block - tokens
    # Before the first block's own keys lie `reach - block` others, which are padded or cut to that number.
    front = reach - block - (keys - tokens)

    def cut(x: Tensor) -> Tensor:
        """`[batch, keys, ...]` to overlapping pieces `[batch, blocks, ..., reach]`, without a copy of any."""
        x = x[:, max(0, -front) :]
        return _padded(x, max(0, front), back).unfold(1, reach, block)

    row, column = torch.arange(block, device=q.device), torch.arange(reach, device=q.device)
    distance = row[:, None] + (reach - block) - column
    # [blocks, reach]; a padded key comes before the first or, by causality, is seen by padded queries only.
    key_index = torch.arange(blocks, device=q.device)[:, None] * block + column - front
    # [batch or 1, blocks, heads or 1, block, reach]
    near = (distance >= 0) & (distance < window) & (distance % rules.dilation == 0)
    visible = near & (key_index >= 0)[None, :, None, None]
    if extras.segments is not None:
        pieces = cut(extras.segments)
        visible = visible & (pieces[:, :, None, -block:, None] == pieces[:, :, None, None, :])
    added = _of_distance(distance, extras, rules, q.dtype)
    if extras.log_forget is not None:
        decay, closures = (cut(x) for x in _decay(extras.log_forget.to(q.dtype)))
        change = decay[..., -block:, None] - decay[..., None, :]
        added = change if added is None else added + change
        visible = visible & (closures[..., -block:, None] == closures[..., None, :])
    seen = None
    if extras.key_length is not None:
        visible = visible & (key_index < extras.key_length[:, None, None])[:, :, None, None]
        if sink is None:
            seen = visible.any(-1, keepdim=True)
            visible = visible | ~seen
    mask = _mask(visible, added)
    assert mask is not None
    q = _padded(q, 0, back).unflatten(1, (blocks, block))
    k, v = (cut(x).movedim(-1, 2) for x in (k, v))
    # Blocks take the place of the batch, row by row: merging the two would copy the overlapping pieces.
    rows = zip(q.unbind(), k.unbind(), v.unbind(), mask.expand(batch, -1, -1, -1, -1).unbind(), strict=True)
    outputs = [_product(queries, near, values, rules.scale, one, sink) for queries, near, values, one in rows]
    out = outputs[0].unsqueeze(0) if batch == 1 else torch.stack(outputs)
    if seen is not None:
        out = out.masked_fill(~seen.transpose(2, 3), 0)
    return out.flatten(1, 2)[:, :tokens]


def _padded(x: Tensor, front: int, back: int) -> Tensor:
    """Zeros around `x` `[batch, tokens, ...]` along the tokens, without writing what `x` covers twice."""
    around = [x.new_zeros(x.shape[0], length, *x.shape[2:]) for length in (front, back)]
    return torch.cat([around[0], x, around[1]], 1) if front or back else x
