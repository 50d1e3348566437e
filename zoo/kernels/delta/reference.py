"""The delta rule one step after another, as the formula reads."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.decay import at_most_one
from zoo.kernels.segments import starts


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float | None,
    steps: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    del chunk
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    out_dtype = v.dtype
    dtype = at_least_float32(v.dtype if state is None else torch.promote_types(v.dtype, state.dtype))
    q, k = (x.to(dtype).repeat_interleave(heads // groups, 2) for x in (q, k))
    v, beta = v.to(dtype), beta.to(dtype)
    S = v.new_zeros(batch, heads, key_dim, value_dim) if state is None else state.to(dtype)
    decay = v.new_ones(batch, tokens, heads)
    if log_decay is not None:
        decay = decay * at_most_one(log_decay.to(dtype)).exp()
    if segments is not None:
        decay = decay.masked_fill(starts(segments)[..., None], 0)

    outputs = [v.new_empty(batch, 0, heads, value_dim)]
    taken = zip(*(x.unbind(1) for x in (k, v, beta[..., None])), strict=True)
    for q_t, decay_t in zip(q.unbind(1), decay.unbind(1), strict=True):
        S = decay_t[:, :, None, None] * S
        for _ in range(steps):
            k_t, v_t, beta_t = next(taken)
            missing = v_t - torch.einsum("bhk,bhkv->bhv", k_t, S)
            S = S + k_t[:, :, :, None] * (beta_t * missing)[:, :, None, :]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q_t, S)[:, None])
    out = torch.cat(outputs, 1)
    return (out if scale is None else out * scale).to(out_dtype), S
