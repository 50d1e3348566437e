"""Checks that the primitives share; each error names the primitive, the tensor, what it is and what was expected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import torch
from torch import Tensor

from zoo.errors import ZooError

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What the primitives compute with; narrower formats have no arithmetic."""
COMPLEX = (torch.complex64, torch.complex128)


def fail(primitive: str, message: str) -> NoReturn:
    raise ZooError(f"{primitive}: {message}")


def is_tensor(primitive: str, name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        fail(primitive, f"{name} is of type {type(tensor).__name__}, expected a tensor")


def rank(primitive: str, name: str, tensor: Tensor, axes: str) -> None:
    """Require one dimension for each word of `axes`."""
    is_tensor(primitive, name, tensor)
    expected = axes.count(",") + 1
    if tensor.dim() != expected:
        fail(primitive, f"{name} has shape {list(tensor.shape)}, expected {expected} dimensions [{axes}]")


def shape(primitive: str, name: str, tensor: Tensor, axes: str, expected: tuple[int, ...]) -> None:
    """Require exactly the shape `expected`, whose dimensions `axes` names."""
    is_tensor(primitive, name, tensor)
    if tensor.shape != expected:
        fail(primitive, f"{name} has shape {list(tensor.shape)}, expected [{axes}] = {list(expected)}")


def positive(primitive: str, name: str, value: float | None) -> None:
    if value is not None and not value > 0:
        fail(primitive, f"{name} is {value}, expected a number above 0")


def floats(primitive: str, **tensors: Tensor | None) -> None:
    """Require real numbers of a dtype that is computed with; None is skipped."""
    _numbers(primitive, FLOATS, tensors)


def floats_or_complex(primitive: str, **tensors: Tensor | None) -> None:
    """Require real or complex numbers of a dtype that is computed with; None is skipped."""
    _numbers(primitive, FLOATS + COMPLEX, tensors)


def _numbers(primitive: str, dtypes: tuple[torch.dtype, ...], tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        is_tensor(primitive, name, tensor)
        if tensor.dtype not in dtypes:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            fail(primitive, f"{name} has dtype {tensor.dtype}, expected one of {allowed}")


def one_device(primitive: str, **tensors: Tensor | None) -> None:
    """Require all tensors where the first is; None is skipped."""
    (first, leader), *others = ((name, tensor) for name, tensor in tensors.items() if tensor is not None)
    for name, tensor in others:
        if tensor.device != leader.device:
            fail(primitive, f"{name} is on {tensor.device}, expected {leader.device}, where {first} is")


def integers(primitive: str, name: str, tensor: Tensor) -> None:
    is_tensor(primitive, name, tensor)
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        fail(primitive, f"{name} has dtype {tensor.dtype}, expected an integer dtype")


def autocast_dtype(kind: str) -> torch.dtype | None:
    """The dtype that autocast gives the operands of a matrix product on a kind of device; None where it is off."""
    return torch.get_autocast_dtype(kind) if _has_autocast(kind) and torch.is_autocast_enabled(kind) else None


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# Dynamo of torch 2.11 does not know the function inside; under this mark it calls ours and keeps the result.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype to accumulate in: float32 for half precision, else `dtype` itself."""
    return torch.promote_types(dtype, torch.float32)
