from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fakes import FakeEvaluator, search
from rich.console import Console

from zoo.search.budget import Budget
from zoo.search.live import LiveProgress
from zoo.search.objective import parse_objectives
from zoo.search.study import Start
from zoo.train.progress import Progress

STEP = Progress(
    step=3,
    steps=9,
    loss=2.5,
    learning_rate=1e-3,
    gradient_norm=1.0,
    metric="loss",
    valid=None,
    best=None,
    evaluated=False,
    tokens_per_second=100.0,
    unit="tokens",
    seconds_left=7.0,
)


class Training(FakeEvaluator):
    """Reports a step of training to a listener, and looks at what it shows then."""

    def __init__(self, live: LiveProgress, looked: list[str]) -> None:
        super().__init__(fail=lambda spec: "broke [b]down[/b]" if spec.width == 48 else "")
        self.live = live
        self.looked = looked

    def evaluate(self, *arguments: Any) -> Any:
        self.live.training(STEP)
        console = Console(file=io.StringIO(), width=160)
        console.print(self.live._view())
        self.looked.append(console.file.getvalue())  # type: ignore[attr-defined]
        return super().evaluate(*arguments)


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_what_is_done_and_what_is_best(tmp_path: Path, terminal: bool) -> None:
    output = io.StringIO()
    looked: list[str] = []
    with LiveProgress(Console(file=output, force_terminal=terminal, width=200)) as live:
        search(tmp_path / "run", Training(live, looked), live, trials=12, objective="loss,params", budget="params<=60k")
    text = output.getvalue()
    assert "search of tiny-hybrid for loss, params; params <= 60k; 12 trials" in text
    assert "all attention" in text and "on the front" in text and "left" in text
    assert "broke [b]down[/b]" in text
    assert text.count("trial ") >= 12
    assert "trial 5: training width" in looked[5] and "step 3/9" in looked[5]
    assert "params <= 60k leaves" in looked[5] and "5/12 trials" in looked[5]
    assert ("\x1b[" in text) == terminal


def test_going_on_is_said(tmp_path: Path) -> None:
    search(tmp_path / "run", trials=4)
    output = io.StringIO()
    with LiveProgress(Console(file=output, width=200)) as live:
        search(tmp_path / "run", listener=live, trials=6)
    assert "going on after 4 trials" in output.getvalue()


def test_a_search_that_joins_another_says_so(tmp_path: Path) -> None:
    output = io.StringIO()
    live = LiveProgress(Console(file=output, width=200))
    live.started(Start("tiny", Budget(), parse_objectives("loss"), 5, (), tmp_path, ("process 12 on here",)))
    assert (
        "joining the search that process 12 on here runs in this folder; "
        "results depend on the order in which candidates finish" in output.getvalue()
    )


def test_the_first_of_several_to_end_says_that_others_still_train(tmp_path: Path) -> None:
    results = search(tmp_path / "run", trials=2)
    assert results.others == () and results.message.startswith("finished: 2 architectures")
    joined = replace(results, others=("process 12 on here", "process 13 on there"))
    assert joined.message.startswith(
        "nothing left to do here: 2 architectures evaluated so far, but process 12 on here"
    )
    assert "and process 13 on there still train;" in joined.message
