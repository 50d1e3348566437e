"""The loop: cut and continued equals uncut, parts equal the whole, and every way in which a run can end."""

from __future__ import annotations

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tolerance
import torch
from torch import nn
from train.tiny_models import Output, TinyClassifier, TinyLanguageModel

from zoo.errors import OutOfMemoryError, ZooError
from zoo.train.checkpoint import load_checkpoint, load_weights
from zoo.train.data import Data, load_data
from zoo.train.loop import TrainResult, evaluate, fit
from zoo.train.module import loss_sum
from zoo.train.progress import Progress
from zoo.train.settings import TrainSettings

COPY = "copy:length=4,vocab=8"


def settings(**changes: Any) -> TrainSettings:
    common = {"data": COPY, "steps": 20, "batch": 8, "evaluate_samples": 16, "evaluate_every": 5, "device": "cpu"}
    return TrainSettings.parse(common | changes)


def small(**options: Any) -> TinyLanguageModel:
    return TinyLanguageModel(vocab=8, width=8, **options)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_equal(one: nn.Module, two: nn.Module) -> None:
    for (name, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def stop_after(step: int) -> Callable[[], bool]:
    """A `should_stop` that ends a run once `step` steps are done."""
    calls = iter(range(10**9))
    return lambda: next(calls) >= step


# Exact resume


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"accumulate": 4, "schedule": "wsd", "decay_share": 0.5},
        {"evaluate_every": 7, "checkpoint_every": 3},
        {"precision": "bf16"},
        {"data": "digits", "batch": 16},
    ],
    ids=["plain", "accumulated", "unaligned", "bf16", "digits"],
)
@pytest.mark.parametrize("cut", [10, 13])
def test_a_run_in_parts_equals_the_run_in_one(tmp_path: Path, changes: dict, cut: int) -> None:
    def model() -> nn.Module:
        return TinyClassifier() if changes.get("data") == "digits" else small(dropout=0.3, auxiliary=True)

    chosen = settings(weights="last", log_every=1, **changes)
    straight, parted = model(), model()
    whole = fit(straight, chosen, tmp_path / "whole")
    first = fit(parted, chosen, tmp_path / "parts", should_stop=stop_after(cut))
    assert (first.steps, first.stopped) == (cut, "pruned")
    torch.manual_seed(99)
    fresh = model()
    for parameter in fresh.parameters():
        nn.init.normal_(parameter)
    second = fit(fresh, chosen, tmp_path / "parts", resume="always")
    assert (second.steps, second.stopped) == (20, "finished")
    assert_equal(straight, fresh)
    assert (whole.best, whole.best_step, whole.valid, whole.train_loss) == (
        second.best,
        second.best_step,
        second.valid,
        second.train_loss,
    )
    timed = ("seconds", "tokens_per_second")
    history = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows(tmp_path / f)] for f in ("whole", "parts")
    ]
    assert history[0] == history[1]
    optimizers = [load_checkpoint(tmp_path / f / "last.ckpt")["optimizer"] for f in ("whole", "parts")]
    assert optimizers[0]["param_groups"] == optimizers[1]["param_groups"]
    for index, one in optimizers[0]["state"].items():
        for name, value in one.items():
            assert torch.equal(value, optimizers[1]["state"][index][name])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["32", "bf16", "16"])
def test_a_run_on_a_gpu_is_continued(tmp_path: Path, precision: str) -> None:
    chosen = settings(device="cuda", precision=precision, weights="last", accumulate=2)
    straight, parted = small(dropout=0.3), small(dropout=0.3)
    fit(straight, chosen, tmp_path / "whole")
    fit(parted, chosen, tmp_path / "parts", should_stop=stop_after(13))
    fit(parted, chosen, tmp_path / "parts", resume="always")
    assert_equal(straight, parted)


