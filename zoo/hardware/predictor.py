"""Latency predicted from a calibration: counted work times fitted costs, with the interval in which measurements fall.

A predictor belongs to one device and dtype. For each phase it holds a regression of seconds on the features of
operators (`zoo.hardware.features`), and one of the peak of memory on what is counted. Work of a kind that was never
timed is not free: it takes what the device's roofline says, with a wide interval and a warning.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from zoo.accounting import ALIASES, Piece, Place, Workload
from zoo.errors import ZooError
from zoo.hardware.features import PHASES, Part, Phase, features
from zoo.hardware.profile import Profile, parse_profile
from zoo.hardware.regression import Growth, Regression
from zoo.hardware.roofline import least_seconds
from zoo.hardware.work import held_bytes, parts_of, pieces_of
from zoo.latency import Context, LatencyFigure

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.cost import Operator

FORMAT = 4
"""The version of the file, and of the log of what it is fitted to."""
COVERAGE = 0.9
COUNTED = "counted"
"""What memory is a regression on: the bytes of `zoo.hardware.work.held_bytes`."""
UNKNOWN_HIGH = 4.0
"""How many times the roofline's seconds work of an unknown kind may take: real kernels reach a quarter of a peak."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, the interval in which `COVERAGE` of measurements lie, and the kinds that the roofline answered for."""

    seconds: float
    low: float
    high: float
    unknown: tuple[str, ...] = ()


class Held(NamedTuple):
    """Bytes that are held at once, and the interval in which `COVERAGE` of measurements lie."""

    bytes: float
    low: float
    high: float


class _Work(NamedTuple):
    """Seconds of work of known kinds as its costs add up, the least that the rest takes, and the kinds of the rest."""

    known: float
    floor: float
    unknown: tuple[str, ...]

    @property
    def seconds(self) -> float:
        return self.known + self.floor


