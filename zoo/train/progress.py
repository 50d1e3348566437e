"""What a run says while it trains, and how a terminal shows it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from rich.console import Console

SECONDS_BETWEEN_LINES = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a run stands after `step` of `steps`."""

    step: int
    steps: int
    loss: float
    """Training loss of the step, without auxiliary losses."""
    learning_rate: float
    gradient_norm: float
    metric: str
    valid: float | None
    """The metric of the last evaluation; None before the first."""
    best: float | None
    evaluated: bool
    """Whether `valid` is new."""
    tokens_per_second: float
    unit: str
    """`tokens` or `images`."""
    seconds_left: float

    def line(self) -> str:
        """All of it in one line."""
        valid = "" if self.valid is None else f"  {self.metric} {self.valid:.4f}"
        return (
            f"step {self.step}/{self.steps}  loss {self.loss:.4f}{valid}  lr {self.learning_rate:.2e}"
            f"  {self.tokens_per_second:,.0f} {self.unit}/s  {_clock(self.seconds_left)} left"
        )


class Listener(Protocol):
    """Is told of progress a few times a second at most, at every evaluation, and at the end."""

    def __call__(self, progress: Progress, /) -> None: ...


@contextmanager
def live(title: str = "training", console: Console | None = None) -> Iterator[Listener]:
    """Shows progress on the terminal in place; where there is none, as a plain line now and then."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _plain_lines(console)
        return
    from rich.progress import BarColumn, SpinnerColumn, TextColumn
    from rich.progress import Progress as Bars

    bars = Bars(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(None), console=console, transient=True)
    with bars:
        task = bars.add_task(title, total=None)

        def show(progress: Progress) -> None:
            bars.update(task, total=progress.steps, completed=progress.step, description=f"{title}  {progress.line()}")
            if progress.evaluated:
                bars.console.print(progress.line(), highlight=False)

        yield show


def _plain_lines(console: Console) -> Listener:
    printed = time.monotonic()

    def show(progress: Progress) -> None:
        nonlocal printed
        now = time.monotonic()
        if progress.evaluated or now - printed >= SECONDS_BETWEEN_LINES:
            printed = now
            console.print(progress.line(), highlight=False, soft_wrap=True)

    return show


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