def test_evaluating_changes_nothing(tmp_path: Path) -> None:
    often, rarely = small(dropout=0.3), small(dropout=0.3)
    fit(often, settings(weights="last", evaluate_every=1), tmp_path / "often")
    fit(rarely, settings(weights="last", evaluate_every=20), tmp_path / "rarely")
    assert_equal(often, rarely)


def test_a_killed_process_is_continued(tmp_path: Path) -> None:
    """SIGKILL in mid-run, then the same call again, ends where an unharmed run ends."""
    code = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from train.test_training_loop import killable, small, fit\n"
        "fit(small(dropout=0.3), killable(), Path(sys.argv[1]))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    checkpoint = tmp_path / "killed" / "last.ckpt"
    try:
        while not checkpoint.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(0.05)
        assert process.poll() is None, "the run ended before it could be killed"
    finally:
        process.kill()
        process.wait()
    step = load_checkpoint(checkpoint)["step"]
    assert 0 < step < 1000
    chosen = killable().model_copy(update={"steps": 4000})
    straight, continued = small(dropout=0.3), small(dropout=0.3)
    limit = step + 20
    fit(straight, chosen, tmp_path / "straight", should_stop=stop_after(limit))
    fit(continued, chosen, tmp_path / "killed", should_stop=stop_after(limit - step))
    assert_equal(straight, continued)


def killable() -> TrainSettings:
    return settings(steps=4000, evaluate_every=4000, checkpoint_every=5, weights="last", threads=1)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    model, again = small(), small()
    first = fit(model, settings(), tmp_path)
    checkpoint = (tmp_path / "last.ckpt").stat().st_mtime_ns
    assert fit(again, settings(), tmp_path) == first
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == checkpoint
    assert_equal(model, again)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    fit(small(), settings(), tmp_path, should_stop=stop_after(5))
    with pytest.raises(ZooError, match=r"learning_rate: 0\.001 there, 0\.5 now.*resume='never'"):
        fit(small(), settings(learning_rate=0.5), tmp_path)
    with pytest.raises(ZooError, match="model: tiny-8-8 there, tiny-8-4 now"):
        fit(TinyLanguageModel(vocab=8, width=4), settings(), tmp_path)
    result = fit(small(), settings(log_every=1, checkpoint_every=4), tmp_path)
    assert result.steps == 20
    assert fit(small(), settings(learning_rate=0.5, steps=3), tmp_path, resume="never").steps == 3
    assert [row["step"] for row in rows(tmp_path)] == ["3"]


def test_a_text_that_changed_is_refused(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_bytes(b"abcdefgh" * 100)
    chosen = settings(data=f"bytes:{text}", context=8)
    fit(TinyLanguageModel(), chosen, tmp_path / "run", should_stop=stop_after(5))
    text.write_bytes(b"abcdefgi" * 100)
    with pytest.raises(ZooError, match="data: "):
        fit(TinyLanguageModel(), chosen, tmp_path / "run")


def test_resume_insists_on_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match="nothing to resume"):
        fit(small(), settings(), tmp_path, resume="always")


