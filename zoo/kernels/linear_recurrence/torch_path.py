"""The recurrence in chunks: matrix products inside a chunk, a short loop that carries the state between chunks.

On CPUs chunks are computed one after another, so that what is between the products stays in the cache. Where decays are
mild, as they nearly always are, a chunk's decays `exp(total_i - total_j)` are split into a factor for each token, and
the products are those of a recurrence without decay; other chunks, and all of them in a compiled graph or on another
device, keep the decays of pairs together, which can not overflow.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.decay import at_most_one, bounded, highest, lowest
from zoo.kernels.segments import runs, starts

MILD = 60.0
"""Logarithm of the largest factor of a token: products with it stay far from the range of float32."""


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
    if log_decay is not None:
        log_decay = log_decay.to(dtype)
        if log_decay.dim() == 1:
            log_decay = log_decay.expand(1, tokens, heads)
    if state is None:
        state = v.new_zeros(batch, heads, key_dim, value_dim)
    state = state.to(dtype)

    if v.numel() == 0 and tokens * batch == 0:
        return v.to(out_dtype), state
    if tokens == 1:
        out, state = _step(q if scale is None else q * scale, k, v, log_decay, state)
    else:
        scale = 1.0 if scale is None else scale
        out, state = _in_chunks(q, k, v, log_decay, state, segments, scale, min(chunk, tokens))
    return out.to(out_dtype), state


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    batch, _, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    # [batch, groups, heads of the group, key_dim, value_dim]
    S = state.view(batch, groups, -1, key_dim, value_dim)
    if log_decay is not None:
        factor = bounded(log_decay).exp()
        by_channel = (batch, groups, 1, key_dim, 1)
        S = S * factor.view((-1, groups, heads // groups, 1, 1) if log_decay.dim() == 3 else by_channel)
    S = torch.addcmul(S, k.view(batch, groups, 1, key_dim, 1), v.view(batch, groups, -1, 1, value_dim))
    out = q.view(batch, groups, 1, 1, key_dim) @ S
    return out.view(batch, 1, heads, value_dim), S.view(state.shape)


def _in_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    batch, tokens, groups, _ = q.shape
    heads, value_dim = v.shape[2:]
    padding = -tokens % chunk
    run, begins = None, None
    if segments is not None:
        run, begins = runs(segments), starts(segments)
    if padding:
        # A padded token has key 0 and decay 1, so it changes nothing, and its output is cut off.
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
        if log_decay is not None:
            log_decay = F.pad(log_decay, (0, 0) * (log_decay.dim() - 2) + (0, padding))
        if run is not None and begins is not None:
            run, begins = torch.cat([run, run[:, -1:].expand(-1, padding)], 1), F.pad(begins, (0, padding))
    by_channel = log_decay is not None and log_decay.dim() == 4
    before = None if run is None else run[:, :1]

    def together(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor]:
        state, run, begins, before = rest
        q, log_decay = q * scale, None if log_decay is None else bounded(log_decay)
        if log_decay is not None and by_channel:
            return _by_channel(q, k, v, log_decay, state, begins, chunk)
        return _chunked(q, k, v, log_decay, state, run, before, chunk)

    if q.device.type != "cpu" or torch.compiler.is_compiling():
        # A compiler would have one graph for each chunk.
        out, state = together(q, k, v, log_decay, state, run, begins, before)
        return out[:, :tokens], state

    count = (tokens + padding) // chunk
    within = [False] * count if begins is None else begins.unflatten(1, (-1, chunk)).any(2).any(0).tolist()
    earlier = q.new_ones(chunk, chunk).tril_()
    pieces: list[Any] = [[None] * count if x is None else x.split(chunk, 1) for x in (q, k, v, log_decay, run, begins)]
    # Without gradients each output is laid where it belongs, so that a chunk's memory serves the next.
    shape = (batch, tokens + padding, groups, heads // groups, value_dim)
    whole = None if torch.is_grad_enabled() else v.new_empty(shape)
    outputs = [] if whole is None else list(whole.split(chunk, 1))
    for index, (begin_within, q_, k_, v_, decay, run_, begins_) in enumerate(zip(within, *pieces, strict=True)):
        total = None if decay is None else _sums(decay, earlier)
        # No number where a decay of a channel is minus infinity, which is not mild either.
        least = 0.0 if total is None else total.detach()[:, -1].amin().item()
        if not begin_within and least >= -2 * MILD:
            out, state = _mild_chunk(q_, k_, v_, total, state, scale, centred=least < -MILD)
        else:
            out, state = together(q_, k_, v_, decay, state, run_, begins_, before)
            out = out.view(batch, chunk, groups, -1, value_dim)
        if whole is None:
            outputs.append(out)
        else:
            outputs[index].copy_(out)
        before = None if run_ is None else run_[:, -1:]
    whole = torch.cat(outputs, 1) if whole is None else whole
    return whole.view(batch, -1, heads, value_dim)[:, :tokens], state


def _sums(log_decay: Tensor, earlier: Tensor) -> Tensor:
    """Sums of the logarithms of the decays up to each token of a chunk; `earlier` is a lower triangle of ones."""
    if log_decay.detach().amax() > 0:
        log_decay = at_most_one(log_decay)
    if log_decay.dim() == 3:
        return log_decay.cumsum(1)
    # Sums over tokens are slow where channels are many.
    return (earlier @ log_decay.flatten(2)).view(log_decay.shape)


def _mild_chunk(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, state: Tensor, scale: float, *, centred: bool
) -> tuple[Tensor, Tensor]:
    """`out_i = f_i (sum_(j <= i) (q_i k_j) v_j / f_j + q_i S exp(middle))` with `f = exp(total - middle)`.

    With a decay for each channel the factors are the queries' and the keys'. `middle` is zero unless `centred`, which
    halves the range of the factors.
    """
    batch, chunk, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    per_group = heads // groups
    factor = entering = leaving = None
    if total is not None:
        by_channel = total.dim() == 4
        shape = (-1, groups, key_dim, 1, 1) if by_channel else (-1, groups, 1, per_group, 1)
        if centred:
            middle = (total[:, :1] + total[:, -1:]) / 2
            total, entering = total - middle, middle.exp().view(shape)
        factor = total.exp()
        leaving = factor[:, -1].view(shape)
        if not by_channel:
            v = v * (-total).exp().unsqueeze(-1)
        else:
            # The gradient of a division by small factors would leave the range.
            q, k = q * factor, k * (-total).exp() if total.requires_grad else k / factor

    def flat(x: Tensor, width: int) -> Tensor:
        return x.reshape(batch, chunk, groups, width).transpose(1, 2).reshape(batch * groups, chunk, width)

    # [batch, groups, key_dim, per_group, value_dim]
    memory = state.view(batch, groups, per_group, key_dim, value_dim).transpose(2, 3)
    inner, width = memory.shape, per_group * value_dim
    if entering is not None:
        memory = memory * entering
    memory = memory.reshape(batch * groups, key_dim, width)
    q, k, v = flat(q, key_dim), flat(k, key_dim), flat(v, width)
    scores = torch.bmm(q, k.transpose(1, 2)).tril_()
    out = torch.baddbmm(torch.bmm(q, memory), scores, v, beta=scale, alpha=scale)
    if factor is not None and factor.dim() == 3:
        by_group = factor.view(-1, chunk, groups, per_group).transpose(1, 2).unsqueeze(-1)
        out = out.view(batch, groups, chunk, per_group, value_dim) * by_group
    out = out.view(batch, groups, chunk, per_group, value_dim).transpose(1, 2)
    memory = torch.baddbmm(memory, k.transpose(1, 2), v).view(inner)
    if leaving is not None:
        memory = memory * leaving
    return out, memory.transpose(2, 3).reshape(state.shape)


def _by_channel(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor, begins: Tensor | None, chunk: int
) -> tuple[Tensor, Tensor]:
    """Chunks with a decay for each channel, by halves: from the first half of a block to the second, a pair's decay is
    what the first half lets out times what the second half lets in. No factor is above 1, so none overflows.
    """
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    decay = log_decay.exp()
    if begins is not None:
        decay = decay.masked_fill(begins[:, :, None, None], 0)
    size = 1 << (chunk - 1).bit_length()

    def blocks(x: Tensor, fill: float = 0.0) -> Tensor:
        """`[batch, chunks, groups, size, width]`"""
        x = x.reshape(batch, -1, chunk, groups, x.shape[2:].numel() // groups).transpose(2, 3)
        return F.pad(x, (0, 0, 0, size - chunk), value=fill)

    q, k, v, decay = blocks(q), blocks(k), blocks(v), blocks(decay, 1.0)
    lead = q.shape[:3]
    scores = (q * k).sum(-1).view(*lead, size, 1, 1)
    # Products of decays from the beginning of a block up to a token, and from behind a token to the block's end.
    into, out_of = decay, torch.ones_like(decay)
    block = 1
    while block < size:

        def halves(x: Tensor, block: int = block) -> tuple[Tensor, ...]:
            return x.reshape(*lead, size // (2 * block), 2, block, x.shape[-1]).unbind(-3)

        (_, q_2), (k_1, _), (into_1, into_2), (out_1, out_2) = halves(q), halves(k), halves(into), halves(out_of)
        across = (q_2 * into_2) @ (k_1 * out_1).transpose(-1, -2)
        first, second = halves(scores)
        scores = torch.cat([F.pad(first, (0, block)), torch.cat([across, second], -1)], -2)
        into = torch.cat([into_1, into_2 * into_1[..., -1:, :]], -2)
        out_of = torch.cat([out_1 * into_2[..., -1:, :], out_2], -2)
        block *= 2
    scores, into, out_of = (x.reshape(*lead, size, x.shape[-1]) for x in (scores, into, out_of))
    per_group = heads // groups
    update = ((k * out_of).transpose(-1, -2) @ v).view(*lead, key_dim, per_group, value_dim)
    entering, state = _carry(
        state.view(batch, groups, per_group, key_dim, value_dim).transpose(2, 3),
        update,
        into[..., -1, :, None, None],
    )
    out = scores @ v + (q * into) @ entering.flatten(-2)
    out = out[..., :chunk, :].transpose(2, 3).reshape(batch, tokens, heads, value_dim)
    return out, state.transpose(2, 3).reshape(batch, heads, key_dim, value_dim)


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
    chunks = tokens // chunk
    per_group = heads // groups

    # [batch, chunks, groups, chunk, key_dim] and [batch, chunks, groups, chunk, per_group, value_dim]
    q, k = (x.reshape(batch, chunks, chunk, groups, key_dim).transpose(2, 3) for x in (q, k))
    v = v.reshape(batch, chunks, chunk, groups, per_group, value_dim).transpose(2, 3)

    # Factors of the state that enters a chunk as each token sees it, and of each token's update at the chunk's end:
    # [batch, chunks, groups, chunk, per_group, 1], with 1 where they do not depend on a dimension.
    from_start = to_end = None
    visible = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril()
    if run is not None and run_before is not None:
        run = run.view(batch, chunks, 1, chunk)
        visible = visible & (run.unsqueeze(-1) == run.unsqueeze(-2))
        last = run[..., -1:]
        before = torch.cat([run_before[:, None, None], last[:, :-1]], 1)
        from_start, to_end = ((run == other)[..., None, None].to(q.dtype) for other in (before, last))

    # Computed once per group, whatever the number of its heads.
    scores = (q @ k.transpose(-1, -2)).masked_fill_(~visible, 0)
    if log_decay is None:
        within = (scores @ v.flatten(-2)).view(v.shape)
    else:
        log_decay = log_decay.reshape(-1, chunks, chunk, groups, per_group)
        total = log_decay.cumsum(2).permute(0, 1, 3, 4, 2)
        # Above the diagonal, where scores are zero, the exponential would overflow.
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).clamp_(lowest(q.dtype), highest(q.dtype)).exp_()
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
    out = out.add_(within).transpose(2, 3).reshape(batch, tokens, heads, value_dim)
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
