"""Attention with the whole matrix of scores, as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.softmax_attention.terms import Extras, Rules, middle


def attention(q: Tensor, k: Tensor, v: Tensor, extras: Extras, rules: Rules) -> tuple[Tensor, Tensor]:
    tokens, heads = q.shape[1:3]
    keys, kv_heads = k.shape[1:3]
    dtype = at_least_float32(q.dtype)
    k, v = (x.to(dtype).repeat_interleave(heads // kv_heads, 2) for x in (k, v))

    scores = torch.einsum("bihd,bjhd->bhij", q.to(dtype), k) * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    key_index = torch.arange(keys, device=q.device)
    query_index = torch.arange(tokens, device=q.device) + keys - tokens
    distance = query_index[:, None] - key_index
    if extras.alibi_slopes is not None:
        scores = scores - extras.alibi_slopes.to(dtype)[:, None, None] * distance.abs()
    if extras.bias is not None:
        entry = (distance + middle(rules, extras.bias)).clamp(0, extras.bias.shape[1] - 1)
        scores = scores + extras.bias.to(dtype)[:, entry]

    visible = torch.ones_like(scores, dtype=torch.bool)
    if rules.causal:
        visible = visible & (distance >= 0)
    if rules.window is not None:
        visible = visible & (distance.abs() < rules.window)
    if extras.prefix is not None:
        visible = visible | (key_index + rules.first < extras.prefix[:, None])[:, None, None]
    visible = visible & (distance % rules.dilation == 0)
    if extras.blocks is not None:
        rows, columns = (query_index + rules.first) // rules.block, (key_index + rules.first) // rules.block
        visible = visible & extras.blocks[:, rows[:, None], columns]
    if extras.segments is not None:
        same = extras.segments[:, keys - tokens :, None] == extras.segments[:, None, :]
        visible = visible & same[:, None]
    if extras.key_length is not None:
        visible = visible & (key_index < extras.key_length[:, None])[:, None, None]
    if extras.log_forget is not None:
        # A gate of zero, whose logarithm is -inf, hides what lies before it; the others add up.
        gates = extras.log_forget.to(dtype).transpose(1, 2)
        closed = gates == float("-inf")
        decay, closures = gates.masked_fill(closed, 0).cumsum(-1), closed.cumsum(-1)
        scores = scores + decay[..., keys - tokens :, None] - decay[..., None, :]
        visible = visible & (closures[..., keys - tokens :, None] == closures[..., None, :])

    seen = visible.any(-1, keepdim=True)
    if extras.sink is not None:
        logits = extras.sink.to(dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores.masked_fill(~visible, float("-inf")), logits), -1)
        log_sum = scores.logsumexp(-1)
    else:
        scores = scores.masked_fill(~visible & seen, float("-inf"))
        log_sum = scores.logsumexp(-1).masked_fill(~seen[..., 0], float("-inf"))
    weights = scores.softmax(-1)[..., :keys].masked_fill(~visible, 0)
    if rules.clip is not None:
        zeta, gamma = rules.clip
        weights = ((zeta - gamma) * weights + gamma).clamp(0, 1).masked_fill(~visible, 0)
    return torch.einsum("bhij,bjhd->bihd", weights, v).to(q.dtype), log_sum.transpose(1, 2)
