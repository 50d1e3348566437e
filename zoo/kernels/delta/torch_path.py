"""The delta rule in chunks, in the WY form (Yang et al. 2024, arXiv 2406.06484, section 3).

With `G` the sum of the log decays from the chunk's start and `S` the state that enters it, the update that token `i`
writes is `u_i = beta_i (v_i - exp(G_i) k_i S) - sum_(j<i) A_ij u_j`, `A_ij = beta_i exp(G_i - G_j) k_i k_j^T`: one
triangular system for a chunk. Its right side needs the state, so only that, the solution and the update of the state
are computed chunk after chunk.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32
from zoo.kernels.decay import bounded, highest, lowest
from zoo.kernels.segments import runs

# Elements of the largest tensor between two products, kept near the size of a core's second-level cache.
_SPAN_ELEMENTS = 1 << 18


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
    batch, tokens, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    out_dtype = v.dtype
    dtype = at_least_float32(v.dtype if state is None else torch.promote_types(v.dtype, state.dtype))
    q, k, v, beta = (x.to(dtype) for x in (q, k, v, beta))
    if scale is not None:
        q = q * scale
    if log_decay is not None:
        log_decay = bounded(log_decay.to(dtype))
    if state is None:
        state = v.new_zeros(batch, heads, key_dim, value_dim)
    state = state.to(dtype)

    if tokens == 0:
        return v.to(out_dtype), state
    if tokens == 1:
        out, state = _step(q, k, v, beta, log_decay, state)
    else:
        out, state = _in_spans(q, k, v, beta, log_decay, state, segments, steps, min(max(1, chunk // steps), tokens))
    return out.to(out_dtype), state


def _step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    heads = v.shape[2]
    q, k = (x.repeat_interleave(heads // x.shape[2], 2) for x in (q, k))
    S = state
    if log_decay is not None:
        S = S * log_decay.exp().view(-1, heads, 1, 1)
    for k_t, v_t, beta_t in zip(*(x.unbind(1) for x in (k, v, beta[..., None])), strict=True):
        missing = v_t - (k_t.unsqueeze(2) @ S).squeeze(2)
        S = torch.addcmul(S, k_t.unsqueeze(3), (beta_t * missing).unsqueeze(2))
    return (q.squeeze(1).unsqueeze(2) @ S).transpose(1, 2), S


def _in_spans(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    steps: int,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """A few chunks after another, so that what is between the products stays in the cache; `chunk` counts tokens."""
    batch, tokens, _, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    padding = -tokens % chunk
    if padding:
        # A padded token has beta 0 and decay 1, so it changes nothing, and its output is cut off.
        q = F.pad(q, (0, 0, 0, 0, 0, padding))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, padding * steps)) for x in (k, v))
        beta = F.pad(beta, (0, 0, 0, padding * steps))
    if log_decay is not None:
        log_decay = F.pad(log_decay.expand(batch, tokens, heads), (0, 0, 0, padding))
    run = None if segments is None else runs(segments)
    if run is not None:
        run = torch.cat([run, run[:, -1:].expand(-1, padding)], 1)
    before = None if run is None else run[:, :1]

    # A compiler fuses the passes itself, and would have one graph for each span.
    rows = chunk * steps
    a_chunk = batch * rows * heads * max(rows, key_dim, value_dim)
    span = tokens + padding if torch.compiler.is_compiling() else chunk * max(1, _SPAN_ELEMENTS // max(1, a_chunk))
    pieces = [x.split(span * steps, 1) for x in (k, v, beta)]
    count = len(pieces[0])
    decays = [None] * count if log_decay is None else log_decay.split(span, 1)
    run_pieces = [None] * count if run is None else run.split(span, 1)
    S = state.reshape(batch * heads, key_dim, value_dim)
    outputs: list[Tensor] = []
    for q_, k_, v_, beta_, decay, run_ in zip(q.split(span, 1), *pieces, decays, run_pieces, strict=True):
        found, S = _chunked(q_, k_, v_, beta_, decay, S, run_, before, steps, chunk)
        outputs += found
        before = None if run_ is None else run_[:, -1:]
    return torch.cat(outputs, 1)[:, :tokens], S.view(state.shape)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    run: Tensor | None,
    run_before: Tensor | None,
    steps: int,
    chunk: int,
) -> tuple[list[Tensor], Tensor]:
    """The outputs of whole chunks, and the state after them; `state` is `[batch * heads, key_dim, value_dim]`.

    `run` numbers the runs of equal segments, `[batch, tokens]`; `run_before` is the state's, `[batch, 1]`. Below,
    `rows` are the steps of a chunk, of which each token has `steps`.
    """
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    chunks, rows, per_group = tokens // chunk, chunk * steps, heads // groups

    # [chunks, batch, groups, 1, chunk or rows, key_dim], [chunks, batch, groups, per_group, rows, value_dim or 1]
    q = q.view(batch, chunks, chunk, groups, 1, key_dim).permute(1, 0, 3, 4, 2, 5).contiguous()
    k = k.view(batch, chunks, rows, groups, 1, key_dim).permute(1, 0, 3, 4, 2, 5).contiguous()
    v = v.view(batch, chunks, rows, groups, per_group, value_dim).permute(1, 0, 3, 4, 2, 5).contiguous()
    beta = beta.view(batch, chunks, rows, groups, per_group, 1).permute(1, 0, 3, 4, 2, 5)

    # Computed once per group, whatever the number of its heads.
    keys_transposed = k.transpose(-1, -2)
    system, scores = k @ keys_transposed, q @ keys_transposed
    if steps == 1:
        scores = scores.tril()
    else:
        token = torch.arange(rows, device=q.device) // steps
        scores = scores.masked_fill_(token > token[::steps, None], 0)

    # Factors of the state that enters the chunk as each row sees it, of each row's update at the chunk's end, and of
    # the state itself there; those of updates as later rows see them go into `system` and `scores`.
    from_start = to_end = whole = None
    if log_decay is not None:
        # In float64 differences of sums are as exact as the decays, and so is the gradient, a difference of sums too.
        wide = log_decay.dtype if log_decay.device.type == "mps" else torch.float64
        total = log_decay.view(batch, chunks, chunk, groups, per_group).cumsum(2, dtype=wide).permute(1, 0, 3, 4, 2)
        total = total.repeat_interleave(steps, -1) if steps > 1 else total.contiguous()
        # Above the diagonal the exponential would overflow.
        decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).to(q.dtype).clamp_(lowest(q.dtype), highest(q.dtype)).exp_()
        system, scores = system * decay, scores * decay[..., ::steps, :]
        from_start, to_end = (x.to(q.dtype).exp().unsqueeze(-1) for x in (total, total[..., -1:] - total))
        whole = from_start[..., -1:, :]
    if run is not None and run_before is not None:
        run = run.repeat_interleave(steps, 1).view(batch, chunks, 1, 1, rows).transpose(0, 1)
        same = run.unsqueeze(-1) == run.unsqueeze(-2)
        system, scores = system.masked_fill(~same, 0), scores.masked_fill(~same[..., ::steps, :], 0)
        last = run[..., -1:]
        before = torch.cat([run_before[None, :, None, None], last[:-1]])
        seen, kept = ((run == other).unsqueeze(-1).to(q.dtype) for other in (before, last))
        from_start = seen if from_start is None else from_start * seen
        to_end = kept if to_end is None else to_end * kept
        whole = from_start[..., -1:, :]

    def for_heads(x: Tensor) -> Tensor:
        x = x.expand(chunks, batch, groups, per_group, *x.shape[-2:])
        return x.reshape(chunks, batch * heads, *x.shape[-2:])

    system = for_heads(system * beta)
    wanted = for_heads(v * beta)
    reads = for_heads(k * (beta if from_start is None else beta * from_start))
    writes = for_heads(keys_transposed if to_end is None else (k * to_end).transpose(-1, -2))
    factors = None if whole is None else for_heads(whole).unbind()

    queries = for_heads(q if from_start is None else q * from_start[..., ::steps, :])

    # `unbind` keeps the backward linear in the number of chunks, where indexing would make it quadratic.
    outputs = []
    for index, (matrix, right, read, write, query, score) in enumerate(
        zip(*(x.unbind() for x in (system, wanted, reads, writes, queries, for_heads(scores))), strict=True)
    ):
        right = torch.baddbmm(right, read, state, alpha=-1)
        update = torch.linalg.solve_triangular(matrix, right, upper=False, unitriangular=True)
        outputs.append(torch.baddbmm(query @ state, score, update).view(batch, heads, chunk, value_dim).transpose(1, 2))
        state = torch.baddbmm(state if factors is None else state * factors[index], write, update)
    return outputs, state
