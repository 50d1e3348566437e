"""Bytes of memory that calls allocate, measured.

On the CPU torch's own profiler reports every allocation and release of torch's allocator, with its exact size, in
whatever operator and for whatever purpose. What libraries allocate behind its back is not seen: packed operands and
scratch inside oneDNN and MKL, NumPy arrays, the interpreter. On a GPU torch's caching allocator keeps the books; it
rounds each tensor up to 512 bytes and sees the workspaces of cuBLAS, but not the CUDA context.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Any, TypeVar

from zoo.device import Device

T = TypeVar("T")

_MARK = "zoo.hardware.memory"


def peak_bytes(case: Callable[[], object], device: Device) -> int:
    """The most bytes that a call of `case` holds at once beyond those that were alive before it.

    `case` runs twice and the second run counts: what the first one leaves behind and the second replaces, such as
    gradients, was alive before. Tensors that only outlive a call count if the call makes them. Gradients are recorded
    as the caller has set. Raises whatever `case` raises.
    """
    if device.kind == "cuda":
        return _peak_on_cuda(case, device)
    return max(0, 0, *accumulate(_changes(case, case)))


def cold_peak_bytes(case: Callable[[], object]) -> int:
    """The most bytes that a first call of `case` holds on the CPU beyond those that were alive before it.

    What is released of the memory from before counts as negative.
    """
    return max(0, 0, *accumulate(_changes(lambda: None, case)))


def kept_bytes(make: Callable[[], T], device: Device) -> tuple[T, int]:
    """What `make` returns, and how many bytes more are alive with it than before.

    Of what was alive before, nothing may be released in `make`. Raises whatever `make` raises.
    """
    made: list[T] = []
    if device.kind == "cuda":
        import torch

        torch.cuda.synchronize(device.name)
        before = torch.cuda.memory_allocated(device.name)
        made.append(make())
        torch.cuda.synchronize(device.name)
        return made[0], torch.cuda.memory_allocated(device.name) - before
    changes = _changes(lambda: None, lambda: made.append(make()))
    return made[0], sum(changes)


def _peak_on_cuda(case: Callable[[], object], device: Device) -> int:
    import torch

    case()
    torch.cuda.synchronize(device.name)
    torch.cuda.reset_peak_memory_stats(device.name)
    before = torch.cuda.memory_allocated(device.name)
    case()
    torch.cuda.synchronize(device.name)
    return torch.cuda.max_memory_allocated(device.name) - before


def _changes(before: Callable[[], object], case: Callable[[], object]) -> list[int]:
    """Bytes that `case` allocates and, below zero, releases, in order; of what `before` allocated too."""
    from torch.autograd.profiler import profile, record_function

    # Typed by torch as nothing, and its events without their bytes.
    observed: Any = profile(use_kineto=False, profile_memory=True)
    with _silent_profiler(), observed:
        before()
        with record_function(_MARK):
            case()
    events = observed.kineto_results.events()
    (start,) = (event.start_ns() for event in events if event.name() == _MARK)
    later = [event for event in events if event.name() == "[memory]" and event.start_ns() >= start]
    return [event.nbytes() for event in sorted(later, key=lambda event: event.start_ns())]


@contextlib.contextmanager
def _silent_profiler() -> Iterator[None]:
    """Keeps the profiler from writing its starts and stops to standard error; it reads the level when first used."""
    name = "KINETO_LOG_LEVEL"
    given = os.environ.get(name)
    os.environ.setdefault(name, "99")
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]
