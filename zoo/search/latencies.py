"""Who tells the latencies that a search asks for: measurement on this machine, a calibration, or a roofline."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from zoo.device import is_here, resolve_device
from zoo.errors import ZooError, did_you_mean
from zoo.hardware.predictor import PredictedLatency, Sums
from zoo.hardware.profile import load_profile, profile_names
from zoo.hardware.roofline import RooflineLatency
from zoo.hardware.roofline import estimator as bound_of
from zoo.latency import Context, LatencyFigure, LatencySource, MeasuredLatency, Phase
from zoo.search.table import Extra

Latency = Literal["measured", "predicted"]
LATENCIES: tuple[Latency, ...] = ("measured", "predicted")
"""How latencies on this machine are found."""
BOUND = "roofline: a bound, not a forecast"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a latency comes from, as one word and in a sentence that also tells one calibration from another."""

    kind: Literal["measured", "predicted", "roofline"]
    text: str


def check_latency(name: str) -> None:
    """Raises `ZooError` with the nearest name unless `LATENCIES` has it."""
    if name not in LATENCIES:
        raise ZooError(f"unknown latency {name!r}{did_you_mean(name, LATENCIES)}")


class Measured:
    """Latencies measured on this machine, each device set up when it is first asked for.

    `threads` are those of the training, so that a CPU is timed as it is used; None for all.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._sources: dict[str, LatencySource] = {}

    def __call__(self, device: str) -> LatencySource:
        if device not in self._sources:
            self._sources[device] = MeasuredLatency(
                resolve_device(device, self._threads), _built, lambda spec: spec.computation
            )
        return self._sources[device]


class Latencies:
    """The source for each device that a term may name.

    Devices of this machine are `measured` or `predicted`, as `latency` says; others are never measured here.
    """

    def __init__(self, latency: Latency, threads: int | None = None) -> None:
        self._threads = threads
        self._measured = Measured(threads) if latency == "measured" else None
        self._forecasts: dict[str, Forecast] = {}

    def __call__(self, device: str) -> LatencySource:
        if self._measured is not None and is_here(device):
            return self._measured(device)
        return self._forecasts.setdefault(device, Forecast(device, self._threads))


class Forecast:
    """Latency on a device without timing it: from its calibration in the dtype that is asked for.

    A shipped device that was not calibrated in that dtype gets its roofline instead. `ZooError` for one of this machine
    that was not.
    """

    def __init__(self, device: str, threads: int | None = None) -> None:
        self.device = device
        self._threads = threads
        self._sources: dict[str, PredictedLatency | RooflineLatency] = {}

    def of(self, dtype: str) -> PredictedLatency | RooflineLatency:
        """Who answers for a dtype."""
        if dtype not in self._sources:
            self._sources[dtype] = self._found(dtype)
        return self._sources[dtype]

    def _found(self, dtype: str) -> PredictedLatency | RooflineLatency:
        from zoo.hardware.store import find_predictor

        try:
            return PredictedLatency(find_predictor(self.device, dtype, self._threads))
        except ZooError:
            if self.device not in profile_names():
                raise
        return RooflineLatency(load_profile(self.device))

    def latency(self, spec: Any, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        return self.of(context.dtype).latency(spec, context, phase, quantile)


def origin(source: LatencySource, device: str, dtype: str, latency: Latency) -> Origin:
    """Where the latencies that a source tells of a device come from; one of another kind is what `latency` says."""
    if isinstance(source, Forecast):
        source = source.of(dtype)
    if isinstance(source, RooflineLatency):
        return Origin("roofline", f"{source.device.title}, {BOUND}")
    if isinstance(source, PredictedLatency):
        found = source.predictor
        made = found.made.get("date", "")
        dated = f", made {made}" if made else ""
        return Origin(
            "predicted",
            f"predicted by the calibration of {found.profile.name} ({found.device}) in {found.dtype}{dated}",
        )
    if latency == "measured" and is_here(device):
        return Origin("measured", f"measured on {resolve_device(device)}")
    return Origin("predicted", f"predicted by {type(source).__name__} for {device}")


def from_parts(source: LatencySource, dtype: str, phase: Phase, quantile: float) -> Extra | None:
    """The seconds that a source gives a model by sums over its parts; None for a source that does not."""
    if isinstance(source, Forecast):
        source = source.of(dtype)
    if isinstance(source, RooflineLatency):
        bound = bound_of(source.device, dtype, phase)
        return Extra(lambda place: (bound(place),))
    if not isinstance(source, PredictedLatency):
        return None
    predictor = source.predictor
    if not math.isfinite(predictor.seconds(Sums(1.0, 1.0, 1.0, 0.0), phase, quantile)):
        return None
    never_timed = predictor.seconds(Sums(0.0, 0.0, 0.0, 1.0), phase, quantile)
    return Extra(
        predictor.estimator(phase),
        lambda sums: predictor.seconds(Sums(*np.moveaxis(sums, -1, 0)), phase, quantile),
        [Sums(0.0, 0.0, 1.0, 0.0), *(Sums(1.0, share, 0.0, never_timed) for share in (0.0, 0.25, 0.5, 0.75, 1.0))],
    )


class Drift:
    """How many times longer this machine takes for the same work than when it was calibrated; timed once for each
    calibration.
    """

    def __init__(self, threads: int | None = None) -> None:
        self._threads = threads
        self._known: dict[tuple[str, str], float | None] = {}

    def of(self, source: LatencySource, device: str, dtype: str) -> float | None:
        """The factor, None where the source does not predict by a calibration of this very machine."""
        if isinstance(source, Forecast):
            source = source.of(dtype)
        if not isinstance(source, PredictedLatency):
            return None
        place = resolve_device(device, self._threads)
        if source.predictor.device != place.id:
            return None
        if (device, dtype) not in self._known:
            from zoo.hardware.stopwatch import DeviceStopwatch

            self._known[device, dtype] = source.predictor.drift(DeviceStopwatch(place).sentinel())
        return self._known[device, dtype]


def _built(spec: Any) -> Any:
    from zoo.model import build

    return build(spec)
