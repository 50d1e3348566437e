"""What a search says while it runs: a display that keeps itself up on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from zoo.search.finalists import Finalist, interval
from zoo.search.objective import Objective
from zoo.search.results import Results, figure, shown
from zoo.search.study import SearchListener, Start
from zoo.search.trial import Trial
from zoo.train.progress import Progress

FRONT_SHOWN = 8
SECONDS_BETWEEN_LINES = 20.0


class LiveProgress(SearchListener):
    """Shows trial, candidate, best or front so far, budget slack and time left.

    Use it as a context, so that the terminal is given back whatever happens.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._live: Live | None = None
        self._start: Start | None = None
        self._front: Sequence[Trial] = ()
        self._done = 0
        self._before = 0
        self._began = self._spoke = time.monotonic()
        self._now = ""
        self._step: Progress | None = None

    def __enter__(self) -> LiveProgress:
        if self.console.is_terminal:
            self._live = Live(console=self.console, refresh_per_second=4, transient=True, get_renderable=self._view)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def started(self, start: Start) -> None:
        self._start = start
        self._done = self._before = sum(trial.trained for trial in start.done)
        self._began = time.monotonic()
        objectives = ", ".join(objective.name for objective in start.objectives)
        budget = " ".join(term.describe() for term in start.budget.terms) or "no budget"
        self._print(f"search of {start.space} for {objectives}; {budget}; {start.trials} trials; in {start.folder}")
        for name, origin in start.latency.items():
            if origin.kind != "measured":
                self._print(f"{name}: {origin.text}")
        if self._before:
            self._print(f"going on after {self._before} trials")
        if start.others:
            self._print(
                f"joining the search that {' and '.join(start.others)} {'runs' if len(start.others) == 1 else 'run'} "
                "in this folder; results depend on the order in which candidates finish"
            )

    def candidate(self, number: int, phase: str, shape: Mapping[str, Any], figures: Mapping[str, float]) -> None:
        self._step = None
        params = f", {shown('params', figures['params'])} parameters" if "params" in figures else ""
        self._now = f"trial {number}: {phase} {brief(shape)}{params}"

    def training(self, progress: Progress, /) -> None:
        self._step = progress
        if self._live is None and time.monotonic() - self._spoke >= SECONDS_BETWEEN_LINES:
            self._print(f"{self._now}  {progress.line()}")

    def finished(self, trial: Trial, front: Sequence[Trial]) -> None:
        self._front = front
        self._done += trial.trained
        self._now, self._step = "", None
        self._print(self._line(trial))

    def finalist(self, finalist: Finalist, done: int, count: int) -> None:
        self._now = ""
        self._print(
            f"finalist {done}/{count}  trial {finalist.number}  {finalist.figure} predicted "
            f"{shown(finalist.figure, finalist.predicted)} ({interval(finalist.low, finalist.high)}), "
            + (finalist.reason or f"measured {shown(finalist.figure, finalist.measured or 0.0)}")
        )

    def ended(self, results: Results) -> None:
        self._now = ""

    def _line(self, trial: Trial) -> str:
        """One finished trial in a line."""
        assert self._start is not None
        head = f"trial {trial.number:>3}  {trial.status:<8}"
        if trial.status != "complete":
            return f"{head}  {brief(trial.shape)}  {trial.reason}".rstrip()
        values = "  ".join(values_of(trial, self._start.objectives))
        mark = "  on the front" if len(self._start.objectives) > 1 else "  best so far"
        best = any(trial.number == other.number for other in self._front)
        name = f"  all {trial.baseline}" if trial.baseline else ""
        return f"{head}  {values}  {brief(trial.shape)}{name}{mark if best else ''}  {self._left()}"

    def _left(self) -> str:
        assert self._start is not None
        here = self._done - self._before
        if not here or self._done >= self._start.trials:
            return ""
        seconds = (time.monotonic() - self._began) / here * (self._start.trials - self._done)
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes}:{rest:02} left"

    def _print(self, line: str) -> None:
        self._spoke = time.monotonic()
        self.console.print(Text(line), soft_wrap=True)

    def _view(self) -> Group:
        """What stands at the foot of the terminal."""
        if self._start is None:
            return Group()
        head = Text.assemble((f"{self._done}/{self._start.trials} trials ", "bold"), self._left())
        parts: list[Any] = [head, ProgressBar(self._start.trials, self._done, width=60)]
        if self._front:
            parts.append(self._table())
        if self._now:
            parts.append(Text(self._now, overflow="ellipsis", no_wrap=True))
        if self._step is not None:
            parts.append(ProgressBar(self._step.steps, self._step.step, width=60))
            parts.append(Text(self._step.line(), style="dim", overflow="ellipsis", no_wrap=True))
        return Group(*parts)

    def _table(self) -> Table:
        assert self._start is not None
        table = Table(box=None, pad_edge=False, header_style="dim")
        table.add_column("front" if len(self._start.objectives) > 1 else "best", justify="right")
        for objective in self._start.objectives:
            table.add_column(objective.name, justify="right")
        for term in self._start.budget.terms:
            table.add_column(Text(f"{term.describe()} leaves"), justify="right")
        table.add_column("architecture", overflow="ellipsis", no_wrap=True)
        for trial in self._front[:FRONT_SHOWN]:
            slack = [f"{trial.slack[str(t)]:.0%}" if str(t) in trial.slack else "" for t in self._start.budget.terms]
            values = [shown(figure(o), value) for o, value in zip(self._start.objectives, trial.values, strict=True)]
            table.add_row(str(trial.number), *values, *slack, Text(brief(trial.shape)))
        return table


def values_of(trial: Trial, objectives: Sequence[Objective]) -> list[str]:
    """The objectives of a trial in words: `loss 1.932`."""
    pairs = zip(objectives, trial.values, strict=True)
    return [f"{objective.name} {shown(figure(objective), value)}" for objective, value in pairs]


def brief(shape: Mapping[str, Any]) -> str:
    """An architecture in a few words: its width, and its mixers with repetitions counted."""
    runs: list[list[Any]] = []
    for layer in shape.get("layers", ()):
        name = layer[0] or layer[2]
        if runs and runs[-1][1] == name:
            runs[-1][0] += 1
        else:
            runs.append([1, name])
    return f"width {shape.get('width')}: " + " ".join(name if count == 1 else f"{count}×{name}" for count, name in runs)
