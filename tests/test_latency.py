from __future__ import annotations

import errno
import gc
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.device import Device
from zoo.latency import (
    Context,
    LatencyCache,
    LatencySource,
    MeasuredLatency,
    Timing,
    default_folder,
    measure,
    pinned_threads,
)

CPU = Device("cpu", "cpu", "test", 2, 1, None, "2.13.0", "3.11.7")
KEY = ("device", "spec", "forward batch=1 seq=8 dtype=float32")


@dataclass
class FakeClock:
    """A clock that only its cases advance; `calls` has their names in order."""

    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now

    def case(self, name: str, *seconds: float) -> Callable[[], object]:
        """A case that takes the given times in turn, the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.calls.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_cases_are_warmed_up_and_interleaved_in_abba_order() -> None:
    clock = FakeClock()
    cases = {"a": clock.case("a", 9, 9, 1, 2, 3), "b": clock.case("b", 9, 9, 4)}
    timings = measure(cases, device=CPU, repeats=3, warmup=2, min_seconds=0, max_seconds=100, clock=clock)
    assert "".join(clock.calls) == "aabb" + "ab" + "ba" + "ab"
    assert timings == {"a": Timing((1, 2, 3)), "b": Timing((4, 4, 4))}
    assert measure({}, device=CPU) == {}


def test_each_timed_run_comes_behind_a_case_that_has_settled() -> None:
    clock = FakeClock()
    cases = {"a": clock.case("a", 0.25), "b": clock.case("b", 3)}
    timings = measure(cases, device=CPU, repeats=2, warmup=0, min_seconds=0, max_seconds=100, clock=clock, settle=0.5)
    assert "".join(clock.calls) == "aaa" + "bb" + "b" + "aaa", "what takes over a second sees to that itself"
    assert [len(timing.runs) for timing in timings.values()] == [2, 2]


def test_the_pace_is_taken_warm_between_all_runs() -> None:
    clock = FakeClock()
    pace = clock.case("p", *[1] * 4, 9, 4, 9, 1, 9, 9)
    cases = {"a": clock.case("a", 8, 10), "b": clock.case("b", 6, 30)}
    found = measure(cases, device=CPU, repeats=2, warmup=0, min_seconds=0, max_seconds=100, clock=clock, pace=pace)
    assert "".join(clock.calls) == "pp" + "app" + "bpp" + "bpp" + "app"
    assert found == {"a": Timing((8, 10), (1, 3)), "b": Timing((6, 30), (2, 2))}
    assert found["a"].at(3) == Timing((24, 10)) and found["b"].at(1) == Timing((3, 15))


def test_a_pace_of_no_time_changes_nothing() -> None:
    assert Timing((2.0, 4.0), (0.0, 2.0)).at(1.0) == Timing((2.0, 2.0))


def test_a_case_that_takes_no_time_settles_all_the_same() -> None:
    clock = FakeClock()
    timing = measure({"a": clock.case("a", 0.0)}, device=CPU, repeats=2, min_seconds=0, clock=clock, settle=0.5)["a"]
    assert timing.runs == (0.0, 0.0)


@pytest.mark.parametrize(
    ("seconds", "runs"),
    [(0.1, 20), (0.001, 200), (0.0, 1000), (3.0, 4), (60.0, 2)],
)
def test_runs_are_enough_but_not_too_many(seconds: float, runs: int) -> None:
    clock = FakeClock()
    timing = measure({"a": clock.case("a", seconds)}, device=CPU, warmup=0, clock=clock)["a"]
    assert len(timing.runs) == pytest.approx(runs, abs=1)


def test_a_slow_case_is_not_warmed_up_for_long() -> None:
    clock = FakeClock()
    measure({"a": clock.case("a", 60)}, device=CPU, warmup=3, clock=clock)
    assert len(clock.calls) == 1 + 2


def test_conditions_hold_inside_and_are_restored() -> None:
    seen: list[tuple[int, bool, bool]] = []

    def case() -> None:
        seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled(), gc.isenabled()))

    def broken() -> None:
        case()
        raise RuntimeError("broken")

    before = torch.get_num_threads()
    measure({"a": case}, device=CPU, repeats=2, warmup=1, min_seconds=0, threads=before + 2)
    with pytest.raises(RuntimeError, match="broken"):
        measure({"a": broken}, device=replace(CPU, threads=before + 2))
    assert set(seen) == {(before + 2, True, False)}
    assert (torch.get_num_threads(), torch.is_inference_mode_enabled(), gc.isenabled()) == (before, False, True)
    gc.disable()
    try:
        measure({"a": case}, device=CPU, repeats=2, min_seconds=0)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_a_gpu_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    clock = FakeClock()

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.at = clock.now

        def elapsed_time(self, other: Event) -> float:
            assert log[-1] == "synchronize"
            return 1000 * (other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "device", lambda _: pinned_threads(torch.get_num_threads()))
    case = clock.case("a", 0.5)
    timing = measure({"a": case}, device=replace(CPU, name="cuda:0", kind="cuda"), repeats=2, warmup=0, min_seconds=0)
    assert timing["a"].runs == pytest.approx((0.5, 0.5))
    assert log == ["synchronize", "record", "record", "synchronize"] * 2


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=40), st.floats(0.01, 0.99))
def test_quantiles_are_those_of_numpy(runs: list[float], q: float) -> None:
    timing = Timing(tuple(runs))
    assert timing.quantile(q) == pytest.approx(float(np.quantile(runs, q)))
    assert timing.median == pytest.approx(float(np.median(runs)))
    assert timing.low <= timing.median <= timing.high
    low, high = timing.interval(q)
    assert min(runs) <= low <= timing.quantile(q) <= high <= max(runs)


@pytest.mark.parametrize("q", [0.5, 0.9])
def test_the_interval_covers_the_quantile_nine_times_in_ten(q: float) -> None:
    random = np.random.default_rng(0)
    exact = -np.log1p(-q)
    intervals = [Timing(tuple(random.exponential(size=100))).interval(q) for _ in range(400)]
    covered = np.mean([low <= exact <= high for low, high in intervals])
    assert 0.87 < covered < 0.98


def test_cached_timings_survive_the_process(tmp_path: Path) -> None:
    timing = Timing((0.1, 0.25))
    cache = LatencyCache(tmp_path / "new" / "folder")
    assert cache.get(KEY) is None
    cache.put(KEY, timing)
    assert cache.get(KEY) == timing
    other = LatencyCache(tmp_path / "new" / "folder")
    assert other.get(KEY) == timing
    assert other.get(("other", *KEY[1:])) is None
    cache.put(KEY, Timing((0.5,)))
    assert LatencyCache(tmp_path / "new" / "folder").get(KEY) == Timing((0.5,))


def test_a_cache_sees_what_another_process_appends(tmp_path: Path) -> None:
    ours, theirs = LatencyCache(tmp_path), LatencyCache(tmp_path)
    ours.put(("a", "b", "c"), Timing((1.0,)))
    assert theirs.get(("a", "b", "c")) == Timing((1.0,))
    theirs.put(("d", "e", "f"), Timing((2.0,)))
    assert ours.get(("d", "e", "f")) == Timing((2.0,))
    (tmp_path / "latency.jsonl").write_bytes(b"")
    assert theirs.get(("g", "h", "i")) is None
    ours.put(("g", "h", "i"), Timing((3.0,)))
    assert theirs.get(("g", "h", "i")) == Timing((3.0,))


@pytest.mark.parametrize(
    "damage",
    [
        b"not json\n",
        b"[]\n",
        b"null\n",
        b"\xff\xfe\n",
        b"{}\n",
        b"[" * 100_000 + b"\n",
        b'{"device": 1, "spec": "s", "context": "c", "runs": [1]}\n',
        b'{"device": "d", "spec": "s", "context": "c", "runs": []}\n',
        b'{"device": "d", "spec": "s", "context": "c", "runs": [NaN]}\n',
        b'{"device": "d", "spec": "s", "context": "c", "runs": [-1]}\n',
        b'{"device": "d", "spec": "s", "context": "c", "runs": {"a": 1}}\n',
    ],
)
def test_damaged_lines_are_skipped_with_a_warning(damage: bytes, tmp_path: Path) -> None:
    LatencyCache(tmp_path).put(KEY, Timing((1.0,)))
    file = tmp_path / "latency.jsonl"
    file.write_bytes(damage + file.read_bytes())
    with pytest.warns(UserWarning, match="skipped 1 unreadable lines"):
        assert LatencyCache(tmp_path).get(KEY) == Timing((1.0,))


def test_a_line_that_a_killed_process_left_unfinished_costs_only_itself(tmp_path: Path) -> None:
    file = tmp_path / "latency.jsonl"
    LatencyCache(tmp_path).put(KEY, Timing((1.0,)))
    whole = file.read_bytes()
    for cut in range(1, len(whole)):
        file.write_bytes(whole + whole[:cut])
        LatencyCache(tmp_path).put(("a", "b", "c"), Timing((2.0,)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cache = LatencyCache(tmp_path)
            assert cache.get(KEY) == Timing((1.0,))
            assert cache.get(("a", "b", "c")) == Timing((2.0,))


def test_a_folder_that_cannot_be_written_is_mentioned_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="timings are not kept on disk") as caught:
        cache = LatencyCache(tmp_path / "file" / "folder")
        cache.put(KEY, Timing((1.0,)))
        cache.put(("a", "b", "c"), Timing((2.0,)))
        assert cache.get(KEY) == Timing((1.0,))
        assert cache.get(("x", "y", "z")) is None
    assert len(caught) == 1


@pytest.mark.parametrize("written", [None, 10])
def test_a_full_disk_leaves_no_half_line(written: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = LatencyCache(tmp_path)
    cache.put(KEY, Timing((1.0,)))
    before = (tmp_path / "latency.jsonl").read_bytes()
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if written is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:written])

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="No space left") as caught:
        cache.put(("a", "b", "c"), Timing((2.0,)))
        cache.put(("d", "e", "f"), Timing((2.0,)))
    assert len(caught) == 1
    assert (tmp_path / "latency.jsonl").read_bytes() == before
    assert cache.get(("a", "b", "c")) == Timing((2.0,))


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from zoo.latency import *\n"
        "cache = LatencyCache(sys.argv[1])\n"
        "for i in range(300): cache.put((sys.argv[2], str(i), 'c'), Timing((float(i),) * 30))\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path), name]) for name in "ab"]
    assert [writer.wait() for writer in writers] == [0, 0]
    lines = (tmp_path / "latency.jsonl").read_text().splitlines()
    assert sorted((r["device"], int(r["spec"])) for r in map(json.loads, lines)) == [
        (name, i) for name in "ab" for i in range(300)
    ]


def test_the_default_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert default_folder() == tmp_path / "xdg" / "zoo"
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_folder() == tmp_path / ".cache" / "zoo"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.warns(UserWarning, match="home directory"):
        cache = LatencyCache()
    cache.put(KEY, Timing((1.0,)))
    assert cache.get(KEY) == Timing((1.0,))


class Built(torch.nn.Linear):
    """A model whose forward pass takes a second for each token and whose decoding step a tenth for each past one."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(2, 2)
        self.clock = clock

    def forward_case(self, batch: int, tokens: int) -> Callable[[], object]:
        assert not self.training and torch.is_inference_mode_enabled()
        return self.clock.case(f"forward {batch} {self.weight.dtype}", tokens / 1000)

    def decode_case(self, batch: int, past: int) -> Callable[[], object]:
        return self.clock.case(f"decode {batch} {self.weight.dtype}", *(past * step / 1e4 for step in range(1, 22)))


