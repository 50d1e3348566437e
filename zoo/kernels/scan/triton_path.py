"""The scans on Triton kernels, as operators that `torch.compile` and `torch.export` know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Launches
from zoo.kernels.scan import triton_kernels

_LAUNCHES = Launches("scan")

CHUNK = 8
"""Tokens for each state that the backward is given; it holds as many in registers."""


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    given = (x, delta, A, B, C, D, z, state)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in given)
    out, final, _ = _forward(*given, starts, keep)
    return out, final


def diagonal_scan(x: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    return _diagonal(x, decay, state, starts)


def _rows(x: Tensor) -> Tensor:
    """`[batch * tokens, ...]` with neighbouring features; a view wherever the strides allow one."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _chunks(x: Tensor) -> int:
    return -(-x.shape[1] // CHUNK)


@torch.library.custom_op("zoo::selective_scan_kernel", mutates_args=())
def _forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the final state, and with `keep` the states that enter the chunks, else nothing."""
    batch, tokens, channels = x.shape
    state_dim = A.shape[1]
    out = x.new_empty(x.shape)
    final = x.new_empty(batch, channels, state_dim, dtype=torch.float32)
    entering = final.new_empty(batch if keep else 0, _chunks(x), channels, state_dim)
    if final.numel():
        kernel, sizes = triton_kernels.selective_scan_forward, {"state_dim": state_dim}
        block = _LAUNCHES.configuration(kernel.__name__, x.device, sizes)["BLOCK_CHANNELS"]
        rows = [_rows(each) for each in (x, delta, B, C)]
        gate, skip = None if z is None else _rows(z), None if D is None else D.contiguous()
        strides = [each.stride(0) for each in rows] + [0 if gate is None else gate.stride(0)]
        x_, delta_, B_, C_ = rows
        initial = None if state is None else state.contiguous()
        tensors = (x_, delta_, A.contiguous(), B_, C_, skip, gate, initial, _bytes(starts), out, final, entering)
        constants = {
            "HAS_D": D is not None,
            "HAS_Z": z is not None,
            "HAS_STATE": state is not None,
            "HAS_STARTS": starts is not None,
            "KEEP": keep,
            "CHUNK": CHUNK,
            "BLOCK_STATE": triton.next_power_of_2(state_dim),
        }
        grid, numbers = (batch * triton.cdiv(channels, block),), (tokens, channels, state_dim, _chunks(x))
        _LAUNCHES.run(kernel, grid, x.device, sizes, *tensors, *numbers, *strides, **constants)
    return out, final, entering


@_forward.register_fake
def _(x: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del delta
    keep = rest[-1]
    final = x.new_empty(x.shape[0], *A.shape, dtype=torch.float32)
    return x.new_empty(x.shape), final, final.new_empty(x.shape[0] if keep else 0, _chunks(x), *A.shape)


@torch.library.custom_op("zoo::selective_scan_kernel_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    starts: Tensor | None,
    entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x, delta, A, B, C, D, z, state`, that of the state in float32; of D and z empty without them."""
    batch, tokens, channels = x.shape
    state_dim = A.shape[1]
    grad_x, grad_delta = x.new_empty(x.shape), delta.new_empty(x.shape)
    grad_z = x.new_empty(0) if z is None else z.new_empty(x.shape)
    grad_state = torch.empty(batch, channels, state_dim, dtype=torch.float32, device=x.device)
    share_A, share_D = torch.empty_like(grad_state), grad_state.new_empty(batch, channels if D is not None else 0)
    kernel, sizes = triton_kernels.selective_scan_backward, {"state_dim": state_dim}
    block = _LAUNCHES.configuration(kernel.__name__, x.device, sizes)["BLOCK_CHANNELS"]
    blocks = triton.cdiv(channels, block)
    share_B, share_C = (grad_state.new_empty(blocks, batch, tokens, state_dim) for _ in range(2))
    if grad_state.numel():
        rows = [_rows(each) for each in (grad, x, delta, B, C)]
        gate, skip = None if z is None else _rows(z), None if D is None else D.contiguous()
        strides = [each.stride(0) for each in rows] + [0 if gate is None else gate.stride(0)]
        given, x_, delta_, B_, C_ = rows
        tensors = (
            given,
            grad_final.contiguous(),
            x_,
            delta_,
            A.contiguous(),
            B_,
            C_,
            skip,
            gate,
            _bytes(starts),
            entering,
        )
        results = (grad_x, grad_delta, grad_z, grad_state, share_A, share_B, share_C, share_D)
        constants = {
            "HAS_D": D is not None,
            "HAS_Z": z is not None,
            "HAS_STARTS": starts is not None,
            "CHUNK": CHUNK,
            "BLOCK_STATE": triton.next_power_of_2(state_dim),
        }
        numbers = (tokens, channels, state_dim, _chunks(x))
        _LAUNCHES.run(kernel, (batch * blocks,), x.device, sizes, *tensors, *results, *numbers, *strides, **constants)
    grad_A, grad_B, grad_C = share_A.sum(0).to(A.dtype), share_B.sum(0).to(B.dtype), share_C.sum(0).to(C.dtype)
    grad_D = share_D.sum(0).to(x.dtype if D is None else D.dtype)
    return grad_x, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_state


@_backward.register_fake
def _(
    grad: Tensor,
    grad_final: Tensor,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    starts: Tensor | None,
    entering: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    del grad, starts, entering
    some = [x.new_empty(0) if each is None else each.new_empty(each.shape) for each in (D, z)]
    every = [each.new_empty(each.shape) for each in (x, delta, A, B, C)]
    return (*every, *some, grad_final.new_empty(grad_final.shape, dtype=torch.float32))  # type: ignore[return-value]


def _bytes(flags: Tensor | None) -> Tensor | None:
    return None if flags is None else flags.contiguous().view(torch.uint8)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *given, state, starts, _ = inputs
    ctx.state_dtype = None if state is None else state.dtype
    ctx.save_for_backward(*given, starts, output[2])
    ctx.mark_non_differentiable(output[2])


def _gradients(ctx: Any, grad: Tensor, grad_final: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    D, z = ctx.saved_tensors[5:7]
    *grads, grad_D, grad_z, grad_state = _backward(grad, grad_final, *ctx.saved_tensors)
    of_state = None if ctx.state_dtype is None else grad_state.to(ctx.state_dtype)
    return (*grads, None if D is None else grad_D, None if z is None else grad_z, of_state, None, None)


_forward.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("zoo::diagonal_scan_kernel", mutates_args=())
def _diagonal(x: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    """All states, and the last in float32."""
    batch, tokens, channels = x.shape
    out = x.new_empty(x.shape)
    final = x.new_empty(batch, channels, dtype=torch.float32)
    if final.numel():
        kernel = triton_kernels.diagonal_scan_forward
        blocks = _LAUNCHES.configuration(kernel.__name__, x.device, {})
        rows, factors = _rows(x), decay.contiguous() if decay.dim() == 1 else _rows(decay)
        initial = None if state is None else state.contiguous()
        tensors = (rows, factors, initial, _bytes(starts), out, final)
        numbers = (tokens, channels, triton.cdiv(tokens, blocks["CHUNK"]), rows.stride(0), factors.stride(0))
        grid = (batch * triton.cdiv(channels, blocks["BLOCK_CHANNELS"]),)
        _LAUNCHES.run(kernel, grid, x.device, {}, *tensors, *numbers, **_diagonal_flags(decay, state, starts))
    return out, final


def _diagonal_flags(decay: Tensor, state: Tensor | None, starts: Tensor | None) -> dict[str, bool]:
    return {"CONSTANT": decay.dim() == 1, "HAS_STATE": state is not None, "HAS_STARTS": starts is not None}


@_diagonal.register_fake
def _(x: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    del decay, state, starts
    return x.new_empty(x.shape), x.new_empty(x.shape[0], x.shape[2], dtype=torch.float32)


@torch.library.custom_op("zoo::diagonal_scan_kernel_backward", mutates_args=())
def _diagonal_backward(
    grad: Tensor, grad_final: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `x, decay, state`, the last in float32."""
    batch, tokens, channels = out.shape
    constant = decay.dim() == 1
    grad_x = out.new_empty(out.shape)
    grad_state = torch.empty(batch, channels, dtype=torch.float32, device=out.device)
    grad_decay = torch.empty_like(grad_state) if constant else decay.new_empty(out.shape)
    if grad_state.numel():
        kernel = triton_kernels.diagonal_scan_backward
        blocks = _LAUNCHES.configuration(kernel.__name__, out.device, {})
        rows, factors = _rows(grad), decay.contiguous() if constant else _rows(decay)
        initial = None if state is None else state.contiguous()
        tensors = (rows, grad_final.contiguous(), factors, initial, _bytes(starts), out.contiguous())
        numbers = (tokens, channels, triton.cdiv(tokens, blocks["CHUNK"]), rows.stride(0), factors.stride(0))
        grid, flags = (batch * triton.cdiv(channels, blocks["BLOCK_CHANNELS"]),), _diagonal_flags(decay, state, starts)
        _LAUNCHES.run(kernel, grid, out.device, {}, *tensors, grad_x, grad_decay, grad_state, *numbers, **flags)
    return grad_x, grad_decay.sum(0).to(decay.dtype) if constant else grad_decay, grad_state


@_diagonal_backward.register_fake
def _(
    grad: Tensor, grad_final: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None, out: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    del grad, state, starts
    states = grad_final.new_empty(grad_final.shape, dtype=torch.float32)
    return out.new_empty(out.shape), decay.new_empty(decay.shape), states


def _keep_diagonal(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, decay, state, starts = inputs
    ctx.save_for_backward(decay, state, starts, output[0])


def _diagonal_gradients(ctx: Any, grad: Tensor, grad_final: Tensor) -> tuple[Tensor | None, ...]:
    _, state, _, _ = ctx.saved_tensors
    grad_x, grad_decay, grad_state = _diagonal_backward(grad, grad_final, *ctx.saved_tensors)
    return grad_x, grad_decay, None if state is None else grad_state.to(state.dtype), None


_diagonal.register_autograd(_diagonal_gradients, setup_context=_keep_diagonal)
