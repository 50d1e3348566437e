"""What the operators of grouped products have in common, whoever computes them: shapes, gradients, FLOPs.

A product is `product(x, weight, offsets, output_widths, input_widths, source)`; its partner `outer(grad, x, weight,
offsets, output_widths, input_widths, source)` gives the gradient of `weight`, of which it reads no number.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.kernels.work import grouped_matmul_flops

Shape = tuple[int, ...]


def empty_gradient(weight: Tensor) -> Tensor:
    """A tensor for the gradient of `weight`, which lies as it does: the transpose of one where `weight` is."""
    if weight.stride(-1) != 1 and weight.stride(-2) == 1:
        return weight.new_empty(weight.mT.shape).mT
    return weight.new_empty(weight.shape)


def keep_inputs(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    """Save all that an operator was given, and nothing that it made, for its backward pass."""
    del output
    ctx.save_for_backward(*inputs)


def complete(product: Any, outer: Any) -> None:
    """Teach two custom operators everything but how to compute. FLOPs are those of whole widths, as shapes tell."""

    @product.register_fake
    def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        source = rest[3] if len(rest) > 3 else None
        return x.new_empty((x if source is None else source).shape[0], weight.shape[-2])

    @outer.register_fake
    def _(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> Tensor:
        del grad, x
        return empty_gradient(weight)

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets, output_widths, input_widths, source = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        grad_x = product(grad, weight.mT, offsets, input_widths, output_widths) if to_x else None
        if grad_x is not None and source is not None:
            # Summed in a fixed order, unlike what `index_add` does on a GPU.
            grad_x = torch.ops.aten.embedding_dense_backward(grad_x, source, x.shape[0], -1, False)
        grad_weight = outer(grad, x, weight, offsets, output_widths, input_widths, source) if to_weight else None
        return grad_x, grad_weight, None, None, None, None

    product.register_autograd(backward, setup_context=keep_inputs)

    @register_flop_formula(product._opoverload.overloadpacket)
    def _(x: Shape, weight: Shape, *rest: Any, **__: Any) -> int:
        source = rest[3] if len(rest) > 3 else None
        return grouped_matmul_flops((source or x)[0], x[1], weight[-2])

    @register_flop_formula(outer._opoverload.overloadpacket)
    def _(grad: Shape, x: Shape, *_: Any, **__: Any) -> int:
        return grouped_matmul_flops(grad[0], grad[1], x[1])