def test_a_broken_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"broken")
    with pytest.raises(ZooError, match=r"last\.ckpt"):
        fit(small(), settings(), tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == b"broken"


# The arithmetic of a step


def test_parts_of_a_batch_equal_the_whole_batch(tmp_path: Path) -> None:
    whole, parts = small().double(), small().double()
    fit(whole, settings(weights="last"), tmp_path / "whole")
    fit(parts, settings(weights="last", accumulate=4), tmp_path / "parts")
    for one, two in zip(whole.parameters(), parts.parameters(), strict=True):
        tolerance.assert_close(one, two)


def test_the_loop_equals_a_plain_loop(tmp_path: Path) -> None:
    """AdamW, clipping, schedule and auxiliary loss, against the same written out with torch alone."""
    chosen = settings(steps=6, clip=0.05, weights="last", weight_decay=0.3)
    ours, plain = small(auxiliary=True).double(), small(auxiliary=True).double()
    fit(ours, chosen, tmp_path)
    exempt = [p for n, p in plain.named_parameters() if n in plain.no_decay]
    rest = [p for n, p in plain.named_parameters() if n not in plain.no_decay]
    optimizer = torch.optim.AdamW(
        [{"params": rest, "weight_decay": 0.3}, {"params": exempt, "weight_decay": 0.0}], lr=1.0, betas=(0.9, 0.95)
    )
    data = load_data(COPY, batch=8)
    for step in range(6):
        inputs, labels = map(torch.from_numpy, data.train_batch(step))
        output = plain(inputs)
        picked = labels != -100
        log_probabilities = output.logits[picked].log_softmax(-1)
        loss = -log_probabilities.gather(1, labels[picked][:, None]).mean() + output.losses["balance"]
        optimizer.zero_grad()
        loss.backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter.grad *= min(1.0, 0.05 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * chosen.factor(step)
        optimizer.step()
    for one, two in zip(ours.parameters(), plain.parameters(), strict=True):
        tolerance.assert_close(one, two)


def test_loss_sums() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[1, -100, 2], [-100, -100, 4]])
    loss, count = loss_sum(logits, labels, "language_model")
    by_hand = -sum(logits.log_softmax(-1)[b, t, labels[b, t]] for b, t in ((0, 0), (0, 2), (1, 2)))
    assert int(count) == 3
    torch.testing.assert_close(loss, by_hand)
    loss, count = loss_sum(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [1.0]]), "regression")
    assert (float(loss), int(count)) == (5.0, 2)
    nothing, none = loss_sum(logits, torch.full((2, 3), -100), "language_model")
    assert (float(nothing), int(none)) == (0.0, 0)


def test_training_learns_and_the_metrics_agree_with_evaluate(tmp_path: Path) -> None:
    model = TinyClassifier()
    chosen = settings(data="digits", steps=60, batch=32, learning_rate=0.02, evaluate_every=20, evaluate_samples=1000)
    result = fit(model, chosen, tmp_path)
    assert result.best is not None
    assert result.best > 0.85
    assert result.direction == "maximize"
    assert evaluate(model, chosen, split="valid")["accuracy"] == pytest.approx(result.best)
    assert evaluate(model, chosen)["accuracy"] > 0.8
    assert 0 <= evaluate(model, chosen, samples=10)["accuracy"] <= 1


class _Caching(TinyClassifier):
    """Keeps a table from its first forward pass, as models do with rotary angles."""

    table: torch.Tensor | None = None

    def forward(self, inputs, labels=None) -> Output:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, 10)
        return Output(self.layer(inputs.flatten(1)) * self.table)


def test_a_table_cached_in_evaluation_serves_training(tmp_path: Path) -> None:
    model, chosen = _Caching(), settings(data="digits", steps=2)
    evaluate(model, chosen, samples=8)
    assert fit(model, chosen, tmp_path).steps == 2


def test_bits_per_byte_of_a_uniform_guess_is_eight(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"some text. " * 100)
    model = TinyLanguageModel()
    nn.init.zeros_(model.head.weight)
    metrics = evaluate(model, settings(data=f"bytes:{tmp_path / 'text'}", context=8))
    assert metrics["bits_per_byte"] == pytest.approx(8)
    assert metrics["loss"] == pytest.approx(math.log(256))


class _Regression(nn.Module):
    head_kind = "regression"
    no_decay: frozenset[str] = frozenset()

    def __init__(self) -> None:
        super().__init__()
        self.spec = type("Spec", (), {"hash": "regression"})
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs, labels=None) -> Output:
        return Output(self.layer(inputs))


class _Line(Data):
    def __init__(self) -> None:
        import numpy as np

        from zoo.train.data import Description

        about = Description(
            name="line",
            input_kind="image",
            head_kind="regression",
            input_shape=(3,),
            label_shape=(1,),
            sizes={"train": None, "valid": 32, "test": 32},
            metric="loss",
            fingerprint="line",
        )
        super().__init__(about, batch=8, seed=0)
        self._slope = np.array([[1.0], [2.0], [-1.0]])

    def samples(self, split, numbers):
        import numpy as np

        shift = {"train": 0, "valid": 10**6, "test": 2 * 10**6}[split]
        inputs = np.sin((numbers[:, None] + shift) * np.array([1.0, 2.3, 3.7]))
        return inputs, inputs @ self._slope


