"""Loop overhead of a search per trial, evaluation excluded: proposing, repairing, making the spec, recording.

    python -m bench.bench_search --json bench/results/search.json

The evaluator answers at once from the layers of the candidate, the journal is a file on the disk. For reference
Optuna's own loop: its default sampler suggests the same decisions one by one, on a journal of its own. Each runs three
times in turn and the quietest is taken, since what else the host does can only slow it down.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from bench.record import arguments, finish, publish
from zoo.search.evaluate import Evaluation
from zoo.search.space import Space
from zoo.search.study import SearchListener, SearchSettings, run_search
from zoo.search.trial import Trial

TRIALS, RIVAL_TRIALS, TURNS = 1000, 100, 3
GOAL = 5.0
"""Milliseconds."""
WINDOW = 50
PHASES = ("propose", "repair", "spec", "write")
SPACE = """
name: bench-hybrid
vars:
  ffn: {choice: [128, 192, 256, 384]}
width: {choice: [96, 128, 160, 192]}
context: 256
stem: {type: token, vocab: 256}
body:
  layers:
    repeat: {choice: [6, 8]}
    of:
      mixer:
        choice:
          attention: {type: attention, heads: 4, kv_heads: {choice: [1, 4]}}
          mamba2: {type: mamba2, state_dim: 32, head_dim: 32}
          linear_attention: {type: linear_attention, heads: 4}
      channel: {type: glu, hidden: $ffn}
head: language_model
"""
BUDGET = "params<=1.5M state<=1MB"


class Instant:
    """Knows the loss of a candidate without training: a smooth function of its layers, the same every time."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def identity(self) -> Mapping[str, Any]:
        return {"instant": 1}

    def metrics(self) -> Mapping[str, str]:
        return {"loss": "minimize"}

    def evaluate(self, spec: Any, trial_number: int, report: Any, should_stop: Any) -> Evaluation:
        started = time.perf_counter()
        loss = 3.0 - spec.width / 400
        for index, layer in enumerate(spec.body.layers):
            loss -= {"attention": 0.05, "mamba2": 0.06, "linear_attention": 0.04}[layer.mixer.type] * (
                1 + index % 3 / 9
            )
        self.seconds.append(time.perf_counter() - started)
        return Evaluation(metrics={"loss": loss})


class Stopwatch(SearchListener):
    """Notes when each trial was done."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.trials: list[Trial] = []

    def started(self, start: Any) -> None:
        self.times.append(time.perf_counter())

    def finished(self, trial: Trial, front: Sequence[Trial]) -> None:
        self.times.append(time.perf_counter())
        self.trials.append(trial)


def overhead(space: Space, trials: int) -> tuple[list[float], list[Trial], float]:
    """Seconds of each trial without its evaluation, the trials, and the seconds of the whole search per trial."""
    evaluator, watch = Instant(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        settings = SearchSettings(space=space, budget=BUDGET, trials=trials, out=Path(folder) / "run")
        started = time.perf_counter()
        run_search(settings, evaluator=evaluator, progress=watch)
        whole = time.perf_counter() - started
    spans = [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]
    return [a - b for a, b in zip(spans, evaluator.seconds, strict=True)], watch.trials, whole / trials


def rival(space: Space, trials: int) -> list[float]:
    """Seconds of each trial of Optuna's own loop over the same decisions, with its default sampler on a journal."""
    spans: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        backend = JournalFileBackend(str(Path(folder) / "journal"))
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend), sampler=optuna.samplers.TPESampler(seed=0)
        )

        def objective(trial: optuna.Trial) -> float:
            point = space.decide(lambda decision: trial.suggest_categorical(decision.name, decision.values()))
            return 3.0 - sum(1 for value in point.values() if value == "mamba2") / 20

        last = time.perf_counter()

        def done(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
            nonlocal last
            spans.append(time.perf_counter() - last)
            last = time.perf_counter()

        study.optimize(objective, n_trials=trials, callbacks=[done])
    return spans


def around(spans: Sequence[float], end: int) -> float:
    """Mean milliseconds of the last trials up to `end`."""
    return 1e3 * statistics.fmean(spans[max(0, end - WINDOW) : end])


def rows(space: Space) -> Iterator[dict[str, Any]]:
    """Ours after few and after many trials, whole and by phase, and the rival's after few."""
    turns = [(overhead(space, TRIALS), around(rival(space, RIVAL_TRIALS), RIVAL_TRIALS)) for _ in range(TURNS)]
    whole, theirs = min(each for (_, _, each), _ in turns), min(theirs for _, theirs in turns)
    for end in (RIVAL_TRIALS, TRIALS):
        spans, trials, _ = min((ours for ours, _ in turns), key=lambda ours: around(ours[0], end))
        yield row(f"zoo, trial {end:,}", around(spans, end), GOAL)
        for phase in PHASES:
            yield row(f"  of it: {phase}", around([trial.seconds.get(phase, 0.0) for trial in trials], end))
    yield row("zoo, whole search with results and report, per trial", 1e3 * whole)
    yield row(f"Optuna's TPE on a journal, trial {RIVAL_TRIALS}", theirs)


def row(what: str, found: float, goal: float | None = None) -> dict[str, Any]:
    return {"what": what, "ms": found, "at most": goal or "", "met": goal is None or found <= goal}


if __name__ == "__main__":
    given = arguments("Loop overhead of a search per trial.")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = Space.parse(SPACE)
    title = f"search: {len(found.decisions)} decisions, budget {BUDGET}, mean of the last {WINDOW} trials"
    finish(publish(title, list(rows(found)), given.json))
