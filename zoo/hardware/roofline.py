"""The least time that a device needs for a model: every part bound by arithmetic, by memory, or by being launched.

A roofline (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785) is a bound, not a forecast: real kernels
reach a part of the peak. It ranks well, costs microseconds, and needs neither the device nor a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zoo.accounting import Workload, places
from zoo.hardware.profile import Profile

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.cost import Cost

Bound = Literal["arithmetic", "memory", "launches"]
Phase = Literal["forward", "decode"]


@dataclass(frozen=True, slots=True)
class Bounded:
    """Seconds that a part of a model takes at least, in all and by what bounds them."""

    path: str
    arithmetic: float
    memory: float
    launches: float

    @property
    def seconds(self) -> float:
        """Arithmetic and memory overlap; being launched does not."""
        return max(self.arithmetic, self.memory) + self.launches

    @property
    def bound(self) -> Bound:
        """What takes most of the time."""
        if self.launches > max(self.arithmetic, self.memory):
            return "launches"
        return "arithmetic" if self.arithmetic > self.memory else "memory"


def roofline(spec: Spec, work: Workload, device: Profile, phase: Phase = "forward") -> list[Bounded]:
    """The bound of each part, in order; the model's is their sum.

    `t = max(flops / peak, bytes / bandwidth) + operators * launch`, with one operator for each component inside a part.
    """
    return list(_bounded(spec, work.at(spec.context), device, phase))


def _bounded(spec: Spec, work: Workload, device: Profile, phase: Phase) -> Iterator[Bounded]:
    rate = device.rate(work.dtype)
    for place in places(spec.fill(), work):
        call = place.tokens if phase == "forward" else place.token
        cost: Cost = place.component.cost(place.scope, call)
        operators = sum(1 for _ in place.component.walk(place.scope))
        yield Bounded(place.path, cost.flops / rate, cost.traffic / device.bandwidth, operators * device.launch)
