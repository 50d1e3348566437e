from __future__ import annotations

import json
import os
import random
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import fakes
import pytest
from fakes import FakeEvaluator, search

import zoo
from zoo.accounting import metrics
from zoo.errors import ZooError
from zoo.search.ledger import JOURNAL
from zoo.search.measure import label
from zoo.search.results import Results, write_results
from zoo.search.space import Space
from zoo.search.study import SearchListener
from zoo.search.trial import Trial

SAMPLERS = ("evolution", "random", "tpe", "nsga2")


def outline(results: Results) -> list[tuple[Any, ...]]:
    """What has to be the same in two runs."""
    return [(t.number, t.key, t.status, t.values, t.baseline, t.history, t.slack) for t in results.trials]


class Killed(BaseException):
    """Ends a search from inside as no error does."""


def test_baselines_come_first_and_stay_homogeneous(tmp_path: Path) -> None:
    results = search(tmp_path / "run", budget="params<=8k")
    baselines = results.trials[:3]
    assert [trial.baseline for trial in baselines] == ["attention", "mamba2", "identity"]
    assert all(trial.baseline is None for trial in results.trials[3:])
    for trial in baselines:
        assert {layer[0] for layer in trial.shape["layers"]} == {trial.baseline}
    assert any(trial.adjusted for trial in baselines)
    assert results.data["mixing"]["sentence"]


@pytest.mark.parametrize("sampler", [*SAMPLERS, "gp"])
def test_nothing_is_evaluated_twice_and_everything_meets_the_budget(tmp_path: Path, sampler: str) -> None:
    evaluator = FakeEvaluator()
    trials = 6 if sampler == "gp" else 20
    budget = "params<=20k state<=10KB latency<=3ms@cpu"
    settings = {"sampler": sampler, "budget": budget, "trials": trials, "objective": "loss,params"}
    results = search(tmp_path / "run", evaluator, **settings)
    assert len(evaluator.evaluated) == len(set(evaluator.evaluated)) == trials
    done = [trial for trial in results.trials if trial.trained]
    assert len(done) == trials
    space = fakes.tiny()
    for trial in done:
        counted = metrics(space.spec_at(trial.point))
        assert counted["params"] == trial.metrics["params"] <= 20_000 and counted["state"] <= 10_000
        assert counted["flops"] * 1e-9 == pytest.approx(trial.metrics["latency@cpu"]) and counted["flops"] <= 3e6
        assert min(trial.slack.values()) >= 0
        assert space.spec_at(trial.point).hash == trial.spec_hash
    assert len({trial.key for trial in results.trials}) == len(results.trials)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("objective", ["loss", "loss,params"])
def test_a_search_that_was_killed_again_and_again_ends_like_one_that_was_not(
    tmp_path: Path, sampler: str, objective: str
) -> None:
    settings = {"sampler": sampler, "objective": objective, "trials": 26, "budget": "params<=25k latency<=3ms@cpu"}
    straight = search(tmp_path / "straight", **settings)
    rng = random.Random(7)
    pieces = None
    while pieces is None or pieces.stopped != "finished":
        survives = rng.randrange(0, 7)

        def kill(count: int, survives: int = survives) -> None:
            if count >= survives:
                raise Killed

        try:
            pieces = search(tmp_path / "pieces", FakeEvaluator(before=kill), **settings)
        except Killed:
            continue
    assert outline(pieces) == outline(straight)


@pytest.mark.parametrize("pruner", ["median", "halving"])
def test_a_pruned_search_goes_on_the_same_too(tmp_path: Path, pruner: str) -> None:
    settings = {"pruner": pruner, "trials": 24}
    straight = search(tmp_path / "straight", **settings)
    for trials in (5, 9, 17, 24):
        pieces = search(tmp_path / "pieces", **{**settings, "trials": trials})
    assert outline(pieces) == outline(straight)
    pruned = [trial for trial in straight.trials if trial.status == "pruned"]
    assert pruned and all(trial.baseline is None and trial.history and not trial.values for trial in pruned)
    assert all(len(trial.history) == 4 for trial in straight.trials if trial.status == "complete")
    assert straight.best is not None and straight.best.status == "complete"