def test_a_regression_finds_its_line(tmp_path: Path) -> None:
    model = _Regression()
    chosen = settings(data="line", steps=200, learning_rate=0.05, weight_decay=0, evaluate_every=50, minimum_ratio=0)
    result = fit(model, chosen, tmp_path, data=_Line())
    assert result.metric == "loss"
    assert result.best is not None
    assert result.best < 1e-3
    assert set(result.valid) == {"loss"}


# How a run can end


def test_early_stopping_keeps_the_best(tmp_path: Path) -> None:
    """A learning rate that only ever worsens the model: the first evaluation stays the best."""
    model = small()
    chosen = settings(steps=100, learning_rate=30.0, patience=3, clip=None, warmup_share=0)
    reported: list[tuple[int, float]] = []
    result = fit(model, chosen, tmp_path, report=lambda step, value: reported.append((step, value)))
    assert result.stopped == "early"
    values = [value for _, value in reported]
    assert result.best == max(values)
    assert result.best_step == 5 * (1 + values.index(max(values)))
    assert result.steps == reported[-1][0] == (result.best_step or 0) + 15
    assert evaluate(model, chosen, split="valid", samples=16)["accuracy"] == result.best
    assert fit(small(), chosen, tmp_path) == result


def test_a_report_may_end_the_run(tmp_path: Path) -> None:
    class PrunedError(Exception):
        pass

    def report(step: int, value: float) -> None:
        assert 0 <= value <= 1
        if step == 10:
            raise PrunedError

    with pytest.raises(PrunedError):
        fit(small(), settings(), tmp_path, report=report)
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 10
    assert fit(small(), settings(), tmp_path).steps == 20


def test_rows_of_steps_that_were_lost_are_written_once(tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        if progress.step == 7:
            raise RuntimeError

    chosen = settings(checkpoint_every=4, log_every=1)
    with pytest.raises(RuntimeError):
        fit(small(), chosen, tmp_path, progress=fail)
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 4
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 8))
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("8,0.5")
    fit(small(), chosen, tmp_path)
    assert [int(row["step"]) for row in rows(tmp_path)] == list(range(1, 21))


class _Poisoned(TinyLanguageModel):
    """Its loss is not a number from a given forward pass on."""

    def __init__(self, after: int) -> None:
        super().__init__(vocab=8, width=8)
        self.left = after

    def forward(self, inputs, labels=None):
        self.left -= self.training
        output = super().forward(inputs, labels)
        return Output(output.logits * float("nan")) if self.left < 0 else output


@pytest.mark.parametrize("after", [0, 3, 12])
def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Path, after: int) -> None:
    with pytest.raises(ZooError) as caught:
        fit(_Poisoned(after), settings(checkpoint_every=4), tmp_path)
    message = str(caught.value)
    assert f"training loss of step {after + 1} is nan" in message
    assert ("none before it" in message) == (after == 0)
    assert "last finite loss was" in message or after == 0
    if after == 12:
        assert "holds step 12" in message
        assert all(torch.isfinite(w).all() for w in load_checkpoint(tmp_path / "last.ckpt")["model"].values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_a_checkpoint(tmp_path: Path, number: int) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.step == 7:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    model, straight = small(), small()
    chosen = settings(log_every=1, weights="last")
    result = fit(model, chosen, tmp_path, progress=interrupt)
    assert (result.steps, result.stopped) == (7, "interrupted")
    assert load_checkpoint(tmp_path / "last.ckpt")["step"] == 7
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    continued = fit(model, chosen, tmp_path)
    assert (continued.steps, continued.stopped) == (20, "finished")
    fit(straight, chosen, tmp_path / "straight")
    assert_equal(model, straight)


def test_a_second_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]

    def interrupt(progress: Progress) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(small(), settings(), tmp_path, progress=interrupt)
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(small(), settings(), tmp_path, should_stop=stop_after(5))
    before = (tmp_path / "last.ckpt").read_bytes()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(ZooError, match=r"cannot write .*last\.ckpt: the disk is full; the file .* unchanged"):
        fit(small(), settings(), tmp_path)
    assert (tmp_path / "last.ckpt").read_bytes() == before


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ZooError, match="cannot write"):
        fit(small(), settings(), tmp_path / "file" / "run")


