"""Gated and polynomial activations on Triton kernels; the backward passes compute from the inputs again."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Launches, processors
from zoo.kernels.pointwise import activation_kernels
from zoo.kernels.pointwise.triton_kernels import rows_of

_LAUNCHES = Launches("pointwise")

_LONGEST = 2048
"""Elements of a row that a tile takes at once, where rows need not be whole."""


@torch.library.custom_op("zoo::gated_activation", mutates_args=())
def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run_gated(activation_kernels.gated_forward, (gate, up), (out,), kind)
    return out


@gated_activation.register_fake
def _(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    del up, kind
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


@torch.library.custom_op("zoo::gated_activation_backward", mutates_args=())
def _gated_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    results = _like(gate, up)
    _run_gated(activation_kernels.gated_backward, (grad, gate, up), results, kind)
    return results


@_gated_backward.register_fake
def _(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    del grad, kind
    return _like(gate, up)


def _like(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (gate, up))
    return grad_gate, grad_up


def _run_gated(kernel: Any, inputs: tuple[Tensor, ...], results: tuple[Tensor, ...], kind: str) -> None:
    count = inputs[0].numel()
    if not count:
        return
    # The halves of one projection are no rows in a row; they are read where they are.
    width = count if all(x.is_contiguous() for x in inputs) else inputs[0].shape[-1]
    rows = [_rowwise(x.reshape(-1, width)) for x in inputs]
    block = min(triton.next_power_of_2(width), _LONGEST)
    _LAUNCHES.run(
        kernel,
        lambda meta: (triton.cdiv(count // width, rows_of(meta["TILE"], block)) * triton.cdiv(width, block),),
        rows[0].device,
        {"width": width},
        *(*rows, *results, count // width, width, *(x.stride(0) for x in rows)),
        KIND=kind,
        BLOCK=block,
    )


def _rowwise(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _remember_gated(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
    del output
    *tensors, ctx.kind = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_gated(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_gated_backward(grad, *ctx.saved_tensors, ctx.kind), None


gated_activation.register_autograd(_differentiate_gated, setup_context=_remember_gated)


@torch.library.custom_op("zoo::polynomial_activation", mutates_args=())
def polynomial_activation(x: Tensor, coefficients: Tensor, normalized: bool, eps: float) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        rows, width, block = _tiles(x, normalized)
        _LAUNCHES.run(
            activation_kernels.polynomial_forward,
            lambda meta: (triton.cdiv(rows, rows_of(meta["TILE"], block)) * triton.cdiv(width, block),),
            x.device,
            {"width": block},
            *(x, coefficients.contiguous(), out, rows, width, eps),
            NORMALIZED=normalized,
            BLOCK=block,
        )
    return out


@polynomial_activation.register_fake
def _(x: Tensor, coefficients: Tensor, normalized: bool, eps: float) -> Tensor:
    del coefficients, normalized, eps
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("zoo::polynomial_activation_backward", mutates_args=())
def _polynomial_backward(
    grad: Tensor, x: Tensor, coefficients: Tensor, normalized: bool, eps: float
) -> tuple[Tensor, Tensor]:
    x, grad = x.contiguous(), grad.contiguous()
    grad_x = torch.empty_like(x)
    programs = 0
    if x.numel():
        rows, width, block = _tiles(x, normalized)
        kernel, sizes = activation_kernels.polynomial_backward, {"width": block}
        tile = _LAUNCHES.configuration(kernel.__name__, x.device, sizes)["TILE"]
        tiles = triton.cdiv(rows, rows_of(tile, block)) * triton.cdiv(width, block)
        programs = min(tiles, 4 * processors(x.device))
    shares = torch.empty(programs, 4, dtype=torch.float32, device=x.device)
    if programs:
        tensors = (grad, x, coefficients.contiguous(), grad_x, shares, rows, width, eps)
        _LAUNCHES.run(kernel, (programs,), x.device, sizes, *tensors, NORMALIZED=normalized, BLOCK=block)
    return grad_x, shares.sum(0).to(coefficients.dtype)


@_polynomial_backward.register_fake
def _(grad: Tensor, x: Tensor, coefficients: Tensor, normalized: bool, eps: float) -> tuple[Tensor, Tensor]:
    del grad, normalized, eps
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), torch.empty(
        coefficients.shape, dtype=coefficients.dtype, device=coefficients.device
    )


def _tiles(x: Tensor, normalized: bool) -> tuple[int, int, int]:
    """Rows, their width and how much of it a tile takes: all of it where it has to be summed."""
    width = x.shape[-1] if normalized else x.numel()
    return x.numel() // width, width, triton.next_power_of_2(width if normalized else min(width, _LONGEST))


def _remember_polynomial(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    del output
    x, coefficients, ctx.normalized, ctx.eps = inputs
    ctx.save_for_backward(x, coefficients)


def _differentiate_polynomial(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    grad_x, grad_coefficients = _polynomial_backward(grad, *ctx.saved_tensors, ctx.normalized, ctx.eps)
    return grad_x, grad_coefficients, None, None


polynomial_activation.register_autograd(_differentiate_polynomial, setup_context=_remember_polynomial)
