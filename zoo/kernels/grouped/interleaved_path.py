"""Interleaved blocks on Triton kernels, which read and write rows once and turn nothing over."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.grouped import interleaved_kernels
from zoo.kernels.grouped.operators import keep_inputs
from zoo.kernels.launch import Launches, processors
from zoo.kernels.pointwise.triton_kernels import rows_of
from zoo.kernels.work import block_diagonal_matmul_flops

_LAUNCHES = Launches("grouped")

Shape = tuple[int, ...]


def block_diagonal_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`x [..., input_width * blocks]`, `weight [blocks, input_width, output_width]`."""
    product = _interleaved(x.reshape(x.shape[:-1].numel(), x.shape[-1]), weight)
    return product.view(*x.shape[:-1], product.shape[1])


@torch.library.custom_op("zoo::interleaved_matmul_triton", mutates_args=())
def _interleaved(x: Tensor, weight: Tensor) -> Tensor:
    x, (rows, (blocks, inputs, outputs)) = _rowwise(x), (x.shape[0], weight.shape)
    out = x.new_empty(rows, outputs * blocks)
    if out.numel():
        width = triton.next_power_of_2(outputs)
        _LAUNCHES.run(
            interleaved_kernels.interleaved_product,
            lambda of: (
                triton.cdiv(rows, rows_of(of["TILE"], width * of["BLOCK"])) * triton.cdiv(blocks, of["BLOCK"]),
            ),
            x.device,
            {},
            *(x, weight, out, rows, blocks, inputs, outputs, x.stride(0), *weight.stride()),
            OUTPUTS=width,
        )
    return out


@_interleaved.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0] * weight.shape[2])


@torch.library.custom_op("zoo::interleaved_outer_triton", mutates_args=())
def _outer(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """The gradient of `weight`, of which no number is read."""
    x, grad, (blocks, inputs, outputs) = _rowwise(x), _rowwise(grad), weight.shape
    # Two programs for a processor, so that one loads while the other computes.
    count = min(x.shape[0], 2 * processors(x.device)) if weight.numel() else 0
    shares = torch.empty(count, inputs, outputs, blocks, dtype=torch.float32, device=x.device)
    if count:
        _LAUNCHES.run(
            interleaved_kernels.interleaved_outer,
            lambda of: (count * triton.cdiv(blocks, of["BLOCK"]),),
            x.device,
            {"pairs": triton.next_power_of_2(inputs) * triton.next_power_of_2(outputs)},
            *(x, grad, shares, x.shape[0], blocks, inputs, outputs, x.stride(0), grad.stride(0)),
            INPUTS=triton.next_power_of_2(inputs),
            OUTPUTS=triton.next_power_of_2(outputs),
        )
    return shares.sum(0).to(weight.dtype).permute(2, 0, 1).contiguous()


@_outer.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    del grad, x
    return weight.new_empty(weight.shape)


def _rowwise(x: Tensor) -> Tensor:
    """`x` with each row in one piece."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, weight = ctx.saved_tensors
    to_x, to_weight = ctx.needs_input_grad
    return _interleaved(grad, weight.mT) if to_x else None, _outer(grad, x, weight) if to_weight else None


_interleaved.register_autograd(_backward, setup_context=keep_inputs)


@register_flop_formula(_interleaved._opoverload.overloadpacket)
def _(x: Shape, weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    return block_diagonal_matmul_flops(x[0], *weight)


@register_flop_formula(_outer._opoverload.overloadpacket)
def _(grad: Shape, x: Shape, weight: tuple[int, int, int], *_: Any, **__: Any) -> int:
    del x
    return block_diagonal_matmul_flops(grad[0], *weight)
