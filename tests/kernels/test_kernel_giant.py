"""Calls with more than 2^31 elements, whose places 32 bits do not hold: the last programs of a launch.

Memory is mapped and not touched, so that a tensor costs what is read and written of it: of each input the last rows,
which a launch's last programs compute. They must give what the same rows give alone.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import kernels
from zoo.kernels.launch import without_gpu

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed on this system", exc_type=ImportError)

LIMIT = 2**31
NO_RESERVE = 0x4000
"""`MAP_NORESERVE` of Linux, which Python names from 3.13 on."""
LARGE = 2**22
"""Elements from which a tensor is mapped."""


def mapped(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros that take no memory until they are touched."""
    size = prod(shape) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, max(1, size), flags), dtype=dtype, count=prod(shape)).view(shape)


@contextmanager
def lazy() -> Iterator[None]:
    """Within the block large results are mapped as well."""
    plain = torch.empty, torch.empty_like, Tensor.new_empty

    def empty(*size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        wanted = dtype or torch.get_default_dtype()
        return mapped(shape, wanted) if prod(shape) > LARGE else plain[0](shape, dtype=wanted, **rest)

    def empty_like(tensor: Tensor, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(tuple(tensor.shape), dtype=dtype or tensor.dtype)

    def new_empty(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        return empty(*size, dtype=dtype or tensor.dtype)

    torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.empty, torch.empty_like, Tensor.new_empty = plain  # type: ignore[assignment]


@contextmanager
def last_programs(count: int) -> Iterator[None]:
    """Within the block only the last `count` programs along a grid's first axis run."""
    builder, executor = interpreter.BUILDER, interpreter.INTERPRETER.GridExecutor
    set_dim, set_index, call = builder.set_grid_dim, builder.set_grid_idx, executor.__call__
    whole, first = [1, 1, 1], [0]

    def called(self: Any, *arguments: Any, **constants: Any) -> None:
        grid = self.grid

        def last(given: Any) -> tuple[int, ...]:
            found: tuple[int, ...] = grid(given) if callable(grid) else grid  # type: ignore[assignment]
            whole[:] = (*found, 1, 1)[:3]
            first[0] = max(0, whole[0] - count)
            return min(count, whole[0]), *whole[1:]

        self.grid = last
        call(self, *arguments, **constants)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(executor, "__call__", called)
        patch.setattr(builder, "set_grid_dim", lambda self, *_: set_dim(self, *whole))
        patch.setattr(
            builder, "set_grid_idx", lambda self, x, y, z: set_index(self, x + max(0, whole[0] - count), y, z)
        )
        # It would copy every tensor over itself.
        patch.setattr(executor, "_restore_args_dev", lambda *_: None)
        yield


@dataclass(frozen=True)
class Giant:
    """A call whose inputs `rows` have so many rows that the largest is above the limit, and its other arguments."""

    primitive: str
    rows: dict[str, tuple[int, ...]]
    """The shape of a row, by argument."""
    rest: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float16
    programs: int = 2
    backward: bool = True

    def __str__(self) -> str:
        return self.primitive


GIANTS = (
    Giant("recurrence", {"q": (8, 1, 64), "k": (8, 1, 64), "v": (8, 1, 64)}, dtype=torch.float32),
    Giant("diagonal_scan", {"x": (4, 64), "decay": (4, 64)}),
    Giant("causal_convolution", {"x": (16, 64)}, {"weight": torch.ones(64, 4)}),
    Giant("grouped_matmul", {"x": (64,)}, {"weight": torch.eye(64)[None].half()}),
    # Few programs go through all rows in the backward pass.
    Giant("rms_norm", {"x": (4096,)}, backward=False),
    Giant("layer_norm", {"x": (4096,)}, backward=False),
    Giant("gated_activation", {"gate": (4096,), "up": (4096,)}, backward=False),
    Giant("polynomial_activation", {"x": (4096,)}, {"coefficients": torch.arange(4.0)}, backward=False),
)


@pytest.mark.parametrize("giant", GIANTS, ids=str)
def test_places_beyond_32_bits(giant: Giant) -> None:
    count = LIMIT // max(prod(row) for row in giant.rows.values()) + 3
    drawn = torch.Generator().manual_seed(0)
    rows, alone = {}, {}
    for name, row in giant.rows.items():
        rows[name] = mapped((count, *row), giant.dtype)
        alone[name] = torch.rand((1, *row), generator=drawn).mul_(0.5).to(giant.dtype)
        rows[name][-1:] = alone[name]
        rows[name].requires_grad_(giant.backward)
        alone[name].requires_grad_(giant.backward)
    with kernels.use(**{giant.primitive: "triton"}), without_gpu("sm_90"), lazy():
        with last_programs(giant.programs):
            outputs = called(giant, rows, count)
        expected = called(giant, alone, 1)
    for index, (out, other) in enumerate(zip(outputs, expected, strict=True)):
        assert torch.equal(out[-1:], other), f"output {index}"


def called(giant: Giant, rows: dict[str, Tensor], count: int) -> list[Tensor]:
    """Outputs and, from ones, gradients."""
    extra = {"offsets": torch.tensor([0, count])} if giant.primitive == "grouped_matmul" else {}
    found = getattr(kernels, giant.primitive)(**rows, **giant.rest, **extra)
    outputs = [found] if isinstance(found, Tensor) else [*found]
    if not giant.backward:
        return outputs
    given = mapped(tuple(outputs[0].shape), outputs[0].dtype)
    given[-1:] = 1
    return [*outputs, *torch.autograd.grad(outputs[0], [*rows.values()], given)]
