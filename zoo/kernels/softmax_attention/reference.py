"""Attention with the whole matrix of scores, as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import at_least_float32


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
    tokens, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
    dtype = at_least_float32(q.dtype)
    k, v = (x.to(dtype).repeat_interleave(heads // kv_heads, 2) for x in (k, v))

    scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    key_index = torch.arange(keys, device=q.device)
    query_index = torch.arange(tokens, device=q.device) + keys - tokens
    distance = query_index[:, None] - key_index
    if alibi_slopes is not None:
        scores = scores - alibi_slopes.to(dtype)[:, None, None] * distance.abs()

    visible = torch.ones_like(scores, dtype=torch.bool)
    if causal:
        visible = visible & (distance >= 0)
    if window is not None:
        visible = visible & (distance.abs() < window)
    if segments is not None:
        same = segments[:, keys - tokens :, None] == segments[:, None, :]
        visible = visible & same[:, None]
    if key_length is not None:
        visible = visible & (key_index < key_length[:, None])[:, None, None]
    seen = visible.any(-1, keepdim=True)
    weights = scores.masked_fill(~visible & seen, float("-inf")).softmax(-1).masked_fill(~seen, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype)
