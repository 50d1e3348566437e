"""The selective scan as one fused multiply-add per token, with everything else done for a chunk of tokens at once.

It is a custom operator, forward and backward: autograd would keep every state and compilation would unroll the loop.
The backward keeps the states that enter the chunks and computes the others again. States lie as
`[batch, state_dim, channels]`, so that the many channels are neighbours in memory.
"""

from __future__ import annotations

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


def _chunk_length(x: Tensor, A: Tensor) -> int:
    return _chunks(x, A)[0]


def _chunks(x: Tensor, A: Tensor) -> tuple[int, int]:
    batch, tokens, channels = x.shape
    return work.selective_scan_chunks(batch, tokens, channels, A.shape[1])


def _time_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1).contiguous() for x in tensors]


class _Chunk:
    """Decays and states of some tokens, `[length, batch, state_dim, channels]`, in buffers that are used again."""

    def __init__(self, length: int, x: Tensor, A: Tensor) -> None:
        size = (length, x.shape[0], A.shape[1], A.shape[0])
        self.A = A.T.contiguous()
        self.decays, self.states = x.new_empty(size), x.new_empty(size)
        self.update = x.new_empty(length, x.shape[0], 1, A.shape[0])
        # Views made once: the loops over tokens then cost one operator call a token.
        self.decay, self.state = self.decays.unbind(), self.states.unbind()

    def fill(self, entering: Tensor, delta: Tensor, x: Tensor, B: Tensor, starts: Tensor | None) -> int:
        """Compute the states of so many tokens as are given; returns how many.

        All are time first: `delta` and `x` `[length, batch, 1, channels]`, `B` `[length, batch, state_dim, 1]`.
        """
        length = delta.shape[0]
        decays, states, update = self.decays[:length], self.states[:length], self.update[:length]
        torch.mul(delta, self.A, out=decays).exp_()
        if starts is not None:
            decays.masked_fill_(starts[:, :, None, None], 0)
        torch.mul(torch.mul(delta, x, out=update), B, out=states)
        previous = entering
        for decay, state in zip(self.decay[:length], self.state[:length], strict=True):
            torch.addcmul(state, decay, previous, out=state)
            previous = state
        return length


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
    batch, tokens, channels = x.shape
    length, piece = _chunks(x, A)
    kept = x.new_empty(_kept(x, A, differentiated), batch, A.shape[1], channels)
    if tokens == 0:
        return torch.empty_like(x), state.clone(), kept
    entering = state.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    out = x.new_empty(tokens, batch, 1, channels)
    x_, delta_, B_, C_ = _time_first(x, delta, B, C)
    shared = (delta_.unsqueeze(2), x_.unsqueeze(2), B_.unsqueeze(3), C_.unsqueeze(2), out)
    chunk = _Chunk(piece, x, A)
    begins = None if starts is None else starts.T.split(length)
    for index, parts in enumerate(zip(*(each.split(length) for each in shared), strict=True)):
        if differentiated:
            kept[index] = entering
        begin = None if begins is None else begins[index].split(piece)
        for at, (step, u, b, c, o) in enumerate(zip(*(each.split(piece) for each in parts), strict=True)):
            size = chunk.fill(entering, step, u, b, None if begin is None else begin[at])
            torch.bmm(c.flatten(0, 1), chunk.states[:size].flatten(0, 1), out=o.flatten(0, 1))
            entering.copy_(chunk.state[size - 1])
    return out.squeeze(2).transpose(0, 1).contiguous(), entering.transpose(1, 2).contiguous(), kept


def _kept(x: Tensor, A: Tensor, differentiated: bool) -> int:
    """How many states are kept for the backward."""
    return -(-x.shape[1] // _chunk_length(x, A)) if differentiated else 0


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
    length = _chunk_length(x, A)
    x_, delta_, B_, C_, grad_ = _time_first(x, delta, B, C, grad)
    grad_x, grad_delta, grad_B, grad_C = (torch.empty_like(each) for each in (x_, delta_, B_, C_))
    chunk = _Chunk(length, x, A)
    grad_A = torch.zeros_like(chunk.A)
    adjoints = torch.empty_like(chunk.states)
    adjoint = adjoints.unbind()
    # What the state before a chunk's end receives from after it.
    arriving = grad_final.transpose(1, 2).contiguous()
    for index in reversed(range(kept.shape[0])):
        part = slice(index * length, index * length + length)
        begin = None if starts is None else starts.T[part]
        size = chunk.fill(kept[index], delta_[part].unsqueeze(2), x_[part].unsqueeze(2), B_[part].unsqueeze(3), begin)
        decays, states, g = chunk.decays[:size], chunk.states[:size], adjoints[:size]
        dy, dt, update = grad_[part], delta_[part], chunk.update[:size].squeeze(2)
        torch.mul(C_[part].unsqueeze(3), dy.unsqueeze(2), out=g)
        adjoint[size - 1].add_(arriving)
        for t in range(size - 2, -1, -1):
            torch.addcmul(adjoint[t], chunk.decay[t + 1], adjoint[t + 1], out=adjoint[t])
        torch.matmul(states, dy.unsqueeze(3), out=grad_C[part].unsqueeze(3))
        torch.matmul(g, update.unsqueeze(3), out=grad_B[part].unsqueeze(3))
        grad_update = torch.matmul(B_[part].unsqueeze(2), g).squeeze(2)
        torch.mul(grad_update, dt, out=grad_x[part])
        # From here on `decays` holds the gradient of the exponents, delta A.
        decays.mul_(g)
        arriving = decays[0].clone()
        decays[1:].mul_(states[: size - 1])
        decays[0].mul_(kept[index])
        torch.mul(decays, dt.unsqueeze(2), out=g)
        grad_A += g.sum((0, 1))
        torch.sum(decays.mul_(chunk.A), 2, out=grad_delta[part])
        grad_delta[part].addcmul_(grad_update, x_[part])
    grads = (each.transpose(0, 1).contiguous() for each in (grad_x, grad_delta, grad_B, grad_C))
    dx, ddelta, dB, dC = grads
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