@dataclass(frozen=True)
class Predictor:
    """What a calibration found for one device and dtype.

    device: the `Device.id` that it was made on. regressions: of seconds, by phase. sentinel: seconds of the sentinel
    meanwhile, see `zoo.hardware.stopwatch`. made: date and versions. memory: of the bytes held at once on those that
    are `COUNTED`, by phase.
    """

    profile: Profile
    device: str
    dtype: str
    regressions: Mapping[Phase, Regression]
    sentinel: float | None = None
    made: Mapping[str, str] = field(default_factory=dict)
    memory: Mapping[Phase, Regression] = field(default_factory=dict)

    def predict(self, parts: Iterable[Part], phase: Phase = "forward") -> Prediction:
        """What a call takes, from the pieces of all its parts. O(operators)."""
        work = self._work(parts, phase)
        return self._prediction(work, self._factor(work.seconds, phase), phase)

    def predict_each(self, parts: Iterable[Part], phase: Phase = "forward") -> list[Prediction]:
        """What each part takes in a call of all of them, which takes what they take together."""
        works = [self._work([part], phase) for part in parts]
        factor = self._factor(sum(work.seconds for work in works), phase)
        return [self._prediction(work, factor, phase) for work in works]

    def held(self, spec: Spec, work: Workload, phase: Phase = "forward") -> Held | None:
        """Bytes that are held at once, weights included; None where the calibration measured none."""
        if phase not in self.memory:
            return None
        (found,) = self.memory[phase].predict([[held_bytes(spec, work, phase)]])
        low, high = self.memory[phase].interval(COVERAGE)
        return Held(float(found), float(found * low), float(found * high))

    def estimator(self, phase: Phase) -> Callable[[Place], float]:
        """The seconds of one part of a model by itself, to be added up; `growth` makes the model's of their sum."""

        def seconds(place: Place) -> float:
            return self._work([pieces_of(place, phase)], phase).seconds

        return seconds

    def growth(self, phase: Phase) -> Growth:
        """What a model takes by the sum over its parts."""
        return self._regression(phase).growth

    def factor(self, phase: Phase, quantile: float) -> float:
        """What a prediction is multiplied by to be a quantile of the measurements of such models."""
        return 1.0 if quantile == 0.5 else self._regression(phase).upper(quantile)

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

    def _work(self, parts: Iterable[Part], phase: Phase) -> _Work:
        known, unknown = self._apart(parts, phase)
        costs = self._costs[phase]
        return _Work(
            sum(costs.get(name, 0.0) * amount for name, amount in features(known, phase).items()),
            least_seconds(unknown, self.profile, self.dtype, phase),
            tuple(sorted({piece.kind for piece in unknown})),
        )

    def _factor(self, seconds: float, phase: Phase) -> float:
        """What a whole takes over the sum of its parts."""
        return self.growth(phase)(seconds) / seconds if seconds else 1.0

    def _prediction(self, work: _Work, factor: float, phase: Phase) -> Prediction:
        low, high = self._regression(phase).interval(COVERAGE)
        known, floor = work.known, work.floor
        return Prediction(
            factor * (known + floor),
            factor * (known * low + floor),
            factor * (known * high + UNKNOWN_HIGH * floor),
            work.unknown,
        )

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

    _costs: Mapping[Phase, Mapping[str, float]] = field(init=False, repr=False, compare=False)
    _kinds: Mapping[Phase, set[str]] = field(init=False, repr=False, compare=False)

    def as_data(self) -> dict[str, Any]:
        """Everything, as data for JSON."""
        return {
            "format": FORMAT,
            "profile": self.profile.as_yaml(),
            "device": self.device,
            "dtype": self.dtype,
            "sentinel": self.sentinel,
            "made": dict(self.made),
            "phases": {phase: found.as_data() for phase, found in self.regressions.items()},
            "memory": {phase: found.as_data() for phase, found in self.memory.items()},
        }

    @classmethod
    def from_data(cls, data: Any, file: str = "<data>") -> Self:
        """What `as_data` gave; a `ZooError` names the file and what is wrong with it."""
        try:
            if data["format"] != FORMAT:
                raise ZooError(f"{file}: format {data['format']}; this zoo reads {FORMAT}; calibrate again")
            wrong = {*data["phases"], *data["memory"]} - set(PHASES)
            if wrong:
                raise ZooError(f"{file}: unknown phases {', '.join(sorted(wrong))}; known: {', '.join(PHASES)}")
            return cls(
                profile=parse_profile(data["profile"], file),
                device=str(data["device"]),
                dtype=str(data["dtype"]),
                regressions={phase: Regression.from_data(found) for phase, found in data["phases"].items()},
                memory={phase: Regression.from_data(found) for phase, found in data["memory"].items()},
                sentinel=None if data["sentinel"] is None else float(data["sentinel"]),
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


def _kinds(names: Iterable[str]) -> set[str]:
    """The kinds of operators that features are of."""
    terms = (name.rpartition(".") for name in names)
    return {kind for kind, _, term in terms if term != "modules"}


def _without(piece: Piece, seen: set[str]) -> Piece:
    return piece._replace(operators=tuple(operator for operator in piece.operators if operator.kind in seen))


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
        found = self.predictor.predict(parts_of(spec, self._work(context), phase), phase)
        fresh = set(found.unknown) - self._warned
        if fresh:
            self._warned |= fresh
            warnings.warn(
                f"{self.predictor.profile.name} was never timed on {', '.join(sorted(fresh))}; the roofline answers "
                "for it, with a wide interval",
                stacklevel=2,
            )
        factor = self.predictor.factor(phase, quantile)
        if not math.isfinite(factor):
            raise ZooError(
                f"{len(self.predictor.regressions[phase].errors)} timed models are too few to tell the quantile "
                f"{quantile}; calibrate with a larger budget"
            )
        seconds = found.seconds * factor
        if found.unknown and quantile > 0.5:
            seconds = max(seconds, found.high)
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