@pytest.fixture
def source(tmp_path: Path) -> SimpleNamespace:
    clock = FakeClock()
    built: list[str] = []

    def build(spec: str) -> Built:
        built.append(spec)
        return Built(clock)

    def make(**options: Any) -> MeasuredLatency[str]:
        return MeasuredLatency(CPU, build, str.upper, LatencyCache(tmp_path), clock=clock, warmup=0, **options)

    return SimpleNamespace(make=make, clock=clock, built=built)


def test_a_model_is_built_and_timed_once(source: SimpleNamespace) -> None:
    latency: LatencySource[str] = source.make()
    figure = latency.latency("spec", Context(batch=2, seq=30))
    assert (figure.seconds, figure.low, figure.high) == pytest.approx((0.03, 0.03, 0.03))
    assert (figure.source, figure.device) == ("measured", "cpu")
    assert set(source.clock.calls) == {"forward 2 torch.float32"}
    calls = len(source.clock.calls)
    assert latency.latency("spec", Context(batch=2, seq=30, past=7)) == figure, "what came before is no matter here"
    assert source.make().latency("spec", Context(batch=2, seq=30)) == figure, "the cache is on disk"
    assert (source.built, len(source.clock.calls)) == (["spec"], calls)
    latency.latency("other", Context(batch=2, seq=30))
    latency.latency("spec", Context(batch=2, seq=31))
    latency.latency("spec", Context(batch=2, seq=30, dtype="bfloat16"))
    assert source.built == ["spec", "other", "spec", "spec"]
    assert source.clock.calls[-1] == "forward 2 torch.bfloat16"


def test_decoding_and_quantiles(source: SimpleNamespace) -> None:
    latency = source.make(repeats=21, min_seconds=0)
    context = Context(past=100)
    median = latency.latency("spec", context, "decode")
    late = latency.latency("spec", context, phase="decode", quantile=0.9)
    assert source.built == ["spec"]
    assert median.seconds == pytest.approx(0.11)
    assert late.seconds == pytest.approx(0.19)
    assert median.low < median.seconds < median.high
    assert late.low < late.seconds <= late.high
    assert latency.latency("spec", replace(context, seq=5), "decode") == median
    assert latency.latency("spec", replace(context, past=200), "decode").seconds == pytest.approx(0.22)
