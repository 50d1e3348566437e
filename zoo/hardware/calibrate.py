"""Calibrating a device: time models that tell most, fit what their work costs, and refuse a machine that is too noisy.

What is timed goes into a log at once, so that a calibration that was interrupted goes on where it stopped; the
predictor of an earlier calibration stays until a new one is finished.
"""

from __future__ import annotations

import itertools
import json
import random
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from zoo.errors import ZooError
from zoo.hardware.features import PHASES, Part, Phase, by_piece, cold_share, features, moved, summed, with_cold
from zoo.hardware.predictor import COUNTED, FORMAT, Predictor
from zoo.hardware.profile import Profile
from zoo.hardware.regression import Floats, Regression, Wholes, fit, slope
from zoo.hardware.roofline import least_seconds
from zoo.hardware.samples import Sample, chosen, drawn, take
from zoo.latency import Clock

if TYPE_CHECKING:
    from zoo.hardware.stopwatch import Reading, Readings, Stopwatch

POOL = 400
"""Samples that the informative half is chosen from."""
PAIR = 2
"""Informative samples, and as many typical ones, that are timed against each other."""
LONGEST = 0.1
"""Seconds of a forward pass, as guessed, beyond which a sample is not timed: longer ones tell no more."""
GUESS = 1.5
"""How many times the roofline's seconds a forward pass is taken to last."""
RUNS = 14
"""About how many forward passes timing a sample comes to, decoding included."""
DRIFT = 0.3
"""The share by which the sentinel may differ from its median; what was timed then is timed again. What it differs less
is taken out of the times, as far as these follow it."""
TRIES = 3
"""How often a group is timed before it counts as disturbed."""
DISTURBED = 1 / 3
"""The share of disturbed groups above which the machine is too noisy."""
DISAGREEMENT = 1.2
"""By what factor a sample and the sum of its modules, timed by turns, may differ; more, and one was disturbed."""
FEWEST = 10
"""Samples that a calibration needs."""
FEWEST_FOLLOWED = 30
"""Samples from which on they tell how far times follow the sentinel; fewer are taken to follow all of it."""
CACHES = tuple(2**power for power in range(21, 27))
"""Sizes in bytes of what a device may keep from one call to the next, of which the one is chosen with which models that
were held out are predicted best."""


@dataclass(frozen=True, slots=True)
class Step:
    """Where a calibration stands: models timed, seconds spent of those it may take, the sentinel's deviation."""

    samples: int
    spent: float
    seconds: float
    deviation: float


Row = tuple[Mapping[str, float], float]
"""Features, and the seconds that they took; or what is counted, and the bytes that were held."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What is kept of a sample: by phase its seconds, those of its modules, and the bytes that it held; and whether the
    machine was disturbed meanwhile.
    """

    key: str
    typical: bool
    whole: Mapping[Phase, Row]
    modules: Mapping[Phase, Sequence[Row]]
    held: Mapping[Phase, Row]
    sentinel: float
    disturbed: bool


class Pool(NamedTuple):
    """Where typical samples come from, and what tells that from other places."""

    name: str
    samples: Iterator[Sample]


class Log:
    """The samples that were timed, one JSON line each behind a first line that says where; appended at once.

    A log of another device, dtype or version of torch is started over.
    """

    def __init__(self, path: Path, identity: Mapping[str, str]) -> None:
        self.path = path
        self.timed: list[Timed] = []
        self.spent = 0.0
        head = json.dumps({"identity": dict(identity)})
        try:
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            if lines[:1] == [head]:
                for line in lines[1:]:
                    self._read(line)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(head + "\n", encoding="utf-8")
        except OSError as error:
            raise ZooError(f"cannot keep what is timed in {path}: {error.strerror or error}") from None

    def _read(self, line: str) -> None:
        try:
            row = json.loads(line)
            timed = [Timed(**item) for item in row["timed"]]
        except (ValueError, KeyError, TypeError):
            return  # The line that a killed process left unfinished.
        self.timed += timed
        self.spent += float(row["spent"])

    def add(self, timed: list[Timed], spent: float) -> None:
        """Keep what a group took."""
        self.timed += timed
        self.spent += spent
        row = {"spent": spent, "timed": [_data(item) for item in timed]}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _data(timed: Timed) -> dict[str, Any]:
    return {name: getattr(timed, name) for name in Timed.__slots__}


