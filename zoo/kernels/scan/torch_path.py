"""The selective scan as one fused multiply-add per token, with everything else done for a piece of tokens at once.

It is a custom operator, forward and backward: autograd would keep every state and compilation would unroll the loop.
The backward keeps the states that enter the chunks and computes the others again. States lie as
`[batch, state_dim, channels]`, so that the many channels are neighbours in memory. Passes over states go through pieces
of a chunk, which the cache holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import work


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 1:
        step = delta[:, 0, :, None]
        state = torch.addcmul((delta * x)[:, 0, :, None] * B, torch.exp(step * A), state)
        return (state @ C.transpose(1, 2)).transpose(1, 2), state
    differentiated = torch.is_grad_enabled() and any(each.requires_grad for each in (x, delta, A, B, C, state))
    out, final, _ = _forward(x, delta, A, B, C, state, starts, differentiated)
    return out, final


def _chunks(x: Tensor, A: Tensor) -> tuple[int, int]:
    batch, tokens, channels = x.shape
    return work.selective_scan_chunks(batch, tokens, channels, A.shape[1])


def _rows(x: Tensor) -> Tensor:
    """`[batch, tokens, width]` as `[tokens * batch, 1, width]`."""
    return x.transpose(0, 1).contiguous().view(-1, 1, x.shape[2])


def _sequences(rows: Tensor, batch: int) -> Tensor:
    """The other way round."""
    return rows.view(-1, batch, rows.shape[2]).transpose(0, 1).contiguous()


class _Piece:
    """Decays and states of some tokens, `[tokens * batch, state_dim, channels]`, in buffers that are used again.

    Views are made once: the loop over tokens then costs one operator call a token, and a piece hardly more than its
    passes over the states.
    """

    def __init__(self, batch: int, A: Tensor, decays: Tensor, states: Tensor, update: Tensor) -> None:
        self.batch, self.A, self.decays, self.update = batch, A, decays, update
        self.all_states = states
        """The states, and in front of them the one that enters."""
        self.before, self.states = states[:-batch], states[batch:]
        self.entering, self.last = states[:batch], states[-batch:]
        each = states.split(batch)
        self.decay = decays.split(batch)
        self.steps = list(zip(each[1:], self.decay, each[:-1], strict=True))

    @classmethod
    def empty(cls, tokens: int, x: Tensor, A: Tensor) -> _Piece:
        """Room for so many tokens, with `A` `[state_dim, channels]`."""
        batch = x.shape[0]
        states = x.new_empty((tokens + 1) * batch, *A.shape)
        decays, update = x.new_empty(tokens * batch, *A.shape), x.new_empty(tokens * batch, 1, A.shape[1])
        return cls(batch, A, decays, states, update)

    def first(self, rows: int) -> _Piece:
        """Room for the first rows of a piece alone."""
        if rows == len(self.decays):
            return self
        states = self.all_states[: rows + self.batch]
        return _Piece(self.batch, self.A, self.decays[:rows], states, self.update[:rows])

    def fill(self, delta: Tensor, x: Tensor, B: Tensor, starts: Tensor | None) -> None:
        """Compute the states behind the one that enters, from rows of `delta`, `x`, `B` and `starts`."""
        torch.mul(delta, self.A, out=self.decays).exp_()
        if starts is not None:
            self.decays.masked_fill_(starts, 0)
        torch.mul(torch.mul(delta, x, out=self.update), B.mT, out=self.states)
        for state, decay, previous in self.steps:
            state.addcmul_(decay, previous)


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    starts: Tensor | None,
    differentiated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the final state, and if `differentiated` the states that enter the chunks,
    `[chunks, batch, state_dim, channels]`.
    """
    batch, _, channels = x.shape
    chunk, tokens = _chunks(x, A)
    kept = x.new_empty(_kept(x, A, differentiated), batch, A.shape[1], channels)
    if x.numel() == 0:
        return torch.empty_like(x), state.clone(), kept
    deltas, xs, Bs, Cs = (_rows(each).split(tokens * batch) for each in (delta, x, B, C))
    begins = _begins(starts, tokens * batch, len(deltas))
    out = x.new_empty(x.shape[1] * batch, 1, channels)
    piece = _Piece.empty(tokens, x, A.T.contiguous())
    piece.entering.copy_(state.transpose(1, 2))
    outs = out.split(tokens * batch)
    for index, (dt, u, b, c, begin, o) in enumerate(zip(deltas, xs, Bs, Cs, begins, outs, strict=True)):
        if differentiated and index % (chunk // tokens) == 0:
            kept[index // (chunk // tokens)] = piece.entering
        piece = piece.first(len(o))
        piece.fill(dt, u, b, begin)
        torch.bmm(c, piece.states, out=o)
        piece.entering.copy_(piece.last)
    return _sequences(out, batch), piece.entering.transpose(1, 2).clone(memory_format=torch.contiguous_format), kept


def _begins(starts: Tensor | None, rows: int, pieces: int) -> Sequence[Tensor | None]:
    """Where runs begin, piece by piece, to be laid on decays."""
    return [None] * pieces if starts is None else starts.T.reshape(-1, 1, 1).split(rows)


def _kept(x: Tensor, A: Tensor, differentiated: bool) -> int:
    """How many states are kept for the backward."""
    return -(-x.shape[1] // _chunks(x, A)[0]) if differentiated else 0


@torch.library.custom_op("zoo::selective_scan_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x, delta, A, B, C, state`."""
    if x.numel() == 0:
        dx, ddelta, dA, dB, dC = (torch.zeros_like(each) for each in (x, delta, A, B, C))
        return dx, ddelta, dA, dB, dC, grad_final.clone()
    batch = x.shape[0]
    chunk, tokens = _chunks(x, A)
    given = [_rows(each) for each in (delta, x, B, C, grad)]
    found = [torch.empty_like(each) for each in given[:4]]
    parts = list(zip(*(each.split(tokens * batch) for each in (*given, *found)), strict=True))
    begins = _begins(starts, tokens * batch, len(parts))
    pieces = [_Piece.empty(tokens, x, A.T.contiguous()) for _ in range(chunk // tokens)]
    adjoints = torch.empty_like(pieces[0].decays)
    grad_A = torch.zeros_like(pieces[0].A)
    # What the state before a piece's end receives from after it.
    arriving = grad_final.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    for index in reversed(range(len(kept))):
        first, entering = index * len(pieces), kept[index]
        filled = []
        for piece, part, begin in zip(pieces, parts[first:], begins[first:]):
            dt, u, b, *_ = part
            piece = piece.first(len(dt))
            piece.entering.copy_(entering)
            piece.fill(dt, u, b, begin)
            entering = piece.last
            filled.append((piece, part))
        for piece, (dt, u, b, c, dy, to_dt, to_u, to_b, to_c) in reversed(filled):
            decays, g = piece.decays, adjoints[: len(dt)]
            torch.mul(c.mT, dy, out=g)
            adjoint = g.split(batch)
            adjoint[-1].add_(arriving)
            for t in range(len(adjoint) - 2, -1, -1):
                adjoint[t].addcmul_(piece.decay[t + 1], adjoint[t + 1])
            # A row of channels times states that lie in rows of channels: the way round that products are fast in.
            torch.bmm(dy, piece.states.mT, out=to_c)
            torch.bmm(piece.update, g.mT, out=to_b)
            grad_update = torch.bmm(b, g)
            torch.mul(grad_update, dt, out=to_u)
            # From here on `decays` holds the gradient of the exponents, delta A.
            decays.mul_(g)
            arriving.copy_(piece.decay[0])
            decays.mul_(piece.before)
            grad_A += torch.mul(decays, dt, out=g).sum(0)
            torch.sum(decays.mul_(piece.A), 1, keepdim=True, out=to_dt)
            to_dt.addcmul_(grad_update, u)
    ddelta, dx, dB, dC = (_sequences(each, batch) for each in found)
    return dx, ddelta, grad_A.T.contiguous(), dB, dC, arriving.transpose(1, 2).contiguous()


@_forward.register_fake
def _(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    state: Tensor,
    starts: Tensor | None,
    differentiated: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    del delta, B, C, starts
    kept = x.new_empty(_kept(x, A, differentiated), x.shape[0], A.shape[1], A.shape[0])
    return torch.empty_like(x), torch.empty_like(state), kept


@_backward.register_fake
def _(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    kept: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad, kept, starts
    return (*(torch.empty_like(each) for each in (x, delta, A, B, C)), torch.empty_like(grad_final))  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, delta, A, B, C, _, starts, _ = inputs
    ctx.save_for_backward(x, delta, A, B, C, output[2], starts)


def _gradients(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, grad_final, *ctx.saved_tensors), None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


def diagonal_scan(x: Tensor, decay: Tensor, state: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    decay = decay.expand_as(x)
    if starts is not None:
        decay = decay.masked_fill(starts.unsqueeze(-1), 0)
    if x.shape[1] == 1:
        out = torch.addcmul(x, decay, state.unsqueeze(1))
    else:
        out = _diagonal(x, decay, state)
    return out, out[:, -1] if x.shape[1] else state


def _scan_chunks(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    """All states, `[batch, tokens, channels]`: all chunks at once from zero, then what entered each is added.

    Only products of decays are needed, no quotients, so a decay may be zero.
    """
    batch, tokens, channels = x.shape
    length = max(1, isqrt(tokens // 2))
    chunks = -(-tokens // length)
    padding = (0, 0, 0, chunks * length - tokens)
    shape = (batch, chunks, length, channels)
    states = F.pad(x, padding).view(shape)
    products = F.pad(decay, padding).view(shape)
    # Both are written in place below and must not be the caller's.
    if padding[-1] == 0:
        states, products = states.clone(), products.clone()
    state_of, product_of = states.unbind(2), products.unbind(2)
    for t in range(1, length):
        torch.addcmul(state_of[t], product_of[t], state_of[t - 1], out=state_of[t])
        torch.mul(product_of[t], product_of[t - 1], out=product_of[t])
    entering = []
    for last, product in zip(state_of[-1].unbind(1), product_of[-1].unbind(1), strict=True):
        entering.append(state)
        state = torch.addcmul(last, product, state)
    states.addcmul_(products, torch.stack(entering, 1).unsqueeze(2))
    return states.view(batch, chunks * length, channels)[:, :tokens].contiguous()


@torch.library.custom_op("zoo::diagonal_scan", mutates_args=())
def _diagonal(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    return _scan_chunks(x, decay, state) if x.numel() else torch.empty_like(x)


@_diagonal.register_fake
def _(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
    del decay, state
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::diagonal_scan_backward", mutates_args=())
def _diagonal_backward(grad: Tensor, decay: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, decay, state`: the same scan from the end, with the decays of the tokens behind."""
    if not grad.numel():
        return torch.empty_like(out), torch.empty_like(out), torch.zeros_like(state)
    behind = F.pad(decay[:, 1:], (0, 0, 0, 1)).flip(1)
    grad_x = _scan_chunks(grad.flip(1), behind.conj().resolve_conj(), torch.zeros_like(state)).flip(1)
    previous = torch.cat([state.unsqueeze(1), out[:, :-1]], 1)
    return grad_x, grad_x * previous.conj(), grad_x[:, 0] * decay[:, 0].conj()


@_diagonal_backward.register_fake
def _(grad: Tensor, decay: Tensor, state: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    del grad, decay
    return out.new_empty(out.shape), out.new_empty(out.shape), state.new_empty(state.shape)


def _keep_diagonal(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:], output)


def _diagonal_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
    return _diagonal_backward(grad, *ctx.saved_tensors)


_diagonal.register_autograd(_diagonal_gradients, setup_context=_keep_diagonal)
