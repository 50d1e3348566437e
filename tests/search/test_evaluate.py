from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from zoo.errors import ZooError
from zoo.search.evaluate import EvaluationError, TrainEvaluator
from zoo.search.space import Space
from zoo.search.study import SearchSettings, run_search
from zoo.train.settings import TrainSettings

TEXT = """
width: 16
context: 16
stem: {type: token, vocab: 256}
head: language_model
body:
  layers:
    repeat: 2
    of: {mixer: {choice: [{type: attention, heads: 2}, {type: linear_attention, heads: 2}]}, channel: mlp}
"""


@pytest.fixture
def settings(tmp_path: Path) -> TrainSettings:
    (tmp_path / "text").mkdir()
    for index in range(12):
        (tmp_path / "text" / f"{index}.txt").write_text(f"{index} the quick brown fox {index * 7919} " * 40)
    values: dict[str, Any] = {"data": f"bytes:{tmp_path}/text", "steps": 4, "batch": 4, "evaluate_samples": 8}
    return TrainSettings.parse({**values, "evaluate_every": 2, "device": "cpu"})


def spec_of(text: str = TEXT) -> Any:
    space = Space.parse(text)
    return space.spec_at(space.first())


def test_training_reports_on_the_way_and_is_the_same_each_time(tmp_path: Path, settings: TrainSettings) -> None:
    evaluator = TrainEvaluator(settings, tmp_path / "candidates")
    assert evaluator.metrics() == {"loss": "minimize", "accuracy": "maximize", "bits_per_byte": "minimize"}
    reported: list[int] = []
    spec = spec_of()
    found = evaluator.evaluate(spec, 3, lambda step, value: reported.append(step), lambda: False)
    again = evaluator.evaluate(spec, 3, lambda step, value: None, lambda: False)
    assert reported == [2, 4] and not found.stopped
    assert dict(found.metrics) == dict(again.metrics) and set(found.metrics) == {"loss", "accuracy", "bits_per_byte"}
    assert found.folder is not None and found.folder.name.startswith("00003-")
    assert sorted(path.name for path in found.folder.iterdir()) == ["metrics.csv", "metrics.json"]


def test_training_stops_when_asked(tmp_path: Path, settings: TrainSettings) -> None:
    evaluator = TrainEvaluator(settings, tmp_path / "candidates")
    reported: list[int] = []
    found = evaluator.evaluate(spec_of(), 0, lambda step, value: reported.append(step), lambda: bool(reported))
    assert found.stopped and reported == [2]


def test_a_loss_that_is_not_finite_is_a_failed_candidate(tmp_path: Path, settings: TrainSettings) -> None:
    wild = settings.model_copy(update={"learning_rate": 1e30, "clip": None, "warmup_share": 0.0})
    evaluator = TrainEvaluator(wild, tmp_path / "candidates")
    with pytest.raises(EvaluationError, match="loss of step"):
        evaluator.evaluate(spec_of(), 0, lambda step, value: None, lambda: False)


def test_a_full_disk_is_no_fault_of_the_candidate(
    tmp_path: Path, settings: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = TrainEvaluator(settings, tmp_path / "candidates")

    def full(*arguments: Any, **named: Any) -> None:
        raise ZooError("cannot write: the disk is full")

    monkeypatch.setattr("zoo.train.loop.fit", full)
    with pytest.raises(ZooError, match="disk is full") as error:
        evaluator.evaluate(spec_of(), 0, lambda step, value: None, lambda: False)
    assert not isinstance(error.value, EvaluationError)


def test_an_interrupted_training_interrupts_the_search(tmp_path: Path, settings: TrainSettings) -> None:
    evaluator = TrainEvaluator(settings, tmp_path / "candidates")
    with pytest.raises(KeyboardInterrupt):
        evaluator.evaluate(
            spec_of(),
            0,
            lambda step, value: os.kill(os.getpid(), signal.SIGINT),
            lambda: False,
        )


def test_what_decides_the_outcome_is_its_identity(tmp_path: Path, settings: TrainSettings) -> None:
    def identity(**changes: Any) -> Any:
        return TrainEvaluator(settings.model_copy(update=changes), tmp_path).identity()

    assert identity() == identity(log_every=3, threads=1)
    for changes in ({"steps": 5}, {"seed": 1}, {"learning_rate": 0.1}):
        assert identity() != identity(**changes)
    here = identity()
    (tmp_path / "text" / "0.txt").write_text("other " * 300)
    assert identity()["fingerprint"] != here["fingerprint"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("vocab: 256", "vocab: 100"), "needs vocab of at least 256, the space has 100"),
        (
            (
                "stem: {type: token, vocab: 256}\nhead: language_model",
                "stem: {type: patch, image: [8, 8], size: 4}\nhead: {type: classifier, classes: 10}",
            ),
            "it holds tokens, the stem takes images",
        ),
    ],
)
def test_data_that_does_not_fit_is_refused(
    tmp_path: Path, settings: TrainSettings, changed: tuple[str, str], message: str
) -> None:
    evaluator = TrainEvaluator(settings, tmp_path)
    with pytest.raises(ZooError, match=message):
        evaluator.check(spec_of(TEXT.replace(*changed)))


def test_a_search_trains_its_candidates(tmp_path: Path, settings: TrainSettings) -> None:
    results = run_search(
        SearchSettings(
            space=Space.parse(TEXT),
            budget="params<=100k",
            objective="loss,params",
            trials=4,
            out=tmp_path / "run",
            train=settings,
        )
    )
    assert len(results.trials) == 4 and all(trial.status == "complete" for trial in results.trials)
    losses = [trial.metrics["loss"] for trial in results.trials]
    assert len(set(losses)) == 4
    best = results.best
    assert best is not None
    evaluator = TrainEvaluator(settings, tmp_path / "again")
    spec = Space.parse(TEXT).spec_at(best.point)
    assert evaluator.evaluate(spec, 0, lambda *_: None, lambda: False).metrics["loss"] == best.metrics["loss"]
    with pytest.raises(ZooError, match="give --data"):
        run_search(SearchSettings(space=Space.parse(TEXT), out=tmp_path / "other"))
