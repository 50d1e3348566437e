"""Training from the first step to the last, in one piece or in many.

An epoch is the span from one evaluation to the next. Whatever a step depends on is a function of its number (samples,
random draws, learning rate) or in the checkpoint (parameters, optimizer, loss scale, early stopping), so a run that
was cut at any checkpoint goes on as if it had not been: on the same machine, bit for bit.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from zoo.errors import ZooError, memory_explained
from zoo.train.checkpoint import load_checkpoint, load_weights, replacing, save_checkpoint, save_weights
from zoo.train.data import Data, load_data
from zoo.train.data.module import DataModule
from zoo.train.module import TrainingModule
from zoo.train.progress import Listener, Progress
from zoo.train.record import Record
from zoo.train.settings import FREE_TO_CHANGE, TrainSettings

Stopped = Literal["finished", "early", "pruned", "interrupted"]
SECONDS_BETWEEN_REPORTS = 0.25
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


LESS_MEMORY = "A smaller --batch, a larger --accumulate, a shorter --context or --checkpointing needs less"


class DivergedError(ZooError):
    """The loss stopped being finite."""


class OtherRunError(ZooError):
    """The folder holds a run of another model, other data or other settings; `differences` says of which."""

    def __init__(
        self,
        checkpoint: Path,
        differences: str,
        remedy: str = "take another folder, or start anew with resume='never'",
    ) -> None:
        self.checkpoint = checkpoint
        self.differences = differences
        super().__init__(
            f"{checkpoint} belongs to another run ({differences}); resume with what it was started with, {remedy}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainResult:
    """What came of a run. `stopped` says why it ended; `interrupted` and `pruned` runs go on when called again."""

    steps: int
    stopped: Stopped
    metric: str
    direction: str
    best: float | None
    """Best value of `metric` on the validation part; None if the run ended before the first evaluation."""
    best_step: int | None
    valid: dict[str, float]
    """All metrics of the last evaluation."""
    train_loss: float | None
    seconds: float
    """Wall time of all sessions, evaluations and checkpoints included."""
    tokens_per_second: float | None
    """Training only; images count as one token each."""
    folder: Path
    weights: Path
    checkpoint: Path


@dataclass
class _State:
    """What a run has to remember besides parameters and optimizer."""

    best: float | None = None
    best_step: int | None = None
    stale: int = 0
    valid: dict[str, float] = field(default_factory=dict)
    loss: float | None = None
    seconds: float = 0.0
    training_seconds: float = 0.0
    tokens: int = 0
    stopped: Stopped | None = None


def fit(
    model: nn.Module,
    settings: TrainSettings,
    folder: Path | str,
    *,
    data: Data | None = None,
    progress: Listener | None = None,
    report: Callable[[int, float], None] | None = None,
    resume: Literal["auto", "always", "never"] = "auto",
    should_stop: Callable[[], bool] | None = None,
) -> TrainResult:
    """Train `model` in place; `folder` gets `weights.safetensors`, `last.ckpt`, `metrics.csv` and `metrics.json`.

    The model ends with the weights that were written: those of the best evaluation, or the last. `data` saves loading
    `settings.data` again; its `batch` must be that of one forward pass, `settings.batch / settings.accumulate`.
    `report(step, metric)` is called after every evaluation and may raise to end the run; `should_stop()` is asked
    before every step. SIGINT and SIGTERM end the run after the step in hand, with a checkpoint; a second one at once.

    `resume`: `auto` goes on from `last.ckpt` if there is one, `always` insists on one, `never` starts anew and removes
    what an earlier run left. Raises ZooError if the checkpoint belongs to another model, other data or settings that
    matter, or if the folder cannot be written, OutOfMemoryError, and DivergedError if the loss stops being finite.
    """
    folder = Path(folder)
    data = data or load_data(
        settings.data, context=settings.context, batch=settings.batch // settings.accumulate, seed=settings.seed
    )
    if data.batch * settings.accumulate != settings.batch:
        raise ValueError(f"data has batch={data.batch}, expected {settings.batch // settings.accumulate}")
    device = _device(settings)
    run = _Run(model, settings, folder, data, progress, report, should_stop)
    start = run.prepare(resume)
    home = next(model.parameters()).device
    if run.state.stopped not in ("finished", "early"):
        run.state.stopped = None
        with (
            _quiet(),
            _threads(settings.threads),
            _random_state(device),
            _signal_handlers(),
            memory_explained(f"training on {device}", LESS_MEMORY),
        ):
            _train(run, start, device)
    model.to(home)
    return run.finish()


def evaluate(
    model: nn.Module,
    settings: TrainSettings,
    *,
    data: Data | None = None,
    split: Literal["valid", "test"] = "test",
    samples: int | None = None,
) -> dict[str, float]:
    """Metrics of the model on a part: `loss`, and `accuracy` and `bits_per_byte` where they apply.

    On all of its samples, or on `samples` of them at even distances.
    """
    data = data or load_data(settings.data, context=settings.context, batch=settings.batch, seed=settings.seed)
    device = _device(settings)
    home = next(model.parameters()).device
    module = TrainingModule(model, settings, data.describe())
    loaders = DataModule(data, evaluation_samples=samples)
    with _quiet(), _threads(settings.threads), _random_state(device):
        trainer = _trainer(settings, device)
        if split == "test":
            trainer.test(module, datamodule=loaders, verbose=False)
        else:
            trainer.validate(module, datamodule=loaders, verbose=False)
    model.to(home)
    return module.metrics


class _Run(Callback):
    """One run: its files, its state, and what happens after each step and evaluation."""

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        folder: Path,
        data: Data,
        progress: Listener | None,
        report: Callable[[int, float], None] | None,
        should_stop: Callable[[], bool] | None,
    ) -> None:
        spec: Any = model.spec
        self.spec = str(spec.hash)
        self.model = model
        self.settings = settings
        self.folder = folder
        self.data = data
        self.description = data.describe()
        self.progress = progress
        self.report = report
        self.should_stop = should_stop
        self.state = _State()
        self.step = 0
        self.interrupted = False
        self.checkpoint = folder / "last.ckpt"
        self.weights = folder / "weights.safetensors"
        self._restored: dict[str, Any] = {}
        self._record: Record | None = None
        self._saved_step = -1
        self._pending: list[tuple[int, Tensor]] = []
        self._losses = torch.zeros(2)
        self._last_row: dict[str, float] = {}
        self._evaluating = 0.0
        self._evaluations = 0
        """Seconds of this session's evaluations, and how many there were."""

    # Before and after

    def prepare(self, resume: Literal["auto", "always", "never"]) -> int:
        """The step to go on from, with the parameters of that step in the model."""
        if resume == "never":
            for path in (self.checkpoint, self.weights, self.folder / "metrics.csv", self.folder / "metrics.json"):
                path.unlink(missing_ok=True)
        if not self.checkpoint.exists():
            if resume == "always":
                raise ZooError(f"nothing to resume: there is no {self.checkpoint}")
            return 0
        content = load_checkpoint(self.checkpoint)
        self._check_same_run(content)
        self.model.load_state_dict(content["model"])
        self.state = _State(**content["state"])
        self.step = self._saved_step = content["step"]
        self._restored = content
        return self.step

    def _check_same_run(self, content: dict[str, Any]) -> None:
        here = {"model": self.spec, "data": self.description.fingerprint, **self._identity()}
        there = {"model": content["spec"], "data": content["fingerprint"], **content["settings"]}
        changed = [name for name in here if here[name] != there.get(name)]
        if changed:
            differences = ", ".join(f"{name}: {there.get(name)} there, {here[name]} now" for name in changed)
            raise OtherRunError(self.checkpoint, differences)

    def _identity(self) -> dict[str, Any]:
        return {
            f"settings.{k}": v for k, v in self.settings.model_dump(mode="json", exclude=set(FREE_TO_CHANGE)).items()
        }

    def finish(self) -> TrainResult:
        """Write what is left to write and say what came of it."""
        state = self.state
        if self.settings.weights == "last" or state.best_step is None or not self.weights.exists():
            self._save_weights()
        elif state.best_step != self.step:
            load_weights(self.weights, self.model)
        result = TrainResult(
            steps=self.step,
            stopped=state.stopped or "finished",
            metric=self.description.metric,
            direction=self.description.direction,
            best=state.best,
            best_step=state.best_step,
            valid=dict(state.valid),
            train_loss=state.loss,
            seconds=state.seconds,
            tokens_per_second=state.tokens / state.training_seconds if state.training_seconds else None,
            folder=self.folder,
            weights=self.weights,
            checkpoint=self.checkpoint,
        )
        facts = {
            "result": {
                name: str(value) if isinstance(value, Path) else value for name, value in asdict(result).items()
            },
            "spec": self.spec,
            "data": self.description.name,
            "optimum_loss": self.description.optimum_loss,
            "optimum_accuracy": self.description.optimum_accuracy,
            "settings": self.settings.model_dump(mode="json"),
        }
        with replacing(self.folder / "metrics.json") as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")
        return result

    # While Lightning runs

    def span(self) -> tuple[int, int]:
        """The batches of the training stream from here to the next evaluation."""
        interval = self.settings.evaluation_interval
        end = min(self.settings.steps, (self.step // interval + 1) * interval)
        return self.step * self.settings.accumulate, end * self.settings.accumulate

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        if self._restored:
            trainer.optimizers[0].load_state_dict(self._restored["optimizer"])
            trainer.precision_plugin.load_state_dict(self._restored["precision"])
            self._restored = {}
        self._record = Record(self.folder, step=self.step, tensorboard=self.settings.tensorboard)
        self._losses = self._losses.to(pl_module.device)
        self._began = self._clocked = self._reported = time.monotonic()
        self._first = self.step
        if threading.current_thread() is threading.main_thread():
            # Only now, because Lightning has put its own in place until here.
            for number in _SIGNALS:
                signal.signal(number, self._interrupt)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx % self.settings.accumulate:
            return
        if self.state.stopped is not None:
            pass
        elif self.interrupted:
            self.state.stopped = "interrupted"
        elif self.should_stop is not None and self.should_stop():
            self.state.stopped = "pruned"
        trainer.should_stop = self.state.stopped is not None

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._losses += torch.stack([outputs["main"], outputs["auxiliary"]])
        if (batch_idx + 1) % self.settings.accumulate:
            return
        self.step = pl_module.step
        self.state.tokens += self.settings.batch * self.description.tokens_per_sample
        norm = pl_module.gradient_norm.to(self._losses.dtype)
        self._pending.append((self.step, torch.cat([self._losses / self.settings.accumulate, norm.reshape(1)])))
        self._losses.zero_()
        settings = self.settings
        evaluating = self.step % settings.evaluation_interval == 0 or self.step == settings.steps
        saving = self.step % settings.checkpoint_interval == 0 and not evaluating
        late = time.monotonic() - self._reported >= SECONDS_BETWEEN_REPORTS
        if evaluating or saving or late or self.step % settings.log_every == 0:
            self._drain(withhold_last=evaluating)
        if saving:
            self._save(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: Any) -> None:
        self._clock()

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        state, settings = self.state, self.settings
        state.valid = dict(pl_module.metrics)
        value = state.valid[self.description.metric]
        if not math.isfinite(value):
            raise self._not_finite("validation loss", state.valid["loss"], self.step)
        better = state.best is None or (
            value < state.best if self.description.direction == "minimize" else value > state.best
        )
        state.stale = 0 if better else state.stale + 1
        if better:
            state.best, state.best_step = value, self.step
            if settings.weights == "best":
                self._save_weights()
        if settings.patience is not None and state.stale >= settings.patience and self.step < settings.steps:
            state.stopped = "early"
        assert self._record is not None
        self._record.write(
            self.step, **self._last_row, **{f"valid_{name}": number for name, number in state.valid.items()}
        )
        self._clock(training=False)
        ending = self.step == settings.steps or state.stopped is not None
        if self.step % settings.checkpoint_interval == 0 and not ending:
            self._save(trainer)
        self._tell(evaluated=True)
        if self.report is not None:
            self.report(self.step, value)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._drain()
        if self.state.stopped is None:
            self.state.stopped = "finished"
        if self.step > 0:
            self._save(trainer)

    def _interrupt(self, number: int, frame: Any) -> None:
        """The first signal ends the run after the step in hand, the next one at once."""
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True

    def close(self) -> None:
        """Close the files that training opened."""
        if self._record is not None:
            self._record.close()

    def _drain(self, *, withhold_last: bool = False) -> None:
        """Fetch the figures of the steps since the last time: reading each step's own would stall a GPU."""
        if not self._pending:
            return
        steps = [step for step, _ in self._pending]
        figures = torch.stack([figure for _, figure in self._pending]).tolist()
        self._pending.clear()
        self._clock()
        assert self._record is not None
        for step, (loss, auxiliary, norm) in zip(steps, figures, strict=True):
            if not math.isfinite(loss + auxiliary):
                raise self._not_finite("training loss", loss + auxiliary, step)
            self.state.loss = loss
            self._last_row = {
                "train_loss": loss,
                "auxiliary_loss": auxiliary,
                "learning_rate": self.settings.learning_rate * self.settings.factor(step - 1),
                "gradient_norm": norm,
                "tokens_per_second": self._rate(),
                "seconds": self.state.seconds,
            }
            if step % self.settings.log_every == 0 and not (withhold_last and step == steps[-1]):
                self._record.write(step, **self._last_row)
        self._tell(evaluated=False)

    def _clock(self, *, training: bool = True) -> None:
        """Add the time since the last call to the totals."""
        now = time.monotonic()
        self.state.seconds += now - self._clocked
        if training:
            self.state.training_seconds += now - self._clocked
        else:
            self._evaluating += now - self._clocked
            self._evaluations += 1
        self._clocked = now

    def _rate(self) -> float:
        return self.state.tokens / max(self.state.training_seconds, 1e-9)

    def _tell(self, *, evaluated: bool) -> None:
        self._reported = time.monotonic()
        if self.progress is None:
            return
        self.progress(
            Progress(
                step=self.step,
                steps=self.settings.steps,
                loss=self._last_row["train_loss"],
                learning_rate=self._last_row["learning_rate"],
                gradient_norm=self._last_row["gradient_norm"],
                metric=self.description.metric,
                valid=self.state.valid.get(self.description.metric),
                best=self.state.best,
                evaluated=evaluated,
                tokens_per_second=self._rate(),
                unit="tokens" if self.description.input_kind == "tokens" else "images",
                seconds_left=self._seconds_left(evaluated=evaluated),
            )
        )

    def _seconds_left(self, *, evaluated: bool) -> float:
        """What the steps and evaluations that are left take at the pace of this session.

        Before the first evaluation its samples count as a third of as many in training: forward passes only.
        """
        settings, steps = self.settings, self.settings.steps
        training = self._reported - self._began - self._evaluating
        step_seconds = training / max(1, self.step - self._first)
        if self._evaluations:
            evaluation_seconds = self._evaluating / self._evaluations
        else:
            samples = min(settings.evaluate_samples, self.description.sizes["valid"] or settings.evaluate_samples)
            evaluation_seconds = step_seconds * samples / settings.batch / 3
        interval = settings.evaluation_interval
        evaluations = math.ceil(steps / interval) - self.step // interval if self.step < steps else 0
        due = self.step % interval == 0 or self.step == steps
        evaluations += due and not evaluated
        return (steps - self.step) * step_seconds + evaluations * evaluation_seconds

    def _not_finite(self, what: str, value: float, step: int) -> DivergedError:
        last = "none before it was" if self.state.loss is None else f"the last finite loss was {self.state.loss:.4f}"
        kept = f"; {self.checkpoint} holds step {self._saved_step}" if self._saved_step > 0 else ""
        return DivergedError(
            f"the {what} of step {step} is {value}; {last}{kept}. "
            f"A lower learning_rate than {self.settings.learning_rate:g}, a longer warm-up or a lower clip may help"
        )

    def _save(self, trainer: Trainer) -> None:
        self._clock()
        save_checkpoint(
            self.checkpoint,
            {
                "step": self.step,
                "spec": self.spec,
                "fingerprint": self.description.fingerprint,
                "settings": self._identity(),
                "model": self.model.state_dict(),
                "optimizer": trainer.optimizers[0].state_dict(),
                "precision": trainer.precision_plugin.state_dict(),
                "state": asdict(self.state),
            },
        )
        self._saved_step = self.step

    def _save_weights(self) -> None:
        save_weights(self.weights, self.model, {"spec": self.spec, "step": str(self.step)})


def _train(run: _Run, start: int, device: torch.device) -> None:
    settings = run.settings
    module = TrainingModule(run.model, settings, run.description, start=start)
    loaders = DataModule(run.data, span=run.span, evaluation_samples=settings.evaluate_samples)
    trainer = _trainer(settings, device, max_steps=settings.steps - start, callbacks=[run])
    try:
        trainer.fit(module, datamodule=loaders)
    except SystemExit as error:
        # Lightning turns a second Ctrl-C into an exit of the whole process.
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        run.close()
        for parameter in run.model.parameters():
            parameter.grad = None


def _trainer(settings: TrainSettings, device: torch.device, **arguments: Any) -> Trainer:
    return Trainer(
        accelerator=device.type,
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision={"32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}[settings.precision],  # type: ignore
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        # Naming the environment keeps Lightning from looking for a cluster's.
        plugins=[LightningEnvironment()],
        # Tables that a model caches while it is evaluated must serve its training too.
        inference_mode=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **arguments,
    )


def _device(settings: TrainSettings) -> torch.device:
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ZooError(f"device {name!r} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ZooError("device 'mps' is not there; use 'cpu' or 'auto'")
    if device.type == "cpu" and settings.precision == "16":
        raise ZooError("precision 16 needs a GPU, and this machine has none; use bf16 or 32")
    return device


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PossibleUserWarning)
        warnings.filterwarnings("ignore", module=r"lightning\.")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _random_state(device: torch.device) -> Iterator[None]:
    """Leaves the caller's random generators as they were."""
    with torch.random.fork_rng(devices=[device.index or 0] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def _signal_handlers() -> Iterator[None]:
    """Leaves the handlers of SIGINT and SIGTERM as they were."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