def test_kill_minus_nine_at_any_moment_loses_at_most_the_candidate_in_hand(tmp_path: Path) -> None:
    settings = {"trials": 20, "budget": "params<=25k"}
    straight = search(tmp_path / "straight", **settings)
    rng = random.Random(3)
    for _ in range(5):
        child = os.fork()
        if child == 0:
            threading.Timer(rng.uniform(0.02, 0.25), os.kill, (os.getpid(), signal.SIGKILL)).start()
            search(tmp_path / "pieces", FakeEvaluator(before=lambda count: time.sleep(0.005)), **settings)
            os.kill(os.getpid(), signal.SIGKILL)
        rng.random()
        os.waitpid(child, 0)
    assert outline(search(tmp_path / "pieces", **settings)) == outline(straight)
    search(tmp_path / "pieces", **settings)


def test_more_trials_go_on_where_it_ended(tmp_path: Path) -> None:
    first = search(tmp_path / "run", trials=8)
    evaluator = FakeEvaluator()
    longer = search(tmp_path / "run", evaluator, trials=14)
    assert outline(longer)[:8] == outline(first)
    assert len(evaluator.evaluated) == 6
    assert search(tmp_path / "run", evaluator, trials=10).stopped == "finished"
    assert len(evaluator.evaluated) == 6


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"budget": "params<=41k"}, "budget: params<=40k there, params<=41k now"),
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"objective": "accuracy"}, "objective: loss there, accuracy now"),
        ({"sampler": "random"}, "sampler: evolution there, random now"),
        ({"space": Space.parse(fakes.TWELVE)}, "space: "),
    ],
)
def test_another_search_in_the_same_folder_is_refused(tmp_path: Path, changed: dict[str, Any], named: str) -> None:
    search(tmp_path / "run", trials=4)
    before = (tmp_path / "run" / JOURNAL).read_bytes()
    with pytest.raises(ZooError, match="--out, or replace it with --fresh") as error:
        search(tmp_path / "run", **changed)
    assert named in str(error.value)
    assert (tmp_path / "run" / JOURNAL).read_bytes() == before
    assert len(search(tmp_path / "run", trials=3, fresh=True, **changed).trials) == 3


def test_points_that_describe_one_architecture_are_evaluated_once(tmp_path: Path) -> None:
    space = Space.parse(fakes.TWELVE.replace("identity]}", "{type: attention, heads: 2, causal: true}]}"))
    evaluator = FakeEvaluator()
    results = search(tmp_path / "run", evaluator, space=space, budget="", trials=50)
    assert space.size() == 12
    assert len(evaluator.evaluated) == len(set(evaluator.evaluated)) == 6 and results.stopped == "exhausted"


def test_an_exhausted_space_is_a_result(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    results = search(tmp_path / "run", evaluator, space=Space.parse(fakes.TWELVE), budget="", trials=50)
    assert results.stopped == "exhausted"
    assert "space exhausted after 12 architectures" in results.message
    assert len(set(evaluator.evaluated)) == 12
    smaller = search(tmp_path / "two", space=Space.parse(fakes.TWELVE), budget="params<=6k", trials=50)
    assert 0 < len(smaller.trials) < 12 and smaller.stopped == "exhausted"
    feasible = [t for t in results.trials if t.metrics["params"] <= 6_000]
    assert {t.key for t in smaller.trials} == {t.key for t in feasible}


def test_a_budget_that_nothing_meets_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    with pytest.raises(ZooError, match="smallest reachable value"):
        search(tmp_path / "run", evaluator, budget="params<=10")
    assert not evaluator.evaluated and not (tmp_path / "run").exists()


def test_a_share_of_a_named_spec_is_put_into_numbers(tmp_path: Path) -> None:
    spec = tmp_path / "reference.yaml"
    spec.write_text(zoo.dump(fakes.tiny().spec_at(fakes.tiny().sample(random.Random(5)))))
    bound = metrics(zoo.load(spec))["params"]
    results = search(tmp_path / "run", budget=f"params<=80% of {spec}", trials=5)
    assert all(trial.metrics["params"] <= 0.8 * bound for trial in results.trials)


def test_what_measures_too_slow_is_made_smaller_or_never_trained(tmp_path: Path) -> None:
    evaluator = FakeEvaluator()
    results = search(tmp_path / "run", evaluator, budget="latency<=2.2ms@cpu{seq=64,quantile=0.9}", trials=10)
    space = fakes.tiny()
    name = label(results_term(results))
    trained = [trial for trial in results.trials if trial.trained]
    assert len(trained) == 10 == len(evaluator.evaluated)
    assert all(trial.metrics[name] <= 2.2e-3 for trial in trained)
    for trial in trained:
        assert trial.metrics[name] == pytest.approx(1.4 * 1e-9 * metrics(space.spec_at(trial.point))["flops"])
    dropped = [trial for trial in results.trials if not trial.trained]
    assert any(trial.also_seen for trial in trained)
    assert all("ms where the budget says latency <= 2.2ms" in trial.reason for trial in dropped)
    assert results.data["counts"]["dropped"] == len(dropped)


def results_term(results: Results) -> Any:
    from zoo.search.budget import Budget

    return Budget.parse(results.data["budget"]).terms[0]


def test_a_budget_on_latency_that_nothing_measures_within_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="all measured outside the budget"):
        search(tmp_path / "run", budget="latency<=1ns@cpu")


