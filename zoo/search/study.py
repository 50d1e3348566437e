"""The search: propose, repair, measure, evaluate, record, until there is nothing left to do.

Proposal `n` depends on the seed and the finished trials before it only, and a trial is recorded whole when its
candidate is done with. So the same command goes on where a search was cut, wherever that was.
"""

from __future__ import annotations

import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.device import is_here
from zoo.errors import InfeasibleError, SpecError, ZooError
from zoo.latency import LatencySource
from zoo.search.architecture import architecture
from zoo.search.budget import Budget, Term, latency_device
from zoo.search.evaluate import Evaluation, EvaluationError, Evaluator, TrainEvaluator
from zoo.search.finalists import FILE as FINALISTS
from zoo.search.finalists import Finalist, chosen, finalists_text, load_finalists, measure_finalist, pending
from zoo.search.latencies import Drift, Latencies, Latency, Measured, Origin, check_latency, origin
from zoo.search.measure import Fitted, Meter, label, resolved
from zoo.search.objective import Objective, parse_objectives
from zoo.search.repair import Repair
from zoo.search.results import Results, Writer, facts_of, write_text
from zoo.search.sampler import (
    Evolution,
    OptunaProposer,
    Proposer,
    RandomDraws,
    Twin,
    check_names,
    generator,
    optuna_pruner,
    optuna_sampler,
)
from zoo.search.space import Decision, Space, load_space, point_key
from zoo.search.trial import Archive, Point, Trial
from zoo.train.settings import TrainSettings

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

