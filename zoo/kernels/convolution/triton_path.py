"""The short convolution on Triton kernels, as operators that `torch.compile` and `torch.export` know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels import segments as packing
from zoo.kernels.convolution import triton_kernels
from zoo.kernels.convolution.torch_path import last_inputs
from zoo.kernels.launch import Launches

_LAUNCHES = Launches("convolution")


def causal_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    state = None if state is None else state.to(x.dtype)
    runs = None if segments is None else packing.runs(segments)
    out = _forward(x, weight, bias, state, None if runs is None else runs.int(), silu)
    return out, last_inputs(x, state, weight.shape[1] - 1, runs)


def _rows(x: Tensor) -> Tensor:
    """`[batch * tokens, channels]` with neighbouring channels; a view wherever the strides allow one."""
    rows = x.flatten(0, 1)
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _flags(bias: Tensor | None, state: Tensor | None, runs: Tensor | None, silu: bool) -> dict[str, bool]:
    return {"HAS_BIAS": bias is not None, "HAS_STATE": state is not None, "HAS_RUNS": runs is not None, "SILU": silu}


@torch.library.custom_op("zoo::causal_convolution_forward", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, runs: Tensor | None, silu: bool
) -> Tensor:
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    rows, weight = _rows(x), weight.contiguous()
    state = None if state is None else state.contiguous()
    out = x.new_empty(x.shape)
    if out.numel():
        sizes = {"kernel": kernel}
        blocks = _LAUNCHES.configuration("causal_convolution_forward", x.device, sizes)
        tiles = triton.cdiv(tokens, blocks["BLOCK_TOKENS"])
        grid = (batch * tiles * triton.cdiv(channels, blocks["BLOCK_CHANNELS"]),)
        tensors = (rows, weight, None if bias is None else bias.contiguous(), state, runs, out)
        numbers = (tokens, channels, rows.stride(0), tiles)
        constants = {"KERNEL": kernel, **_flags(bias, state, runs, silu)}
        _LAUNCHES.run(triton_kernels.causal_convolution_forward, grid, x.device, sizes, *tensors, *numbers, **constants)
    return out


@_forward.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("zoo::causal_convolution_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    runs: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `x, weight, bias, state`, the last two empty where there is none."""
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    rows, given, taps = _rows(x), _rows(grad), weight.contiguous()
    before = None if state is None else state.contiguous()
    grad_x = x.new_empty(x.shape)
    grad_state = x.new_empty(0) if before is None else torch.empty_like(before)
    shares = torch.empty(0, kernel + 1, channels, dtype=torch.float32, device=x.device)
    if x.numel():
        sizes = {"kernel": kernel}
        blocks = _LAUNCHES.configuration("causal_convolution_backward", x.device, sizes)
        # Positions start at the first row of the state.
        groups = triton.cdiv(tokens + kernel - 1, blocks["TILES"] * blocks["BLOCK_TOKENS"])
        shares = torch.empty(batch * groups, kernel + 1, channels, dtype=torch.float32, device=x.device)
        grid = (batch * groups * triton.cdiv(channels, blocks["BLOCK_CHANNELS"]),)
        offset = None if bias is None else bias.contiguous()
        tensors = (given, rows, taps, offset, before, runs, grad_x, grad_state, shares)
        numbers = (tokens, channels, given.stride(0), rows.stride(0), groups)
        constants = {"KERNEL": kernel, **_flags(bias, before, runs, silu)}
        _LAUNCHES.run(
            triton_kernels.causal_convolution_backward, grid, x.device, sizes, *tensors, *numbers, **constants
        )
    else:
        grad_state.zero_()
    sums = shares.sum(0)
    grad_weight = sums[:kernel].flip(0).T.to(weight.dtype, memory_format=torch.contiguous_format, copy=True)
    grad_bias = x.new_empty(0) if bias is None else sums[kernel].to(bias.dtype, copy=True)
    return grad_x, grad_weight, grad_bias, grad_state


@_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    runs: Tensor | None,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    del grad, runs, silu
    some = (x.new_empty(0) if each is None else each.new_empty(each.shape) for each in (bias, state))
    return x.new_empty(x.shape), weight.new_empty(weight.shape), *some  # type: ignore[return-value]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, state, runs = ctx.saved_tensors
    grad_x, grad_weight, grad_bias, grad_state = _backward(grad, x, weight, bias, state, runs, ctx.silu)
    optional = (None if bias is None else grad_bias, None if state is None else grad_state)
    return grad_x, grad_weight, *optional, None, None


_forward.register_autograd(_gradients, setup_context=_keep)
