"""What modules take while a model runs, by a clock that only they move."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.hardware.pretended import DEVICE
from zoo.accounting import Piece
from zoo.cost import Cost
from zoo.device import resolve_device
from zoo.hardware import stopwatch
from zoo.hardware.calibrate import rows
from zoo.hardware.features import features, summed
from zoo.hardware.modules import ModuleTimes
from zoo.hardware.samples import Sample
from zoo.hardware.stopwatch import DeviceStopwatch, Readings
from zoo.latency import Case, Timing
from zoo.model import build
from zoo.spec.document import load, parse
from zoo.train.bench import trainer


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Work(nn.Module):
    """Takes so many seconds by itself, half of them in front of what is inside it."""

    def __init__(self, clock: Clock, seconds: float, *inside: Work) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.inside = nn.ModuleList(inside)

    def forward(self) -> None:
        self.clock.now += self.seconds / 2
        for module in self.inside:
            module()
        self.clock.now += self.seconds / 2


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_each_module_takes_what_those_inside_it_do_not(clock: Clock) -> None:
    model = Work(clock, 1.0, Work(clock, 2.0, Work(clock, 4.0)), Work(clock, 8.0))
    times = ModuleTimes(model, ["inside.0", "inside.0.inside.0", "inside.1"], DEVICE, clock)
    timed = times.timed(model)
    timed()
    timed()
    assert clock.now == 30
    assert times.seconds() == {"inside.0": [2, 2], "inside.0.inside.0": [4, 4], "inside.1": [8, 8]}
    assert times.seconds() == {}, "what was read is forgotten"


def test_a_module_that_is_not_timed_counts_to_the_one_around_it(clock: Clock) -> None:
    model = Work(clock, 1.0, Work(clock, 2.0, Work(clock, 4.0)))
    times = ModuleTimes(model, ["inside.0"], DEVICE, clock)
    times.timed(model)()
    assert times.seconds() == {"inside.0": [6]}


def test_a_module_called_twice_has_two_times_and_one_that_is_not_called_none(clock: Clock) -> None:
    inner, idle = Work(clock, 3.0), Work(clock, 5.0)
    model = nn.ModuleDict({"inner": inner, "idle": idle})
    times = ModuleTimes(model, ["inner", "idle"], DEVICE, clock)
    times.timed(lambda: (inner(), inner()))()
    assert times.seconds() == {"inner": [3, 3]}


def test_modules_are_as_they_were_also_behind_an_error(clock: Clock) -> None:
    class Broken(Work):
        def forward(self) -> None:
            self.clock.now += 1
            raise ValueError

    model = Work(clock, 1.0, Broken(clock, 0.0))
    times = ModuleTimes(model, ["inside.0"], DEVICE, clock)
    with pytest.raises(ValueError):
        times.timed(model)()
    assert all("forward" not in vars(module) for module in model.modules())


LINEAR = Cost(kind="linear", flops=8.0)
ADD = Cost(kind="elementwise", pointwise=2.0)


def piece(path: str, cost: Cost, kind: str) -> Piece:
    return Piece(path, kind, cost.operators)


def test_pieces_that_were_not_called_count_to_what_they_stand_in() -> None:
    part = [
        piece("layer", ADD, "layer"),
        piece("layer.channel", Cost(), "glu"),
        piece("layer.channel.gate", LINEAR, "dense"),
        piece("layer.channel.activation", ADD, "silu"),
    ]
    found = rows([part], "forward", {"layer": 1.0, "layer.channel": 2.0, "layer.channel.gate": 4.0})
    by_seconds = {seconds: counts for counts, seconds in found}
    assert set(by_seconds) == {1.0, 2.0, 4.0}
    assert by_seconds[2.0]["elementwise.pointwise"] == 2 and by_seconds[2.0]["silu.modules"] == 1
    assert "silu.modules" not in by_seconds[1.0] and by_seconds[4.0]["linear.flops"] == 8


def test_modules_inside_a_piece_count_to_it() -> None:
    found = rows([[piece("mixer", LINEAR, "token_mlp")]], "forward", {"mixer": 1.0, "mixer.up": 2.0, "mixer.down": 4.0})
    ((counts, seconds),) = found
    assert seconds == 7 and counts["linear.flops"] == 8 and counts["token_mlp.modules"] == 1


def test_pieces_that_do_the_same_are_one_row() -> None:
    part = [piece(f"layers.{index}", LINEAR, "dense") for index in range(3)] + [piece("layers.3", ADD, "dense")]
    found = rows([part], "forward", {f"layers.{index}": 2.0**index for index in range(4)})
    assert sorted(seconds for _, seconds in found) == [7, 8]
    assert next(counts for counts, seconds in found if seconds == 7)["linear.flops"] == 24


def test_a_device_reads_samples_and_their_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SETTLE_SECONDS", 0.0)
    sample = Sample(load("tiny-bytes"), 2, 16, 8, True)
    known = dict(build(sample.spec, device="meta").named_modules())
    (readings,), sentinel = DeviceStopwatch(resolve_device("cpu", 1)).read([sample])
    assert set(readings) == {"forward", "decode"} and sentinel > 0
    for phase, reading in readings.items():
        assert reading.seconds > 0 and all(seconds >= 0 for seconds in reading.modules.values())
        called = set(reading.modules)
        assert {"stem", "head"} <= called <= known.keys() and any(path.endswith("mixer") for path in called)
        # Nothing that is counted is lost on the way to the rows that a fit sees.
        found = rows(sample.parts(phase), phase, reading.modules)
        whole = summed(counts for counts, _ in found)
        assert whole == pytest.approx(features(sample.parts(phase), phase))
        assert sum(seconds for _, seconds in found) == pytest.approx(sum(reading.modules.values()))


def test_readings_are_as_if_the_sentinel_had_never_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = Sample(load("tiny-bytes"), 1, 8, 4, True)

    def read(*paces: float) -> Readings:
        def measured(cases: Mapping[str, Case], **_: Any) -> dict[str, Timing]:
            with torch.inference_mode():
                for case in cases.values():
                    case()
            return dict.fromkeys(cases, Timing((2.0, 4.0, 4.0), paces))

        monkeypatch.setattr(stopwatch, "measure", measured)
        ticks = itertools.count()
        (found,), pace = DeviceStopwatch(resolve_device("cpu", 1), clock=lambda: float(next(ticks))).read([sample])
        assert pace == 3
        return found

    even, uneven = read(3.0, 3.0, 3.0), read(3.0, 6.0, 3.0)
    for phase in sample.phases:
        assert (even[phase].seconds, uneven[phase].seconds) == (4, 2)
        assert any(even[phase].modules.values())
        assert uneven[phase].modules == pytest.approx({path: time / 2 for path, time in even[phase].modules.items()})


def test_a_thorough_sample_is_trained_and_its_memory_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SETTLE_SECONDS", 0.0)
    device, spec = resolve_device("cpu", 1), load("tiny-bytes")
    sample = Sample(spec, 2, 16, 8, True, thorough=True)
    (found,), _ = DeviceStopwatch(device, trainer(device, "float32")).read([sample])
    assert set(found) == {"forward", "decode", "train"}
    assert found["train"].seconds > found["forward"].seconds and not found["train"].modules
    for phase, reading in found.items():
        assert reading.held == pytest.approx(sample.held(phase), rel=0.1)
    (untrained,), _ = DeviceStopwatch(device).read([sample])
    assert set(untrained) == {"forward", "decode"} and untrained["decode"].held is not None
    (quick,), _ = DeviceStopwatch(device, trainer(device, "float32")).read([replace(sample, thorough=False)])
    assert set(quick) == {"forward", "decode"} and quick["forward"].held is None


def test_the_memory_of_decoding_counts_both_states_of_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "SETTLE_SECONDS", 0.0)
    mixers = ("{type: attention, heads: 4, window: 48}", "{type: attention, heads: 4}")
    layers = ", ".join(f"{{mixer: {mixer}, channel: glu}}" for mixer in mixers)
    around = "width: 64, context: 512, stem: {type: token, vocab: 64}, head: language_model"
    sample = Sample(parse(f"{{{around}, body: {{layers: [{layers}]}}}}"), 8, 16, 256, True, thorough=True)
    (found,), _ = DeviceStopwatch(resolve_device("cpu", 1)).read([sample])
    assert found["decode"].held == pytest.approx(sample.held("decode"), rel=0.03)


def test_nobody_trains_where_no_loss_or_precision_belongs_to_it() -> None:
    sample = Sample(load("tiny-bytes"), 1, 8, 0, True)
    assert trainer(resolve_device("cpu", 1), "float16")(sample) is None


def test_models_run_as_before_while_they_are_timed() -> None:
    model = build(load("tiny-bytes")).eval()
    case = model.forward_case(1, 8)
    times = ModuleTimes(model, ["stem", "head"], DEVICE)
    with torch.inference_mode():
        plain: Any = case()
        timed: Any = times.timed(case)()
    torch.testing.assert_close(plain.logits, timed.logits, rtol=0, atol=0)
