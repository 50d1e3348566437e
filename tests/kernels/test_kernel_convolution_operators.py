"""The short convolution's Triton operators: well formed, and right on views, single tokens and tiny channels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.launch import without_gpu

path = pytest.importorskip(
    "zoo.kernels.convolution.triton_path", reason="Triton is not installed", exc_type=ImportError
)

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def both(function: Callable[..., Any], *inputs: Tensor) -> list[list[Tensor]]:
    """Outputs and gradients by the kernel and by the reference."""
    found = []
    for implementation in ("triton", "reference"):
        leaves = [each.detach().requires_grad_() for each in inputs]
        with without_gpu("sm_90"), kernels.use(causal_convolution=implementation):
            outputs = function(*leaves)
            total = torch.cat([each.flatten() for each in outputs]).square().sum()
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append([*outputs, *grads])
    return found


def test_operators_are_well_formed() -> None:
    x, weight, bias, state = torch.randn(2, 5, 3), torch.randn(3, 4), torch.randn(3), torch.randn(2, 3, 3)
    runs = torch.tensor([[0, 0, 1, 1, 2]] * 2, dtype=torch.int32)
    given = [each.requires_grad_() for each in (x, weight, bias, state)]
    with without_gpu("sm_90"):
        torch.library.opcheck(path._forward, (*given, runs, True), test_utils=CHECKS)
        torch.library.opcheck(path._forward, (*given[:2], None, None, None, False), test_utils=CHECKS)


@pytest.mark.parametrize(("batch", "tokens", "channels"), [(2, 1, 3), (1, 2, 1), (2, 0, 3), (0, 3, 3), (1, 5, 0)])
def test_tiny_and_empty(batch: int, tokens: int, channels: int) -> None:
    x, state = torch.randn(batch, tokens, channels), torch.randn(batch, 3, channels)

    def function(x: Tensor, weight: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.causal_convolution(x, weight, state=state, activation="silu")

    found, expected = both(function, x, torch.randn(channels, 4), state)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_views() -> None:
    def function(wide: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.causal_convolution(wide[..., 2:5], weight.T, bias)

    found, expected = both(function, torch.randn(2, 6, 8), torch.randn(4, 3), torch.randn(3))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_refuses_many_taps() -> None:
    x = torch.randn(1, 4, 2)
    with without_gpu("sm_90"), kernels.use(causal_convolution="triton"):
        with pytest.raises(ZooError, match="takes kernels of 2 to 8 taps, not 9"):
            kernels.causal_convolution(x, torch.randn(2, 9))
        with pytest.raises(ZooError, match="takes float32, float16, bfloat16, not float64"):
            kernels.causal_convolution(x.double(), torch.randn(2, 4))