def calibrate(
    stopwatch: Stopwatch,
    profile: Profile,
    log: Path,
    *,
    dtype: str = "float32",
    seconds: float = 255.0,
    prior: Predictor | None = None,
    pool: Pool | None = None,
    seed: int = 0,
    tell: Callable[[Step], None] = lambda step: None,
    clock: Clock = time.monotonic,
) -> Predictor:
    """Time samples for `seconds`, those of an earlier run of the same calibration included, and fit a predictor.

    profile: peak figures of the device, which the first guesses come from, and which answer for kinds that are never
    timed. log: the file of what was timed. prior: another device's predictor, with which ten samples are a start. pool:
    where typical samples come from in place of the shipped spaces, such as the space that will be searched.

    Raises `ZooError` where the sentinel, the same work between all others, says that the machine is too noisy: as soon
    as more samples were disturbed than may be in the end.
    """
    drawn_from = {"pool": "shipped" if pool is None else pool.name, "seed": str(seed)}
    versions = {"format": str(FORMAT), "zoo": version("zoo-nas")}
    kept = Log(log, {"device": stopwatch.device.id, "profile": profile.name, "dtype": dtype, **drawn_from, **versions})
    groups = _groups(profile, dtype, pool, seed, {timed.key for timed in kept.timed})
    sentinels = [timed.sentinel for timed in kept.timed if not timed.disturbed]
    while kept.spent < seconds:
        start = clock()
        group = next(groups, None)
        if group is None or _too_noisy(kept.timed, expected=seconds / max(kept.spent, 1e-9)):
            break
        found, sentinel, disturbed = _undisturbed(stopwatch, group, sentinels)
        if not disturbed:
            sentinels += [sentinel] * len(group)
        kept.add(
            [
                _timed(sample, readings, sentinel, disturbed or not _agree(readings.values()))
                for sample, readings in zip(group, found, strict=True)
            ],
            max(clock() - start, 1e-9),
        )
        tell(Step(len(kept.timed), kept.spent, seconds, _deviation(sentinel, sentinels)))
    if _too_noisy(kept.timed):
        # The refusal that follows asks for another try, which begins anew.
        log.unlink(missing_ok=True)
    return fitted(kept.timed, profile, stopwatch.device.id, dtype, prior)


def _too_noisy(timed: Sequence[Timed], expected: float = 1.0) -> bool:
    """Whether too many samples were disturbed, of `expected` times as many if all that are yet to come are not."""
    return sum(item.disturbed for item in timed) > DISTURBED * expected * len(timed)


def _timed(sample: Sample, readings: Readings, sentinel: float, disturbed: bool) -> Timed:
    parts = {phase: sample.parts(phase) for phase in readings}
    return Timed(
        sample.key,
        sample.typical,
        {phase: (features(parts[phase], phase), reading.seconds) for phase, reading in readings.items()},
        {phase: rows(parts[phase], phase, reading.modules) for phase, reading in readings.items() if reading.modules},
        {
            phase: ({COUNTED: sample.held(phase)}, reading.held)
            for phase, reading in readings.items()
            if reading.held is not None
        },
        sentinel,
        disturbed,
    )


def _agree(readings: Iterable[Reading]) -> bool:
    """Whether what was timed as a whole took as long as what was timed module by module."""
    sums = [(reading.seconds, sum(reading.modules.values())) for reading in readings if reading.modules]
    return all(max(whole, parts) <= DISAGREEMENT * min(whole, parts) for whole, parts in sums)


