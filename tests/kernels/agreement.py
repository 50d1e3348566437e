"""How the tests of the primitives compare one implementation with another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tolerance import FORWARD_SLACK, GRADIENT_SLACK, assert_close
from torch import Tensor

from zoo import kernels

Function = Callable[..., Any]


def tensors_of(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else result


def outputs_and_gradients(function: Function, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The results of `function(*inputs)`, and the gradients of a fixed mixture of them for the floating inputs."""
    inputs = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    outputs = tensors_of(function(*inputs))
    mixture = sum(
        (out * torch.arange(out.numel(), device=out.device).view(out.shape).to(out.dtype).cos()).sum()
        for out in outputs
    )
    wanted = [x for x in inputs if x.requires_grad]
    assert isinstance(mixture, Tensor)
    if not mixture.requires_grad:
        return list(outputs), [torch.zeros_like(x) for x in wanted]
    return list(outputs), list(torch.autograd.grad(mixture, wanted, allow_unused=True, materialize_grads=True))


def assert_agrees(primitive: str, function: Function, *inputs: Tensor) -> None:
    """In the inputs' dtype, results and gradients must be those of the reference up to rounding."""
    with kernels.use(**{primitive: "reference"}):
        expected = outputs_and_gradients(function, inputs)
    actual = outputs_and_gradients(function, inputs)
    for kind, found, wanted in zip(("output", "gradient"), actual, expected, strict=True):
        for index, (one, other) in enumerate(zip(found, wanted, strict=True)):
            assert_close(one, other, what=f"{kind} {index}")


def assert_as_exact_as_reference(primitive: str, dtype: torch.dtype, function: Function, *inputs: Tensor) -> None:
    """In `dtype`, results and gradients must be about as near to float64 as the reference in `dtype` is."""
    low = [x.to(dtype) if x.is_floating_point() else x for x in inputs]
    high = [x.double() if x.is_floating_point() else x for x in low]
    with kernels.use(**{primitive: "reference"}):
        exact, plain = outputs_and_gradients(function, high), outputs_and_gradients(function, low)
    actual = outputs_and_gradients(function, low)
    for kind, slack, *groups in zip(
        ("output", "gradient"), (FORWARD_SLACK, GRADIENT_SLACK), actual, exact, plain, strict=True
    ):
        for index, (one, truth, other) in enumerate(zip(*groups, strict=True)):
            assert_close(one, truth, plain=other, slack=slack, what=f"{kind} {index}")
