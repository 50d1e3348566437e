"""Calls of primitives that together use every flag of every kernel, and the one way in which they are checked.

Each primitive lists its cases in `cases.py` of its folder. The tests run them in the interpreter, the static sweep
compiles them, the GPU script checks and times them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from zoo import kernels
from zoo.kernels.dispatch import HOMES
from zoo.testing.tolerance import FORWARD_SLACK, GRADIENT_SLACK, assert_close

Size = Literal["small", "large"]
Prepare = Callable[[Tensor], Tensor]


class Draw:
    """Makes the inputs of a case: `small` for an interpreter, with odd lengths, `large` as a GPU meets them.

    With `blank` all numbers are zero, which takes no time: for a harness that only compiles.
    """

    def __init__(
        self, size: Size, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, blank: bool = False
    ) -> None:
        self.size = size
        self.dtype = dtype
        self.device = device
        self.blank = blank
        self._generator = torch.Generator(device).manual_seed(seed)

    def pick(self, small: int, large: int) -> int:
        """The first at small size, the second at large."""
        return small if self.size == "small" else large

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers in the case's dtype, or in another."""
        if self.blank:
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        drawn = torch.randn(shape, generator=self._generator, device=self.device)
        return (drawn * std).to(dtype or self.dtype)

    def uniform(self, low: float, high: float, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        if self.blank:
            return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)
        drawn = torch.rand(shape, generator=self._generator, device=self.device)
        return (low + (high - low) * drawn).to(dtype or self.dtype)

    def segments(self, batch: int, tokens: int, *, most: int = 4) -> Tensor:
        """Ids of packed sequences of random lengths, `[batch, tokens]`."""
        starts = torch.rand((batch, tokens), generator=self._generator, device=self.device) < most / tokens
        return starts.long().cumsum(1)


@dataclass(frozen=True, slots=True)
class Case:
    """One call of a primitive.

    call: the public function; everything that `inputs` makes is given to it by name. gradients: whether it is
    differentiated, for all its inputs in floating point. kernels: the kernels that it launches, for the harness to go
    through their configurations.
    """

    primitive: str
    name: str
    call: Callable[..., Tensor | tuple[Tensor | None, ...]]
    inputs: Callable[[Draw], Mapping[str, Any]]
    kernels: tuple[str, ...]
    gradients: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the GPU script needs to know to time it, such as the rival and the bytes that must be moved."""

    def __str__(self) -> str:
        return f"{self.primitive}-{self.name}"


def cases() -> Iterator[Case]:
    """Every case of every primitive that has kernels."""
    for home in dict.fromkeys(HOMES.values()):
        try:
            module = import_module(f"zoo.kernels.{home}.cases")
        except ModuleNotFoundError as error:
            if error.name != f"zoo.kernels.{home}.cases":
                raise
            continue
        yield from module.CASES


@dataclass(slots=True)
class Outcome:
    """What a call gave: outputs, and gradients by the names of inputs."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def outcome(case: Case, inputs: Mapping[str, Any], implementation: str) -> Outcome:
    """Run a case forward and, if it is differentiated, backward from fixed random gradients of its outputs."""
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
        given = [_cotangent(out) for out in ends]
        found = torch.autograd.grad(ends, list(leaves.values()), given, allow_unused=True)
    gradients = {name: each for name, each in zip(leaves, found, strict=True) if each is not None}
    return Outcome([out.detach() for out in outputs], gradients)


def _cotangent(out: Tensor) -> Tensor:
    """Numbers that hang on nothing but the shape, exact in every dtype."""
    drawn = torch.randn(out.shape, generator=torch.Generator().manual_seed(out.numel()))
    return drawn.to(torch.bfloat16).to(out.device, out.dtype)


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
