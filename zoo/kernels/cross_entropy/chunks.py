"""The chunks of `linear_cross_entropy`, as operators that stay whole in a compiled graph.

`zoo::linear_cross_entropy_sum` computes its gradients along with the loss: they are those of the sum times a number
that is known later. `zoo::linear_cross_entropy_rows` computes the losses of rows, and in its backward pass the logits
again. Between two matrix products both hand a chunk of logits to a `SoftmaxPass`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from zoo.errors import ZooError
from zoo.kernels import work
from zoo.kernels.checks import at_least_float32
from zoo.kernels.work import CROSS_ENTROPY_MULTIPLE as MULTIPLE

ELEMENTS = {"cuda": 2**27}
"""Logits of a chunk by kind of device, where there may be more than on a CPU: enough rows to keep a GPU's matrix units
busy with any vocabulary."""

Shape = tuple[int, ...]


class Settings(NamedTuple):
    ignore_index: int
    softcap: float | None
    z_loss: float
    label_smoothing: float


SoftmaxPass = Callable[[Tensor, Tensor, Tensor | None, Tensor, Settings, bool], None]
"""`(logits, targets, scales, losses, settings, gradients)`: write the losses of rows and, if asked for, the gradients
of `sum(scales * losses)` over the logits."""


def linear_cross_entropy(
    home: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    chunk: int | None,
    each: bool,
) -> Tensor:
    """The losses of rows if `each`, or their sum; `home` is the module that has the `softmax_pass`."""
    tensors = x, weight, bias, targets
    chunk = chunk or rows_of_chunk(x.shape[0], x.shape[1], weight.shape[0], x)
    settings = ignore_index, softcap, z_loss, label_smoothing, chunk
    if each:
        return _rows(*tensors, *settings, home)
    wanted = [torch.is_grad_enabled() and one is not None and one.requires_grad for one in tensors[:3]]
    return _sum(*tensors, *settings, home, *wanted)[0]


def rows_of_chunk(rows: int, width: int, vocab: int, x: Tensor) -> int:
    """Rows to a chunk on the device of `x`."""
    return work.linear_cross_entropy_rows(rows, width, vocab, ELEMENTS.get(x.device.type, work.CROSS_ENTROPY_ELEMENTS))


def _chunked(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scales: Tensor | None,
    settings: Settings,
    chunk: int,
    softmax_pass: SoftmaxPass,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Losses of rows, and gradients of `x`, `weight` and `bias`, the last two in float32; empty if unwanted."""
    _check_targets(targets, weight.shape[0], settings.ignore_index)
    losses, grad_x, grad_weight, grad_bias = _results(x, weight, wanted)
    grad_weight.zero_()
    grad_bias.zero_()
    x = x.contiguous()
    buffer = torch.empty((min(chunk, x.shape[0]), weight.shape[0]), dtype=x.dtype, device=x.device)
    for low in range(0, x.shape[0], chunk):
        part = slice(low, low + chunk)
        rows = x[part]
        logits = buffer[: rows.shape[0]]
        if bias is None:
            torch.mm(rows, weight.T, out=logits)
        else:
            torch.addmm(bias, rows, weight.T, out=logits)
        scale = None if scales is None else scales[part]
        softmax_pass(logits, targets[part], scale, losses[part], settings, any(wanted))
        if wanted[0]:
            torch.mm(logits, weight, out=grad_x[part])
        if wanted[1]:
            _add_product(grad_weight, logits, rows)
        if wanted[2]:
            grad_bias += logits.sum(0, dtype=grad_bias.dtype)
    return losses, grad_x, grad_weight, grad_bias


