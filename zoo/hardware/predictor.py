"""Latency predicted from a calibration: counted work times fitted costs, with the interval in which measurements fall.

A predictor belongs to one device and dtype. For each phase it holds a regression of seconds on the features of
operators (`zoo.hardware.features`). Work of a kind that was never timed is not free: it takes what the device's
roofline says, with a wide interval and a warning.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from zoo.accounting import ALIASES, Piece, Place, Workload
from zoo.errors import ZooError
from zoo.hardware.features import PHASES, Part, Phase, features
from zoo.hardware.profile import Profile, parse_profile
from zoo.hardware.regression import Regression
from zoo.hardware.roofline import least_seconds
from zoo.hardware.samples import parts_of
from zoo.latency import Context, LatencyFigure
from zoo.latency import Phase as TimedPhase

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.cost import Operator

FORMAT = 2
"""The version of the file."""
COVERAGE = 0.9
UNKNOWN_HIGH = 4.0
"""How many times the roofline's seconds work of an unknown kind may take: real kernels reach a quarter of a peak."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds, the interval in which `COVERAGE` of measurements lie, and the kinds that the roofline answered for."""

    seconds: float
    low: float
    high: float
    unknown: tuple[str, ...] = ()


@dataclass(frozen=True)
class Predictor:
    """What a calibration found for one device and dtype.

    device: the `Device.id` that it was made on. regressions: by phase. sentinel: seconds of the sentinel meanwhile, see
    `zoo.hardware.stopwatch`. made: date and versions.
    """

    profile: Profile
    device: str
    dtype: str
    regressions: Mapping[Phase, Regression]
    sentinel: Mapping[Phase, float] = field(default_factory=dict)
    made: Mapping[str, str] = field(default_factory=dict)

    def predict(self, parts: Iterable[Part], phase: Phase = "forward") -> Prediction:
        """What a call takes, from the pieces of all its parts. O(operators)."""
        known, unknown = self._apart(parts, phase)
        seconds = self._seconds(features(known, phase), phase)
        floor = least_seconds(unknown, self.profile, self.dtype, phase)
        low, high = self.interval(phase)
        kinds = tuple(sorted({piece.kind for piece in unknown}))
        return Prediction(seconds + floor, seconds * low + floor, seconds * high + UNKNOWN_HIGH * floor, kinds)

    def interval(self, phase: Phase) -> tuple[float, float]:
        """The factors on a prediction between which `COVERAGE` of measurements lie; 0 and infinity where too few were
        taken to say.
        """
        regression = self._regression(phase)
        outside = (1 - COVERAGE) / 2
        return regression.lower(outside), regression.upper(1 - outside)

    def estimator(self, phase: Phase) -> Callable[[Place], float]:
        """The seconds of one part of a model; those of all parts add up to the model's."""

        def seconds(place: Place) -> float:
            return self.predict([place.pieces(phase == "decode")], phase).seconds

        return seconds

    def factor(self, phase: Phase, quantile: float) -> float:
        """What a prediction is multiplied by to be a quantile of the measurements of such models."""
        return 1.0 if quantile == 0.5 else self._regression(phase).upper(quantile)

    def drift(self, sentinel: Mapping[Phase, float]) -> dict[Phase, float]:
        """How many times slower the machine is than when it was calibrated, by phase, by what the sentinel takes."""
        return slowdown(sentinel, self.sentinel)

    def _regression(self, phase: Phase) -> Regression:
        if phase not in self.regressions:
            have = ", ".join(self.regressions)
            raise ZooError(f"{self.profile.name} was not calibrated for {phase}; its calibration has {have}")
        return self.regressions[phase]

    def _seconds(self, counts: Mapping[str, float], phase: Phase) -> float:
        costs = self._costs[phase]
        return sum(costs.get(name, 0.0) * amount for name, amount in counts.items())

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
            "sentinel": dict(self.sentinel),
            "made": dict(self.made),
            "phases": {phase: found.as_data() for phase, found in self.regressions.items()},
        }

    @classmethod
    def from_data(cls, data: Any, file: str = "<data>") -> Self:
        """What `as_data` gave; a `ZooError` names the file and what is wrong with it."""
        try:
            if data["format"] != FORMAT:
                raise ZooError(f"{file}: format {data['format']}; this zoo reads {FORMAT}; calibrate again")
            wrong = set(data["phases"]) - set(PHASES)
            if wrong:
                raise ZooError(f"{file}: unknown phases {', '.join(sorted(wrong))}; known: {', '.join(PHASES)}")
            return cls(
                profile=parse_profile(data["profile"], file),
                device=str(data["device"]),
                dtype=str(data["dtype"]),
                regressions={phase: Regression.from_data(found) for phase, found in data["phases"].items()},
                sentinel={phase: float(data["sentinel"][phase]) for phase in PHASES if phase in data["sentinel"]},
                made={str(key): str(value) for key, value in data["made"].items()},
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ZooError(f"{file}: not a calibration ({error!r}); `zoo device calibrate` makes one") from None

    def save(self, path: Path) -> Path:
        """Write the file whole or not at all, so that the one before stays usable."""
        fresh = path.with_name(path.name + ".new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh.write_text(json.dumps(self.as_data(), indent=1) + "\n", encoding="utf-8")
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


def slowdown(sentinel: Mapping[Phase, float], usual: Mapping[Phase, float]) -> dict[Phase, float]:
    """How many times longer the sentinel takes than usual, in each phase that both have."""
    return {phase: seconds / usual[phase] for phase, seconds in sentinel.items() if phase in usual}


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
    """A `LatencySource` that asks a predictor: microseconds for each spec, and no model is built."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self._warned: set[str] = set()

    def latency(
        self, spec: Spec, context: Context, phase: TimedPhase = "forward", quantile: float = 0.5
    ) -> LatencyFigure:
        if ALIASES.get(context.dtype, context.dtype) != self.predictor.dtype:
            raise ZooError(
                f"{self.predictor.profile.name} was calibrated in {self.predictor.dtype}, not {context.dtype}; "
                f"`zoo device calibrate --dtype {context.dtype}` does that"
            )
        work = Workload(context.batch, context.seq, context.past, context.dtype)
        found = self.predictor.predict(parts_of(spec, work, phase), phase)
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
