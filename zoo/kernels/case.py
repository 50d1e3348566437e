"""Calls of primitives that together use every flag of every kernel.

Each primitive lists its own in `cases.py` of its folder. The tests run them in the interpreter, the static sweep
compiles them, the GPU script checks them; `zoo.testing.kernels` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from zoo.kernels.dispatch import HOMES

Size = Literal["small", "large"]


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