def _add_product(total: Tensor, logits: Tensor, rows: Tensor) -> None:
    """`total += logits^T rows`; from half precision by way of blocks that take no more memory than the logits."""
    if total.dtype == logits.dtype:
        total.addmm_(logits.T, rows)
        return
    block = max(MULTIPLE, logits.numel() // max(1, rows.shape[1]) // MULTIPLE * MULTIPLE)
    for low in range(0, total.shape[0], block):
        total[low : low + block] += logits[:, low : low + block].T @ rows


def _check_targets(targets: Tensor, vocab: int, ignore_index: int) -> None:
    if targets.device.type == "cpu":
        wrong = targets[((targets < 0) | (targets >= vocab)) & (targets != ignore_index)]
        if wrong.numel():
            raise ZooError(
                f"linear_cross_entropy: targets has {int(wrong[0])}, expected classes from 0 to {vocab - 1}, or "
                f"ignore_index = {ignore_index}"
            )


def _results(x: Tensor, weight: Tensor, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = at_least_float32(x.dtype)

    def empty(there: bool, shape: Shape, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape if there else (0,), dtype=dtype, device=x.device)

    return (
        empty(True, (x.shape[0],), wide),
        empty(wanted[0], tuple(x.shape), x.dtype),
        empty(wanted[1], tuple(weight.shape), wide),
        empty(wanted[2], (weight.shape[0],), wide),
    )


def _softmax_pass(home: str) -> SoftmaxPass:
    return import_module(home).softmax_pass


@torch.library.custom_op("zoo::linear_cross_entropy_sum", mutates_args=())
def _sum(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    chunk: int,
    home: str,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The sum of all losses, and its gradients."""
    settings = Settings(ignore_index, softcap, z_loss, label_smoothing)
    wanted = of_x, of_weight, of_bias
    losses, *gradients = _chunked(x, weight, bias, targets, None, settings, chunk, _softmax_pass(home), wanted)
    grad_x, grad_weight, grad_bias = gradients
    return losses.sum(), grad_x, grad_weight, grad_bias


@_sum.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    losses, *gradients = _results(x, weight, rest[-3:])
    grad_x, grad_weight, grad_bias = gradients
    return losses.new_empty(()), grad_x, grad_weight, grad_bias


def _keep_gradients(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.wanted, gradients = inputs[-3:], output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*gradients)
    ctx.save_for_backward(*gradients)
    ctx.dtype = inputs[0].dtype


@torch.library.custom_op("zoo::linear_cross_entropy_sum_backward", mutates_args=())
def _scaled(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * grad` in `dtype` without a copy in between; an operator, so that nobody differentiates it again."""
    return torch.mul(gradient, grad, out=torch.empty(gradient.shape, dtype=dtype, device=gradient.device))


@_scaled.register_fake
def _(gradient: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
    del grad
    return torch.empty(gradient.shape, dtype=dtype, device=gradient.device)


def _scale_gradients(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    gradients = zip(ctx.saved_tensors, ctx.wanted, strict=True)
    scaled = (_scaled(each, grad, ctx.dtype) if there and grad is not None else None for each, there in gradients)
    return *scaled, *(None for _ in range(10))


_sum.register_autograd(_scale_gradients, setup_context=_keep_gradients)


@torch.library.custom_op("zoo::linear_cross_entropy_rows", mutates_args=())
def _rows(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    chunk: int,
    home: str,
) -> Tensor:
    settings = Settings(ignore_index, softcap, z_loss, label_smoothing)
    nothing = False, False, False
    return _chunked(x, weight, bias, targets, None, settings, chunk, _softmax_pass(home), nothing)[0]


@_rows.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    del rest
    return _results(x, weight, (False, False, False))[0]


@torch.library.custom_op("zoo::linear_cross_entropy_rows_backward", mutates_args=())
def _rows_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    softcap: float | None,
    z_loss: float,
    label_smoothing: float,
    chunk: int,
    home: str,
    of_x: bool,
    of_weight: bool,
    of_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    settings = Settings(ignore_index, softcap, z_loss, label_smoothing)
    scales, wanted = grad.contiguous(), (of_x, of_weight, of_bias)
    _, *gradients = _chunked(x, weight, bias, targets, scales, settings, chunk, _softmax_pass(home), wanted)
    grad_x, grad_weight, grad_bias = (each.to(x.dtype) for each in gradients)
    return grad_x, grad_weight, grad_bias


@_rows_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    del grad
    grad_x, grad_weight, grad_bias = (each.to(x.dtype) for each in _results(x, weight, rest[-3:])[1:])
    return grad_x, grad_weight, grad_bias


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    ctx.save_for_backward(*inputs[:4])
    ctx.settings = inputs[4:]


def _compute_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[:3]
    gradients = _rows_backward(grad, *ctx.saved_tensors, *ctx.settings, *wanted)
    return *(each if there else None for each, there in zip(gradients, wanted, strict=True)), *(None for _ in range(7))


_rows.register_autograd(_compute_gradients, setup_context=_keep_inputs)


def _products(x: Shape, weight: Shape, wanted: Iterator[bool] | tuple[bool, ...] = ()) -> int:
    """Operations of the logits and of the gradients of `x` and of `weight`, which take as much each."""
    return 2 * x[0] * x[1] * weight[0] * (1 + sum(wanted))


@register_flop_formula(_sum._opoverload.overloadpacket)
def _(x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    return _products(x, weight, rest[-3:-1])


@register_flop_formula(_rows._opoverload.overloadpacket)
def _(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return _products(x, weight)


@register_flop_formula(_rows_backward._opoverload.overloadpacket)
def _(grad: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    del grad
    return _products(x, weight, rest[-3:-1])
