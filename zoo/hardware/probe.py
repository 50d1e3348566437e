"""Peak figures of the machine at hand, measured: matrix rates, copy bandwidth, the time of the smallest operator."""

from __future__ import annotations

import re

import torch

from zoo.device import Device
from zoo.hardware.profile import Profile
from zoo.latency import Case, measure

MATRIX_SIDE = {"cpu": 1024, "cuda": 8192}
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}
"""Bytes of a copy, beyond what caches hold."""
DTYPES = {"cpu": ("float32",), "cuda": ("float32", "bfloat16", "float16")}


def probe(device: Device, *, side: int | None = None, copied: int | None = None, repeats: int = 10) -> Profile:
    """Measure a device: the fastest of `repeats` runs of square matrix products, copies, and additions of one number.

    Takes some seconds. What else the machine does makes the figures worse, never better.
    """
    side, copied = side or MATRIX_SIDE[device.kind], copied or COPIED[device.kind]
    cases: dict[str, Case] = {}
    for name in DTYPES[device.kind]:
        a, b = (torch.randn(side, side, device=device.name).to(getattr(torch, name)) for _ in range(2))
        cases[name] = _product(a, b)
    source = torch.ones(copied // 4, device=device.name)
    target, one = torch.empty_like(source), torch.ones((), device=device.name)
    cases["copy"] = lambda: target.copy_(source)
    # Many at once, so that the clock does not count.
    cases["launch"] = lambda: [one.add_(1.0) for _ in range(100)]
    timings = measure(cases, device=device, repeats=repeats, min_seconds=0.0)
    best = {name: min(timing.runs) for name, timing in timings.items()}
    return Profile(
        name=re.sub(r"[^a-z0-9]+", "-", device.processor.lower()).strip("-") or device.kind,
        title=str(device).partition(": ")[2],
        kind=device.kind,
        source="probed",
        peak={name: 2 * side**3 / best[name] for name in DTYPES[device.kind]},
        bandwidth=2 * copied / best["copy"],
        memory=float(device.memory or 0) or 1.0,
        launch=best["launch"] / 100,
        fingerprint=device.id,
    )


def _product(a: torch.Tensor, b: torch.Tensor) -> Case:
    return lambda: a @ b
