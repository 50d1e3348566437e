"""Attention on `scaled_dot_product_attention`, in blocks where a window leaves most keys unseen."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.work import attention_block


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    segments: Tensor | None,
    alibi_slopes: Tensor | None,
    softcap: float | None,
    scale: float,
    key_length: Tensor | None,
) -> Tensor:
    batch, tokens, heads = q.shape[:3]
    keys = k.shape[1]
    if batch == 0 or tokens == 0 or keys == 0:
        return q.new_zeros(batch, tokens, heads, v.shape[3])
    if window is not None and window >= max(keys, tokens):
        window = None
    if tokens == 1 and window is None:
        causal = False

    extras = segments is not None or alibi_slopes is not None or softcap is not None or key_length is not None
    if window is None and not extras and (not causal or tokens == keys):
        return _product(q, k, v, scale, None, causal)

    dtype = q.dtype
    if alibi_slopes is not None or softcap is not None:
        # Distances and capped scores need more digits than half precision has.
        q, k, v = (x.to(at_least_float32(dtype)) for x in (q, k, v))
    cut = None if softcap is not None else attention_block(tokens, keys, window, causal)
    if window is not None and cut is not None:
        return _in_blocks(q, k, v, *cut, window, segments, alibi_slopes, scale, key_length).to(dtype)

    key_index = torch.arange(keys, device=q.device)
    # [tokens, keys]
    distance = torch.arange(keys - tokens, keys, device=q.device)[:, None] - key_index
    visible = _within(distance, causal, window)
    if segments is not None:
        visible = _both(visible, segments[:, None, keys - tokens :, None] == segments[:, None, None, :])
    if key_length is not None:
        visible = _both(visible, key_index < key_length[:, None, None, None])
    # A causal query whose own key is there always sees that one.
    seen = None
    if visible is not None and (not causal or keys < tokens or key_length is not None):
        seen = visible.any(-1, keepdim=True)
        visible = visible | ~seen
    if visible is None and alibi_slopes is not None:
        visible = torch.ones_like(distance, dtype=torch.bool)[None, None]
    mask = None if visible is None else _mask(visible, distance, alibi_slopes, q.dtype)
    out = _product(q, k, v, scale, mask) if softcap is None else _capped(q, k, v, scale, mask, softcap)
    return (out if seen is None else out.masked_fill(~seen.transpose(1, 2), 0)).to(dtype)


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


def _mask(visible: Tensor, distance: Tensor, alibi_slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What the scores meet: where keys are visible, or with slopes what is added, `-inf` where a key is hidden."""
    if alibi_slopes is None:
        return visible
    bias = -alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    return torch.where(visible, bias, float("-inf"))


def _product(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    batch, tokens, heads, _ = q.shape
    kv_heads = k.shape[2]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    if tokens > 1 or heads == kv_heads:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k, v, mask, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
        )
        return out.transpose(1, 2)
    # One query: the heads that share keys become its rows, and no key is repeated.
    rows = q.view(batch, kv_heads, heads // kv_heads, -1)
    if mask is not None and mask.shape[-3] != 1:
        mask = mask.view(-1, *rows.shape[1:3], mask.shape[-1])
    elif mask is not None:
        mask = mask.expand(-1, 1, rows.shape[2], -1)
    return F.scaled_dot_product_attention(rows, k, v, mask, scale=scale).reshape(batch, 1, heads, -1)


def _capped(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None, softcap: float) -> Tensor:
    batch, tokens, heads, head_dim = q.shape
    keys, kv_heads = k.shape[1:3]
    # The heads that share keys become rows: [batch, kv_heads, rows, keys].
    q = q.view(batch, tokens, kv_heads, -1, head_dim).permute(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, head_dim)
    scores = softcap * torch.tanh(q @ k.permute(0, 2, 3, 1) * (scale / softcap))
    scores = scores.view(batch, heads, tokens, keys)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    out = scores.softmax(-1).view(batch, kv_heads, -1, keys) @ v.transpose(1, 2)
    return out.view(batch, heads, tokens, -1).transpose(1, 2)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block: int,
    reach: int,
    window: int,
    segments: Tensor | None,
    alibi_slopes: Tensor | None,
    scale: float,
    key_length: Tensor | None,
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
        return F.pad(x, (0, 0) * (x.dim() - 2) + (max(0, front), back)).unfold(1, reach, block)

    row, column = torch.arange(block, device=q.device), torch.arange(reach, device=q.device)
    distance = row[:, None] + (reach - block) - column
    # [blocks, reach]; a padded key comes before the first or, by causality, is seen by padded queries only.
    key_index = torch.arange(blocks, device=q.device)[:, None] * block + column - front
    # [batch or 1, blocks, heads or 1, block, reach]
    visible = (distance >= 0) & (distance < window) & (key_index >= 0)[None, :, None, None]
    if segments is not None:
        pieces = cut(segments)
        visible = visible & (pieces[:, :, None, -block:, None] == pieces[:, :, None, None, :])
    seen = None
    if key_length is not None:
        visible = visible & (key_index < key_length[:, None, None])[:, :, None, None]
        seen = visible.any(-1, keepdim=True)
        visible = visible | ~seen
    mask = _mask(visible, distance, alibi_slopes, q.dtype)
    q = F.pad(q, (0, 0, 0, 0, 0, back)).unflatten(1, (blocks, block))
    k, v = (cut(x).movedim(-1, 2) for x in (k, v))
    # Blocks take the place of the batch, row by row: merging the two would copy the overlapping pieces.
    rows = zip(q.unbind(), k.unbind(), v.unbind(), mask.expand(batch, -1, -1, -1, -1).unbind(), strict=True)
    out = torch.stack([_product(queries, near, values, scale, one) for queries, near, values, one in rows])
    if seen is not None:
        out = out.masked_fill(~seen.transpose(2, 3), 0)
    return out.flatten(1, 2)[:, :tokens]
