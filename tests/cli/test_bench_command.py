"""`zoo bench`, as a user runs it."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from zoo.cli import main

SPEC = """
width: 16
context: 16
stem: {type: token, vocab: 256}
body: {layers: [{mixer: {type: attention, heads: 2}, channel: glu}]}
head: language_model
"""
QUICK = ("--threads", "1", "--repeats", "2")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "classifier.yaml").write_text(SPEC.replace("language_model", "{type: classifier, classes: 3}"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    # What is said does not depend on how long each was timed.
    import zoo.train.bench

    real = zoo.train.bench.measure

    def short(cases: Any, **options: Any) -> Any:
        return real(cases, **options, min_seconds=0.0)

    monkeypatch.setattr(zoo.train.bench, "measure", short)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["zoo", "bench", *arguments])
    with pytest.raises(SystemExit) as stop:
        main()
    return int(stop.value.code or 0)


def test_tables_for_people(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "spec.yaml", *QUICK, "--roofline", "h100") == 0
    out = str(capsys.readouterr().out)
    for name in ("train 16", "prefill 16", "decode 4", "decode 15", "tokens/s", "of peak", "least"):
        assert name in out
    assert max(map(len, out.splitlines()[1:])) <= 80 and "…" not in out


def test_json_for_scripts_and_files(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--phases", "prefill, decode", "--seq", "16,8", "--past", "3", "--batch", "2", "--dtype", "bf16")
    assert run(monkeypatch, "spec.yaml", *QUICK, *wanted, "--json", "--out", "figures.json") == 0
    found = json.loads(str(capsys.readouterr().out))
    assert found == json.loads((folder / "figures.json").read_text())
    assert [(row["phase"], row.get("seq"), row.get("past")) for row in found["rows"]] == [
        ("prefill", 8, None),
        ("prefill", 16, None),
        ("decode", None, 3),
    ]
    assert all(row["low"] <= row["median"] <= row["high"] and row["memory"] > 0 for row in found["rows"])
    assert found["device"]["threads"] == 1 and re.fullmatch("[0-9a-f]{12}", found["device"]["id"])
    assert set(found["versions"]) == {"zoo", "torch", "python"} and found["date"].endswith("+00:00")


def test_a_classifier_has_no_decoding(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "classifier.yaml", *QUICK, "--phases", "decode") == 0
    assert capsys.readouterr().out == "decode: a classifier has none\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--phases", "train,prefil"], "unknown phase 'prefil'; did you mean 'prefill'?"),
        (["--seq", "8,x"], "--seq: expected lengths such as 128,512; got '8,x'"),
        (["--seq", "17"], "seq: expected 1 to 16, the spec's context; got 17"),
        (["--past", "16"], "past: expected 0 to 15"),
        (["--dtype", "bfloat61"], "did you mean 'bfloat16'?"),
        (["--device", "gpu"], "did you mean 'cuda'?"),
        (["--roofline", "h10"], "did you mean 'h100'?"),
        (["--predict", "--threads", "3"], "`zoo device calibrate"),
        (["--out", "missing/figures.json"], "there is no folder missing"),
        (["--out", "."], "it is a folder"),
    ],
)
def test_mistakes(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(monkeypatch, "spec.yaml", *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_calibration_is_held_against_what_is_measured_and_the_machine_against_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.accounting import Workload
    from zoo.device import resolve_device
    from zoo.hardware.features import features
    from zoo.hardware.predictor import Predictor
    from zoo.hardware.profile import load_profile
    from zoo.hardware.regression import Regression
    from zoo.hardware.stopwatch import DeviceStopwatch
    from zoo.hardware.store import calibration_path
    from zoo.hardware.work import parts_of
    from zoo.spec.document import load

    device = resolve_device("cpu", 1)
    names = tuple(features(parts_of(load(folder / "spec.yaml"), Workload(1, 16, 8), "decode"), "decode"))
    found = Regression(names, np.full(len(names), 1e-9), np.eye(len(names)), np.linspace(-0.1, 0.1, 41), np.ones(41))
    Predictor(load_profile("h100"), device.id, "float32", {"decode": found}, {"decode": 1e6}, 1e-3).save(
        calibration_path(device, "float32")
    )
    monkeypatch.setattr(DeviceStopwatch, "sentinel", lambda self: 1.25e-3)
    asked = ("--phases", "decode", "--past", "8", "--predict")
    assert run(monkeypatch, "spec.yaml", *QUICK, *asked, "--roofline", "raspberry-pi-4") == 0
    out = str(capsys.readouterr().out)
    assert "as when it was calibrated, the machine now takes 1.25 times as long" in " ".join(out.split())
    assert max(map(len, out.splitlines())) <= 80
    for name in ("time / measured   predicted", "least on raspberry-pi-4   ratio   of peak", "memory / measured"):
        assert name in out
    assert run(monkeypatch, "spec.yaml", *QUICK, *asked, "--json") == 0
    data = json.loads(str(capsys.readouterr().out))
    assert data["drift"] == 1.25
    found = data["rows"][0]["predicted"]
    assert 0 < found["low"] < found["seconds"] < found["high"] and found["source"] == "predicted"
    calibration_path(device, "float32").unlink()


def test_an_interrupt_prints_what_is_there(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zoo.model import Model

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Model, "decode_case", interrupted)
    assert run(monkeypatch, "spec.yaml", *QUICK, "--out", "figures.json") == 130
    out = str(capsys.readouterr().out)
    assert "prefill 16" in out and "decode" not in out and "interrupted" in out
    assert json.loads((folder / "figures.json").read_text())["interrupted"]
