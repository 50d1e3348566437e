"""Timing samples on a device of this machine, beside a sentinel that tells whether the machine has changed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from zoo.device import Device
from zoo.hardware.features import Phase
from zoo.hardware.samples import Sample
from zoo.latency import Case, Clock, kept_memory, measure, pinned_threads
from zoo.model import build

REPEATS = 6
MOST_SECONDS = 1.0
"""Seconds of timed runs after which a case has enough, repeats or not."""
SETTLE_SECONDS = 0.02
"""How long a case runs before each timed run."""
SENTINEL_SIDE = 384

Seconds = dict[Phase, float]


class Stopwatch(Protocol):
    """Whatever times samples: a device, or in tests something that only pretends to be one."""

    device: Device

    def seconds(self, samples: Sequence[Sample]) -> tuple[list[Seconds], float]:
        """The medians of each sample by phase, and the seconds of the sentinel, the same work each time."""
        ...


class DeviceStopwatch:
    """Times samples against each other: every round runs each case once, warm, and the sentinel."""

    def __init__(self, device: Device, clock: Clock = time.perf_counter) -> None:
        self.device = device
        self._clock = clock
        a, b = (torch.randn(SENTINEL_SIDE, SENTINEL_SIDE, device=device.name) for _ in range(2))
        self._sentinel: Case = lambda: (a @ b).exp_()

    def seconds(self, samples: Sequence[Sample]) -> tuple[list[Seconds], float]:
        with kept_memory():
            return self._seconds(samples)

    def _seconds(self, samples: Sequence[Sample]) -> tuple[list[Seconds], float]:
        cases: dict[str, Case] = {"sentinel": self._sentinel}
        with torch.inference_mode(), pinned_threads(self.device.threads):
            for number, sample in enumerate(samples):
                model = build(sample.spec, device=self.device.name, dtype=getattr(torch, sample.dtype)).eval()
                for phase in sample.phases:
                    make: Callable[[int, int], Case] = model.forward_case if phase == "forward" else model.decode_case
                    cases[f"{number} {phase}"] = make(sample.batch, sample.tokens)
        found = measure(
            cases,
            device=self.device,
            repeats=REPEATS,
            warmup=1,
            min_seconds=0.0,
            max_seconds=MOST_SECONDS,
            settle=SETTLE_SECONDS,
            clock=self._clock,
        )
        medians: list[Seconds] = [
            {phase: found[f"{number} {phase}"].median for phase in sample.phases}
            for number, sample in enumerate(samples)
        ]
        return medians, found["sentinel"].median