ATTEMPTS = 256
"""Proposals of a stream for one trial before the space is swept for what is left."""
SWEEP = 50_000
"""Largest number of points that a sweep goes through."""
SWEPT = 64
"""How many of them are counted together."""
DROPPED_IN_A_ROW = 25
FAILED_AT_FIRST = 5


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a search is.

    space: a file, a shipped name, or the space itself. trials: candidates to train in all, those of earlier sessions
    included. storage: an Optuna storage URL in place of a journal in `out`. fresh: replace a search that is there.
    timeout: seconds after which this session starts no further candidate. latency: whether latencies on this machine
    are measured, or predicted from its calibration and measured for the finalists at the end. device: where latencies
    that name no device hold. train: how candidates are trained; needed unless an evaluator is given. command: as the
    report shows it.
    """

    space: str | Path | Space
    budget: str | Budget = ""
    trials: int = 40
    objective: str = "loss"
    sampler: str = "evolution"
    pruner: str = "none"
    storage: str | None = None
    seed: int = 0
    out: Path = Path("runs/search")
    fresh: bool = False
    timeout: float | None = None
    latency: Latency = "measured"
    device: str = "cpu"
    train: TrainSettings | None = None
    command: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """What a listener is told before the first candidate."""

    space: str
    budget: Budget
    objectives: tuple[Objective, ...]
    trials: int
    done: Sequence[Trial]
    folder: Path
    others: tuple[str, ...] = ()
    """Processes that work on the same search already."""
    latency: Mapping[str, Origin] = field(default_factory=dict)
    """Where each latency comes from."""


class SearchListener:
    """Is told what a search does; this one does nothing with it. `zoo.search.live.LiveProgress` shows it."""

    def started(self, start: Start) -> None:
        """Before the first candidate of this session."""

    def candidate(self, number: int, phase: str, shape: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        """A candidate is now measured, predicted or trained (`phase`: measuring, predicting, training)."""

    def training(self, progress: Any, /) -> None:
        """Progress of the training in hand, a `zoo.train.progress.Progress`."""

    def finished(self, trial: Trial, front: Sequence[Trial]) -> None:
        """A trial was recorded; `front` are the best so far."""

    def finalist(self, finalist: Finalist, done: int, count: int) -> None:
        """After the last candidate: one latency that was predicted was measured, `done` of `count`."""

    def ended(self, results: Results) -> None:
        """No further candidate in this session; also after Ctrl-C."""


@dataclass(frozen=True, slots=True)
class _Baseline:
    """A homogeneous point: its name, the decisions that make it homogeneous, and whether it had to be changed."""

    name: str
    point: Point
    keep: tuple[str, ...]
    adjusted: bool


@dataclass(slots=True)
class _Candidate:
    number: int
    point: Point
    key: str
    spec: Spec
    spec_hash: str
    shape: dict[str, Any]
    baseline: _Baseline | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def run_search(
    settings: SearchSettings,
    *,
    evaluator: Evaluator | None = None,
    progress: SearchListener | None = None,
    latency: Callable[[str], LatencySource] | None = None,
    measured: Callable[[str], LatencySource] | None = None,
) -> Results:
    """Search until `trials` candidates are trained, the space is exhausted, or Ctrl-C; then say what was found.

    `latency` tells who knows the latencies of a device, by default what `settings.latency` says; `measured` who
    measures the finalists of a search that predicts. Raises `ZooError` for settings that do not fit each other, a
    budget that nothing meets, and a run folder of another search; once the first candidate is on its way, nothing that
    was found is lost, whatever happens.
    """
    return _Search(settings, evaluator, progress or SearchListener(), latency, measured).run()


class _Search:
    def __init__(
        self,
        settings: SearchSettings,
        evaluator: Evaluator | None,
        listener: SearchListener,
        latency: Callable[[str], LatencySource] | None,
        measured: Callable[[str], LatencySource] | None,
    ) -> None:
        if settings.trials < 1:
            raise ZooError(f"a search needs at least one trial, found {settings.trials}")
        self.settings = settings
        self.listener = listener
        self.began = time.monotonic()
        self.space: Space = load_space(settings.space) if isinstance(settings.space, str | Path) else settings.space
        self.space.validate()
        given = Budget.parse(settings.budget) if isinstance(settings.budget, str) else settings.budget
        check_latency(settings.latency)
        latency_device(settings.device)
        threads = None if settings.train is None else settings.train.threads
        sources = latency or Latencies(settings.latency, threads)
        self.measured = measured or Measured(threads)
        self.drift = Drift(threads)
        budget = resolved(given, sources, settings.device)
        self.objectives = parse_objectives(settings.objective, budget)
        check_names(settings.sampler, settings.pruner, self.objectives)
        self.meter = Meter(self.space, budget, self.objectives, sources, settings.device)
        self.repair = Repair(self.space, self.meter.tables, budget)
        if (reason := self.repair.infeasible()) is not None:
            raise InfeasibleError(reason)
        self.evaluator = evaluator or self._train_evaluator()
        self._check_objectives()
        self._open(given)

    def _train_evaluator(self) -> Evaluator:
        if self.settings.train is None:
            raise ZooError("a search needs to know on which data candidates are trained; give --data")
        evaluator = TrainEvaluator(self.settings.train, self.settings.out / "candidates", self.listener.training)
        point = self.repair(self.space.sample(random.Random(0)), random.Random(0))
        if point is not None:
            evaluator.check(self.space.spec_at(point))
        return evaluator

    def _check_objectives(self) -> None:
        known = self.evaluator.metrics()
        for objective in self.objectives:
            if objective.trained and objective.name not in known:
                raise ZooError(f"objective {objective.name!r} is not known for this data; it has {', '.join(known)}")

    def _open(self, given: Budget) -> None:
        from zoo.search.ledger import Codec, Ledger, remove

        settings = self.settings
        if settings.fresh:
            remove(settings.out, settings.storage)
            _clear(settings.out)
        identity = {
            "space": self.space.hash,
            "budget": str(given),
            "objective": ",".join(objective.name for objective in self.objectives),
            "sampler": settings.sampler,
            "pruner": settings.pruner,
            "seed": settings.seed,
            **{f"train.{name}": value for name, value in self.evaluator.identity().items()},
        }
        self.origins = {label(term): self._origin(term) for term in self.meter.measured}
        texts = sorted({found.text for found in self.origins.values()})
        if texts:
            identity["latency"] = "; ".join(texts)
        about = facts_of(
            command=settings.command,
            space=self.space,
            budget=self.meter.budget,
            objectives=self.objectives,
            identity=identity,
            trials=settings.trials,
            latency={name: asdict(found) for name, found in self.origins.items()},
        )
        self.ledger = Ledger.open(
            settings.out, storage=settings.storage, objectives=self.objectives, identity=identity, about=about
        )
        self.codec = Codec(self.space.decisions)
        needs_twin = settings.pruner != "none" or settings.sampler not in ("evolution", "random")
        make = None if settings.sampler in ("evolution", "random") else optuna_sampler(settings.sampler)
        self.twin = Twin(self.objectives, make, optuna_pruner(settings.pruner), settings.seed) if needs_twin else None
        self.archive = Archive(self.objectives)
        self.proposer = self._proposer()
        self.trained = 0
        self.trained_baselines: set[str] = set()
        self.aliases: set[str] = set()
        """Keys of points whose spec is that of another point."""
        for trial, frozen in zip(self.ledger.trials, self.ledger.frozen, strict=True):
            self._take_in(trial, frozen)
        self.writer = Writer(settings.out, self.ledger.about, self.ledger.identity, self.objectives)
        self.sweep: Iterator[Point] | None = None

    def _origin(self, term: Term) -> Origin:
        device = term.device or self.settings.device
        return origin(self.meter.source(term), device, term.context.dtype or "float32", self.settings.latency)

    def _proposer(self) -> Proposer:
        settings = self.settings
        if settings.sampler == "evolution":
            return Evolution(self.space, self.archive, settings.seed)
        if settings.sampler == "random":
            return RandomDraws(self.space, settings.seed)
        assert self.twin is not None
        return OptunaProposer(self.space, self.twin, self.codec, settings.seed)

    def run(self) -> Results:
        """The loop, and the results whatever ends it."""
        stopped = "error"
        baselines = self._baselines()
        self.listener.started(
            Start(
                self.space.name or str(self.settings.space),
                self.meter.budget,
                self.objectives,
                self.settings.trials,
                tuple(self.ledger.trials),
                self.settings.out,
                self.ledger.others(),
                self.origins,
            )
        )
        try:
            stopped = self._loop(baselines)
        except KeyboardInterrupt:
            stopped = "interrupted"
        finally:
            # What was found is written even if an error is on its way out, which must not be hidden by a second one.
            try:
                self.ledger.release()
                results = self.writer.write(self.ledger.trials, stopped, self._seconds())
                results = replace(results, others=self.ledger.others())
            except Exception:
                if stopped != "error":
                    raise
        try:
            fresh = self._measure_finalists()
        except KeyboardInterrupt:
            fresh, stopped = True, "interrupted"
        if fresh:
            results = replace(self.writer.write(self.ledger.trials, stopped, self._seconds()), others=results.others)
        self.listener.ended(results)
        return results

    def _measure_finalists(self) -> bool:
        """Measure the best candidates whose latencies on this machine were predicted; whether there were any.

        While other processes work on the search the machine is not quiet, and whichever ends last does it.
        """
        terms = [
            term
            for term in self.meter.measured
            if self.origins[label(term)].kind == "predicted" and is_here(term.device or self.settings.device)
        ]
        if not terms or self.ledger.others():
            return False
        single = None if len(self.objectives) > 1 else lambda trial: self.objectives[0].oriented(trial.values[0])
        known = {finalist.key: finalist for finalist in load_finalists(self.settings.out)}
        trials = chosen(self.archive.front(), self.archive.trials, single)
        work = pending(trials, terms, known.values())
        for done, (trial, term) in enumerate(work, 1):
            self.listener.candidate(trial.number, "measuring", trial.shape, trial.metrics)
            device, source = term.device or self.settings.device, self.meter.source(term)
            drift = self.drift.of(source, device, term.context.dtype or "float32")
            found = measure_finalist(trial, term, self.space.spec_at(trial.point), source, self.measured(device), drift)
            known[found.key] = found
            write_text(self.settings.out / FINALISTS, finalists_text(known.values()))
            self.listener.finalist(found, done, len(work))
        return bool(work)

    def _loop(self, baselines: Mapping[str, _Baseline]) -> str:
        while not self._enough():
            timeout = self.settings.timeout
            if timeout is not None and self._seconds() >= timeout:
                return "timeout"
            if self._out_of_luck():
                return "slow"
            candidate = self._next(baselines)
            if candidate is None:
                return "exhausted"
            # Another process may have claimed the last place at the same time; then one of both gives way.
            if self._enough():
                self.ledger.release()
                continue
            self._handle(candidate)
            self.writer.write_if_due(self.ledger.trials, self._seconds())
        return "finished"

    def _enough(self) -> bool:
        """Whether all trials are done or in other hands."""
        return self.trained + len(self.ledger.claimed()) >= self.settings.trials

    def _seconds(self) -> float:
        return time.monotonic() - self.began

    def _out_of_luck(self) -> bool:
        """Whether nothing further is fast enough; raises `ZooError` if nothing ever was, or everything breaks."""
        trials = self.ledger.trials
        if self.trained >= FAILED_AT_FIRST and all(trial.status in ("failed", "dropped") for trial in trials):
            reason = next(trial.reason for trial in reversed(trials) if trial.trained)
            raise ZooError(f"the first {self.trained} candidates all failed; the last one: {reason}")
        last = trials[-DROPPED_IN_A_ROW:]
        if len(last) < DROPPED_IN_A_ROW or any(trial.status != "dropped" for trial in last):
            return False
        if not self.trained:
            raise ZooError(
                f"the first {DROPPED_IN_A_ROW} candidates all measured outside the budget and could not be made to "
                f"fit; the last one {last[-1].reason}. Loosen that term, or let the space go smaller"
            )
        return True

    # Proposing

    def _baselines(self) -> dict[str, _Baseline]:
        """The homogeneous points as the budget allows them, by key. What makes them homogeneous is not changed."""
        given = self.space.homogeneous()
        found: dict[str, _Baseline] = {}
        for index, (name, point) in enumerate(given.items()):
            held = _held(point, given.values())
            keep = [decision for decision in point if _place(decision) in held]
            fitting = self.repair(point, generator(self.settings.seed, index, "baseline"), keep)
            if fitting is None:
                continue
            # Layers that the repair added are like the others.
            alike = {decision: held[_place(decision)] for decision in fitting if _place(decision) in held}
            fitting = self.space.normalised({**fitting, **alike})
            if self.repair.feasible(fitting):
                key = point_key(fitting)
                found.setdefault(key, _Baseline(name, fitting, tuple(alike), key != point_key(point)))
        return found

    def _next(self, baselines: Mapping[str, _Baseline]) -> _Candidate | None:
        """A candidate that is new, feasible and claimed; None if there is none."""
        others = self.ledger.claimed()
        number = len(self.ledger.trials)
        seconds = {"propose": 0.0, "repair": 0.0, "spec": 0.0}
        for key, baseline in baselines.items():
            if baseline.name in self.trained_baselines:
                continue
            candidate = self._claimed(number, key, baseline.point, others, seconds)
            if candidate is not None:
                candidate.baseline = baseline
                return candidate
        rng = generator(self.settings.seed, number, "repair")
        stream = self.proposer.stream(number)
        for _ in range(ATTEMPTS):
            with _clock(seconds, "propose"):
                proposed = next(stream)
            with _clock(seconds, "repair"):
                point = self.repair(proposed, rng)
            if point is not None:
                candidate = self._claimed(number, point_key(point), point, others, seconds)
                if candidate is not None:
                    return candidate
        if self.sweep is None:
            self.sweep = self._swept()
        for point in self.sweep:
            candidate = self._claimed(number, point_key(point), point, others, seconds)
            if candidate is not None:
                return candidate
        return None

    def _claimed(
        self, number: int, key: str, point: Point, others: Mapping[str, str], seconds: dict[str, float]
    ) -> _Candidate | None:
        """The candidate of a point, unless it or its spec has been seen or is in other hands."""
        if key in self.ledger.keys or key in self.aliases or key in others:
            return None
        with _clock(seconds, "spec"):
            try:
                spec = self.space.spec_at(point)
            except SpecError:
                self.aliases.add(key)
                return None
            identity = spec.hash
        if identity in self.ledger.hashes:
            self.aliases.add(key)
            return None
        if not self.ledger.claim(key):
            return None
        # Another process may have finished this one between the last look and the claim.
        self._refresh()
        if key in self.ledger.keys or identity in self.ledger.hashes:
            self.ledger.release()
            return None
        return _Candidate(number, point, key, spec, identity, architecture(spec), seconds=seconds)

    def _swept(self) -> Iterator[Point]:
        """All feasible points of a small space in order; nothing for a large one."""
        size = self.space.size()
        if size is not None and size <= SWEEP:
            points = _points(self.space)
            while some := list(islice(points, SWEPT)):
                yield from (point for point, missed in zip(some, self.repair.violations(some)) if not missed)

    # Working on one

    def _handle(self, candidate: _Candidate) -> None:
        """Measure, evaluate and record one candidate."""
        rng = generator(self.settings.seed, candidate.number, "shrink")

        measured = any(found.kind == "measured" for found in self.origins.values())

        def measuring(point: Point) -> None:
            phase = "measuring" if measured else "predicting"
            self.listener.candidate(candidate.number, phase, candidate.shape, self.meter.figures(point))

        def usable(point: Point) -> bool:
            key = point_key(point)
            taken = key in self.ledger.keys or key in self.aliases
            return not taken and self.space.spec_at(point).hash not in self.ledger.hashes and self.ledger.claim(key)

        with _clock(candidate.seconds, "measure"):
            keep = candidate.baseline.keep if candidate.baseline is not None else ()
            fitted = self.meter.fit(candidate.point, candidate.spec, rng, usable, measuring, keep)
        if fitted.point is not candidate.point:
            candidate.point, candidate.spec = fitted.point, fitted.spec
            candidate.key, candidate.spec_hash = point_key(fitted.point), fitted.spec.hash
            candidate.shape = architecture(fitted.spec)
        trial = self._started_trial(candidate, fitted)
        if not fitted.reason:
            self.listener.candidate(candidate.number, "training", trial.shape, trial.metrics)
            with _clock(candidate.seconds, "train"):
                trial = self._evaluated(candidate, trial)
        self._record(trial)

    def _started_trial(self, candidate: _Candidate, fitted: Fitted) -> Trial:
        from zoo.spec.document import brief

        metrics = {**self.meter.figures(fitted.point), **fitted.measured}
        baseline = candidate.baseline
        measured = all(label(term) in metrics for term in self.meter.budget.terms)
        return Trial(
            number=candidate.number,
            key=candidate.key,
            point=candidate.point,
            status="dropped",
            spec=brief(candidate.spec),
            spec_hash=candidate.spec_hash,
            shape=candidate.shape,
            metrics=metrics,
            slack=self.meter.slack(metrics) if measured else {},
            baseline=baseline.name if baseline is not None else None,
            adjusted=baseline is not None and (baseline.adjusted or candidate.point != baseline.point),
            reason=fitted.reason,
            also_seen=tuple(map(point_key, fitted.tried)),
            seconds=candidate.seconds,
        )

    def _evaluated(self, candidate: _Candidate, trial: Trial) -> Trial:
        """The trial with what its evaluation found."""
        history: dict[int, float] = {}
        pruned = False
        running = None
        if self.twin is not None and self.settings.pruner != "none":
            running = self._stand_in(self.twin, candidate.number)

        def report(step: int, value: float) -> None:
            nonlocal pruned
            if len(self.objectives) == 1 and math.isfinite(value):
                history[step] = self.objectives[0].oriented(value)
                if running is not None:
                    running.report(history[step], step)
                    # Baselines are what everything is compared with, so they are always trained to the end.
                    pruned = running.should_prune() and candidate.baseline is None

        try:
            found = self.evaluator.evaluate(candidate.spec, candidate.number, report, lambda: pruned)
        except (EvaluationError, RuntimeError, ValueError, ArithmeticError, MemoryError) as error:
            reason = str(error).strip() or type(error).__name__
            return replace(trial, status="failed", reason=reason[:500], history=history)
        metrics = {**trial.metrics, **found.metrics}
        if found.stopped:
            return replace(trial, status="pruned", metrics=_finite(metrics), history=history)
        return self._complete(trial, metrics, found, history)

    def _stand_in(self, twin: Twin, number: int) -> Any:
        """The twin's trial for the candidate in hand.

        For one that no sampler proposed, such as a baseline, the sampler is asked all the same, so that it notes on it
        what it notes on every trial.
        """
        if twin.asked is None and isinstance(self.proposer, OptunaProposer):
            next(self.proposer.stream(number))
        return twin.asked or twin.ask(number)

    def _complete(self, trial: Trial, metrics: dict[str, float], found: Evaluation, history: dict[int, float]) -> Trial:
        values = []
        for objective in self.objectives:
            name = objective.name if objective.term is None else label(objective.term)
            if name not in metrics:
                raise ZooError(f"the evaluator found no {name!r}, only {', '.join(found.metrics)}")
            values.append(float(metrics[name]))
        if not all(map(math.isfinite, values)):
            reason = ", ".join(f"{o.name} is {v}" for o, v in zip(self.objectives, values) if not math.isfinite(v))
            return replace(trial, status="failed", reason=reason, metrics=_finite(metrics), history=history)
        return replace(trial, status="complete", values=tuple(values), metrics=_finite(metrics), history=history)

    def _record(self, trial: Trial) -> None:
        notes = {}
        if self.twin is not None:
            self._stand_in(self.twin, trial.number)
            notes = self.twin.notes()
        trial.seconds["write"] = self.ledger.write_seconds + self.writer.seconds
        self.ledger.write_seconds = self.writer.seconds = 0.0
        self.ledger.record(trial, self.codec, len(self.objectives), notes)
        mine = [new for new in self._refresh() if new.key == trial.key]
        self.listener.finished(mine[0] if mine else trial, self.archive.front())

    def _refresh(self) -> list[Trial]:
        """Take in every trial that was recorded since the last time, here or elsewhere."""
        before = len(self.ledger.trials)
        new = self.ledger.refresh()
        for trial, frozen in zip(new, self.ledger.frozen[before:], strict=True):
            self._take_in(trial, frozen)
        return new

    def _take_in(self, trial: Trial, frozen: Any) -> None:
        self.archive.add(trial)
        self.trained += trial.trained
        if trial.baseline is not None:
            self.trained_baselines.add(trial.baseline)
        if self.twin is not None:
            self.twin.add(frozen)


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that are numbers: results.json has no place for others."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


def _place(decision: str) -> str:
    """A decision's name without the number of its layer."""
    return re.sub(r"\[\d+\]", "[]", decision)


