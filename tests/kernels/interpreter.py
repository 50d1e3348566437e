"""Triton kernels on the CPU, in Triton's interpreter, under harder conditions than a GPU would set.

`trials` runs a function with everything that it reads and allocates inside slabs filled with NaN, whose edges must be
untouched afterwards, with programs in random order, and with bfloat16 as the hardware computes it. The interpreter must
be on before Triton is imported: `tests/conftest.py` sees to that.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.interpreter import TensorHandle

# What Triton does not mean to be changed from outside.
INTERPRETER: Any = interpreter
BUILDER: Any = interpreter.InterpreterBuilder
HANDLE: Any = TensorHandle

EDGE = 256
"""Elements on either side of a tensor that nothing may touch."""
CANARY = 0x5A
"""Byte that fills slabs of integers; slabs of floating-point numbers hold NaN."""


def slab(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An uninitialised tensor in the middle of a poisoned slab, and the slab."""
    extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if all(size) else 0
    whole = torch.zeros(extent + 2 * EDGE, dtype=dtype)
    if dtype.is_floating_point:
        whole.fill_(float("nan"))
    else:
        whole.view(torch.uint8).fill_(CANARY)
    return whole.as_strided(size, stride, EDGE), whole


class Poisoned:
    """Slabs that were handed out, and whether their edges are as they were."""

    def __init__(self) -> None:
        self.slabs: list[Tensor] = []

    def like(self, tensor: Tensor) -> Tensor:
        """The same values and strides inside a slab."""
        found, whole = slab(tuple(tensor.shape), tensor.stride(), tensor.dtype)
        found.copy_(tensor)
        self.slabs.append(whole)
        return found

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        stride = torch.empty(size, device="meta").stride()
        found, whole = slab(size, stride, dtype)
        self.slabs.append(whole)
        return found

    def check(self) -> None:
        """Fail if something wrote beyond the ends of a tensor."""
        for whole in self.slabs:
            fresh = slab((whole.numel() - 2 * EDGE,), (1,), whole.dtype)[1].view(torch.uint8)
            edge = EDGE * whole.element_size()
            bytes_now = whole.view(torch.uint8)
            assert torch.equal(bytes_now[:edge], fresh[:edge]), "something wrote in front of a tensor"
            assert torch.equal(bytes_now[-edge:], fresh[-edge:]), "something wrote behind a tensor"


@contextmanager
def poisoned() -> Iterator[Poisoned]:
    """Within the block `torch.empty`, `empty_like` and `new_empty` hand out slabs; the edges are checked at its end."""
    kept = Poisoned()
    plain = {"empty": torch.empty, "empty_like": torch.empty_like, "new_empty": Tensor.new_empty}

    def on_cpu(device: Any) -> bool:
        return device is None or torch.device(device).type == "cpu"

    def empty(*size: Any, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        if rest or not on_cpu(device):
            return plain["empty"](*size, dtype=dtype, device=device, **rest)
        shape = size[0] if len(size) == 1 and not isinstance(size[0], int) else size
        return kept.empty(tuple(shape), dtype or torch.get_default_dtype())

    def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None, device: Any = None, **rest: Any) -> Tensor:
        if rest or tensor.device.type != "cpu" or not on_cpu(device):
            return plain["empty_like"](tensor, dtype=dtype, device=device, **rest)
        return kept.empty(tuple(tensor.shape), dtype or tensor.dtype)

    def new_empty(tensor: Tensor, *size: Any, dtype: torch.dtype | None = None, **rest: Any) -> Tensor:
        return empty(*size, dtype=dtype or tensor.dtype, **({"device": tensor.device} | rest))

    torch.empty, torch.empty_like, Tensor.new_empty = empty, empty_like, new_empty  # type: ignore[assignment]
    try:
        yield kept
    finally:
        torch.empty, torch.empty_like = plain["empty"], plain["empty_like"]  # type: ignore[assignment]
        Tensor.new_empty = plain["new_empty"]  # type: ignore[assignment]
    kept.check()


