from __future__ import annotations

import json
import math
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import numpy as np
import pytest
from fakes import FakeEvaluator, FakeLatency
from test_report import report

from zoo.accounting import Workload
from zoo.device import resolve_device
from zoo.errors import InfeasibleError, ZooError
from zoo.hardware.features import cold_share, features, summed, with_cold
from zoo.hardware.predictor import PredictedLatency, Predictor
from zoo.hardware.profile import load_profile
from zoo.hardware.regression import Regression
from zoo.hardware.roofline import roofline
from zoo.hardware.work import parts_of
from zoo.latency import Context, LatencyFigure, LatencySource, Phase
from zoo.search.budget import Budget, latency_device
from zoo.search.finalists import FILE, load_finalists
from zoo.search.latencies import Forecast, Latencies, from_parts
from zoo.search.repair import Repair, label, workload
from zoo.search.results import Results, write_results
from zoo.search.study import SearchListener, SearchSettings, run_search
from zoo.search.table import CostTable

BUDGET = "latency<=2.2ms@cpu{seq=64,quantile=0.9}"


def predictor(date: str = "2026-11-26", errors: float = 0.1, chill: float = 0.0) -> Predictor:
    """A nanosecond for each floating-point operation of every kind of operator in the small space, and `chill` times as
    much for each byte of weights that is cold, half of those of a model that moves a megabyte.
    """
    specs = [fakes.tiny().spec_at(point) for point in fakes.tiny().homogeneous().values()]
    counts = summed(features(parts_of(spec, Workload(1, 64), "forward")) for spec in specs)
    names = tuple(with_cold(counts, 1.0))
    costs = [1e-9 * (name.endswith(".flops") + chill * name.endswith(".cold_weights")) for name in names]
    found = Regression(names, np.array(costs), np.eye(len(names)), np.linspace(-errors, errors, 41), np.ones(41))
    return Predictor(
        load_profile("h100"), "0123456789ab", "float32", {"forward": found}, {"forward": 1e6}, made={"date": date}
    )