def test_latency_is_an_objective_too(tmp_path: Path) -> None:
    results = search(tmp_path / "run", objective="loss,latency@cpu{seq=32}", trials=10)
    for trial in results.trials:
        assert trial.values == (trial.metrics["loss"], trial.metrics["latency@cpu{seq=32}"])
    assert [trial.values[1] for trial in results.front] == sorted((t.values[1] for t in results.front), reverse=True)


def test_a_candidate_that_breaks_down_is_recorded_and_the_search_goes_on(tmp_path: Path) -> None:
    def fail(spec: Any) -> str:
        return "the training loss of step 3 is nan" if spec.width == 48 else ""

    results = search(tmp_path / "run", FakeEvaluator(fail), budget="", trials=15)
    failed = [trial for trial in results.trials if trial.status == "failed"]
    assert failed and all(trial.point["width"] == 48 and "nan" in trial.reason for trial in failed)
    assert results.best is not None and results.best.point["width"] != 48
    assert results.data["counts"]["failed"] == len(failed)


def test_a_search_in_which_everything_breaks_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="the first 5 candidates all failed; the last one: no luck"):
        search(tmp_path / "run", FakeEvaluator(lambda spec: "no luck"))


def test_an_infinite_loss_is_a_failure(tmp_path: Path) -> None:
    class Infinite(FakeEvaluator):
        def evaluate(self, spec: Any, *rest: Any) -> Any:
            found = super().evaluate(spec, *rest)
            return type(found)(metrics={"loss": float("inf")}) if spec.width == 16 else found

    results = search(tmp_path / "run", Infinite(), trials=10)
    assert any(trial.status == "failed" and trial.reason == "loss is inf" for trial in results.trials)


def test_the_folder_in_which_it_runs_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"sqlite:///{tmp_path}/study.db"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        results = search(Path(), storage=url, trials=3, seed=int(name == "two"))
        assert len(results.trials) == 3 and zoo.load("best.yaml").name == f"{name}-best"


@pytest.mark.parametrize("pruner", ["none", "median"])
def test_a_metric_that_is_no_number_does_not_stop_a_search(tmp_path: Path, pruner: str) -> None:
    class Undefined(FakeEvaluator):
        def evaluate(self, spec: Any, *rest: Any) -> Any:
            found = super().evaluate(spec, *rest)
            return replace(found, metrics={**found.metrics, "accuracy": float("nan")})

    results = search(tmp_path / "run", Undefined(), trials=20, pruner=pruner)
    assert results.stopped == "finished" and all("accuracy" not in trial.metrics for trial in results.trials)
    assert any(trial.status == "pruned" for trial in results.trials) == (pruner != "none")


