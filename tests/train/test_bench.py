"""What a bench measures, on a clock of our own and against figures counted elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch

import zoo
from zoo.device import Device
from zoo.errors import ZooError
from zoo.hardware.features import Phase
from zoo.hardware.predictor import Held
from zoo.hardware.profile import load_profile
from zoo.hardware.roofline import roofline
from zoo.latency import Context, LatencyFigure
from zoo.model import Model, build
from zoo.train.bench import Report, Request, bench, default_pasts, facts, plan
from zoo.train.case import training_case

CPU = Device("cpu", "cpu", "test", 2, 1, 8 << 30, "2.13.0", "3.11.7")
LM = """
width: 32
context: 64
stem: {type: token, vocab: 256}
body: {layers: {repeat: 2, of: {mixer: {type: attention, heads: 2}, channel: glu}}}
head: language_model
"""
VIT = """
width: 32
stem: {type: patch, image: [16, 16], size: 4, channels: 1, class_token: true}
body: {layers: [{mixer: {type: attention, heads: 2}, channel: mlp}]}
head: {type: classifier, classes: 10}
"""


def spec(text: str = LM) -> zoo.Spec:
    from zoo.spec.document import parse

    return parse(text, file="spec.yaml")


class Oracle:
    """A predictor that says three seconds and a byte for each token of the context, in some phases."""

    def __init__(self, *phases: Phase) -> None:
        self.phases = phases

    def latency(self, spec: Any, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        seconds = 3.0 * (context.past if phase == "decode" else context.seq)
        return LatencyFigure(seconds, seconds, seconds, "predicted", "test")

    def held(self, spec: Any, context: Context, phase: Phase = "forward") -> Held:
        return Held(context.seq, 0.0, context.seq)


def ticking(seconds: float = 1.0) -> Callable[[], float]:
    """A clock on which everything takes `seconds`."""
    ticks = count()
    return lambda: seconds * next(ticks)


def run(text: str = LM, device: Device = CPU, **wanted: Any) -> Report:
    options = {name: wanted.pop(name) for name in ("profile", "predictor", "progress") if name in wanted}
    return bench(spec(text), device, Request(repeats=3, **wanted), clock=ticking(), **options)


def test_every_phase_is_measured_at_every_length() -> None:
    said: list[tuple[int, int, str]] = []
    report = run(batch=2, seq=(8, 16), past=(0, 5), progress=lambda *facts: said.append(facts))
    names = ["train 8", "train 16", "prefill 8", "prefill 16", "decode 0", "decode 5"]
    assert [row.item.name for row in report.rows] == names
    assert said == [(number, 6, name) for number, name in enumerate(names)]
    assert not report.notes and not report.interrupted
    for row in report.rows:
        assert row.timing is not None and row.timing.median == 1.0
        assert row.per_second == 2 * (1 if row.item.phase == "decode" else row.item.tokens)
        assert row.flops_per_second == row.item.flops


def test_flops_are_those_of_the_counts() -> None:
    items, _ = plan(spec(), CPU, Request(seq=(16,), past=(5,)))
    forward = zoo.metrics(spec(), zoo.Workload(seq=16, past=5))
    assert [item.flops for item in items] == [forward["train_flops"], forward["flops"], forward["decode_flops"]]


def test_memory_holds_at_least_what_must_be_there() -> None:
    params = zoo.metrics(spec())["params"]
    rows = {row.item.name: row.memory or 0 for row in run(seq=(16,), past=(0, 32)).rows}
    logits = 4 * 16 * 256
    # Parameters, gradients and two moments; what is kept for the backward pass comes on top.
    assert 16 * params + logits < rows["train 16"] < 16 * params + 100 * logits
    assert 4 * params + logits < rows["prefill 16"] < 4 * params + 4 * logits
    state = zoo.metrics(spec(), zoo.Workload(seq=1, past=32))["state"]
    assert state < rows["decode 32"] - 4 * params
    assert rows["decode 0"] < rows["decode 32"]


def test_half_precision_halves_inference_and_leaves_training_its_parameters() -> None:
    single, half = (run(seq=(16,), past=(0,), dtype=dtype).rows for dtype in ("float32", "bf16"))
    assert 0.4 < (half[1].memory or 0) / (single[1].memory or 1) < 0.7
    assert (half[0].memory or 0) > 16 * zoo.metrics(spec())["params"]


def test_predictions_stand_beside_what_was_measured() -> None:
    profile = load_profile("h100")
    report = run(seq=(8,), past=(5,), predictor=Oracle("train", "forward", "decode"), profile=profile)
    train, prefill, decode = report.rows
    assert (train.ratio, prefill.ratio, decode.ratio) == (24.0, 24.0, 15.0) and not report.notes
    assert facts(report, None, "float32")[0]["predicted_memory"] == {"bytes": 8, "low": 0.0, "high": 8}
    work = zoo.Workload(seq=8, past=0)
    assert train.item.bound == sum(part.seconds for part in roofline(spec(), work, profile, "train"))
    assert prefill.item.bound == sum(part.seconds for part in roofline(spec(), work, profile, "forward"))
    assert decode.item.bound is not None
    shares = [row["share_of_peak"] for row in facts(report, profile, "float32")]
    assert shares == [row.item.flops / profile.rate("float32") for row in report.rows]
    assert facts(report, None, "float32")[0]["share_of_peak"] is None


def test_a_phase_that_a_calibration_does_not_know_is_named() -> None:
    report = run(seq=(8,), past=(5,), predictor=Oracle("forward"))
    assert [row.ratio for row in report.rows] == [None, 24.0, None]
    assert [note.partition(":")[0] for note in report.notes] == ["train", "decode"]
    assert "zoo device calibrate" in report.notes[0]


def test_images_have_one_length_and_no_decoding() -> None:
    report = run(VIT, batch=3)
    assert [(row.item.phase, row.item.tokens, row.per_second) for row in report.rows] == [
        ("train", 17, 3.0),
        ("prefill", 17, 3.0),
    ]
    assert report.notes == ["decode: a classifier has none"]
    with pytest.raises(ZooError, match="always has 17 tokens"):
        run(VIT, seq=(16,))
    assert len(run(VIT, seq=(17,), phases=("prefill",)).rows) == 1


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"phases": ("trian",)}, "unknown phase 'trian'; did you mean 'train'"),
        ({"seq": (65,)}, "seq: expected 1 to 64, the spec's context; got 65"),
        ({"past": (64,)}, "past: expected 0 to 63, .* got 64"),
        ({"dtype": "float31"}, "did you mean 'float32'"),
    ],
)
def test_mistakes_are_told_before_anything_is_built(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(ZooError, match=message):
        plan(spec(), CPU, Request(**wanted))


@pytest.mark.parametrize(("dtype", "note"), [("float16", "needs a GPU"), ("float64", "not in float64")])
def test_what_a_device_does_not_train_in_is_a_note(dtype: str, note: str) -> None:
    items, notes = plan(spec(), CPU, Request(dtype=dtype))
    assert {item.phase for item in items} == {"prefill", "decode"}
    assert len(notes) == 1 and note in notes[0]


def test_regression_and_what_has_no_state() -> None:
    regression = VIT.replace("{type: classifier, classes: 10}", "{type: regression, outputs: 3}")
    assert [row.failure for row in run(regression).rows] == [None, None]


def test_default_lengths_of_the_past() -> None:
    assert default_pasts(1024) == (16, 64, 256, 1023)
    assert default_pasts(16) == (1, 4, 15)
    assert default_pasts(1) == ()


def test_running_out_of_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 5 bytes.")

    monkeypatch.setattr(Model, "forward_case", full)
    report = run(seq=(8,), past=(5,))
    assert [row.failure is None for row in report.rows] == [True, False, True]
    assert "out of memory while measuring prefill 8: 5 bytes" in str(report.rows[1].failure)


def test_what_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo.model, "build", lambda *_, **__: pytest.fail("built"))
    report = run(device=replace(CPU, memory=1000), seq=(8,), past=(5,))
    assert all("counted to take" in str(row.failure) and "of 1KB" in str(row.failure) for row in report.rows)


def test_an_error_that_is_no_lack_of_memory_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Model, "forward_case", lambda *_: pytest.fail.Exception("x") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(phases=("prefill",))


def test_an_interrupt_ends_with_what_is_there() -> None:
    def stop(done: int, items: int, name: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    report = run(seq=(8,), past=(5,), progress=stop)
    assert report.interrupted and [row.item.phase for row in report.rows] == ["train", "prefill"]


@pytest.mark.parametrize("precision", ["32", "bf16"])
@pytest.mark.parametrize("text", [LM, VIT])
def test_a_training_step_makes_gradients_and_moves_nothing(text: str, precision: str) -> None:
    model = build(spec(text))
    before = [parameter.clone() for parameter in model.parameters()]
    step = training_case(model, 2, 16, precision)
    with torch.inference_mode():
        step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert any(bool(parameter.grad.any()) for parameter in model.parameters() if parameter.grad is not None)
    torch.testing.assert_close(list(model.parameters()), before, rtol=1e-6, atol=1e-7)
