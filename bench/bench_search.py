"""Loop overhead of a search per trial, evaluation excluded: proposing, repairing, making the spec, recording.

The evaluator answers at once from the layers of the candidate, the journal is a file on the disk. `zoo_without_specs`
leaves out turning points into checked and hashed specs, which an evaluation needs in any case. For reference the
same number of trials of Optuna's own loop: its default sampler suggests the same decisions one by one, on a journal of
its own. Run it alone on the machine:

    python bench/bench_search.py [--trials 1000] [--rival-trials 200] [--json bench/results/search.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend

from zoo.device import fingerprint
from zoo.search.evaluate import Evaluation
from zoo.search.space import Space
from zoo.search.study import SearchListener, SearchSettings, run_search
from zoo.search.trial import Trial

GOAL = 5e-3
WINDOW = 50
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


def overhead(space: Space, trials: int, sampler: str) -> tuple[list[float], list[Trial], float]:
    """Seconds of each trial without its evaluation, the trials, and the seconds of the whole search per trial."""
    evaluator, watch = Instant(), Stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        settings = SearchSettings(space=space, budget=BUDGET, trials=trials, out=Path(folder) / "run", sampler=sampler)
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


def window(spans: Sequence[float], end: int) -> dict[str, float]:
    """Mean and median of the last trials up to `end`."""
    last = spans[max(0, end - WINDOW) : end]
    return {"mean": statistics.fmean(last), "median": statistics.median(last)}


def phases(trials: Sequence[Trial], end: int) -> dict[str, float]:
    """Mean seconds of each phase of the last trials up to `end`."""
    last = trials[max(0, end - WINDOW) : end]
    names = dict.fromkeys(name for trial in last for name in trial.seconds)
    return {name: statistics.fmean(trial.seconds.get(name, 0.0) for trial in last) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--rival-trials", type=int, default=200)
    parser.add_argument("--sampler", default="evolution")
    parser.add_argument("--json", type=Path, default=None)
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = Space.parse(SPACE)
    ends = sorted({end for end in (100, arguments.trials) if end <= arguments.trials})
    spans, trials, whole = overhead(space, arguments.trials, arguments.sampler)
    theirs = rival(space, arguments.rival_trials) if arguments.rival_trials else []
    without = [span - trial.seconds.get("spec", 0.0) for span, trial in zip(spans, trials, strict=True)]
    found: dict[str, Any] = {
        "device": str(fingerprint()),
        "space": {"name": space.name, "decisions": len(space.decisions), "size": space.size()},
        "budget": BUDGET,
        "sampler": arguments.sampler,
        "goal_seconds": GOAL,
        "whole_search_per_trial": whole,
        "zoo": {str(end): {**window(spans, end), "phases": phases(trials, end)} for end in ends},
        "zoo_without_specs": {str(end): window(without, end) for end in ends},
        "optuna_tpe_journal": {str(end): window(theirs, end) for end in (100, len(theirs)) if 0 < end <= len(theirs)},
    }
    print(f"{found['device']}; {len(space.decisions)} decisions; budget {BUDGET}; last {WINDOW} trials, milliseconds")

    def row(*cells: object) -> None:
        print("  ".join(f"{cell:>22}" for cell in cells))

    row("loop", "at trial", "median", "mean", "goal")
    for name in ("zoo", "zoo_without_specs", "optuna_tpe_journal"):
        for end, seconds in found[name].items():
            goal = "" if name == "optuna_tpe_journal" else f"{GOAL * 1e3:.0f}"
            row(name, end, f"{seconds['median'] * 1e3:.2f}", f"{seconds['mean'] * 1e3:.2f}", goal)
    for end in ends:
        parts = found["zoo"][str(end)]["phases"].items()
        print(f"at {end}: " + ", ".join(f"{phase} {seconds * 1e3:.2f}" for phase, seconds in parts))
    print(f"whole search, with results and report, per trial: {whole * 1e3:.2f}")
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
