"""A device that only pretends: its times follow from known costs, its clock from what it was asked to time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zoo.device import Device
from zoo.hardware.features import Phase, features
from zoo.hardware.profile import Profile
from zoo.hardware.samples import Sample

TERMS = {"calls": 5e-6, "flops": 1e-11, "traffic": 1e-10}
"""Seconds for each unit of work, whatever its kind."""

DEVICE = Device("cpu", "cpu", "pretended", 1, 1, None, "0", "3")
PROFILE = Profile(
    name="pretended",
    title="a processor that is not there",
    kind="cpu",
    source="probed",
    peak={"float32": 2e11},
    bandwidth=2e10,
    memory=1e10,
    launch=2e-6,
)


def true_seconds(counts: Mapping[str, float]) -> float:
    """What the device takes for work, without noise."""
    return sum(TERMS.get(name.rpartition(".")[2], 0.0) * amount for name, amount in counts.items())


@dataclass
class PretendedStopwatch:
    """Times samples by `true_seconds`, give or take `noise`; its sentinel takes what `sentinels` say in turn."""

    noise: float = 0.0
    sentinels: Sequence[float] = (1e-3,)
    sign: float = 1.0
    device: Device = DEVICE
    now: float = 0.0
    asked: list[str] = field(default_factory=list)

    def seconds(self, samples: Sequence[Sample]) -> tuple[list[dict[Phase, float]], float]:
        sentinel = self.sentinels[min(len(self.asked), len(self.sentinels) - 1)]
        found: list[dict[Phase, float]] = []
        for sample in samples:
            rng = random.Random(sample.key)
            self.asked.append(sample.key)
            times: dict[Phase, float] = {}
            for phase in sample.phases:
                factor = 1 + rng.uniform(-self.noise, self.noise)
                times[phase] = self.sign * factor * true_seconds(features(sample.operators(phase), phase))
            found.append(times)
        self.now += len(samples)
        return found, sentinel

    def clock(self) -> float:
        """Seconds by its own clock: one for each sample."""
        return self.now
