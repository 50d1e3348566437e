"""The recurrence's kernels in Triton's interpreter: as operators, which calls they take, and at the edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.launch import without_gpu

triton_path: Any = pytest.importorskip(
    "zoo.kernels.linear_recurrence.triton_path", reason="Triton is not installed on this system", exc_type=ImportError
)
CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def inputs(decay: tuple[int, ...] | None) -> dict[str, Any]:
    torch.manual_seed(0)
    q, k = (torch.randn(1, 5, 1, 16) for _ in range(2))
    state = torch.randn(1, 2, 16, 16)
    log_decay = None if decay is None else -torch.rand(decay)
    segments = torch.tensor([[3, 3, 1, 1, 3]])
    return {"q": q, "k": k, "v": torch.randn(1, 5, 2, 16), "log_decay": log_decay, "state": state, "segments": segments}


@pytest.mark.parametrize("decay", [None, (2,), (1, 5, 2), (1, 5, 1, 16)])
def test_operators(decay: tuple[int, ...] | None) -> None:
    """What they register fits what they do, so that compilers can rely on it."""
    given = inputs(decay)
    leaves = [x.requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in given.values()]
    grad, grad_final = torch.randn(1, 5, 2, 16), torch.randn(1, 2, 16, 16)
    with without_gpu("sm_90"):
        torch.library.opcheck(triton_path._recurrence_forward, (*leaves, 0.5), test_utils=CHECKS)
        plain = [x.detach() if isinstance(x, Tensor) else x for x in leaves]
        backward = (grad, grad_final, *plain, 0.5, decay is not None)
        torch.library.opcheck(triton_path._recurrence_backward, backward, test_utils=CHECKS)


def test_only_what_is_wanted_is_differentiated() -> None:
    """A constant decay without a gradient, an output that nothing uses, a state that is not given."""
    v, log_decay, segments = torch.randn(1, 5, 2, 16), -torch.rand(2), torch.tensor([[3, 3, 1, 1, 3]])
    found = []
    for implementation in ("triton", "torch"):
        q = torch.ones(1, 5, 1, 16).cumsum(1).requires_grad_()
        with without_gpu("sm_90"), kernels.use(recurrence=implementation):
            _, final = kernels.recurrence(q, q, v, log_decay=log_decay, segments=segments)
            found.append(torch.autograd.grad(final.square().sum(), q)[0])
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("shape", [(1, 0, 2, 16), (0, 3, 2, 16), (1, 1, 2, 16), (1, 2, 2, 16)])
def test_empty_and_tiny(shape: tuple[int, ...]) -> None:
    q, v, log_decay = torch.randn(shape), torch.randn(shape), -torch.rand(shape[:3])
    for decay in (None, log_decay, log_decay[..., None].expand(shape)):
        expected, last = kernels.recurrence(q, q, v, log_decay=decay)
        with without_gpu("sm_90"), kernels.use(recurrence="triton"):
            out, final = kernels.recurrence(q, q, v, log_decay=decay)
        torch.testing.assert_close((out, final), (expected, last))


def test_strides_do_not_matter() -> None:
    """Queries, keys and values as slices of one projection, and decays transposed."""
    whole = torch.randn(2, 9, 2, 48)
    q, k, v = whole.split(16, -1)
    log_decay = -torch.rand(2, 2, 9).transpose(1, 2)
    expected = kernels.recurrence(q, k, v, log_decay=log_decay)
    with without_gpu("sm_90"), kernels.use(recurrence="triton"):
        torch.testing.assert_close(kernels.recurrence(q, k, v, log_decay=log_decay), expected)


def test_refusals() -> None:
    q = torch.randn(1, 4, 1, 16)
    with without_gpu("sm_90"), kernels.use(recurrence="triton"):
        with pytest.raises(ZooError, match="takes float32, bfloat16, not float16"):
            kernels.recurrence(q.half(), q.half(), q.half())
        with pytest.raises(ZooError, match="takes q, k and v in one dtype"):
            kernels.recurrence(q, q, q.bfloat16())
        with pytest.raises(ZooError, match="a state in no wider one than float32"):
            kernels.recurrence(q, q, q, state=torch.zeros(1, 1, 16, 16, dtype=torch.float64))
    with kernels.use(recurrence="triton"), pytest.raises(ZooError, match="needs a CUDA device"):
        kernels.recurrence(q, q, q)
