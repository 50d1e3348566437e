"""Latency predicted from a calibration: counted work times fitted costs, with the interval in which measurements fall.

A predictor belongs to one device and dtype. For each phase it holds a regression of seconds on the features of
operators (`zoo.hardware.features`), and one of the peak of memory on what is counted. Work of a kind that was never
timed is not free: it takes what the device's roofline says, with a wide interval and a warning.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from zoo.accounting import ALIASES, Piece, Place, Workload
from zoo.errors import ZooError
from zoo.hardware.features import PHASES, Part, Phase, cold, cold_share, features, moved
from zoo.hardware.profile import Profile, parse_profile
from zoo.hardware.regression import Regression
from zoo.hardware.roofline import least_seconds
from zoo.hardware.work import held_bytes, parts_of, pieces_of
from zoo.latency import Context, LatencyFigure

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.cost import Operator

FORMAT = 5
"""The version of the file, of the log of what it is fitted to, and of what `zoo.hardware.features` counts."""
COVERAGE = 0.9
COUNTED = "counted"
"""What memory is a regression on: the bytes of `zoo.hardware.work.held_bytes`."""
UNKNOWN_HIGH = 4.0
"""How many times the roofline's seconds work of an unknown kind may take: real kernels reach a quarter of a peak."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, the interval in which `COVERAGE` of measurements lie, and what the roofline answered for: kinds of
    operators, their terms such as `linear.pointwise`, and `TYPE.modules`.
    """

    seconds: float
    low: float
    high: float
    unknown: tuple[str, ...] = ()


class Held(NamedTuple):
    """Bytes that are held at once, and the interval in which `COVERAGE` of measurements lie."""

    bytes: float
    low: float
    high: float


class Sums(NamedTuple):
    """What adds up over the parts of a model, or `[models]` of each.

    warm: seconds of known work whose data are in caches. chill: seconds that it takes on top if nothing is. moved:
    bytes that it moves, which say how much is. floor: the least seconds that the rest takes.
    """

    warm: Any
    chill: Any
    moved: Any
    floor: Any

    def known(self, share: Any) -> Any:
        """Seconds of known work of which a share is cold."""
        return self.warm + share * self.chill


@dataclass(frozen=True)
class Predictor:
    """What a calibration found for one device and dtype.

    device: the `Device.id` that it was made on. regressions: of seconds, by phase. caches: bytes that stay from one
    call to the next, by phase, see `zoo.hardware.features.cold_share`. sentinel: seconds of the sentinel meanwhile, see
    `zoo.hardware.stopwatch`. made: date and versions. memory: of the bytes held at once on those that are `COUNTED`, by
    phase.
    """

    profile: Profile
    device: str
    dtype: str
    regressions: Mapping[Phase, Regression]
    caches: Mapping[Phase, float]
    sentinel: float | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[Phase, Regression] = field(default_factory=dict)

    def predict(self, parts: Iterable[Part], phase: Phase = "forward") -> Prediction:
        """What a call takes, from the pieces of all its parts. O(operators)."""
        return self.prediction(*self.counted(parts, phase), phase)

    def predict_each(self, parts: Iterable[Part], phase: Phase = "forward") -> list[Prediction]:
        """What each part takes in a call of all of them: they share the caches, and take together what all take."""
        found = [self.counted([part], phase) for part in parts]
        whole = Sums(*map(sum, zip(*(sums for sums, _ in found))))
        return [self.prediction(sums, unknown, phase, whole) for sums, unknown in found]

    def counted(self, parts: Iterable[Part], phase: Phase) -> tuple[Sums, tuple[str, ...]]:
        """The sums over parts, and what of them was never timed."""
        parts, strange = self._apart(parts, phase)
        costs, least, counts = self._costs[phase], self._least[phase], features(parts, phase)
        warm, chill, floor = 0.0, 0.0, least_seconds(strange, self.profile, self.dtype, phase)
        unknown = {operator.kind for operator in strange}
        for name, amount in counts.items():
            if name in costs:
                warm += costs[name] * amount
                chill += costs.get(cold(name) or "", 0.0) * amount
            elif (term := name.rpartition(".")[2]) in least:
                floor += least[term] * amount
                unknown.add(name)
        bytes_moved = moved(counts) + sum(operator.traffic * operator.calls for operator in strange)
        return Sums(warm, chill, bytes_moved, floor), tuple(sorted(unknown))

    def prediction(self, sums: Sums, unknown: tuple[str, ...], phase: Phase, whole: Sums | None = None) -> Prediction:
        """What work of these sums takes as a part of a whole, by default of itself; it has the whole's interval."""
        whole = whole or sums
        share = self._share(whole.moved, phase)
        known, floor = sums.known(share), sums.floor
        low, high = self._regression(phase).interval(COVERAGE, whole.known(share)) if known else (1.0, 1.0)
        return Prediction(known + floor, known * low + floor, known * high + UNKNOWN_HIGH * floor, unknown)

    def held(self, spec: Spec, work: Workload, phase: Phase = "forward") -> Held | None:
        """Bytes that are held at once, weights included; None where the calibration measured none."""
        if phase not in self.memory:
            return None
        (found,) = self.memory[phase].predict([[held_bytes(spec, work, phase)]])
        low, high = self.memory[phase].interval(COVERAGE, found)
        return Held(float(found), float(found * low), float(found * high))

    def estimator(self, phase: Phase) -> Callable[[Place], Sums]:
        """What one part of a model adds to the sums that `seconds` makes the model's time of."""

        def sums(place: Place) -> Sums:
            return self.counted([pieces_of(place, phase)], phase)[0]

        return sums

    def seconds(self, sums: Sums, phase: Phase, quantile: float = 0.5) -> Any:
        """What models of these sums take, or a quantile of their measurements; it grows with each of the sums."""
        known = sums.known(self._share(sums.moved, phase))
        factor = 1.0 if quantile == 0.5 else self._regression(phase).upper(quantile, known)
        return factor * known + (UNKNOWN_HIGH if quantile > 0.5 else 1.0) * sums.floor

    def drift(self, sentinel: float) -> float | None:
        """How many times slower the machine is than when it was calibrated, by what the sentinel takes now; None where
        that is not known of then.
        """
        return None if self.sentinel is None else sentinel / self.sentinel

    def _regression(self, phase: Phase) -> Regression:
        if phase not in self.regressions:
            have = ", ".join(self.regressions)
            raise ZooError(f"{self.profile.name} was not calibrated for {phase}; its calibration has {have}")
        return self.regressions[phase]

    def _share(self, moved: Any, phase: Phase) -> Any:
        return cold_share(moved, self.caches[phase])

    def _apart(self, parts: Iterable[Part], phase: Phase) -> tuple[list[Part], list[Operator]]:
        """The parts with the operators of known kinds alone, and those of others."""
        self._regression(phase)
        seen = self._kinds[phase]
        known: list[Part] = []
        unknown: list[Operator] = []
        for part in parts:
            strange = [operator for piece in part for operator in piece.operators if operator.kind not in seen]
            unknown += strange
            known.append([_without(piece, seen) for piece in part] if strange else part)
        return known, unknown

    def __post_init__(self) -> None:
        costs = {
            phase: dict(zip(found.names, found.coefficients.tolist(), strict=True))
            for phase, found in self.regressions.items()
        }
        object.__setattr__(self, "_costs", costs)
        object.__setattr__(self, "_kinds", {phase: _kinds(found.names) for phase, found in self.regressions.items()})
        object.__setattr__(self, "_least", {phase: self._least_of(found) for phase, found in costs.items()})

    _costs: Mapping[Phase, Mapping[str, float]] = field(init=False, repr=False, compare=False)
    _kinds: Mapping[Phase, set[str]] = field(init=False, repr=False, compare=False)
    _least: Mapping[Phase, Mapping[str, float]] = field(init=False, repr=False, compare=False)

    def _least_of(self, costs: Mapping[str, float]) -> Mapping[str, float]:
        """What a unit of a term costs that was never timed in a kind that was: as much as by the roofline, and the
        Python code of a component what half of those take that take time at all. Terms that add to others, for large
        tensors or for steps, are free.
        """
        modules = [cost for name, cost in costs.items() if name.endswith(".modules") and cost]
        operation, byte = 1 / self.profile.rate(self.dtype), 1 / self.profile.bandwidth
        return {
            "modules": statistics.median(modules) if modules else self.profile.launch,
            "calls": self.profile.launch,
            "flops": operation,
            "pointwise": operation,
            "inputs": byte,
            "weights": byte,
            "outputs": byte,
        }

    def as_data(self) -> dict[str, Any]:
        """Everything, as data for JSON."""
        return {
            "format": FORMAT,
            "profile": self.profile.as_yaml(),
            "device": self.device,
            "dtype": self.dtype,
            "sentinel": self.sentinel,
            "made": dict(self.made),
            "caches": dict(self.caches),
            "phases": {phase: found.as_data() for phase, found in self.regressions.items()},
            "memory": {phase: found.as_data() for phase, found in self.memory.items()},
        }

    @classmethod
    def from_data(cls, data: Any, file: str = "<data>") -> Self:
        """What `as_data` gave; a `ZooError` names the file and what is wrong with it."""
        try:
            if data["format"] != FORMAT:
                raise ZooError(f"{file}: format {data['format']}; this zoo reads {FORMAT}; calibrate again")
            if not data["phases"]:
                raise ZooError(f"{file}: a calibration of nothing; `zoo device calibrate` makes one")
            wrong = {*data["phases"], *data["memory"]} - set(PHASES)
            if wrong:
                raise ZooError(f"{file}: unknown phases {', '.join(sorted(wrong))}; known: {', '.join(PHASES)}")
            return cls(
                profile=parse_profile(data["profile"], file),
                device=str(data["device"]),
                dtype=str(data["dtype"]),
                regressions=_regressions(data["phases"], f"{file}: phases"),
                caches={phase: _above_zero(data["caches"][phase], "a cache") for phase in data["phases"]},
                memory=_regressions(data["memory"], f"{file}: memory", (COUNTED,)),
                sentinel=None if data["sentinel"] is None else _above_zero(data["sentinel"], "the sentinel"),
                made={str(key): str(value) for key, value in data["made"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ZooError(f"{file}: not a calibration ({error!r}); `zoo device calibrate` makes one") from None

    def save(self, path: Path) -> Path:
        """Write the file whole or not at all, so that the one before stays usable."""
        fresh = path.with_name(path.name + ".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.as_data(), separators=(",", ":")) + "\n", encoding="utf-8")
            fresh.replace(path)
        except OSError as error:
            raise ZooError(f"cannot write {path}: {error.strerror or error}") from None
        return path


def _regressions(
    data: Mapping[Phase, Any], place: str, names: tuple[str, ...] | None = None
) -> dict[Phase, Regression]:
    """The regressions of a file, by phase, on features of these names, if given; errors say which of them is wrong."""
    found: dict[Phase, Regression] = {}
    for phase, regression in data.items():
        try:
            found[phase] = Regression.from_data(regression)
        except ZooError as error:
            raise ZooError(f"{place}.{phase}: {error}") from None
        if names is not None and found[phase].names != names:
            raise ZooError(f"{place}.{phase}: a regression on {', '.join(found[phase].names)}, not {', '.join(names)}")
    return found


def _above_zero(value: Any, what: str) -> float:
    found = float(value)
    if not 0 < found < math.inf:
        raise ValueError(f"{what} of {value}")
    return found


def _kinds(names: Iterable[str]) -> set[str]:
    """The kinds of operators that features are of."""
    terms = (name.rpartition(".") for name in names)
    return {kind for kind, _, term in terms if term != "modules"}


def _without(piece: Piece, seen: set[str]) -> Piece:
    return piece._replace(operators=tuple(operator for operator in piece.operators if operator.kind in seen))


def never_timed(unknown: Iterable[str]) -> str:
    """What is to be said of work that a calibration does not know."""
    return (
        f"never timed on {', '.join(sorted(unknown))}: operators take what the roofline says, components what half of "
        "the others take, up to four times as long"
    )


def load_predictor(path: Path) -> Predictor:
    """The predictor of a file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise ZooError(f"{path}: not a calibration ({error}); `zoo device calibrate` makes one") from None
    return Predictor.from_data(data, str(path))


class PredictedLatency:
    """A `LatencySource` that asks a predictor: microseconds for each spec, and no model is built.

    It knows steps of training as well, and what is held of memory.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._warned: set[str] = set()

    @property
    def phases(self) -> Collection[Phase]:
        """What it knows of."""
        return self.predictor.regressions.keys()

    def latency(self, spec: Spec, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        parts = parts_of(spec, self._work(context), phase)
        sums, unknown = self.predictor.counted(parts, phase)
        found = self.predictor.prediction(sums, unknown, phase)
        fresh = set(found.unknown) - self._warned
        if fresh:
            self._warned |= fresh
            warnings.warn(f"{self.predictor.profile.name} was {never_timed(fresh)}", stacklevel=2)
        seconds = float(self.predictor.seconds(sums, phase, quantile))
        if not math.isfinite(seconds):
            raise ZooError(
                f"{len(self.predictor.regressions[phase].errors)} timed models are too few to tell the quantile "
                f"{quantile}; calibrate with a larger budget"
            )
        return LatencyFigure(seconds, found.low, found.high, "predicted", self.predictor.profile.name)

    def held(self, spec: Spec, context: Context, phase: Phase = "forward") -> Held | None:
        """Bytes that are held at once, weights included; None where the calibration measured none."""
        return self.predictor.held(spec, self._work(context), phase)

    def _work(self, context: Context) -> Workload:
        if ALIASES.get(context.dtype, context.dtype) != self.predictor.dtype:
            raise ZooError(
                f"{self.predictor.profile.name} was calibrated in {self.predictor.dtype}, not {context.dtype}; "
                f"`zoo device calibrate --dtype {context.dtype}` does that"
            )
        return Workload(context.batch, context.seq, context.past, context.dtype)
