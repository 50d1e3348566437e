"""Peak figures of the machine at hand, measured: matrix rates, copy bandwidth, the time of the smallest operator."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch

from zoo.device import Device
from zoo.hardware.profile import Profile
from zoo.latency import Case, measure

SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
"""Sides of square matrices, of which the best counts: small ones start slowly, large ones leave caches."""
MOVED = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Bytes that are copied and read, beyond what caches hold."""
DTYPES = {"cpu": ("float32", "bfloat16", "float64"), "cuda": ("float32", "bfloat16", "float16")}
MOST_SECONDS = 1.0
"""Seconds of timed runs of one product, which a processor without instructions for a dtype needs for two."""

ENOUGH = 1 << 50
"""Bytes of memory that a system is taken to have that does not say."""


def probe(
    device: Device, *, sides: Sequence[int] | None = None, moved: int | None = None, repeats: int = 10
) -> Profile:
    """Measure a device: the fastest of `repeats` runs of square matrix products, of a copy and a sum of what no cache
    holds, and of additions of one number.

    Takes some seconds. What else the machine does makes the figures worse, never better.
    """
    sides, moved = sides or SIDES[device.kind], moved or MOVED[device.kind]
    rates = {name: max(_rate(device, name, side, repeats) for side in sides) for name in DTYPES[device.kind]}
    source = torch.ones(moved // 4, device=device.name)
    target, one = torch.empty_like(source), torch.ones((), device=device.name)
    best = _best(
        {
            "copy": lambda: target.copy_(source),
            "read": source.sum,
            # Many at once, so that the clock does not count.
            "launch": lambda: [one.add_(1.0) for _ in range(100)],
        },
        device,
        repeats,
    )
    return Profile(
        name=re.sub(r"[^a-z0-9]+", "-", device.processor.lower()).strip("-") or device.kind,
        title=str(device).partition(": ")[2],
        kind=device.kind,
        source="probed",
        peak=_in_order(rates),
        bandwidth=max(2 * moved / best["copy"], moved / best["read"]),
        memory=float(device.memory or ENOUGH),
        launch=best["launch"] / 100,
        fingerprint=device.id,
    )


def _rate(device: Device, dtype: str, side: int, repeats: int) -> float:
    """Operations a second in the product of two square matrices."""
    a, b = (torch.randn(side, side, device=device.name).to(getattr(torch, dtype)) for _ in range(2))
    return 2 * side**3 / _best({"product": lambda: a @ b}, device, repeats)["product"]


def _best(cases: Mapping[str, Case], device: Device, repeats: int) -> dict[str, float]:
    """Seconds of the fastest run of each."""
    timings = measure(cases, device=device, repeats=repeats, min_seconds=0.0, max_seconds=MOST_SECONDS, warmup=1)
    return {name: min(timing.runs) for name, timing in timings.items()}


def _in_order(rates: Mapping[str, float]) -> dict[str, float]:
    """Half precision is as fast as float32 at least, in which it can be computed, and float64 at most."""
    full = rates["float32"]
    return {name: min(rate, full) if name == "float64" else max(rate, full) for name, rate in rates.items()}
