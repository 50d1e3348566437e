"""What `zoo cost --predict` says: the time of every part and of the whole on a device, from where, and how sure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, print_table
from zoo.quantity import format_quantity

if TYPE_CHECKING:
    from zoo.accounting import Place, Workload
    from zoo.blocks.model import Spec
    from zoo.hardware.features import Part, Phase
    from zoo.hardware.predictor import Predictor


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one part in one phase, or of all with an empty path; the interval holds 90% of measurements."""

    path: str
    phase: Phase
    seconds: float
    low: float
    high: float
    source: str
    unknown: tuple[str, ...] = ()


def predicted(spec: Spec, work: Workload, device: str) -> list[Time]:
    """The times of a spec on a calibrated device, the whole of each phase first."""
    from zoo.accounting import places
    from zoo.hardware.store import find_predictor

    predictor = find_predictor(device, work.dtype)
    phases: tuple[Phase, ...] = ("forward", "decode") if spec.root().causal else ("forward",)
    parts = list(places(spec.fill(), work))
    return [time for phase in phases for time in _times(predictor, parts, phase)]


def _times(predictor: Predictor, parts: Iterable[Place], phase: Phase) -> list[Time]:
    rows: list[Time] = []
    everything = []
    for place in parts:
        pieces = place.pieces(phase == "decode")
        everything.append(pieces)
        rows.append(Time(place.path, phase, *_figures(predictor, [pieces], phase)))
    return [Time("", phase, *_figures(predictor, everything, phase)), *rows]


def _figures(predictor: Predictor, parts: list[Part], phase: Phase) -> tuple[float, float, float, str, tuple[str, ...]]:
    found = predictor.predict(parts, phase)
    source = "predicted" if not found.unknown else "predicted, in part by the roofline"
    return found.seconds, found.low, found.high, source, found.unknown


def print_predictions(times: list[Time], device: str, layers: bool) -> None:
    """A table with the whole of each phase, on request with every part."""
    rows = [
        (
            time.phase if not time.path else f"  {time.path}",
            _said(time.seconds),
            _said(time.low),
            _said(time.high),
            time.source,
        )
        for time in times
        if layers or not time.path
    ]
    title = f"predicted on {device}: 90% of measurements lie between the two"
    print_table(title, ("", "seconds", "from", "to", "source"), rows, right=(1, 2, 3))
    unknown = sorted({kind for time in times for kind in time.unknown})
    if unknown:
        console().print(f"never timed there: {', '.join(unknown)}; the roofline answers for it, with a wide interval")


def prediction_facts(times: list[Time]) -> list[dict[str, Any]]:
    """The same for scripts; an interval without an end has None there."""
    return [{**asdict(time), "high": time.high if math.isfinite(time.high) else None} for time in times]


def _said(seconds: float) -> str:
    return format_quantity(seconds, "time") if math.isfinite(seconds) else "unknown"
