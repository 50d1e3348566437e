"""The commands that build, train and search, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SPACE = """
zoo: 1
name: tiny
width: {choice: [16, 24]}
context: 16
stem: {type: token, vocab: 256}
body:
  layers:
    repeat: {int: [1, 2]}
    of:
      mixer: {choice: [{type: attention, heads: 2}, linear_attention, identity]}
      channel: {type: glu, hidden: {choice: [16, 32]}}
head: language_model
"""
SPEC = """
zoo: 1
width: 16
context: 16
stem: {type: token, vocab: 256}
body: {layers: [{mixer: {type: attention, heads: 2}, channel: glu}]}
head: language_model
"""
SEARCH = ["search", "space.yaml", "--data", "bytes:text.txt", "--steps", "3", "--batch", "2", "--threads", "1"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "space.yaml").write_text(SPACE)
    (tmp_path / "spec.yaml").write_text(SPEC)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 200)
    return tmp_path


def command(folder: Path, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    program = [sys.executable, "-c", "from zoo.cli import main; main()", *arguments]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), "COLUMNS": "120"}
    pipe = subprocess.PIPE
    return subprocess.Popen(program, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True, **options)


def run(folder: Path, *arguments: str, code: int = 0) -> tuple[str, str]:
    """Standard output and error of a command that must end with `code`, and never with a traceback."""
    process = command(folder, *arguments)
    out, error = process.communicate(timeout=300)
    assert "Traceback" not in error, error
    assert process.returncode == code, (out, error)
    return out, error


def test_build_saves_what_load_model_reads(folder: Path) -> None:
    import zoo

    out, _ = run(folder, "build", "spec.yaml", "--save", "model.safetensors", "--json", "--seed", "3")
    facts = json.loads(out)
    assert facts["params"] == facts["counted_params"]
    model = zoo.load_model(folder / "model.safetensors")
    assert model.spec.hash == facts["hash"]
    again = zoo.build(zoo.load(folder / "spec.yaml"), seed=3)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_build_on_meta_has_nothing_to_save(folder: Path) -> None:
    assert "parameters" in run(folder, "build", "gpt3-175b", "--device", "meta")[0]
    _, error = run(folder, "build", "spec.yaml", "--device", "meta", "--save", "x.safetensors", code=2)
    assert "no weights to save" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "byts"], "did you mean 'bytes'"),
        (["--data", "digits"], "needs a classifier"),
        (["--data", "bytes:missing"], "no file or folder"),
        (["--data", "bytes:text.txt", "--accumulate", "3"], "cannot be cut into 3"),
        (["--data", "bytes:text.txt", "--context", "64"], "the spec's context is 16"),
    ],
)
def test_a_mistake_is_told_before_anything_is_trained(folder: Path, arguments: list[str], message: str) -> None:
    _, error = run(folder, "train", "spec.yaml", *arguments, code=2)
    assert message in error
    assert not (folder / "runs").exists()


def test_training_goes_on_where_it_stopped(folder: Path) -> None:
    train = ["train", "spec.yaml", "--data", "bytes:text.txt", "--batch", "2", "--threads", "1", "--out", "run"]
    first = json.loads(run(folder, *train, "--steps", "6", "--json")[0])
    assert first["steps"] == 6 and Path(folder / first["weights"]).exists()
    again = json.loads(run(folder, *train, "--steps", "6", "--json")[0])
    assert again["bits_per_byte"] == first["bits_per_byte"]
    _, error = run(folder, *train, "--steps", "6", "--learning-rate", "0.5", code=2)
    assert "learning_rate" in error and "--fresh" in error and "resume=" not in error


@pytest.mark.parametrize("kind", ["train", "search"])
def test_what_a_script_runs_in_the_background_can_be_interrupted(folder: Path, kind: str) -> None:
    long = ["train", "spec.yaml", "--data", "bytes:text.txt", "--batch", "2", "--threads", "1", "--steps", "1000000"]
    search = [*SEARCH, "--trials", "50", "--steps", "1000000"]
    arguments = [*(long if kind == "train" else search), "--out", "run", "--evaluate-every", "5"]
    # As a shell starts a command that ends in `&`.
    process = command(folder, *arguments, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None and not [*folder.glob("run/**/metrics.csv")]:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=120)
    assert process.returncode == 130, (out, error)
    assert "interrupted" in out + error and "Traceback" not in error


def test_a_model_that_no_memory_holds_is_told(folder: Path) -> None:
    text = SPEC.replace("vocab: 256", "vocab: 16777216").replace("width: 16", "width: 4194304")
    (folder / "giant.yaml").write_text(text)
    _, error = run(folder, "build", "giant.yaml", code=2)
    assert "out of memory while building the model on cpu" in error and "--dtype bfloat16" in error


def test_a_search_leaves_specs_that_build_and_train(folder: Path) -> None:
    out, _ = run(folder, *SEARCH, "--trials", "5", "--budget", "params<=20k latency<=5s@cpu", "--out", "s", "--json")
    results = json.loads(out)
    trained = [trial for trial in results["trials"] if trial["status"] == "complete"]
    assert len(trained) == 5
    assert {trial["baseline"] for trial in trained[:3]} == {"attention", "linear_attention", "identity"}
    assert all(trial["metrics"]["params"] <= 20_000 for trial in trained)
    assert len({trial["spec_hash"] for trial in trained}) == 5
    assert "<html" in (folder / "s" / "report.html").read_text()
    run(folder, "build", "s/best.yaml")
    run(folder, "train", "s/best.yaml", "--data", "bytes:text.txt", "--steps", "2", "--batch", "2")
    fronts = list((folder / "s" / "front").glob("*.yaml"))
    assert "are valid" in run(folder, "validate", "s/best.yaml", *map(str, fronts))[0]
    assert "report" in run(folder, "report", "s")[0]


def test_a_search_that_is_killed_goes_on(folder: Path) -> None:
    search = [*SEARCH, "--trials", "6", "--objective", "loss", "--out", "s"]
    process = command(folder, *search)
    journal = folder / "s" / "study.journal"
    limit = time.monotonic() + 120
    while time.monotonic() < limit and process.poll() is None:
        if journal.exists() and journal.read_text().count("\n") > 4:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = json.loads(run(folder, "report", "s", "--json")[0])["trials"]
    after = json.loads(run(folder, *search, "--json")[0])["trials"]
    assert [trial["point"] for trial in after[: len(before)]] == [trial["point"] for trial in before]
    assert sum(trial["status"] == "complete" for trial in after) == 6


def test_an_impossible_budget_says_what_is_reachable(folder: Path) -> None:
    _, error = run(folder, *SEARCH, "--budget", "params<=100", "--out", "s", code=3)
    assert "smallest reachable value" in error


def test_another_search_in_the_same_folder_is_refused(folder: Path) -> None:
    run(folder, *SEARCH, "--trials", "1", "--out", "s")
    _, error = run(folder, *SEARCH, "--trials", "1", "--out", "s", "--budget", "params<=15k", code=2)
    assert "budget" in error and "--fresh" in error
    run(folder, *SEARCH, "--trials", "1", "--out", "s", "--budget", "params<=15k", "--fresh")
