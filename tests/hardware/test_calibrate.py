"""Calibrations of a device that only pretends."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.hardware.pretended import HELD, PROFILE, PretendedStopwatch, true_seconds
from zoo.accounting import Piece
from zoo.cost import Cost
from zoo.errors import ZooError
from zoo.hardware import calibrate as module
from zoo.hardware import regression
from zoo.hardware.calibrate import Pool, Step, calibrate
from zoo.hardware.features import cold_share, features, moved
from zoo.hardware.predictor import PredictedLatency, Predictor, Sums, load_predictor
from zoo.hardware.regression import Regression
from zoo.hardware.samples import chosen, drawn, take
from zoo.hardware.work import held_bytes, parts_of
from zoo.latency import Context
from zoo.spec.document import load


@pytest.fixture(autouse=True)
def small_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "POOL", 60)
    monkeypatch.setattr(regression, "FOLDS", 5)
    monkeypatch.setattr(module, "CACHES", (2**23, 2**25))


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A calibration of the device that only pretends, without noise."""
    return run(PretendedStopwatch(), tmp_path_factory.mktemp("exact"), 80)


def run(stopwatch: PretendedStopwatch, folder: Path, seconds: float = 120, **options: Any) -> Predictor:
    return calibrate(stopwatch, PROFILE, folder / "log.jsonl", seconds=seconds, clock=stopwatch.clock, **options)


def test_known_costs_are_found_again_and_predict_other_models(tmp_path: Path) -> None:
    predictor = run(PretendedStopwatch(), tmp_path, 200)
    for name, context in (("gpt2", Context(1, 512, 512)), ("mamba2-130m", Context(4, 1024, 1024))):
        spec = load(name)
        for phase in ("forward", "decode"):
            figure = PredictedLatency(predictor).latency(spec, context, phase)
            work = features(parts_of(spec, _work(context), phase), phase)
            assert figure.seconds == pytest.approx(true_seconds(work), rel=0.05)
            assert figure.low <= figure.seconds <= figure.high and figure.source == "predicted"


def test_how_much_stays_in_a_cache_is_found_out(tmp_path: Path) -> None:
    """Models that stay in it and those that do not are both predicted, though no sum over parts tells them apart."""
    size = 8 * 2**20
    predictor = run(PretendedStopwatch(cache=size), tmp_path, 200)
    assert predictor.caches["forward"] == predictor.caches["train"] == size and predictor.caches["decode"] == size
    shares = []
    for sample in take(drawn(random.Random(9)), 60, lambda sample: 0.0, 1.0, set()):
        for phase in sample.phases:
            counts = features(sample.parts(phase), phase)
            shares.append(cold_share(moved(counts), size))
            found = predictor.predict(sample.parts(phase), phase).seconds
            assert found == pytest.approx(true_seconds(counts, shares[-1]), rel=0.1)
            each = predictor.predict_each(sample.parts(phase), phase)
            whole = predictor.predict(sample.parts(phase), phase)
            for end in ("seconds", "low", "high"):
                assert sum(getattr(part, end) for part in each) == pytest.approx(getattr(whole, end))
    assert min(shares) < 0.1 and max(shares) > 0.9


