"""What a search leaves behind: results.json, the best and the front as specs, and a report to look at.

All of it follows from the study and the measured finalists alone, so it can be written anew at any time; each file is
whole or the one before.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.device import fingerprint
from zoo.errors import ZooError
from zoo.quantity import format_quantity
from zoo.search.budget import METRICS, Budget
from zoo.search.finalists import load_finalists, summary
from zoo.search.measure import label
from zoo.search.objective import Objective, parse_objectives
from zoo.search.trial import Archive, Trial

if TYPE_CHECKING:
    from zoo.search.space import Space

SCHEMA = 1
PACKAGES = ("zoo-nas", "torch", "lightning", "optuna")
NOISE = 0.01
"""Differences below this share are what another seed of a short training can make."""

_SHORTEST_PAUSE = 2.0
_LARGEST_SHARE = 0.02
"""Of the time of a search that goes into writing results while it runs."""


@dataclass(frozen=True, slots=True)
class Results:
    """What was found so far; `stopped` is finished, exhausted, slow, timeout, interrupted, or empty if not known."""

    folder: Path
    trials: tuple[Trial, ...]
    front: tuple[Trial, ...]
    best: Trial | None
    objectives: tuple[Objective, ...]
    stopped: str
    data: dict[str, Any]
    """Content of results.json."""
    others: tuple[str, ...] = ()
    """Processes that still work on the same search."""

    @property
    def message(self) -> str:
        """Why the search ended, in one sentence."""
        trained = sum(trial.trained for trial in self.trials)
        again = self.data["command"] or "the same call"
        if self.others and self.stopped in ("finished", "exhausted", "slow"):
            still = "still trains" if len(self.others) == 1 else "still train"
            return (
                f"nothing left to do here: {_count(trained, 'architecture')} evaluated so far, but "
                f"{' and '.join(self.others)} {still}; the results are complete when that ends"
            )
        return {
            "finished": f"finished: {_count(trained, 'architecture')} evaluated",
            "exhausted": f"space exhausted after {_count(trained, 'architecture')}: no other one meets the budget",
            "slow": f"no further architecture was found that measures within the budget, after {trained:,}",
            "timeout": f"time is up after {_count(trained, 'architecture')}; to continue: {again}",
            "interrupted": f"interrupted after {_count(trained, 'architecture')}; to continue: {again}",
        }.get(self.stopped, f"{_count(trained, 'architecture')} evaluated")


def facts_of(
    *,
    command: str,
    space: Space,
    budget: Budget,
    objectives: Sequence[Objective],
    identity: Mapping[str, Any],
    trials: int,
    latency: Mapping[str, Any],
) -> dict[str, Any]:
    """Where, when and with what a search was started; the study keeps it for the report.

    latency: by figure, the `Origin` of each latency as data.
    """
    return {
        "command": command,
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "device": str(fingerprint()),
        "trials_wanted": trials,
        "space": {
            "name": space.name or "",
            "hash": space.hash,
            "size": space.size(),
            "decisions": len(space.decisions),
        },
        "budget": str(budget),
        "objective": ",".join(objective.name for objective in objectives),
        "seed": identity.get("seed"),
        "latency": dict(latency),
    }


def write_results(folder: Path | str, storage: str | None = None) -> Results:
    """Write the results of a run folder anew from its study (`zoo report RUN`); raises `ZooError` if there is none."""
    from zoo.search.ledger import Ledger

    ledger = Ledger.open(Path(folder), storage=storage)
    about = ledger.about
    budget = Budget.parse(about["budget"])
    objectives = parse_objectives(about["objective"], budget)
    return Writer(Path(folder), about, ledger.identity, objectives).write(ledger.trials, "", None)


class Writer:
    """Writes the results into a run folder, as often as is worth its time."""

    def __init__(
        self, folder: Path, about: Mapping[str, Any], identity: Mapping[str, Any], objectives: Sequence[Objective]
    ) -> None:
        self.folder = folder
        self.about = about
        self.identity = identity
        self.objectives = tuple(objectives)
        self.seconds = 0.0
        """Time that writing took, for whoever keeps the account to take and reset."""
        self._due = time.monotonic()
        self._specs: dict[tuple[int, str], str] = {}

    def write_if_due(self, trials: Sequence[Trial], seconds: float) -> None:
        """Write the results of a search that goes on, unless that was done a moment ago."""
        if time.monotonic() >= self._due:
            self.write(trials, "", seconds)

    def write(self, trials: Sequence[Trial], stopped: str, seconds: float | None) -> Results:
        """Write everything. `seconds` is how long this session has lasted."""
        from zoo.search.report import html

        started = time.monotonic()
        archive = Archive(self.objectives)
        for trial in trials:
            archive.add(trial)
        front, best = tuple(archive.front()), archive.best()
        data = self._data(trials, front, best, stopped, seconds)
        results = Results(self.folder, tuple(trials), front, best, self.objectives, stopped, data)
        write_text(self.folder / "results.json", json.dumps(data, indent=1, allow_nan=False) + "\n")
        self._write_specs(front, best)
        write_text(self.folder / "report.html", html(data))
        took = time.monotonic() - started
        self.seconds += took
        self._due = time.monotonic() + max(_SHORTEST_PAUSE, took / _LARGEST_SHARE)
        return results

    def _data(
        self,
        trials: Sequence[Trial],
        front: Sequence[Trial],
        best: Trial | None,
        stopped: str,
        seconds: float | None,
    ) -> dict[str, Any]:
        budget = Budget.parse(self.about["budget"])
        on_front = {trial.number for trial in front}
        statuses = ("complete", "pruned", "failed", "dropped")
        phases: dict[str, float] = {}
        for trial in trials:
            for phase, spent in trial.seconds.items():
                phases[phase] = phases.get(phase, 0.0) + spent
        return {
            "schema": SCHEMA,
            **self.about,
            "identity": dict(self.identity),
            "stopped": stopped,
            "session_seconds": seconds,
            "terms": [
                {
                    "text": str(term),
                    "shown": term.describe(),
                    "figure": label(term),
                    "low": term.low or None,
                    "high": term.high if term.high < float("inf") else None,
                }
                for term in budget.terms
            ],
            "objectives": [
                {"name": objective.name, "direction": objective.direction, "figure": figure(objective)}
                for objective in self.objectives
            ],
            "dimensions": _dimensions(trials),
            "counts": {status: sum(trial.status == status for trial in trials) for status in statuses},
            "seconds": phases,
            "best": None if best is None else best.number,
            "front": [trial.number for trial in front],
            "mixing": mixing(trials, self.objectives),
            "finalists": summary(load_finalists(self.folder), budget),
            "trials": [
                {
                    "number": trial.number,
                    "status": trial.status,
                    "front": trial.number in on_front,
                    "baseline": trial.baseline,
                    "adjusted": trial.adjusted,
                    "values": list(trial.values),
                    "metrics": trial.metrics,
                    "slack": trial.slack,
                    "point": trial.point,
                    "shape": trial.shape,
                    "spec_hash": trial.spec_hash,
                    "reason": trial.reason,
                    "history": trial.history,
                    "seconds": trial.seconds,
                    "finished": trial.finished,
                }
                for trial in trials
            ],
        }

    def _write_specs(self, front: Sequence[Trial], best: Trial | None) -> None:
        """`best.yaml` and `front/*.yaml`: ordinary specs; what is no longer on the front goes."""
        wanted = {
            self.folder / "front" / f"{rank:02d}-trial-{trial.number}.yaml": trial
            for rank, trial in enumerate(front, 1)
        }
        for path, trial in wanted.items():
            write_text(path, self._spec(trial, f"front-{trial.number}"))
        for path in (self.folder / "front").glob("[0-9]*-trial-*.yaml"):
            if path not in wanted:
                path.unlink(missing_ok=True)
        if best is not None:
            write_text(self.folder / "best.yaml", self._spec(best, "best"))

    def _spec(self, trial: Trial, suffix: str) -> str:
        key = (trial.number, suffix)
        if key not in self._specs:
            self._specs[key] = spec_text(trial, f"{self.folder.absolute().name}-{suffix}", self.about, self.objectives)
        return self._specs[key]


def spec_text(trial: Trial, name: str, about: Mapping[str, Any], objectives: Sequence[Objective]) -> str:
    """The spec of a trial as a file, with what it is worth and how it was found."""
    from zoo.spec.document import as_spec, dump

    found = ", ".join(
        f"{objective.name} {shown(figure(objective), value)}"
        for objective, value in zip(objectives, trial.values, strict=True)
    )
    where = about["space"]["name"] or "a space"
    if all(objective.name != "params" for objective in objectives):
        found += f", {shown('params', trial.metrics['params'])} parameters"
    summary = f"Found by searching {where}: {found}"
    lines = [
        f"{summary}.",
        f"Trial {trial.number} of a search under the budget {about['budget']!r}, seed {about['seed']}.",
        *([f"Found by: {about['command']}"] if about["command"] else []),
    ]
    comment = "".join(f"# {line}\n" for text in lines for line in text.splitlines())
    spec = as_spec(trial.spec)
    return comment + dump(spec.model_copy(update={"name": name, "summary": summary}))


def mixing(trials: Sequence[Trial], objectives: Sequence[Objective]) -> dict[str, Any] | None:
    """Whether mixing helped: the best complete homogeneous architecture against the best mixed one, and a sentence.

    Compared on the first objective. An architecture is homogeneous if all layers have the mixer in common, or where no
    baseline differs from another in that, the channel mixer. None without baselines.
    """
    complete = [trial for trial in trials if trial.status == "complete"]
    baselines = [trial for trial in complete if trial.baseline is not None]
    if not baselines:
        return None
    column = next(
        (column for column in (0, 2) if len({frozenset(_kinds(trial, column)) for trial in baselines}) > 1), 0
    )
    objective = objectives[0]

    def best(among: Sequence[Trial]) -> Trial | None:
        return min(among, key=lambda trial: objective.oriented(trial.values[0]), default=None)

    homogeneous = best([trial for trial in complete if len(_kinds(trial, column)) <= 1])
    mixed = best([trial for trial in complete if len(_kinds(trial, column)) > 1])
    found: dict[str, Any] = {
        "homogeneous": None if homogeneous is None else homogeneous.number,
        "mixed": None if mixed is None else mixed.number,
        "gain": None,
    }
    name = objective.name
    if mixed is None:
        sentence = "No mixed architecture has been trained to the end yet, so nothing can be said about mixing."
    elif homogeneous is None:
        sentence = "No homogeneous architecture met the budget, so there is nothing to compare the mixed ones with."
    else:
        theirs, ours = homogeneous.values[0], mixed.values[0]
        gain = (objective.oriented(theirs) - objective.oriented(ours)) / (abs(theirs) or 1.0)
        found["gain"] = gain
        kind = next(iter(_kinds(homogeneous, column)), "homogeneous")
        numbers = (
            f"The best mixed architecture (trial {mixed.number}) has {name} {shown(figure(objective), ours)}, the best "
            f"homogeneous one (trial {homogeneous.number}, all {kind}) {shown(figure(objective), theirs)}"
        )
        if abs(gain) < NOISE:
            sentence = (
                f"{numbers}: a difference of {abs(gain):.2%}, which another training seed can make. "
                "This search is no evidence that mixing helps."
            )
        elif gain > 0:
            sentence = f"Mixing helped. {numbers}: {gain:.1%} better, from one training run each."
        else:
            sentence = f"Mixing did not help. {numbers}: the mixed one is {-gain:.1%} worse."
    if len(objectives) > 1:
        archive = Archive(objectives)
        for trial in complete:
            archive.add(trial)
        front = archive.front()
        count = sum(len(_kinds(trial, column)) > 1 for trial in front)
        sentence += f" Of the {len(front)} on the front, {count or 'none'} mix{'es' if count == 1 else ''}."
    return {**found, "sentence": sentence}


def _kinds(trial: Trial, column: int) -> set[str]:
    return {layer[column] for layer in trial.shape["layers"] if layer[column]}


def figure(objective: Objective) -> str:
    """What an objective is called among a trial's metrics."""
    return objective.name if objective.term is None else label(objective.term)


def shown(name: str, value: float) -> str:
    """A figure for people, in the unit of its metric."""
    metric = METRICS.get(name.partition("@")[0].partition("{")[0])
    return format_quantity(value, metric.dimension) if metric else f"{value:.4g}"


def _dimensions(trials: Sequence[Trial]) -> dict[str, str]:
    """The dimension of every figure that some trial has: count, bytes, flops, time, or number."""
    names = dict.fromkeys(name for trial in trials for name in trial.metrics)
    found = {}
    for name in names:
        metric = METRICS.get(name.partition("@")[0].partition("{")[0])
        found[name] = metric.dimension if metric else "number"
    return found


def write_text(path: Path, text: str) -> None:
    """Put a text into a file that is whole at any time; raises `ZooError` where that fails, and the old file stays."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        raise ZooError(
            f"cannot write {path}: {reason}; the study is kept, and `zoo report {shlex.quote(str(path.parent))}` "
            "writes the results from it"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
