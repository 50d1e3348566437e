"""The scans' Triton operators: well formed, deterministic, and right on views and in extreme cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.kernels.launch import without_gpu

path = pytest.importorskip("zoo.kernels.scan.triton_path", reason="Triton is not installed", exc_type=ImportError)

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")
STARTS = torch.tensor([[False, True, False, False]])


def both(primitive: str, function: Callable[..., Any], *inputs: Tensor) -> list[list[Tensor]]:
    """Outputs and gradients by the kernel and by the reference."""
    found = []
    for implementation in ("triton", "reference"):
        leaves = [each.detach().requires_grad_() for each in inputs]
        with without_gpu("sm_90"), kernels.use(**{primitive: implementation}):
            outputs = function(*leaves)
            total = torch.cat([each.flatten() for each in outputs]).square().sum()
            grads = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
        found.append([*outputs, *grads])
    return found


def selective(tokens: int = 4, channels: int = 3, state_dim: int = 2) -> list[Tensor]:
    """`x, delta, A, B, C, D, z, state`."""
    torch.manual_seed(0)
    inner, shared = (1, tokens, channels), (1, tokens, state_dim)
    tensors = [torch.randn(inner), torch.rand(inner), -torch.rand(channels, state_dim), torch.randn(shared)]
    return [
        *tensors,
        torch.randn(shared),
        torch.randn(channels),
        torch.randn(inner),
        torch.randn(1, channels, state_dim),
    ]


def test_operators_are_well_formed() -> None:
    tensors = [each.requires_grad_() for each in selective()]
    x, decay, state = torch.randn(1, 4, 3), torch.rand(1, 4, 3), torch.randn(1, 3)
    with without_gpu("sm_90"):
        torch.library.opcheck(path._forward, (*tensors, STARTS, True), test_utils=CHECKS)
        torch.library.opcheck(path._forward, (*tensors[:5], None, None, None, None, False), test_utils=CHECKS)
        for factor in (decay, decay[0, 0]):
            given = [each.detach().requires_grad_() for each in (x, factor, state)]
            torch.library.opcheck(path._diagonal, (*given, STARTS), test_utils=CHECKS)


def test_states_are_kept_only_for_a_gradient() -> None:
    with without_gpu("sm_90"):
        *_, entering = path._forward(*selective(), None, False)
    assert entering.numel() == 0


def test_views_and_large_states() -> None:
    *_, state = selective(state_dim=33)
    wide = torch.randn(1, 4, 3 * 3 + 2 * 33)

    def function(wide: Tensor, A: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x, delta, z, B, C = wide.split([3, 3, 3, 33, 33], -1)
        return kernels.selective_scan(x, delta.sigmoid(), A, B, C, z=z, state=state)

    found, expected = both("selective_scan", function, wide, -torch.rand(3, 33), state)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


def test_infinite_rate_and_no_step() -> None:
    x, delta, A, B, C, *_ = selective()
    A[0] = -torch.inf
    delta[:, 1] = 0
    found, expected = both("selective_scan", lambda *given: kernels.selective_scan(*given), x, delta, A, B, C)
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 3), (1, 1)])
def test_empty_and_tiny(batch: int, tokens: int) -> None:
    x, state = torch.randn(batch, tokens, 3), torch.randn(batch, 3)
    shared = torch.randn(batch, tokens, 2)
    scans: dict[str, Callable[..., Any]] = {
        "diagonal_scan": lambda x, state: kernels.diagonal_scan(x, x.sigmoid(), state=state),
        "selective_scan": lambda x, state: kernels.selective_scan(
            x, x.sigmoid(), -torch.ones(3, 2), shared, shared, state=state.unsqueeze(2).expand(-1, -1, 2)
        ),
    }
    for primitive, function in scans.items():
        found, expected = both(primitive, function, x, state)
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


def test_the_same_twice() -> None:
    def function(*given: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.selective_scan(*given[:5], D=given[5], z=given[6], state=given[7])

    tensors = selective(tokens=9, channels=20)
    first, _ = both("selective_scan", function, *tensors)
    second, _ = both("selective_scan", function, *tensors)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