def rows(parts: Iterable[Part], phase: Phase, seconds: Mapping[str, float]) -> list[Row]:
    """What the pieces of a model's parts do and what their modules took, without the modules inside them.

    Pieces whose modules were not called count to the nearest that was called and that they stand in, and modules within
    a piece to that. Pieces that do the same are one row.
    """
    work: dict[str, dict[str, float]] = {}
    took: dict[str, float] = {}
    pieces = {path: counts for part in parts for path, counts in by_piece(part, phase)}
    both = pieces.keys() & seconds.keys()
    for path, counts in pieces.items():
        owner = _within(path, both)
        work[owner] = summed([work.get(owner, {}), counts])
    for path, second in seconds.items():
        owner = _within(path, both)
        took[owner] = took.get(owner, 0.0) + second
    alike: dict[frozenset[tuple[str, float]], list[str]] = {}
    for owner in both:
        alike.setdefault(frozenset(work[owner].items()), []).append(owner)
    return [
        ({name: amount * len(owners) for name, amount in key}, sum(took[owner] for owner in owners))
        for key, owners in alike.items()
    ]


def _within(path: str, paths: Collection[str]) -> str:
    """The nearest of the paths that a path is or lies below; the path itself where there is none."""
    above = path
    while above and above not in paths:
        above = above.rpartition(".")[0]
    return above or path


def _groups(profile: Profile, dtype: str, pool: Pool | None, seed: int, seen: set[str]) -> Iterator[list[Sample]]:
    """What is timed together: informative samples while there are any, and typical ones."""

    def guess(sample: Sample) -> float:
        operators = [operator for part in sample.parts("forward") for piece in part for operator in piece.operators]
        return GUESS * least_seconds(operators, profile, dtype)

    informative = iter(
        chosen(
            take(drawn(random.Random(seed), dtype), POOL, guess, LONGEST, seen), guess, lambda least: 0.2 + RUNS * least
        )
    )
    typical = drawn(random.Random(seed + 1), dtype, typical=True) if pool is None else pool.samples
    while True:
        drawn_ones = take(typical, PAIR, guess, LONGEST, seen)
        group = [*itertools.islice(informative, PAIR), *drawn_ones[1:]]
        group += [replace(sample, thorough=True) for sample in drawn_ones[:1]]
        if not group:
            return
        yield group


def _undisturbed(
    stopwatch: Stopwatch, group: list[Sample], sentinels: Sequence[float]
) -> tuple[list[Readings], float, bool]:
    """The group's times, taken again while the sentinel says that the machine is not as it was."""
    attempts = []
    for _ in range(TRIES):
        found, sentinel = stopwatch.read(group)
        times = [reading.seconds for readings in found for reading in readings.values()] + [sentinel]
        if not min(times) > 0:
            raise ZooError(f"the clock of {stopwatch.device} went wrong: a run took {min(times)} s")
        attempts.append((_deviation(sentinel, sentinels), found, sentinel))
        if attempts[-1][0] <= DRIFT:
            break
    deviation, found, sentinel = min(attempts, key=lambda attempt: attempt[0])
    return found, sentinel, deviation > DRIFT


def _deviation(sentinel: float, others: Sequence[float]) -> float:
    """By what share the sentinel is faster or slower than usual."""
    factor = sentinel / statistics.median(others or [sentinel])
    return max(factor, 1 / factor) - 1


