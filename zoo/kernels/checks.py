"""Checks that the primitives share; each error names the primitive, the tensor, what it is and what was expected."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from zoo.errors import ZooError


def fail(primitive: str, message: str) -> NoReturn:
    raise ZooError(f"{primitive}: {message}")


def rank(primitive: str, name: str, tensor: Tensor, axes: str) -> None:
    """Require one dimension for each word of `axes`."""
    expected = axes.count(",") + 1
    if tensor.dim() != expected:
        fail(primitive, f"{name} has shape {list(tensor.shape)}, expected {expected} dimensions [{axes}]")


def shape(primitive: str, name: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    """Require exactly the shape `expected`, whose dimensions `axes` names."""
    if tensor.shape != expected:
        fail(primitive, f"{name} has shape {list(tensor.shape)}, expected [{axes}] = {list(expected)}")


def positive(primitive: str, name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        fail(primitive, f"{name} is {value}, expected a number above 0")


def integers(primitive: str, name: str, tensor: Tensor) -> None:
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        fail(primitive, f"{name} has dtype {tensor.dtype}, expected an integer dtype")


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32 for half precision, else `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)
