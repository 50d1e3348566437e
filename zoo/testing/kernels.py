"""The one way in which kernels are checked, on the calls that `zoo.kernels.case` lists."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo import kernels
from zoo.kernels.case import Case, Draw, Size
from zoo.testing.tolerance import FORWARD_SLACK, GRADIENT_SLACK, assert_close


@dataclass(slots=True)
class Outcome:
    """What a call gave: outputs, and gradients by the names of inputs."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def _cotangent(out: Tensor) -> Tensor:
    """Numbers that hang on nothing but the shape, exact in every dtype."""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(out.numel()))
    return drawn.to(torch.bfloat16).to(out.device, out.dtype)


def outcome(
    case: Case,
    inputs: Mapping[str, Any],
    implementation: str,
    *,
    cotangent: Callable[[Tensor], Tensor] = _cotangent,
) -> Outcome:
    """Run a case forward and, if it is differentiated, backward from gradients of its outputs: fixed random ones."""
    leaves = {
        name: value.detach().requires_grad_(case.gradients)
        for name, value in inputs.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    }
    with kernels.use(**{case.primitive: implementation}), nullcontext() if case.gradients else torch.no_grad():
        found = case.call(**{**inputs, **leaves})
        outputs = [out for out in ((found,) if isinstance(found, Tensor) else found) if out is not None]
        if not case.gradients:
            return Outcome(outputs, {})
        ends = [out for out in outputs if out.requires_grad]
        given = [cotangent(out) for out in ends]
        found = torch.autograd.grad(ends, list(leaves.values()), given, allow_unused=True)
    gradients = {name: each for name, each in zip(leaves, found, strict=True) if each is not None}
    return Outcome([out.detach() for out in outputs], gradients)


def widened(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same numbers in float64."""
    return {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


def check(
    case: Case,
    dtype: torch.dtype,
    *,
    size: Size = "small",
    device: str = "cpu",
    seed: int = 0,
    run: Callable[[Case, Mapping[str, Any]], Outcome] | None = None,
) -> None:
    """Hold a case's kernel against the rule of `zoo.testing.tolerance`.

    Exact is the reference in float64 on the numbers as `dtype` holds them, plain the reference in `dtype`. `run` gives
    the kernel's outcome, by default by calling it.
    """
    inputs = case.inputs(Draw(size, dtype, device, seed))
    exact, plain = outcome(case, widened(inputs), "reference"), outcome(case, inputs, "reference")
    found = (run or (lambda case, inputs: outcome(case, inputs, "triton")))(case, inputs)
    for index, (one, truth, other) in enumerate(zip(found.outputs, exact.outputs, plain.outputs, strict=True)):
        assert_close(one, truth, plain=other, slack=FORWARD_SLACK, what=f"{case} output {index}")
    assert found.gradients.keys() == exact.gradients.keys()
    for name, one in found.gradients.items():
        what = f"{case} gradient of {name}"
        assert_close(one, exact.gradients[name], plain=plain.gradients[name], slack=GRADIENT_SLACK, what=what)