def fitted(timed: list[Timed], profile: Profile, device: str, dtype: str, prior: Predictor | None = None) -> Predictor:
    """The predictor of what was timed; disturbed samples are left out, and errors are those of typical ones."""
    good = [item for item in timed if not item.disturbed]
    if _too_noisy(timed):
        slow = [item.sentinel for item in timed]
        raise ZooError(
            f"the machine is too noisy: the same work took from {min(slow) * 1e3:.3g} to {max(slow) * 1e3:.3g} ms, and "
            f"{len(timed) - len(good)} of {len(timed)} samples were disturbed; stop what else runs and calibrate again"
        )
    if len(good) < FEWEST:
        raise ZooError(f"{len(good)} samples are too few for a calibration, which needs {FEWEST}; give it more time")
    usual = statistics.median(item.sentinel for item in good)
    regressions: dict[Phase, Regression] = {}
    caches: dict[Phase, float] = {}
    memory: dict[Phase, Regression] = {}
    for phase in PHASES:
        mine = [item for item in good if phase in item.whole]
        if len(mine) >= FEWEST:
            drifts = np.array([item.sentinel for item in mine]) / usual
            before, sizes = _before(phase, prior, regressions, caches, len(mine))
            found = {size: _regression(mine, phase, size, drifts, before) for size in sizes}
            caches[phase], regressions[phase] = min(found.items(), key=lambda item: item[1].error)
        held = [item.held[phase] for item in good if phase in item.held]
        if len(held) >= FEWEST:
            memory[phase] = fit(
                _matrix([counts for counts, _ in held], [COUNTED]), [size for _, size in held], [COUNTED]
            )
    made = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "samples": str(len(good)),
        **{name: version(name) for name in ("torch", "zoo-nas")},
    }
    return Predictor(profile, device, dtype, regressions, caches, usual, made, memory)


def _before(
    phase: Phase,
    prior: Predictor | None,
    found: Mapping[Phase, Regression],
    caches: Mapping[Phase, float],
    samples: int,
) -> tuple[Regression | None, Sequence[float]]:
    """What is known of a phase before it is fitted, and which sizes its cache may have: another device's costs, and its
    cache where samples are few; of training, which few are timed in, that it is some times a forward pass.
    """
    if prior is not None and phase in prior.regressions:
        return prior.regressions[phase], CACHES if samples >= FEWEST_FOLLOWED else [prior.caches[phase]]
    if phase == "train" and "forward" in found:
        return found["forward"], [caches["forward"]]
    return None, CACHES


def _regression(
    timed: list[Timed], phase: Phase, cache: float, drifts: Floats, before: Regression | None
) -> Regression:
    """The fit to times as they would be were the machine as fast as it usually was, as far as times follow the
    sentinel: where it strays by chance, less than all of its drift is in them.
    """
    found = _fit(timed, phase, cache, drifts, before)
    followed = 1 + slope(np.log(drifts), np.log1p(found.errors))
    if followed < 1 and len(timed) >= FEWEST_FOLLOWED:
        found = _fit(timed, phase, cache, drifts ** max(0.0, followed), before)
    typical = np.array([item.typical for item in timed])
    return found.judged(typical) if typical.sum() >= FEWEST else found


def _fit(timed: list[Timed], phase: Phase, cache: float, drifts: Floats, before: Regression | None) -> Regression:
    """Times, divided by the drift meanwhile, as costs of what the modules do, cold as far as the model that they are in
    does not stay in a cache; training is timed as a whole.
    """
    shares = [cold_share(moved(item.whole[phase][0]), cache) for item in timed]
    wholes = [(with_cold(item.whole[phase][0], share), item.whole[phase][1]) for item, share in zip(timed, shares)]
    names = sorted({name for counts, _ in wholes for name in counts} | set(before.names if before else ()))
    # A module so fast that the clock stood still tells nothing.
    parts = [
        (index, with_cold(counts, shares[index]), seconds / drifts[index])
        for index, item in enumerate(timed)
        for counts, seconds in item.modules.get(phase, [item.whole[phase]])
        if seconds > 0
    ]
    return fit(
        _matrix([counts for _, counts, _ in parts], names),
        [seconds for _, _, seconds in parts],
        names,
        prior=before,
        wholes=Wholes(
            np.array([index for index, _, _ in parts]),
            _matrix([counts for counts, _ in wholes], names),
            np.array([seconds for _, seconds in wholes]) / drifts,
        ),
    )


def _matrix(rows: Sequence[Mapping[str, float]], names: Sequence[str]) -> Floats:
    return np.array([[counts.get(name, 0.0) for name in names] for counts in rows])
