"""What a candidate is worth: an `Evaluator` says it, `TrainEvaluator` by training the candidate briefly."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from zoo.errors import OutOfMemoryError, ZooError
from zoo.train.data import Data, load_data
from zoo.train.progress import Listener
from zoo.train.settings import FREE_TO_CHANGE, TrainSettings

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

Report = Callable[[int, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What an evaluation found: `metrics` by name, or up to where it was stopped."""

    metrics: Mapping[str, float]
    seconds: float = 0.0
    folder: Path | None = None
    stopped: bool = False
    """Whether `should_stop` ended it."""
    facts: Mapping[str, Any] = field(default_factory=dict)


class EvaluationError(ZooError):
    """A candidate broke down, for example because its loss became infinite; the search records why and goes on."""


class Evaluator(Protocol):
    """Tells what an architecture is worth, the same for equal architectures."""

    def identity(self) -> Mapping[str, Any]:
        """Everything that decides the outcome, as plain data: a search goes on only with what it began with."""
        ...

    def metrics(self) -> Mapping[str, str]:
        """Names of the metrics that it finds, and whether to `minimize` or `maximize` each."""
        ...

    def evaluate(self, spec: Spec, trial_number: int, report: Report, should_stop: Callable[[], bool]) -> Evaluation:
        """Evaluate one architecture.

        `report(step, value)` is called with the metric so far, the same for all candidates, signed so that less is
        better; when `should_stop()` is true, the evaluation may end early. Raises `EvaluationError` if the candidate
        breaks down.
        """
        ...


class TrainEvaluator:
    """Builds a candidate and trains it with `zoo.train.loop.fit`: the same data, steps and seed for all.

    folder: gets a folder for each trial with its `metrics.csv` and `metrics.json`; weights are not kept. progress: is
    told of the training.
    """

    def __init__(self, settings: TrainSettings, folder: Path, progress: Listener | None = None) -> None:
        # Between evaluations a candidate that dies is trained anew, so checkpoints on the way would only cost time.
        self.settings = settings.model_copy(update={"checkpoint_every": settings.steps, "weights": "last"})
        self.folder = folder
        self.progress = progress
        self._data: dict[int | None, Data] = {}
        self._description = self._load(settings.context).describe()

    def identity(self) -> Mapping[str, Any]:
        settings = self.settings.model_dump(mode="json", exclude=set(FREE_TO_CHANGE))
        return {**settings, "fingerprint": self._description.fingerprint}

    def metrics(self) -> Mapping[str, str]:
        found = {"loss": "minimize"}
        if self._description.head_kind != "regression":
            found["accuracy"] = "maximize"
        return found | {self._description.metric: self._description.direction}

    def check(self, spec: Spec) -> None:
        """Raises `ZooError` if the data asks something else of a model than what `spec` describes."""
        asked = self._description
        problems = []
        kind = getattr(spec.stem, "inputs", None)
        if kind is not None and (kind == "images") != (asked.input_kind == "image"):
            problems.append(f"it holds {'images' if asked.input_kind == 'image' else 'tokens'}, the stem takes {kind}")
        else:
            for name, holder, wanted in (
                ("vocab", spec.stem, asked.vocab),
                ("classes", spec.head, asked.classes),
            ):
                have = getattr(holder, name, None)
                if wanted is not None and have is not None and have < wanted:
                    problems.append(f"it needs {name} of at least {wanted}, the space has {have}")
        if problems:
            raise ZooError(f"data set {self.settings.data!r} does not fit the space: {'; '.join(problems)}")

    def evaluate(self, spec: Spec, trial_number: int, report: Report, should_stop: Callable[[], bool]) -> Evaluation:
        from zoo.model import build
        from zoo.train.loop import DivergedError, fit

        settings = self._settings_for(spec)
        folder = self.folder / f"{trial_number:05d}-{spec.hash[:8]}"
        sign = -1.0 if self._description.direction == "maximize" else 1.0
        with _memory_released():
            try:
                model = build(spec, seed=settings.seed)
                result = fit(
                    model,
                    settings,
                    folder,
                    data=self._load(settings.context),
                    progress=self.progress,
                    report=lambda step, value: report(step, sign * value),
                    resume="never",
                    should_stop=should_stop,
                )
            except (OutOfMemoryError, DivergedError) as error:
                raise EvaluationError(str(error)) from error
            finally:
                for name in ("last.ckpt", "weights.safetensors"):
                    (folder / name).unlink(missing_ok=True)
            if result.stopped == "interrupted":
                raise KeyboardInterrupt
            return Evaluation(
                metrics=dict(result.valid),
                seconds=result.seconds,
                folder=folder,
                stopped=result.stopped == "pruned",
                facts={"steps": result.steps, "tokens_per_second": result.tokens_per_second},
            )

    def _settings_for(self, spec: Spec) -> TrainSettings:
        """Text is cut into pieces as long as the model's context, unless the settings say how long."""
        if self.settings.context is None and self.settings.data.startswith("bytes:"):
            return self.settings.model_copy(update={"context": spec.context})
        return self.settings

    def _load(self, context: int | None) -> Data:
        if context not in self._data:
            settings = self.settings
            batch = settings.batch // settings.accumulate
            self._data[context] = load_data(settings.data, context=context, batch=batch, seed=settings.seed)
        return self._data[context]


@contextlib.contextmanager
def _memory_released() -> Iterator[None]:
    """Frees what a candidate held, cycles and the GPU's cache included."""
    try:
        yield
    finally:
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()
