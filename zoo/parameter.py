"""Tensors as data: what a component owns (`Parameter`) and what it remembers between calls (`StateTensor`).

A component declares its tensors instead of allocating them. Exact counts, building on `meta`, initialisation, weight
decay, narrowing to a sub-network and the size of a decoding state all follow from the declaration.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

Initializer = Callable[["torch.Tensor", "torch.Generator"], Any]
"""Fills a float32 tensor in place, drawing from the generator."""


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a tensor: a name from the field's terms (`width`, `heads`, `hidden`, ...) and its size."""

    name: str
    size: int


def normal(std: float = 0.02) -> Initializer:
    """Draw from a normal distribution with mean 0."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0.0, std, generator=generator)

    return fill


def uniform(low: float, high: float) -> Initializer:
    """Draw uniformly from `[low, high)`."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.uniform_(low, high, generator=generator)

    return fill


def constant(value: float) -> Initializer:
    """The same value everywhere."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        tensor.fill_(value)

    return fill


zeros = constant(0.0)
ones = constant(1.0)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A trainable tensor with named axes.

    `decay` tells whether weight decay applies; `active` is the share of it that one token uses (an expert layer with
    8 experts and top-2 routing has 1/4); `embedding` marks look-up tables, which counts without embeddings leave out.
    """

    axes: tuple[Axis, ...]
    init: Initializer = field(compare=False, default=zeros)
    decay: bool = True
    active: Fraction = Fraction(1)
    embedding: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class StateTensor:
    """A tensor kept between calls, per sequence of the batch: the batch axis comes first and is not part of `shape`.

    `dtype` is `"model"` for the model's own dtype or `"float32"` for accumulators (float64 in a float64 model).
    """

    shape: tuple[int, ...]
    dtype: Literal["model", "float32"] = "model"

    def bytes(self, element_bytes: int) -> int:
        """Bytes for one sequence, with `element_bytes` to an element of the model's dtype."""
        return math.prod(self.shape) * (element_bytes if self.dtype == "model" else max(4, element_bytes))
