"""What `zoo cost --predict` says: times of every part and of the whole on a device, memory, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, print_table
from zoo.quantity import Dimension, format_quantity

if TYPE_CHECKING:
    from zoo.accounting import Place, Workload
    from zoo.blocks.model import Spec
    from zoo.hardware.features import Phase
    from zoo.hardware.predictor import Held, Predictor


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


@dataclass(frozen=True, slots=True)
class Prediction:
    """Times, the whole of each phase first, and the bytes held at once in the phases in which those were measured."""

    times: list[Time]
    held: dict[Phase, Held]


def predicted(spec: Spec, work: Workload, device: str) -> Prediction:
    """What is predicted of a spec on a calibrated device, in every phase that both have."""
    from zoo.accounting import places
    from zoo.hardware.store import find_predictor

    predictor = find_predictor(device, work.dtype)
    phases: list[Phase] = list(_phases(spec, predictor))
    parts = list(places(spec.fill(), work))
    held: dict[Phase, Held] = {}
    for phase in phases:
        found = predictor.held(spec, work, phase)
        if found is not None:
            held[phase] = found
    return Prediction([time for phase in phases for time in _times(predictor, parts, phase)], held)


def _phases(spec: Spec, predictor: Predictor) -> Iterator[Phase]:
    from zoo.train.bench import LOSSES

    yield "forward"
    if spec.root().causal:
        yield "decode"
    if "train" in predictor.regressions and getattr(spec.head, "kind", "other") in LOSSES:
        yield "train"


def _times(predictor: Predictor, parts: Sequence[Place], phase: Phase) -> list[Time]:
    from zoo.hardware.work import pieces_of

    pieces = [pieces_of(place, phase) for place in parts]
    paths = ["", *(place.path for place in parts)]
    found = [predictor.predict(pieces, phase), *predictor.predict_each(pieces, phase)]
    return [
        Time(path, phase, one.seconds, one.low, one.high, source, one.unknown)
        for path, one in zip(paths, found, strict=True)
        for source in ["predicted" if not one.unknown else "predicted, in part by the roofline"]
    ]


def print_predictions(found: Prediction, device: str, layers: bool) -> None:
    """A table with the whole of each phase, on request with every part, and one of memory."""
    rows = [
        (
            time.phase if not time.path else f"  {time.path}",
            _said(time.seconds),
            _said(time.low),
            _said(time.high),
            time.source,
        )
        for time in found.times
        if layers or not time.path
    ]
    title = f"predicted on {device}: 90% of measurements lie between the two"
    print_table(title, ("", "seconds", "from", "to", "source"), rows, right=(1, 2, 3))
    held = [(phase, *(_said(size, "bytes") for size in sizes)) for phase, sizes in found.held.items()]
    if held:
        print_table("", ("memory held at once", "predicted", "from", "to"), held, right=(1, 2, 3))
    unknown = sorted({kind for time in found.times for kind in time.unknown})
    if unknown:
        console().print(f"never timed there: {', '.join(unknown)}; the roofline answers for it, with a wide interval")


def prediction_facts(found: Prediction) -> dict[str, Any]:
    """The same for scripts; an interval without an end has None there."""
    return {
        "predicted": [{**asdict(time), "high": _finite(time.high)} for time in found.times],
        "predicted_memory": {
            phase: {**held._asdict(), "high": _finite(held.high)} for phase, held in found.held.items()
        },
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _said(value: float, dimension: Dimension = "time") -> str:
    return format_quantity(value, dimension) if math.isfinite(value) else "unknown"
