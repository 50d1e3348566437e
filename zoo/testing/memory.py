"""Counting the bytes that a function's tensors really take on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.profiler import ProfilerActivity, profile


def peak_bytes(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """The most bytes of CPU tensors alive at once while `function(*args, **kwargs)` runs, beside those alive before.

    The sum over the allocator's own record of every allocation and release, workspaces inside operators included, so
    that the same call gives the same number. What is released of the memory from before counts as negative.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = function(*args, **kwargs)
    del result
    events = [
        (event.start_ns(), event.nbytes())  # type: ignore[attr-defined]
        for event in recorded.profiler.kineto_results.events()  # type: ignore[union-attr]
        if event.name() == "[memory]"
    ]
    alive = most = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        alive += size
        most = max(most, alive)
    return most