def test_training_is_fitted_to_few_samples_with_the_forward_pass_as_a_prior(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = take(drawn(random.Random(9)), 40, lambda sample: 0.0, 1.0, set())

    def error(predictor: Predictor) -> float:
        parts = [sample.parts("train") for sample in others]
        true = [true_seconds(features(one, "train")) for one in parts]
        return sum(abs(predictor.predict(one, "train").seconds / t - 1) for one, t in zip(parts, true)) / len(parts)

    with_prior = run(PretendedStopwatch(noise=0.05), tmp_path / "with", 120)
    trained = with_prior.regressions["train"]
    assert len(trained.errors) == 30 < len(trained.names)
    monkeypatch.setattr(module, "_before", lambda *_: (None, module.CACHES))
    without = run(PretendedStopwatch(noise=0.05), tmp_path / "without", 120)
    assert error(with_prior) < 0.1 and error(with_prior) < 0.8 * error(without)


def test_memory_is_predicted_with_its_interval(tmp_path: Path) -> None:
    predictor = run(PretendedStopwatch(noise=0.1), tmp_path, 160)
    spec, context = load("gpt2"), Context(1, 128, 128)
    for phase in ("forward", "decode", "train"):
        held = PredictedLatency(predictor).held(spec, context, phase)
        assert held is not None
        assert held.bytes == pytest.approx(HELD * held_bytes(spec, _work(context), phase), rel=0.03)
        assert 0.85 * held.bytes < held.low < held.bytes < held.high < 1.15 * held.bytes


def test_what_a_calibration_did_not_measure_is_not_made_up(exact: Predictor) -> None:
    data = exact.as_data()
    data["memory"], data["phases"] = {}, {"forward": data["phases"]["forward"]}
    source = PredictedLatency(Predictor.from_data(data))
    assert source.held(load("gpt2"), Context(1, 64, 64)) is None
    with pytest.raises(ZooError, match="not calibrated for train; its calibration has forward"):
        source.latency(load("gpt2"), Context(1, 64, 64), "train")


def _work(context: Context) -> Any:
    from zoo.accounting import Workload

    return Workload(context.batch, context.seq, context.past, context.dtype)


def test_the_interval_holds_nine_of_ten_new_models(tmp_path: Path) -> None:
    predictor = run(PretendedStopwatch(noise=0.2), tmp_path, 240)
    fresh = PretendedStopwatch(noise=0.2)
    samples = take(drawn(random.Random(99)), 200, lambda sample: 0.0, 1.0, set())
    inside = 0
    for sample in samples:
        ((readings,), _) = fresh.read([sample])
        found = predictor.predict(sample.parts("forward"))
        inside += found.low <= readings["forward"].seconds <= found.high
    assert 0.82 <= inside / len(samples) <= 0.98


def test_a_quantile_is_what_that_share_of_models_stays_below(tmp_path: Path) -> None:
    source = PredictedLatency(run(PretendedStopwatch(noise=0.2), tmp_path, 160))
    spec, context = load("gpt2"), Context(1, 256, 256)
    half, most = (source.latency(spec, context, "forward", quantile).seconds for quantile in (0.5, 0.9))
    assert half < most < 1.4 * half


def test_a_calibration_that_was_interrupted_goes_on(tmp_path: Path) -> None:
    whole = run(PretendedStopwatch(noise=0.1), tmp_path / "whole", 60)

    class Interrupted(PretendedStopwatch):
        def read(self, samples: Any) -> Any:
            if self.now >= 20:
                raise KeyboardInterrupt
            return super().read(samples)

    first = Interrupted(noise=0.1)
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path, 60)
    log = tmp_path / "log.jsonl"
    log.write_text(log.read_text() + '{"spent": 1, "tim')  # What a kill leaves behind.
    second = PretendedStopwatch(noise=0.1)
    predictor = run(second, tmp_path, 60)
    assert not set(first.asked) & set(second.asked)
    assert len(first.asked) + len(second.asked) == 60
    assert len(predictor.regressions["forward"].errors) == len(whole.regressions["forward"].errors)


def test_the_log_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    run(PretendedStopwatch(), tmp_path, 40)
    other = PretendedStopwatch()
    other.device = replace(other.device, processor="another")
    run(other, tmp_path, 40)
    assert len(other.asked) == 40


def test_the_log_of_another_space_is_not_gone_on_with(tmp_path: Path) -> None:
    def asked(name: str) -> int:
        stopwatch = PretendedStopwatch()
        run(stopwatch, tmp_path, 40, pool=Pool(name, drawn(random.Random(3), typical=True)))
        return len(stopwatch.asked)

    assert [asked(name) for name in ("one", "one", "other")] == [40, 0, 40]


def test_a_short_disturbance_is_timed_again(tmp_path: Path) -> None:
    stopwatch = PretendedStopwatch(sentinels=[*[1e-3] * 20, 2e-3, *[1e-3] * 500])
    steps: list[Step] = []
    predictor = run(stopwatch, tmp_path, 60, tell=steps.append)
    again = [key for key in stopwatch.asked if stopwatch.asked.count(key) > 1]
    assert len(set(again)) == 4 and int(predictor.made["samples"]) == steps[-1].samples
    assert max(step.deviation for step in steps) <= module.DRIFT


def test_a_sample_that_disagrees_with_its_modules_is_left_out(tmp_path: Path, exact: Predictor) -> None:
    class Jolted(PretendedStopwatch):
        def read(self, samples: Any) -> Any:
            found, sentinel = super().read(samples)
            if len(self.asked) % 5 == 0:
                found[0]["forward"] = found[0]["forward"]._replace(seconds=2 * found[0]["forward"].seconds)
            return found, sentinel

    predictor = run(Jolted(), tmp_path, 80)
    assert 60 < int(predictor.made["samples"]) < 80
    sample = next(drawn(random.Random(5)))
    wanted, found = (one.predict(sample.parts("forward")).seconds for one in (exact, predictor))
    assert found == pytest.approx(wanted, rel=0.03) and predictor.regressions["forward"].error < 0.1


