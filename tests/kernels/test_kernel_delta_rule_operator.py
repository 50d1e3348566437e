"""The delta rule's Triton operators: registration, empty inputs, decays at their limits, hardest keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.kernels import launch

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed on this system", exc_type=ImportError)

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def inputs(tokens: int = 5, heads: int = 2, groups: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`q, k, v, beta, log_decay`."""
    torch.manual_seed(0)
    q, k = (F.normalize(torch.randn(1, tokens, groups, 16), dim=-1) for _ in range(2))
    v = torch.randn(1, tokens, heads, 16)
    return q, k, v, 2 * torch.rand(1, tokens, heads), -torch.rand(1, tokens, heads)


def test_operators_are_registered_right() -> None:
    from zoo.kernels.delta import triton_path

    *tensors, log_decay = inputs(heads=1)
    rest = log_decay, torch.zeros(1, 1, 16, 16), torch.tensor([[0, 0, 1, 1, 1]], dtype=torch.int32), 0.5
    with launch.without_gpu("sm_90"), interpreter.bfloat16():
        leaves = [x.clone().requires_grad_() for x in tensors]
        torch.library.opcheck(triton_path._forward, (*leaves, *rest), test_utils=CHECKS)
        given = torch.ones_like(tensors[2]), torch.ones(1, 1, 16, 16), *tensors, *rest
        torch.library.opcheck(triton_path._backward, given, test_utils=CHECKS[:2])


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 3)])
def test_nothing_to_compute(batch: int, tokens: int) -> None:
    q, k, v, beta, log_decay = (x[:batch, :tokens] for x in inputs())
    state = torch.ones(batch, 2, 16, 16, requires_grad=True)
    with launch.without_gpu("sm_90"), kernels.use(delta_rule="triton"):
        out, final = kernels.delta_rule(q, k, v, beta, log_decay=log_decay, state=state)
        final.sum().backward()
    assert out.shape == v.shape
    assert torch.equal(final, state)
    assert state.grad is not None
    assert torch.equal(state.grad, torch.ones_like(state))


def test_decays_at_their_limits() -> None:
    """A decay of zero forgets exactly, whatever other decays stand beside it."""
    q, k, v, beta, log_decay = inputs(12)
    log_decay[:, 4] = log_decay[0, 5] = float("-inf")
    log_decay[:, 7:9] = 0
    log_decay[:, 10] = 1
    rows = [x[:, 4:] for x in (q, k, v, beta)]
    with launch.without_gpu("sm_90"), kernels.use(delta_rule="triton"), interpreter.trials() as slab:
        found = kernels.delta_rule(*(slab(x) for x in (q, k, v, beta)), log_decay=log_decay.requires_grad_())
        found[0].sum().backward()
    assert log_decay.grad is not None
    assert torch.isfinite(log_decay.grad).all()
    wide = [x.double() for x in rows]
    with kernels.use(delta_rule="reference"):
        exact = kernels.delta_rule(*wide, log_decay=log_decay[:, 4:].detach().double())
    assert_close(found[0][:, 4:], exact[0])
    assert_close(found[1], exact[1])


def test_equal_keys_and_steps_of_two() -> None:
    """All rows of the triangle are full; its inverse alternates between -2 and 2 and must not lose digits."""
    q, k, v, beta, _ = inputs(64, heads=1)
    tensors = q, k[:, :1].repeat(1, 64, 1, 1), v, torch.full_like(beta, 2)
    with launch.without_gpu("sm_90"), kernels.use(delta_rule="triton"), interpreter.trials() as slab:
        found = kernels.delta_rule(*(slab(x) for x in tensors))
    with kernels.use(delta_rule="reference"):
        exact, plain = (kernels.delta_rule(*(x.to(dtype) for x in tensors)) for dtype in (torch.float64, torch.float32))
    for one, truth, other in zip(found, exact, plain, strict=True):
        assert_close(one, truth, plain=other, slack=8)
