"""The recurrence one token after another, as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.decay import at_most_one
from zoo.kernels.segments import starts


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    del chunk
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    dtype = at_least_float32(v.dtype if state is None else torch.promote_types(v.dtype, state.dtype))
    q, k = (x.to(dtype).repeat_interleave(heads // groups, 2) for x in (q, k))
    S = v.new_zeros(batch, heads, key_dim, value_dim, dtype=dtype) if state is None else state.to(dtype)
    # [batch, tokens, heads, key_dim or 1]
    decay = v.new_ones(batch, tokens, heads, 1, dtype=dtype)
    if log_decay is not None:
        factor = at_most_one(log_decay.to(dtype)).exp()
        by_channel = factor.dim() == 4
        decay = decay * (factor.repeat_interleave(heads // factor.shape[2], 2) if by_channel else factor[..., None])
    if segments is not None:
        decay = decay.masked_fill(starts(segments)[..., None, None], 0)

    outputs = [v.new_empty(batch, 0, heads, value_dim, dtype=dtype)]
    for q_t, k_t, v_t, decay_t in zip(*(x.unbind(1) for x in (q, k, v.to(dtype), decay)), strict=True):
        S = decay_t[:, :, :, None] * S + k_t[:, :, :, None] * v_t[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, S)[:, None])
    out = torch.cat(outputs, 1)
    return (out if scale is None else out * scale).to(v.dtype), S
