"""What `bench.gpu` records and `zoo kernels bench` prints, without a GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import gpu
from zoo.cli.facts import print_kernel_timings


def test_a_row_that_was_begun_counts_as_a_crash_and_is_not_begun_again(tmp_path: Path) -> None:
    journal = gpu.Journal(tmp_path / "rows.jsonl")
    assert journal.begin("a", primitive="route") and journal.begin("b")
    journal.add({"name": "a", "primitive": "route", "right": True, "error": ""})
    again = gpu.Journal(journal.path)
    assert again.rows["a"]["right"] and again.rows["b"]["error"] == gpu.CRASHED
    assert not again.begin("a") and not again.begin("b") and again.begin("c")


def test_sections_add_up_and_are_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "timings" / "h200.json"
    norm = {"what": "norm", "ms": 2.0, "share": 0.95, "rival": "PyTorch", "ratio": 1.5, "at_least": 1.0, "met": True}
    route = {"what": "route", "error": gpu.CRASHED}
    rates = {"name": "rates", "copy_bytes_per_second": 4e12}
    gpu.written(file, "H200", {"norms": {"rates": rates, "n": {"name": "n", "timed": [norm]}}})
    checked = {"name": "route-top-3", "primitive": "route", "right": False, "error": "off"}
    gpu.written(file, "H200", {"products": {"r": {"name": "r", "timed": [route]}, "c": checked}})
    record = json.loads(file.read_text())
    assert [row["section"] for row in record["rows"]] == ["norms", "products"]
    assert record["copy_bytes_per_second"] == 4e12 and record["versions"] and record["date"]
    monkeypatch.setattr("importlib.resources.files", lambda _: tmp_path)
    print_kernel_timings(as_json=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "H200" in shown and "met" in shown and "0 configurations right, 1 wrong route-top-3" in shown


def test_a_missed_bar_and_what_is_absent_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    timed = [
        {"what": "norm", "rival": "PyTorch", "ratio": 0.5, "at_least": 1.0, "met": False},
        {"what": "norm", "rival": "Liger", "at_least": 2.0, "error": "not installed"},
    ]
    found = {"norms": {"n": {"name": "n", "timed": timed}}}
    assert gpu._summed_up(found, [], judged=True) == 1 and gpu._summed_up(found, [], judged=False) == 0
    out = capsys.readouterr().out
    assert "MISSED: norm, PyTorch: 0.5, asked 1.0" in out and "not installed: Liger; `make rivals`" in out
