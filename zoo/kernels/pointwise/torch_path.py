"""Norms, activations and rotary embedding in few passes over memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.checks import at_least_float32


def rms_norm(
    x: Tensor, weight: Tensor | None, eps: float, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = at_least_float32(x.dtype)
    total = x if residual is None else x + residual
    out = F.rms_norm(total.to(dtype), x.shape[-1:], _factor(weight, offset, dtype), eps).to(x.dtype)
    return out if residual is None else (out, total)


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    offset: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    dtype = at_least_float32(x.dtype)
    total = x if residual is None else x + residual
    factor, shift = _factor(weight, offset, dtype), _factor(bias, 0.0, dtype)
    out = F.layer_norm(total.to(dtype), x.shape[-1:], factor, shift, eps).to(x.dtype)
    return out if residual is None else (out, total)


def _factor(weight: Tensor | None, offset: float, dtype: torch.dtype) -> Tensor | None:
    if weight is None:
        return None
    return weight.to(dtype) + offset if offset else weight.to(dtype)


def rotary(x: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool) -> Tensor:
    if dim == 0:
        return x
    return _turned(x, *_waves(x, positions, base, dim), interleaved)


def rotary_pair(
    q: Tensor, k: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    if dim == 0:
        return q, k
    waves = _waves(q, positions, base, dim)
    return _turned(q, *waves, interleaved), _turned(k, *waves, interleaved)


def _waves(x: Tensor, positions: Tensor, base: float, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the angles, `[batch or 1, tokens, 1, dim / 2]`."""
    dtype = at_least_float32(x.dtype)
    frequencies = base ** (torch.arange(0, dim, 2, device=x.device, dtype=dtype) / -dim)
    angles = (positions.to(dtype).unsqueeze(-1) * frequencies).unsqueeze(-2)
    return angles.cos(), angles.sin()


def _turned(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    dim = 2 * cos.shape[-1]
    turning = x[..., :dim].to(cos.dtype)
    first, second = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    pairs = first * cos - second * sin, second * cos + first * sin
    out = (torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)).to(x.dtype)
    return out if dim == x.shape[-1] else torch.cat([out, x[..., dim:]], -1)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}

_aten = torch.ops.aten

GRADIENTS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda grad, x: _aten.silu_backward(grad, x),
    "gelu": lambda grad, x: _aten.gelu_backward(grad, x),
    "gelu_tanh": lambda grad, x: _aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: grad * (x > 0),
    "relu2": lambda grad, x: grad * 2 * F.relu(x),
    "sigmoid": lambda grad, x: _aten.sigmoid_backward(grad, x.to(at_least_float32(x.dtype)).sigmoid()),
    "linear": lambda grad, x: grad,
}
"""The gradient of each activation's input, from that of its output and the input."""


class _Gated(torch.autograd.Function):
    """Keeps gate and up only, where autograd would keep the activation as well.

    In half precision each step rounds what PyTorch computes in float32, which is twice or thrice, and takes a quarter
    of the time that copies in float32 would.
    """

    @staticmethod
    def forward(gate: Tensor, up: Tensor, kind: str) -> Tensor:
        out = _scaled(ACTIVATIONS[kind](gate), up, kind)
        # Compiled by torch 2.11, a cast that does nothing at the end of a function loses its gradients.
        return out if out.dtype == gate.dtype else out.to(gate.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.kind = inputs[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        grad_gate = GRADIENTS[ctx.kind]((grad * up).to(gate.dtype), gate).to(gate.dtype)
        return grad_gate, _scaled(ACTIVATIONS[ctx.kind](gate), grad, ctx.kind).to(up.dtype), None


def _scaled(activated: Tensor, factor: Tensor, kind: str) -> Tensor:
    """`activated * factor`, in place where `activated` is a tensor of its own and wide enough."""
    # Compiled by torch 2.11, a product in place at the end of a function loses its gradients.
    own = kind != "linear" and activated.dtype == factor.dtype and not torch.compiler.is_compiling()
    return activated.mul_(factor) if own else activated * factor


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    out = _Gated.apply(gate, up, kind)
    assert isinstance(out, Tensor)
    return out


def polynomial_activation(x: Tensor, coefficients: Tensor, normalized: bool, eps: float) -> Tensor:
    wide, factors = x.to(at_least_float32(x.dtype)), coefficients.to(at_least_float32(x.dtype))
    if normalized:
        square = wide.square()
        # [..., 1, powers], so that each token's powers are scaled by one product
        scales = factors[1:] * torch.stack(
            [(power.mean(-1, keepdim=True) + eps).rsqrt() for power in (square, square**2, square**3)], -1
        )
        first, second, third = scales.unbind(-1)
    else:
        wide = F.relu(wide)
        first, second, third = factors[1:].unbind()
    return (factors[0] + wide * (first + wide * (second + wide * third))).to(x.dtype)
