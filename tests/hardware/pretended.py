"""A device that only pretends: its times follow from known costs, its clock from what it was asked to time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from zoo.device import Device
from zoo.hardware.features import Phase, by_piece, cold_share, features, moved
from zoo.hardware.profile import Profile
from zoo.hardware.samples import Sample
from zoo.hardware.stopwatch import Reading, Readings

TERMS = {"calls": 5e-6, "flops": 1e-11, "inputs": 1e-10, "weights": 1e-10, "outputs": 1e-10, "modules": 1e-6}
"""Seconds for each unit of work, whatever its kind."""
CHILL = 1e-10
"""Seconds that a byte of weights takes on top if it is cold."""

HELD = 1.1
"""Bytes that are held for each that is counted."""

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


def true_seconds(counts: Mapping[str, float], cold: float = 0.0) -> float:
    """What the device takes for work, without noise, of which a share is cold."""
    costs = TERMS | {"weights": TERMS["weights"] + CHILL * cold}
    return sum(costs.get(name.rpartition(".")[2], 0.0) * amount for name, amount in counts.items())


@dataclass
class PretendedStopwatch:
    """Times samples by `true_seconds`, give or take `noise`; its sentinel takes what `sentinels` say in turn.

    Modules are as wrong as the sample that they stand in, and so is what thorough samples hold, `HELD` times what is
    counted. If it is `drifting`, samples are slow when the sentinel is; if it has a `cache`, weights are cold where a
    model does not stay in it.
    """

    noise: float = 0.0
    sentinels: Sequence[float] = (1e-3,)
    sign: float = 1.0
    drifting: bool = False
    cache: float | None = None
    device: Device = DEVICE
    now: float = 0.0
    asked: list[str] = field(default_factory=list)

    def read(self, samples: Sequence[Sample]) -> tuple[list[Readings], float]:
        seconds = self.sentinels[min(len(self.asked), len(self.sentinels) - 1)]
        found: list[Readings] = []
        for sample in samples:
            rng = random.Random(sample.key)
            self.asked.append(sample.key)
            readings: Readings = {}
            phases: tuple[Phase, ...] = (*sample.phases, "train") if sample.thorough else sample.phases
            for phase in phases:
                factor = self.sign * (1 + rng.uniform(-self.noise, self.noise))
                held = HELD * factor * sample.held(phase) if sample.thorough else None
                factor *= seconds / self.sentinels[0] if self.drifting else 1.0
                parts = sample.parts(phase)
                modules = {path: counts for part in parts for path, counts in by_piece(part, phase)}
                counted = features(parts, phase)
                cold = 0.0 if self.cache is None else cold_share(moved(counted), self.cache)
                readings[phase] = Reading(
                    factor * true_seconds(counted, cold),
                    {path: factor * true_seconds(counts, cold) for path, counts in modules.items() if phase != "train"},
                    held,
                )
            found.append(readings)
        self.now += len(samples)
        return found, seconds

    def clock(self) -> float:
        """Seconds by its own clock: one for each sample."""
        return self.now