# What it leaves behind


def test_files_and_result(tmp_path: Path) -> None:
    model = small(tied=True)
    result: TrainResult = fit(model, settings(log_every=2, tensorboard=True), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "last.ckpt",
        "metrics.csv",
        "metrics.json",
        "tensorboard",
        "weights.safetensors",
    }
    table = rows(tmp_path)
    assert [int(row["step"]) for row in table] == sorted({*range(2, 21, 2), 5, 10, 15, 20})
    assert [int(row["step"]) for row in table if row["valid_loss"]] == [5, 10, 15, 20]
    assert float(table[-1]["train_loss"]) == pytest.approx(result.train_loss, rel=1e-6)
    assert float(table[0]["gradient_norm"]) > 0
    facts = json.loads((tmp_path / "metrics.json").read_text())
    assert facts["result"]["best"] == result.best
    assert facts["optimum_accuracy"] == 1.0
    assert facts["settings"]["steps"] == 20
    assert list((tmp_path / "tensorboard").iterdir())
    fresh = small(tied=True)
    load_weights(result.weights, fresh)
    assert_equal(model, fresh)


def test_a_run_is_silent_and_leaves_no_trace_in_the_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    threads, model = torch.get_num_threads(), small()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(model, settings(threads=1), tmp_path / "run")
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads
    assert all(parameter.grad is None for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_precision_and_devices_that_are_not_there(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ZooError, match="'cuda' is not there"):
            fit(small(), settings(device="cuda"), tmp_path)
        with pytest.raises(ZooError, match="needs a GPU"):
            fit(small(), settings(device="auto", precision="16"), tmp_path)
    half = small()
    result = fit(half, settings(precision="bf16"), tmp_path / "bf16")
    assert result.stopped == "finished"
    assert half.head.weight.dtype == torch.float32


@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory"), MemoryError()])
def test_running_out_of_memory_names_what_needs_less(tmp_path: Path, error: Exception) -> None:
    class Greedy(TinyLanguageModel):
        def forward(self, *_: Any, **__: Any) -> Output:
            raise error

    expected = r"out of memory while training on cpu\. .*--batch.*--accumulate.*--context.*--checkpointing"
    with pytest.raises(OutOfMemoryError, match=expected):
        fit(Greedy(vocab=8, width=8), settings(), tmp_path)


def test_the_time_left_counts_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that training moves by a second for each step and evaluations by ten."""
    now = 0.0

    class Slow(TinyLanguageModel):
        def forward(self, *arguments: Any, **options: Any) -> Output:
            nonlocal now
            now += 1.0 if self.training else 10.0
            return super().forward(*arguments, **options)

    monkeypatch.setattr("zoo.train.loop.time.monotonic", lambda: now)
    told: list[Progress] = []
    chosen = settings(steps=20, evaluate_every=5, log_every=1, evaluate_samples=8)
    fit(Slow(vocab=8, width=8), chosen, tmp_path, progress=told.append)
    left = {(progress.step, progress.evaluated): progress.seconds_left for progress in told}
    assert left[5, True] == pytest.approx(15 + 3 * 10)
    assert left[7, False] == pytest.approx(13 + 3 * 10)
    assert left[20, True] == 0
    assert left[2, False] == pytest.approx(18 + 4 / 3)
