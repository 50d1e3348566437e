"""What `zoo cost` says of time: of the whole and of every part, by whom it is told, and how sure that is.

Three sources know times: a roofline's bound, a calibration's prediction, the model itself. All give the same rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, print_table
from zoo.quantity import Dimension, finite, format_quantity

if TYPE_CHECKING:
    from zoo.accounting import Place, Workload
    from zoo.blocks.model import Spec
    from zoo.device import Device
    from zoo.hardware.features import Phase
    from zoo.hardware.predictor import Held, Predictor
    from zoo.hardware.profile import Profile
    from zoo.hardware.roofline import Bounded

BOUNDS = ("arithmetic", "memory", "launches")
FAR = 10.0
"""How many times longer than all that was timed a model takes for that to be said."""


@dataclass(frozen=True, slots=True)
class Time:
    """Seconds of one part in one phase, or of all with an empty path, the interval around them, and who says so."""

    path: str
    phase: Phase
    seconds: float
    low: float
    high: float
    source: str
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Times:
    """What one source says: the whole of each phase first, then its parts.

    title: whose times they are and what their interval means. held: bytes held at once, in phases in which those were
    measured. notes: what else there is to say.
    """

    title: str
    times: Sequence[Time] = ()
    held: Mapping[Phase, Held] = field(default_factory=dict)
    notes: Sequence[str] = ()


def bounded(spec: Spec, work: Workload, profile: Profile, weights: str | None) -> dict[Phase, list[Bounded]]:
    """The least times of every part on a device, by phase."""
    from zoo.hardware.roofline import roofline

    return {phase: roofline(spec, work, profile, phase, weights) for phase in _phases(spec)}


def bounds(parts: Sequence[Bounded]) -> dict[str, float]:
    """Seconds in all, and those of the parts that each thing bounds."""
    bound = {name: sum(part.seconds for part in parts if part.bound == name) for name in BOUNDS}
    return {"seconds": sum(part.seconds for part in parts), **bound}


def least_times(found: Mapping[Phase, Sequence[Bounded]], profile: Profile) -> Times:
    """Bounds as times, whose intervals have no end."""
    times = [
        Time(path, phase, seconds, seconds, math.inf, source)
        for phase, parts in found.items()
        for path, seconds, source in [
            ("", sum(part.seconds for part in parts), "roofline"),
            *((part.path, part.seconds, f"roofline: {part.bound}") for part in parts),
        ]
    ]
    return Times(f"at least, on {profile.name} ({profile.source} figures): a bound, not a forecast", times)


def predicted(spec: Spec, work: Workload, predictor: Predictor, device: str) -> Times:
    """What a calibration predicts, in every phase that it and the spec have."""
    from zoo.accounting import places
    from zoo.hardware.predictor import never_timed
    from zoo.hardware.work import held_bytes

    parts = list(places(spec.fill(), work))
    phases: list[Phase] = [phase for phase in _phases(spec) if phase in predictor.regressions]
    held: dict[Phase, Held] = {
        phase: found for phase in phases if (found := predictor.held(spec, work, phase)) is not None
    }
    times = [time for phase in phases for time in _predicted(predictor, parts, phase)]
    notes = []
    if unknown := {kind for time in times for kind in time.unknown}:
        notes.append(f"it was {never_timed(unknown)}")
    for time in times:
        longest = float(predictor.regressions[time.phase].predicted.max())
        if not time.path and time.seconds > FAR * longest:
            notes.append(
                f"{time.phase}: {time.seconds / longest:.0f} times as long as any model that was timed there, whose "
                "intervals these are"
            )
    room = predictor.profile.memory
    full = [phase for phase in phases if (held[phase].bytes if phase in held else held_bytes(spec, work, phase)) > room]
    if full:
        notes.append(
            f"{', '.join(full)}: does not fit in the {format_quantity(room, 'bytes')} of {predictor.profile.name}; the "
            "time is what it would take if it did"
        )
    title = f"predicted on {_named(predictor, device)}: 90% of measurements of the whole lie between the two"
    return Times(title, times, held, notes)


def _predicted(predictor: Predictor, parts: Sequence[Place], phase: Phase) -> Iterator[Time]:
    from zoo.hardware.work import pieces_of

    pieces = [pieces_of(place, phase) for place in parts]
    paths = ["", *(place.path for place in parts)]
    for path, one in zip(
        paths, [predictor.predict(pieces, phase), *predictor.predict_each(pieces, phase)], strict=True
    ):
        source = "in part guessed" if one.unknown else "predicted"
        yield Time(path, phase, one.seconds, one.low, one.high, source, one.unknown)


def _named(predictor: Predictor, device: str) -> str:
    name, made = predictor.profile.name, predictor.made.get("date", "")[:10]
    return (device if device == name else f"{device} ({name})") + (f", calibrated {made}" if made else "")


def measured(spec: Spec, work: Workload, device: Device, layers: bool) -> Times:
    """What the model takes here, timed; with `layers` also what every part takes, timed apart in a run of its own."""
    from zoo.accounting import ALIASES
    from zoo.blocks.model import Spec
    from zoo.latency import Context, MeasuredLatency
    from zoo.model import build

    source = MeasuredLatency[Spec](device, build, lambda spec: spec.computation)
    assert work.seq is not None and work.past is not None
    context = Context(work.batch, work.seq, work.past, ALIASES.get(work.dtype, work.dtype))
    parts = _part_seconds(spec, work, device) if layers else {}
    times: list[Time] = []
    for phase in _phases(spec):
        if phase != "train":
            found = source.latency(spec, context, phase)
            times.append(Time("", phase, found.seconds, found.low, found.high, "measured"))
            times += [
                Time(path, phase, seconds, 0.0, math.inf, "measured by module")
                for path, seconds in parts.get(phase, {}).items()
            ]
    return Times(f"measured on {device}: medians, and between what they lie with 90% confidence", times)


def _part_seconds(spec: Spec, work: Workload, device: Device) -> dict[Phase, dict[str, float]]:
    """Seconds of every part, those of its modules together, by phase."""
    from zoo.accounting import ALIASES, places
    from zoo.hardware.samples import Sample
    from zoo.hardware.stopwatch import DeviceStopwatch

    assert work.seq is not None and work.past is not None
    dtype = ALIASES.get(work.dtype, work.dtype)
    (readings,), _ = DeviceStopwatch(device).read([Sample(spec, work.batch, work.seq, work.past, False, dtype)])
    paths = [place.path for place in places(spec.fill(), work)]
    return {
        phase: {
            path: sum(took for module, took in reading.modules.items() if f"{module}.".startswith(f"{path}."))
            for path in paths
        }
        for phase, reading in readings.items()
    }


def _phases(spec: Spec) -> Iterator[Phase]:
    from zoo.train.bench import LOSSES

    yield "forward"
    if spec.root().causal:
        yield "decode"
    if getattr(spec.head, "kind", "other") in LOSSES:
        yield "train"


def print_times(found: Times, layers: bool) -> None:
    """A table with the whole of each phase, with `layers` also its parts, and one of memory."""
    rows = [
        (name, _said(seconds), _said(low) if low or not seconds else "unknown", _said(high), source)
        for name, seconds, low, high, source in _rows(found.times, layers)
    ]
    # A title inside a table would be wrapped at the table's width.
    console().print(found.title)
    print_table("", ("", "seconds", "from", "to", "source"), rows, right=(1, 2, 3))
    held = [(phase, *(_said(size, "bytes") for size in sizes)) for phase, sizes in found.held.items()]
    if held:
        print_table("", ("memory held at once", "predicted", "from", "to"), held, right=(1, 2, 3))
    for note in found.notes:
        console().print(note)


def _rows(times: Sequence[Time], layers: bool) -> Iterator[tuple[str, float, float, float, str]]:
    """Parts that follow each other and take the same are one row with what they take together."""

    def alike(time: Time) -> tuple[Any, ...]:
        stem, _, number = time.path.rpartition(".")
        return time.phase, stem if number.isdecimal() else time.path, time.seconds, time.source

    for _, group in groupby(times, alike):
        same = list(group)
        first, count = same[0], len(same)
        name = f"  {first.path}" if first.path else first.phase
        if count > 1:
            name += f"..{same[-1].path.rpartition('.')[2]}"
        if layers or not first.path:
            yield name, count * first.seconds, count * first.low, count * first.high, first.source


def time_facts(found: Times) -> list[dict[str, Any]]:
    """The same for scripts; an interval without an end has None there."""
    return [{**asdict(time), "high": finite(time.high)} for time in found.times]


def held_facts(found: Times) -> dict[str, Any]:
    """Bytes held at once, for scripts."""
    return {phase: {**held._asdict(), "high": finite(held.high)} for phase, held in found.held.items()}


def _said(value: float, dimension: Dimension = "time") -> str:
    return format_quantity(value, dimension) if math.isfinite(value) else "unknown"