class Guess:
    """Predicts what `FakeLatency` measures, and says that nine in ten measurements lie within a tenth of it."""

    def latency(self, spec: Any, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        seconds = FakeLatency().latency(spec, context, phase, quantile).seconds
        return LatencyFigure(seconds, seconds * 0.9, seconds * 1.1, "predicted", "cpu")


class Timed(FakeLatency):
    """Measures `factor(spec)` times what is predicted, and remembers whom."""

    def __init__(self, factor: Any = lambda spec: 1.0) -> None:
        super().__init__()
        self.factor = factor
        self.timed: list[str] = []

    def latency(self, spec: Any, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        self.timed.append(spec.hash)
        seconds = super().latency(spec, context, phase, quantile).seconds * self.factor(spec)
        return LatencyFigure(seconds, seconds, seconds, "measured", "cpu")


def predicted(
    out: Path,
    timed: Timed | None = None,
    *,
    source: LatencySource | None = None,
    listener: SearchListener | None = None,
    evaluator: FakeEvaluator | None = None,
    **settings: Any,
) -> Results:
    timed = timed or Timed()
    given = {"space": fakes.tiny(), "trials": 8, "budget": BUDGET, "objective": "loss,params", "latency": "predicted"}
    return run_search(
        SearchSettings(out=out, **{**given, **settings}),
        evaluator=evaluator or FakeEvaluator(),
        progress=listener,
        latency=lambda device: source or Guess(),
        measured=lambda device: timed,
    )


def test_the_front_of_a_predicted_search_is_measured_when_it_ends(tmp_path: Path) -> None:
    timed = Timed(lambda spec: 1.05 if spec.width == 16 else 1.2)
    results = predicted(tmp_path / "run", timed)
    front = {trial.spec_hash: trial for trial in results.front}
    assert set(timed.timed) == set(front)
    rows = results.data["finalists"]["rows"]
    assert [row["number"] for row in rows] == results.data["front"]
    space = fakes.tiny()
    for row in rows:
        trial = front[row["spec_hash"]]
        context = Context(1, 64, trial.spec.get("context", 64))
        median = FakeLatency().latency(space.spec_at(trial.point), context).seconds
        factor = 1.05 if trial.point["width"] == 16 else 1.2
        assert row["predicted"] == pytest.approx(median) and row["measured"] == pytest.approx(factor * median)
        assert row["bounded"] == pytest.approx(1.4 * factor * median)
        assert row["inside"] == (factor == 1.05) and row["meets"] == (row["bounded"] <= 2.2e-3)
    (figure,) = results.data["finalists"]["figures"]
    assert figure["inside"] == sum(row["inside"] for row in rows)
    assert figure["meets"] == sum(row["meets"] for row in rows)
    assert write_results(tmp_path / "run").data["finalists"] == results.data["finalists"]


def test_finalists_say_how_the_machine_has_changed_since_its_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zoo.hardware.stopwatch import DeviceStopwatch

    monkeypatch.setattr(DeviceStopwatch, "sentinel", lambda self: 1.2e-3)
    here = replace(predictor(), device=resolve_device("cpu").id, sentinel=1e-3)
    results = predicted(tmp_path / "here", source=PredictedLatency(here), budget="latency<=1s@cpu{seq=64}")
    assert {row["drift"] for row in results.data["finalists"]["rows"]} == {1.2}
    (figure,) = results.data["finalists"]["figures"]
    assert "The machine took 1.20 times as long for the same as when it was calibrated." in figure["sentence"]
    elsewhere = PredictedLatency(replace(here, device="another"))
    results = predicted(tmp_path / "elsewhere", source=elsewhere, budget="latency<=1s@cpu{seq=64}")
    assert {row["drift"] for row in results.data["finalists"]["rows"]} == {None}


def test_only_new_finalists_are_measured_when_a_search_goes_on(tmp_path: Path) -> None:
    first = predicted(tmp_path / "run", trials=6)
    timed = Timed()
    longer = predicted(tmp_path / "run", timed, trials=16)
    before = {trial.spec_hash for trial in first.front}
    assert set(timed.timed) == {trial.spec_hash for trial in longer.front} - before != set()
    assert before <= {row["spec_hash"] for row in longer.data["finalists"]["rows"]}
    (tmp_path / "run" / FILE).write_text("[{")
    with pytest.warns(UserWarning, match="measured anew"):
        predicted(tmp_path / "run", timed, trials=16)
    assert {found.spec_hash for found in load_finalists(tmp_path / "run")} == {t.spec_hash for t in longer.front}
    predicted(tmp_path / "run", timed, trials=6, fresh=True)
    assert len(load_finalists(tmp_path / "run")) == len(first.front)


def test_a_finalist_that_cannot_be_measured_says_why_and_is_tried_again(tmp_path: Path) -> None:
    def fail(spec: Any) -> float:
        raise ZooError("no memory")

    results = predicted(tmp_path / "run", Timed(fail))
    assert {row["reason"] for row in results.data["finalists"]["rows"]} == {"no memory"}
    assert "No finalist could be measured" in report(tmp_path / "run")[1]
    again = predicted(tmp_path / "run")
    assert all(row["measured"] and not row["reason"] for row in again.data["finalists"]["rows"])
    assert len(again.data["finalists"]["rows"]) == len(again.front)


def test_control_c_once_still_measures_and_twice_keeps_what_was_measured(tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        if count == 6:
            raise KeyboardInterrupt

    results = predicted(tmp_path / "once", evaluator=FakeEvaluator(before=interrupt))
    assert results.stopped == "interrupted"
    assert len(results.data["finalists"]["rows"]) == len(results.front) > 1

    class Impatient(SearchListener):
        def finalist(self, finalist: Any, done: int, count: int) -> None:
            assert (done, count) == (1, len(results.front))
            raise KeyboardInterrupt

    twice = predicted(tmp_path / "twice", evaluator=FakeEvaluator(before=interrupt), listener=Impatient())
    assert twice.stopped == "interrupted" and len(twice.data["finalists"]["rows"]) == 1


def test_one_objective_measures_the_best_few(tmp_path: Path) -> None:
    results = predicted(tmp_path / "run", objective="loss", trials=14)
    best = sorted((t for t in results.trials if t.status == "complete"), key=lambda trial: trial.values[0])[:10]
    assert [row["number"] for row in results.data["finalists"]["rows"]] == [trial.number for trial in best]


def test_the_report_shows_predicted_against_measured(tmp_path: Path) -> None:
    results = predicted(tmp_path / "run", Timed(lambda spec: 1.0 if spec.width == 16 else 1.5), trials=14)
    text = (tmp_path / "run" / "report.html").read_text()
    _, words, _ = report(tmp_path / "run")
    (figure,) = results.data["finalists"]["figures"]
    assert figure["sentence"] in words and "predicted by Guess" in words
    assert text.count('class="span"') == figure["measured"]
    assert text.count('class="dot front" cx') == figure["inside"]
    assert text.count('class="dot outside" cx') == figure["measured"] - figure["inside"] > 0
    plain = fakes.search(tmp_path / "plain", budget=BUDGET, trials=4)
    assert plain.data["finalists"] is None and not (tmp_path / "plain" / FILE).exists()
    assert "Predicted against measured" not in (tmp_path / "plain" / "report.html").read_text()


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"latency": "measured", "source": Guess()}, "latency: predicted by the calibration of h100"),
        ({"source": PredictedLatency(predictor("2026-11-27"))}, "made 2026-11-27 now"),
    ],
)
def test_a_search_is_not_continued_with_other_latencies(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    first = predicted(tmp_path / "run", source=PredictedLatency(predictor()), trials=4)
    assert first.data["identity"]["latency"].endswith("h100 (0123456789ab) in float32, made 2026-11-26")
    with pytest.raises(ZooError, match="--out, or replace it with --fresh") as error:
        predicted(tmp_path / "run", **changed)
    assert named in str(error.value)


@pytest.mark.parametrize("chill", [0.0, 3.0])
def test_candidates_meet_what_a_calibration_predicts(tmp_path: Path, chill: float) -> None:
    source = PredictedLatency(predictor(chill=chill))
    results = predicted(tmp_path / "run", source=source, trials=10)
    (name,) = results.data["latency"]
    space = fakes.tiny()
    for trial in results.trials:
        if trial.trained:
            figure = source.latency(space.spec_at(trial.point), Context(1, 64, 64), "forward", 0.9)
            assert trial.metrics[name] == pytest.approx(figure.seconds) and figure.seconds <= 2.2e-3
    assert all(trial.trained and not trial.also_seen for trial in results.trials)


def test_models_are_repaired_to_a_time_that_is_no_sum_over_their_parts() -> None:
    space, source = fakes.tiny(), PredictedLatency(predictor(chill=3.0))
    seconds = from_parts(source, "float32", "forward", 0.5)
    assert seconds is not None
    (term,) = Budget.parse("latency<=2ms@cpu{seq=64}").terms
    work = workload(term)
    costs = CostTable(space, work, {label(term): seconds})
    repair = Repair(space, {work: costs}, Budget((term,)))
    changed, cold = 0, set()
    for seed in range(12):
        proposal = space.sample(random.Random(seed))
        found = repair(proposal, random.Random(seed))
        assert found is not None
        figure = source.latency(space.spec_at(found), Context(1, 64, 64))
        assert figure.seconds == pytest.approx((costs.figures(found) or {})[label(term)]) and figure.seconds <= 2e-3
        changed += found != proposal
        moved = source.predictor.counted(parts_of(space.spec_at(found), work, "forward"), "forward")[0].moved
        cold.add(round(cold_share(moved, 1e6), 1))
    assert 0 < changed < 12 and len(cold) > 2


def test_a_latency_that_no_candidate_is_predicted_to_meet_ends_the_search_at_once(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match=r"smallest reachable value is .*relax it to latency<=.*@cpu\{seq=64\}"):
        predicted(tmp_path / "run", source=PredictedLatency(predictor()), budget="latency<=1ns@cpu{seq=64}")
    with pytest.raises(InfeasibleError, match="@h100"):
        predicted(tmp_path / "run", source=Forecast("h100"), budget="decode<=1ns@h100{past=64}")
    assert not (tmp_path / "run").exists()


def test_a_shipped_device_answers_with_its_roofline_and_is_never_measured(tmp_path: Path) -> None:
    timed = Timed()
    results = run_search(
        SearchSettings(space=fakes.tiny(), trials=4, budget="latency<=1s@h100{seq=32}", out=tmp_path / "run"),
        evaluator=FakeEvaluator(),
        latency=Latencies("measured"),
        measured=lambda device: timed,
    )
    space, device = fakes.tiny(), load_profile("h100")
    for trial in results.trials:
        parts = roofline(space.spec_at(trial.point), Workload(1, 32), device)
        assert trial.metrics["latency@h100{seq=32}"] == pytest.approx(sum(part.seconds for part in parts))
    assert not timed.timed and results.data["finalists"] is None
    assert "latency <= 1s@h100{seq=32}, roofline: a bound, not a forecast" in report(tmp_path / "run")[1]


def test_a_calibration_answers_under_the_name_of_its_file(tmp_path: Path) -> None:
    path = predictor().save(tmp_path / "board.json")
    assert latency_device(str(path)) == str(path)
    found = Forecast(str(path)).latency(
        fakes.tiny().spec_at(next(iter(fakes.tiny().homogeneous().values()))), Context(1, 64, 64)
    )
    assert found.source == "predicted" and 0 < found.low < found.seconds < found.high < math.inf


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10", "did you mean 'h100'"),
        ("cpuu", "did you mean 'cpu'"),
        ("gpu", "did you mean 'cuda'"),
        ("toaster", "known: cpu, cuda, cuda:N, .*h100"),
        ("missing.json", "known: cpu"),
    ],
)
def test_an_unknown_device_names_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        Budget.parse(f"latency<=5ms@{name}")


def test_an_unknown_latency_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="unknown latency 'predict'; did you mean 'predicted'"):
        predicted(tmp_path / "run", latency="predict")
    assert not (tmp_path / "run").exists()


def test_reading_a_budget_with_devices_does_not_import_torch() -> None:
    code = (
        "import sys; from zoo.search.budget import Budget, BudgetError\n"
        "Budget.parse('latency<=5ms@h100 decode<=1ms@cuda:1')\n"
        "try: Budget.parse('latency<=5ms@toaster')\n"
        "except BudgetError: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_finalists_are_data_for_scripts(tmp_path: Path) -> None:
    results = predicted(tmp_path / "run")
    kept = json.loads((tmp_path / "run" / "results.json").read_text())
    assert kept["finalists"] == results.data["finalists"]
    assert [found.number for found in load_finalists(tmp_path / "run")] == results.data["front"]