def test_control_c_leaves_results_and_says_how_to_go_on(tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        if count == 5:
            raise KeyboardInterrupt

    results = search(tmp_path / "run", FakeEvaluator(before=interrupt))
    assert results.stopped == "interrupted" and len(results.trials) == 5
    assert results.message.endswith("to continue: zoo search tiny.yaml")
    assert json.loads((tmp_path / "run" / "results.json").read_text())["counts"]["complete"] == 5
    assert outline(search(tmp_path / "run")) == outline(search(tmp_path / "straight"))


def test_time_may_run_out(tmp_path: Path) -> None:
    results = search(tmp_path / "run", timeout=0.0)
    assert results.stopped == "timeout" and results.trials == ()


def test_two_searches_on_one_file_share_the_work(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"trials": 24}
    slow = FakeEvaluator(before=lambda count: time.sleep(0.01))
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                search(tmp_path / "run", slow, **settings)
                (tmp_path / f"evaluated-{os.getpid()}").write_text(" ".join(slow.evaluated))
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    parts = [path.read_text().split() for path in tmp_path.glob("evaluated-*")]
    everything = [spec for part in parts for spec in part]
    assert len(everything) == len(set(everything)) == 24
    assert all(parts)
    results = write_results(tmp_path / "run")
    assert len(results.trials) == 24
    assert [t.baseline for t in results.trials if t.baseline] and len({t.key for t in results.trials}) == 24


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler": "evolutoin"}, "did you mean 'evolution'"),
        ({"pruner": "medain"}, "did you mean 'median'"),
        ({"pruner": "median", "objective": "loss,params"}, "needs a single objective, found loss, params"),
        ({"pruner": "median", "objective": "params"}, "needs an objective that training improves, not params"),
        ({"objective": "bits_per_byte"}, "not known for this data; it has loss, accuracy"),
        ({"trials": 0}, "at least one trial"),
        ({"device": "gpu"}, "did you mean 'cuda'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        search(tmp_path / "run", **changed)
    assert not (tmp_path / "run").exists()


def test_results_can_be_written_anew_from_the_study_alone(tmp_path: Path) -> None:
    results = search(tmp_path / "run", objective="loss,params", trials=15)
    folder = tmp_path / "run"
    kept = {path.name: path.read_text() for path in (folder / "front").iterdir()}
    best = (folder / "best.yaml").read_text()
    for name in ("results.json", "best.yaml", "report.html", "front"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    again = write_results(folder)
    assert outline(again) == outline(results)
    assert {path.name: path.read_text() for path in (folder / "front").iterdir()} == kept
    assert len(kept) == len(results.front)
    assert (folder / "best.yaml").read_text() == best
    assert results.best is not None and zoo.load(folder / "best.yaml").hash == results.best.spec_hash
    for trial, path in zip(results.front, sorted((folder / "front").iterdir()), strict=True):
        assert zoo.load(path).hash == trial.spec_hash
    with pytest.raises(ZooError, match="holds no search"):
        write_results(tmp_path)


def test_a_full_disk_ends_the_search_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def fill(count: int) -> None:
        if count == 6:
            monkeypatch.setattr(os, "write", lambda descriptor, content: real(descriptor, content[:20]))

    with pytest.raises(ZooError, match="the disk is full"):
        search(tmp_path / "run", FakeEvaluator(before=fill))
    monkeypatch.undo()
    assert len(write_results(tmp_path / "run").trials) == 6
    assert outline(search(tmp_path / "run")) == outline(search(tmp_path / "straight"))


def test_a_listener_hears_of_everything(tmp_path: Path) -> None:
    heard: list[tuple[str, Any]] = []

    class Listener(SearchListener):
        def started(self, start: Any) -> None:
            heard.append(("started", start.trials))

        def candidate(self, number: int, phase: str, shape: Any, figures: Any) -> None:
            heard.append((phase, (number, len(shape["layers"]), figures["params"])))

        def finished(self, trial: Trial, front: Any) -> None:
            heard.append(("finished", (trial.number, [each.number for each in front])))

        def ended(self, results: Results) -> None:
            heard.append(("ended", results.stopped))

    results = search(tmp_path / "run", listener=Listener(), trials=5, budget="latency<=1s")
    assert [name for name, _ in heard] == ["started", *["measuring", "training", "finished"] * 5, "ended"]
    assert results.best is not None and heard[-2][1] == (4, [results.best.number])