def _held(point: Point, baselines: Iterable[Point]) -> dict[str, Any]:
    """Where the decisions of a baseline stand that other baselines take otherwise, and what it takes there."""
    others = [{_place(name): value for name, value in other.items()} for other in baselines]
    mine = {_place(name): value for name, value in point.items()}
    return {
        place: value
        for place, value in mine.items()
        if all(place in other for other in others) and any(other[place] != value for other in others)
    }


def _points(space: Space) -> Iterator[Point]:
    """Every point of a space, counting up the last decision that has a further value."""
    script: list[int] = []
    while True:
        left: list[int] = []

        def choose(decision: Decision, script: list[int] = script, left: list[int] = left) -> Any:
            values = decision.values()
            index = script[len(left)] if len(left) < len(script) else 0
            left.append(len(values) - 1 - index)
            return values[index]

        yield space.decide(choose)
        last = max((place for place, more in enumerate(left) if more), default=None)
        if last is None:
            return
        taken = script[last] if last < len(script) else 0
        script = [*(script + [0] * last)[:last], taken + 1]


@contextmanager
def _clock(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time that the block takes to a phase."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - started


def _clear(folder: Path) -> None:
    """Remove what an earlier search left in a folder, and nothing else."""
    for name in ("results.json", "best.yaml", "report.html", FINALISTS):
        (folder / name).unlink(missing_ok=True)
    for name in ("front", "candidates"):
        shutil.rmtree(folder / name, ignore_errors=True)


__all__ = ["SearchListener", "SearchSettings", "Start", "run_search"]