def rounded(data: np.ndarray) -> np.ndarray:
    """float32 numbers rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
    up = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(data), data, (up & np.uint32(0xFFFF0000)).view(np.float32)).astype(np.float32)


@contextmanager
def bfloat16() -> Iterator[None]:
    """Within the block the interpreter holds bfloat16 as float32 rounded after each operation, as hardware computes it.

    By itself it computes with the bit patterns as if they were integers.
    """
    module = INTERPRETER
    kept = {name: getattr(module, name) for name in ("_get_np_dtype", "_validate_np_data_size", "_convert_float")}
    methods = {name: getattr(BUILDER, name) for name in ("create_masked_load", "create_masked_store")}
    finish = HANDLE.__post_init__

    def is_bfloat16(dtype: Any) -> bool:
        return not isinstance(dtype, tl.pointer_type) and getattr(dtype, "scalar", dtype) == tl.bfloat16

    def numpy_dtype(dtype: Any) -> np.dtype:
        return np.dtype(np.float32) if is_bfloat16(dtype) else kept["_get_np_dtype"](dtype)

    def fits(data: np.ndarray, dtype: Any) -> bool:
        return is_bfloat16(dtype) or kept["_validate_np_data_size"](data, dtype)

    def convert(data: np.ndarray, source: Any, target: Any, rounding: Any) -> np.ndarray:
        if is_bfloat16(source) or is_bfloat16(target):
            return data.astype(numpy_dtype(target))
        return kept["_convert_float"](data, source, target, rounding)

    def post_init(handle: TensorHandle) -> None:
        if is_bfloat16(handle.dtype):
            handle.data = rounded(handle.data)
        finish(handle)

    def load(builder: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> TensorHandle:
        if pointers.get_element_ty() != tl.bfloat16:
            return methods["create_masked_load"](builder, pointers, mask, other, *rest)
        default = np.zeros(pointers.data.shape, np.float32) if other is None else other.data
        bits = (np.ascontiguousarray(default, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        found = module._interpreter.load(pointers.data, mask.data, bits, np.dtype(np.uint16))
        return TensorHandle((found.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.bfloat16)

    def store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        if pointers.get_element_ty() != tl.bfloat16:
            return methods["create_masked_store"](builder, pointers, value, mask, *rest)
        bits = (rounded(value.data).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
        return module._interpreter.store(pointers.data, bits, mask.data)

    module._get_np_dtype, module._validate_np_data_size, module._convert_float = numpy_dtype, fits, convert
    HANDLE.__post_init__ = post_init
    BUILDER.create_masked_load, BUILDER.create_masked_store = load, store
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
        for name, value in methods.items():
            setattr(BUILDER, name, value)
        HANDLE.__post_init__ = finish


@contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Within the block the programs of a launch run in random order, which must not matter."""
    set_dim, set_index = BUILDER.set_grid_dim, BUILDER.set_grid_idx
    order: list[int] = []
    rng = random.Random(seed)

    def dim(self: Any, x: int, y: int, z: int) -> None:
        set_dim(self, x, y, z)
        order[:] = rng.sample(range(x * y * z), x * y * z)

    def index(self: Any, x: int, y: int, z: int) -> None:
        _, rows, columns = self.grid_dim
        number = order[(x * rows + y) * columns + z]
        set_index(self, number // (rows * columns), number // columns % rows, number % columns)

    BUILDER.set_grid_dim, BUILDER.set_grid_idx = dim, index
    try:
        yield
    finally:
        BUILDER.set_grid_dim, BUILDER.set_grid_idx = set_dim, set_index


@contextmanager
def trials(seed: int = 0) -> Iterator[Callable[[Tensor], Tensor]]:
    """All of the above at once; gives what puts an input into a slab."""
    with bfloat16(), shuffled(seed), poisoned() as kept:
        yield kept.like
