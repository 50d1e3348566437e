"""The least time that a device needs for a model: every part bound by arithmetic, by memory, or by being launched.

A roofline (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785) is a bound, not a forecast: real kernels
reach a part of the peak. It ranks well, costs microseconds, and needs neither the device nor a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zoo.accounting import Place, Workload, places
from zoo.breakdown import with_weights_in
from zoo.hardware.features import Phase
from zoo.hardware.profile import Profile
from zoo.hardware.work import UPDATE, pieces_of
from zoo.latency import Context, LatencyFigure
from zoo.latency import Phase as TimedPhase

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.cost import Operator

Bound = Literal["arithmetic", "memory", "launches"]


@dataclass(frozen=True, slots=True)
class Bounded:
    """Seconds that a part of a model takes at least, those of its operators by what bounds them."""

    path: str
    arithmetic: float
    memory: float
    launches: float

    @property
    def seconds(self) -> float:
        """In all: arithmetic and memory overlap inside an operator, operators and their launches do not."""
        return self.arithmetic + self.memory + self.launches

    @property
    def bound(self) -> Bound:
        """What takes most of the time."""
        if self.launches > max(self.arithmetic, self.memory):
            return "launches"
        return "arithmetic" if self.arithmetic > self.memory else "memory"


def roofline(
    spec: Spec, work: Workload, device: Profile, phase: Phase = "forward", weights: str | None = None
) -> list[Bounded]:
    """The bound of each part, in order; the model's is their sum.

    Each operator of a part takes `max(flops / peak, bytes / bandwidth) + launch` for each of its calls. In training
    clipping and AdamW are operators too. weights: what weights are stored in where nobody trains them, a dtype or
    `int2` to `int8`; by default the workload's dtype, in which arithmetic stays.
    """
    return list(_bounded(spec, work.at(spec.context), device, phase, weights))


def _bounded(spec: Spec, work: Workload, device: Profile, phase: Phase, weights: str | None) -> Iterator[Bounded]:
    for place in places(spec.fill(), work):
        yield bounded(place.path, operators(place, work, phase, weights), device, work.dtype, phase)


def operators(place: Place, work: Workload, phase: Phase, weights: str | None = None) -> list[Operator]:
    """What a device meets of a part whose weights are stored in a format, where nobody trains them."""
    found = [operator for piece in pieces_of(place, phase) for operator in piece.operators]
    return with_weights_in(found, weights, work.element_bytes) if weights and phase != "train" else found


def bounded(path: str, operators: Iterable[Operator], device: Profile, dtype: str, phase: Phase) -> Bounded:
    """The bound of a part from its operators, each counted to what bounds it.

    In training an operator's backward pass moves twice what its forward pass does, and starts twice as often.
    """
    rate = device.rate(dtype)
    arithmetic = memory = launches = 0.0
    for piece in operators:
        passes = 3 if phase == "train" and piece.kind != UPDATE else 1
        computing, moving = piece.computed(phase == "train") / rate, passes * piece.traffic / device.bandwidth
        if computing > moving:
            arithmetic += computing * piece.calls
        else:
            memory += moving * piece.calls
        launches += passes * piece.calls * device.launch
    return Bounded(path, arithmetic, memory, launches)


def least_seconds(operators: Iterable[Operator], device: Profile, dtype: str, phase: Phase = "forward") -> float:
    """The bound of operators in all."""
    return bounded("", operators, device, dtype, phase).seconds


def estimator(device: Profile, dtype: str, phase: Phase = "forward") -> Callable[[Place], float]:
    """The bound of one part of a model; those of all parts add up to the model's."""

    def seconds(place: Place) -> float:
        return least_seconds(place.cost(phase == "decode").operators, device, dtype, phase)

    return seconds


class RooflineLatency:
    """A `LatencySource` that answers with the least time on a device; the interval reaches to infinity."""

    def __init__(self, device: Profile) -> None:
        self.device = device

    def latency(
        self, spec: Spec, context: Context, phase: TimedPhase = "forward", quantile: float = 0.5
    ) -> LatencyFigure:
        del quantile
        work = Workload(context.batch, context.seq, context.past, context.dtype)
        seconds = sum(part.seconds for part in roofline(spec, work, self.device, phase))
        return LatencyFigure(seconds, seconds, math.inf, "roofline", self.device.name)
