"""Norms on Triton kernels, as operators that `torch.compile` and `torch.export` know."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Launches, processors
from zoo.kernels.pointwise import triton_kernels

_LAUNCHES = Launches("pointwise")

HELD = 8192
"""The widest row whose backward pass holds it, its gradient and the shares of the parameters in registers."""


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    out, total, *_ = _norm_forward(x, residual, weight, None, eps, offset, False)
    return out if residual is None else (out, total)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    out, total, *_ = _norm_forward(x, residual, weight, bias, eps, offset, True)
    return out if residual is None else (out, total)


@torch.library.custom_op("zoo::norm_forward", mutates_args=())
def _norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    centred: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The norm, the sum that was normed (empty without `residual`), and means (if `centred`) and scales of the rows."""
    given = x.contiguous()
    count, width = x.shape[:-1].numel(), x.shape[-1]
    added, weight, bias = (None if each is None else each.contiguous() for each in (residual, weight, bias))
    out, total, mean, inverse = _results(given, added, centred)
    if x.numel():
        block = triton.next_power_of_2(width)
        _LAUNCHES.run(
            triton_kernels.norm_forward,
            lambda meta: (triton.cdiv(count, triton_kernels.rows_of(meta["TILE"], block)),),
            x.device,
            {"width": width},
            *(given, added, weight, bias, out, total, mean, inverse, count, width, eps),
            CENTRED=centred,
            HAS_RESIDUAL=added is not None,
            HAS_WEIGHT=weight is not None,
            HAS_BIAS=bias is not None,
            OFFSET=offset,
            BLOCK=block,
        )
    return out, total, mean, inverse


@_norm_forward.register_fake
def _(x: Tensor, residual: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _results(x, residual, rest[-1])


def _results(x: Tensor, residual: Tensor | None, centred: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = x.shape[:-1].numel()
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = torch.empty(x.shape if residual is not None else (0,), dtype=dtype, device=x.device)
    mean = torch.empty(rows if centred else 0, dtype=torch.float32, device=x.device)
    out, inverse = (torch.empty(n, dtype=d, device=x.device) for n, d in ((x.shape, x.dtype), (rows, torch.float32)))
    return out, total, mean, inverse


@torch.library.custom_op("zoo::norm_backward", mutates_args=())
def _norm_backward(
    grad: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    offset: float,
    centred: bool,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of what was normed and, in float32, of the weight and of the bias, zero where there is none."""
    given, added = grad.contiguous(), None if grad_total is None else grad_total.contiguous()
    weight = None if weight is None else weight.contiguous()
    count, width = total.shape[:-1].numel(), total.shape[-1]
    grad_x = torch.empty(total.shape, dtype=total.dtype, device=total.device)
    kernel: Any = triton_kernels.norm_backward if width <= HELD else triton_kernels.norm_backward_wide
    block, sizes = triton.next_power_of_2(width), {"width": width}
    settings = _LAUNCHES.configuration(kernel.__name__, total.device, sizes)
    rows = settings["ROWS"] if "ROWS" in settings else triton_kernels.rows_of(settings["TILE"], block)
    # Two programs for a processor, so that one loads while the other computes.
    programs = min(triton.cdiv(count, rows), 2 * processors(total.device)) if total.numel() else 0
    shares, shares_bias = (
        torch.empty(programs if there else 0, width, dtype=torch.float32, device=total.device)
        for there in (weight is not None, has_bias)
    )
    if programs:
        constants = {
            "CENTRED": centred,
            "HAS_TOTAL": added is not None,
            "HAS_WEIGHT": weight is not None,
            "HAS_BIAS": has_bias,
            "OFFSET": offset,
        }
        if width <= HELD:
            constants["BLOCK"] = block
        tensors = (given, added, total.contiguous(), weight, mean, inverse, grad_x, shares, shares_bias)
        _LAUNCHES.run(kernel, (programs,), total.device, sizes, *tensors, count, width, **constants)
    return grad_x, shares.sum(0), shares_bias.sum(0)


@_norm_backward.register_fake
def _(grad: Tensor, grad_total: Tensor | None, total: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    del grad, grad_total
    grad_weight, grad_bias = (total.new_empty(total.shape[-1], dtype=torch.float32) for _ in range(2))
    return torch.empty(total.shape, dtype=total.dtype, device=total.device), grad_weight, grad_bias


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, _, ctx.offset, ctx.centred = inputs
    _, total, mean, inverse = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(mean, inverse)
    ctx.save_for_backward(x if residual is None else total, weight, mean, inverse)
    ctx.bias = None if bias is None else bias.dtype
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype


def _differentiate(ctx: Any, grad: Tensor | None, grad_total: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    total, weight, mean, inverse = ctx.saved_tensors
    of_x, of_residual = ctx.dtypes
    if of_residual is None:
        grad_total = None
    grad_weight = grad_bias = None
    if grad is not None:
        grad_total, for_weight, for_bias = _norm_backward(
            grad, grad_total, total, weight, mean, inverse, ctx.offset, ctx.centred, ctx.bias is not None
        )
        grad_weight = None if weight is None else for_weight.to(weight.dtype)
        grad_bias = None if ctx.bias is None else for_bias.to(ctx.bias)
    if grad_total is None:
        return None, None, grad_weight, grad_bias, None, None, None
    grad_residual = None if of_residual is None else grad_total.to(of_residual)
    return grad_total.to(of_x), grad_residual, grad_weight, grad_bias, None, None, None


_norm_forward.register_autograd(_differentiate, setup_context=_remember)