def test_drift_that_the_sentinel_feels_is_taken_out(tmp_path: Path, exact: Predictor) -> None:
    spell = [1e-3 * (1.15 if number // 30 % 2 else 1.0) for number in range(500)]
    drifting = run(PretendedStopwatch(sentinels=spell, drifting=True), tmp_path, 80)
    sample = next(drawn(random.Random(5)))
    wanted, found = (one.predict(sample.parts("forward")).seconds for one in (exact, drifting))
    assert found == pytest.approx(wanted, rel=0.02)
    assert drifting.sentinel == 1e-3 and drifting.drift(1.2e-3) == pytest.approx(1.2)


def test_what_only_the_sentinel_feels_is_left_in(tmp_path: Path) -> None:
    rng = random.Random(0)
    jitter = [1e-3 * (1 + rng.uniform(-0.1, 0.1)) for _ in range(500)]
    found = run(PretendedStopwatch(sentinels=jitter), tmp_path, 80)
    assert found.regressions["forward"].error < 0.01 and found.regressions["decode"].error < 0.01


def test_a_machine_that_is_never_quiet_is_refused_and_nothing_replaced(tmp_path: Path) -> None:
    before = run(PretendedStopwatch(), tmp_path / "before", 40).save(tmp_path / "kept.json")
    text = before.read_text()
    rng = random.Random(0)
    stopwatch = PretendedStopwatch(sentinels=[1e-3 * 16 ** rng.random() for _ in range(1000)])
    with pytest.raises(
        ZooError, match=r"too noisy: the same work took from [12][.0-9]* to 1[.0-9]* ms.*stop what else runs"
    ):
        run(stopwatch, tmp_path, 60)
    assert before.read_text() == text and load_predictor(before).regressions
    assert stopwatch.now < 59, "as soon as nothing can help"
    assert run(PretendedStopwatch(), tmp_path, 60).made["samples"] == "60", "the next try begins anew"


def test_a_clock_that_runs_backwards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="clock of cpu: pretended"):
        run(PretendedStopwatch(sign=-1.0), tmp_path)


def test_too_little_time_says_so(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"4 samples are too few for a calibration, which needs 10; give it more time"):
        run(PretendedStopwatch(), tmp_path, 3)


def test_a_prior_makes_ten_samples_a_start(tmp_path: Path) -> None:
    prior = run(PretendedStopwatch(), tmp_path / "prior", 200)

    others = take(drawn(random.Random(9)), 40, lambda sample: 0.0, 1.0, set())

    def error(predictor: Predictor) -> float:
        """The mean relative error on models that no one has timed."""
        parts = [sample.parts("forward") for sample in others]
        return sum(abs(predictor.predict(one).seconds / true_seconds(features(one)) - 1) for one in parts) / len(parts)

    alone = run(PretendedStopwatch(noise=0.1), tmp_path / "alone", 12)
    helped = run(PretendedStopwatch(noise=0.1), tmp_path / "helped", 12, prior=prior)
    assert error(helped) < 0.8 * error(alone)


def test_work_that_was_never_timed_is_not_free(exact: Predictor) -> None:
    known = Cost(kind="linear", flops=1e9, traffic=1e6)
    strange = Cost(kind="strange", flops=1e9, traffic=1e6)
    alone, both = (exact.predict([[Piece("", "dense", cost.operators)]]) for cost in (known, known + strange))
    assert both.unknown == ("strange",) and not alone.unknown
    assert both.seconds - alone.seconds >= 1e9 / PROFILE.peak["float32"]
    assert both.high - both.seconds > alone.high - alone.seconds + 2 * (both.seconds - alone.seconds)


def test_a_term_and_a_type_that_were_never_timed_are_not_free(exact: Predictor) -> None:
    part = [[Piece("", "dense", Cost(kind="linear", flops=1e9, traffic=1e6).operators)]]
    without, whole = _forgetting(exact, "linear.flops", "dense.modules"), exact.predict(part)
    found = without.predict(part)
    assert found.unknown == ("dense.modules", "linear.flops") and not whole.unknown
    names, costs = exact.regressions["forward"].names, exact.regressions["forward"].coefficients
    modules = {name: cost for name, cost in zip(names, costs) if name.endswith(".modules") and cost}
    usual = np.median([cost for name, cost in modules.items() if name != "dense.modules"])
    free = sum(costs[names.index(name)] * count for name, count in (("linear.flops", 1e9), ("dense.modules", 1)))
    assert found.seconds == pytest.approx(whole.seconds - free + 1e9 / PROFILE.peak["float32"] + usual)


def test_a_space_with_parts_that_were_never_timed_warns_once(exact: Predictor) -> None:
    without = _forgetting(exact, "attention.")
    source = PredictedLatency(without)
    with pytest.warns(
        UserWarning, match=r"never timed on attention, attention\.modules: operators take what the roofline says"
    ):
        figure = source.latency(load("gpt2"), Context(1, 64, 64))
    assert figure.low < figure.seconds < figure.high, "the middle is not the end of the interval"
    most = source.latency(load("gpt2"), Context(1, 64, 64), "forward", 0.9).seconds
    sums, _ = without.counted(parts_of(load("gpt2"), _work(Context(1, 64, 64)), "forward"), "forward")
    assert most >= figure.seconds + 3 * sums.floor > figure.seconds
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        source.latency(load("gpt2"), Context(1, 64, 64))


def _forgetting(predictor: Predictor, *prefixes: str) -> Predictor:
    def rest(found: Regression) -> Regression:
        rows = [row for row, name in enumerate(found.names) if not name.startswith(prefixes)]
        return replace(
            found,
            names=tuple(found.names[row] for row in rows),
            coefficients=found.coefficients[rows],
            covariance=found.covariance[np.ix_(rows, rows)],
        )

    return replace(predictor, regressions={phase: rest(found) for phase, found in predictor.regressions.items()})


def test_parts_add_up_to_the_model(exact: Predictor) -> None:
    from zoo.accounting import Workload, places

    spec, work = load("gpt2"), Workload(2, 128, 128)
    for phase in ("forward", "decode"):
        sums = map(exact.estimator(phase), places(spec.fill(), work.at(spec.context)))
        total = exact.seconds(Sums(*np.sum(list(sums), axis=0)), phase)
        assert total == pytest.approx(exact.predict(parts_of(spec, work, phase), phase).seconds)


def test_a_predictor_is_saved_whole_and_read_again(exact: Predictor, tmp_path: Path) -> None:
    again = load_predictor(exact.save(tmp_path / "one.json"))
    assert again.as_data() == exact.as_data()
    assert [path.name for path in tmp_path.glob("one*")] == ["one.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=7), "format 7; this zoo reads 5"),
        (lambda data: data["phases"].update(prefil=data["phases"]["forward"]), "unknown phases prefil"),
        (lambda data: data.pop("profile"), "not a calibration"),
        (lambda data: data.update(profile="name: x\n"), "required"),
        (lambda data: data["phases"]["forward"].pop("names"), r"file\.json: phases\.forward: no regression: .*names"),
        (lambda data: data["memory"]["decode"]["errors"].append(0.1), r"memory\.decode: .* errors have other sizes"),
        (lambda data: data["memory"]["decode"].update(names=["seconds"]), "on seconds, not counted"),
        (lambda data: data.update(phases={}), "a calibration of nothing"),
        (lambda data: data["caches"].pop("decode"), "not a calibration .*decode"),
        (lambda data: data["caches"].update(train=-1), "a cache of -1"),
        (lambda data: data.update(sentinel="x"), r"file\.json: not a calibration \(ValueError"),
        (lambda data: data.update(sentinel=0), r"file\.json: not a calibration .*the sentinel of 0"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(exact: Predictor, change: Any, message: str) -> None:
    data = json.loads(json.dumps(exact.as_data()))
    change(data)
    with pytest.raises(ZooError, match=message):
        Predictor.from_data(data, "file.json")


def test_another_dtype_is_refused_with_the_command_that_helps(exact: Predictor) -> None:
    source = PredictedLatency(exact)
    with pytest.raises(ZooError, match="calibrated in float32, not bfloat16; `zoo device calibrate --dtype bfloat16`"):
        source.latency(load("gpt2"), Context(1, 64, 64, "bfloat16"))


def test_what_is_timed_spans_the_catalogue() -> None:
    from zoo.registry import Role, components

    # What only holds others does nothing by itself, and an activation that is none has nothing to time.
    holding = (Role.BODY, Role.STAGE, Role.MODEL, Role.RECORD)
    samples = take(drawn(random.Random(0)), 300, lambda sample: 0.0, 1.0, set())
    found = {part.type for sample in samples for _, part, _ in sample.spec.fill().walk(sample.spec.root())}
    ours = {kind.type for kind in components() if kind.__module__.startswith("zoo.blocks") and kind.role not in holding}
    assert ours - found <= {"linear"}


def test_the_informative_half_is_chosen_for_what_it_tells() -> None:
    """The first samples of the order determine the costs better than as many drawn ones."""
    pool = take(drawn(random.Random(0)), 120, lambda sample: 0.0, 1.0, set())
    order = chosen(pool, lambda sample: true_seconds(sample.known), lambda seconds: 1.0)
    assert sorted(sample.key for sample in order) == sorted(sample.key for sample in pool)
    names = sorted({name for sample in pool for name in sample.known})

    def determinant(samples: Any) -> float:
        rows = np.array([[s.known.get(name, 0.0) / true_seconds(s.known) for name in names] for s in samples])
        scale = np.array([[s.known.get(name, 0.0) / true_seconds(s.known) for name in names] for s in pool]).mean(0)
        return float(np.linalg.slogdet((rows / scale).T @ (rows / scale) + 1e-6 * np.eye(len(names)))[1])

    assert determinant(order[:40]) > determinant(pool[:40]) + 20
