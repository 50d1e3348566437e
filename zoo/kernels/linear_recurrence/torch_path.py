"""The recurrence in chunks: matrix products inside a chunk, a short loop that carries the state between chunks."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.segments import runs

# Elements of the largest tensor between two products, kept near the size of a core's second-level cache.
_SPAN_ELEMENTS = 1 << 18


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
    batch, tokens, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    out_dtype = v.dtype
    dtype = at_least_float32(v.dtype if state is None else torch.promote_types(v.dtype, state.dtype))
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if scale is not None:
        q = q * scale
    if log_decay is not None:
        log_decay = log_decay.to(dtype).clamp(_least_exponent(dtype), 0)
    if state is None:
        state = v.new_zeros(batch, heads, key_dim, value_dim)
    state = state.to(dtype)

    if tokens == 0:
        return v.to(out_dtype), state
    if tokens == 1:
        out, state = _step(q, k, v, log_decay, state)
    else:
        out, state = _in_spans(q, k, v, log_decay, state, segments, min(chunk, tokens))
    return out.to(out_dtype), state


def _least_exponent(dtype: torch.dtype) -> float:
    """The logarithm of the least normal number: what has decayed below it is taken to have that weight.

    It keeps sums of logarithms finite, so that differences of them are never inf - inf, and keeps the exponential off
    the numbers below the normal ones, where it is ten times slower.
    """
    return math.log(torch.finfo(dtype).tiny)


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    # [batch, groups, heads of the group, key_dim, value_dim]
    S = state.view(batch, groups, -1, key_dim, value_dim)
    if log_decay is not None:
        S = S * log_decay.exp().view(-1, groups, heads // groups, 1, 1)
    S = torch.addcmul(S, k.view(batch, groups, 1, key_dim, 1), v.view(batch, groups, -1, 1, value_dim))
    out = q.view(batch, groups, 1, 1, key_dim) @ S
    return out.view(batch, 1, heads, value_dim), S.view(state.shape)


def _in_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """A few chunks after another, so that what is between the products stays in the cache."""
    batch, tokens, heads, value_dim = v.shape
    a_chunk = batch * chunk * heads * max(chunk, value_dim)
    # A compiler fuses the passes itself, and would have one graph for each span.
    span = tokens if torch.compiler.is_compiling() else chunk * max(1, _SPAN_ELEMENTS // max(1, a_chunk))
    pieces = [x.split(span, 1) for x in (q, k, v)]
    count = len(pieces[0])
    decays = [log_decay] * count if log_decay is None or log_decay.dim() == 1 else log_decay.split(span, 1)
    run = None if segments is None else runs(segments)
    run_pieces = [None] * count if run is None else run.split(span, 1)
    before = None if run is None else run[:, :1]
    outputs = []
    for q_, k_, v_, decay, run_ in zip(*pieces, decays, run_pieces, strict=True):
        out, state = _chunked(q_, k_, v_, decay, state, run_, before, chunk)
        outputs.append(out)
        before = None if run_ is None else run_[:, -1:]
    return torch.cat(outputs, 1), state


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    run: Tensor | None,
    run_before: Tensor | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """`run` numbers the runs of equal segments, `[batch, tokens]`; `run_before` is the state's, `[batch, 1]`."""
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    chunks = -(-tokens // chunk)
    padding = chunks * chunk - tokens
    if padding:
        # A padded token has key 0 and decay 1, so it changes nothing, and its output is cut off.
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
    per_group = heads // groups

    # [batch, chunks, groups, chunk, key_dim] and [batch, chunks, groups, chunk, per_group, value_dim]
    q, k = (x.view(batch, chunks, chunk, groups, key_dim).transpose(2, 3) for x in (q, k))
    v = v.view(batch, chunks, chunk, groups, per_group, value_dim).transpose(2, 3)

    # Factors of the state that enters a chunk as each token sees it, and of each token's update at the chunk's end:
    # [batch, chunks, groups, chunk, per_group, 1], with 1 where they do not depend on a dimension.
    from_start = to_end = None
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if run is not None and run_before is not None:
        run = torch.cat([run, run[:, -1:].expand(-1, padding)], 1).view(batch, chunks, 1, chunk)
        visible = visible & (run.unsqueeze(-1) == run.unsqueeze(-2))
        last = run[..., -1:]
        before = torch.cat([run_before[:, None, None], last[:, :-1]], 1)
        from_start, to_end = ((run == other)[..., None, None].to(q.dtype) for other in (before, last))

    # Computed once per group, whatever the number of its heads.
    scores = (q @ k.transpose(-1, -2)).masked_fill_(~visible, 0)
    if log_decay is None:
        within = (scores @ v.flatten(-2)).view(v.shape)
    else:
        log_decay = log_decay.expand(log_decay.shape[0] if log_decay.dim() == 3 else 1, tokens, heads)
        log_decay = F.pad(log_decay, (0, 0, 0, padding)).view(-1, chunks, chunk, groups, per_group)
        total = log_decay.cumsum(2).permute(0, 1, 3, 4, 2)
        # Above the diagonal, where scores are zero, the exponential would overflow.
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(_least_exponent(q.dtype), 0).exp_()
        within = ((scores.unsqueeze(3) * decay) @ v.transpose(3, 4)).transpose(3, 4)
        decay_from_start = total.exp().transpose(3, 4).unsqueeze(-1)
        decay_to_end = (total[..., -1:] - total).exp().transpose(3, 4).unsqueeze(-1)
        from_start = decay_from_start if from_start is None else from_start * decay_from_start
        to_end = decay_to_end if to_end is None else to_end * decay_to_end

    update = k.transpose(-1, -2) @ (v if to_end is None else v * to_end).flatten(-2)
    entering, state = _carry(
        state.view(batch, groups, per_group, key_dim, value_dim).transpose(2, 3),
        update.view(batch, chunks, groups, key_dim, per_group, value_dim),
        None if from_start is None else from_start[:, :, :, -1].unsqueeze(3),
    )
    out = (q @ entering.flatten(-2)).view(v.shape)
    if from_start is not None:
        out = out * from_start
    out = out.add_(within).transpose(2, 3).reshape(batch, chunks * chunk, heads, value_dim)[:, :tokens]
    return out, state.transpose(2, 3).reshape(batch, heads, key_dim, value_dim)


def _carry(state: Tensor, update: Tensor, decay: Tensor | None) -> tuple[Tensor, Tensor]:
    """The states that enter the chunks, `[batch, chunks, groups, key_dim, per_group, value_dim]`, and the one after.

    `unbind` and `stack` keep the backward linear in the number of chunks, where indexing would make it quadratic.
    """
    factors = None if decay is None else decay.unbind(1)
    entering = []
    for index, one in enumerate(update.unbind(1)):
        entering.append(state)
        state = state + one if factors is None else torch.addcmul(one, state, factors[index])
    return torch.stack(entering, 1), state
