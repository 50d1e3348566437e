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

# Elements of a chunk's states: two or three such buffers should fit the second-level cache of a core.
_CHUNK_ELEMENTS = 1 << 18
# However large the states, a chunk has so many tokens: only one state in so many is kept for the backward.
_LEAST_CHUNK = 16


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if x.shape[1] == 1:
        step = delta[:, 0, :, None]
        state = torch.addcmul((delta * x)[:, 0, :, None] * B, torch.exp(step * A), state)
        return (state @ C.transpose(1, 2)).transpose(1, 2), state
    out, final, _ = _forward(x, delta, A, B, C, state, starts)
    return out, final


def _chunk_length(x: Tensor, A: Tensor) -> int:
    batch, tokens, _ = x.shape
    return max(1, min(tokens, max(_LEAST_CHUNK, _CHUNK_ELEMENTS // max(1, batch * A.numel()))))


def _time_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(0, 1).contiguous() for x in tensors]


class _Chunk:
    """Decays and states of one chunk, `[chunk, batch, state_dim, channels]`, in buffers that all chunks share."""

    def __init__(self, length: int, x: Tensor, A: Tensor) -> None:
        size = (length, x.shape[0], A.shape[1], A.shape[0])
        self.A = A.T.contiguous()
        self.decays, self.states = x.new_empty(size), x.new_empty(size)
        # Views made once: the loops over tokens then cost one operator call a token.
        self.decay, self.state = self.decays.unbind(), self.states.unbind()

    def fill(self, entering: Tensor, delta: Tensor, x: Tensor, B: Tensor, starts: Tensor | None) -> int:
        """Compute all states of a chunk, its tensors time first; returns its length."""
        length = delta.shape[0]
        decays, states = self.decays[:length], self.states[:length]
        torch.mul(delta.unsqueeze(2), self.A, out=decays).exp_()
        if starts is not None:
            decays.masked_fill_(starts[:, :, None, None], 0)
        torch.mul((delta * x).unsqueeze(2), B.unsqueeze(3), out=states)
        previous = entering
        for decay, state in zip(self.decay[:length], self.state[:length], strict=True):
            torch.addcmul(state, decay, previous, out=state)
            previous = state
        return length


@torch.library.custom_op("zoo::selective_scan", mutates_args=())
def _forward(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the final state, and the states that enter the chunks, `[chunks, batch, state_dim, channels]`."""
    tokens = x.shape[1]
    length = _chunk_length(x, A)
    first, entering = [], state.transpose(1, 2).contiguous()
    out = x.new_empty(tokens, x.shape[0], x.shape[2])
    x_, delta_, B_, C_ = _time_first(x, delta, B, C)
    chunk = _Chunk(length, x, A)
    for low in range(0, tokens, length):
        part = slice(low, low + length)
        first.append(entering)
        size = chunk.fill(entering, delta_[part], x_[part], B_[part], None if starts is None else starts.T[part])
        torch.matmul(C_[part].unsqueeze(2), chunk.states[:size], out=out[part].unsqueeze(2))
        entering = chunk.state[size - 1].clone()
    kept = torch.stack(first) if first else x.new_empty(0, x.shape[0], A.shape[1], A.shape[0])
    return out.transpose(0, 1).contiguous(), entering.transpose(1, 2).contiguous(), kept


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
        size = chunk.fill(kept[index], delta_[part], x_[part], B_[part], None if starts is None else starts.T[part])
        decays, states, g = chunk.decays[:size], chunk.states[:size], adjoints[:size]
        dy, dt, update = grad_[part], delta_[part], delta_[part] * x_[part]
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
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    del delta, B, C, starts
    chunks = -(-x.shape[1] // _chunk_length(x, A))
    return torch.empty_like(x), torch.empty_like(state), x.new_empty(chunks, x.shape[0], A.shape[1], A.shape[0])


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
    x, delta, A, B, C, _, starts = inputs
    ctx.save_for_backward(x, delta, A, B, C, output[2], starts)


def _gradients(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(grad, grad_final, *ctx.saved_tensors), None)


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
