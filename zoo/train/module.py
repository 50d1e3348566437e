"""A model with its loss, its metrics and its optimizer, as a Lightning module."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo.train.data.base import IGNORE, Description, Split
from zoo.train.data.random import random_bits
from zoo.train.optimizer import adamw
from zoo.train.settings import TrainSettings


class TrainingModule(LightningModule):
    """Trains `model` as `settings` say. A run that goes on after `start` steps keeps counting from there.

    The learning rate of a step is a function of its number, and so is the random state from which every forward pass
    in training starts: dropout is the same whether or not the run was cut, and however often it was evaluated.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings, description: Description, *, start: int = 0) -> None:
        super().__init__()
        self.model = model
        self.head_kind = str(model.head_kind)
        self.settings = settings
        self.description = description
        self.start = start
        self.gradient_norm = torch.zeros(())
        self.metrics: dict[str, float] = {}
        self._dtype_of_model = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self._totals: list[Tensor] = []

    @property
    def step(self) -> int:
        """Optimizer steps taken so far, those before `start` included."""
        return self.start + self.trainer.global_step

    def configure_optimizers(self) -> Optimizer:
        settings = self.settings
        return adamw(
            self.model,
            learning_rate=settings.learning_rate,
            weight_decay=settings.weight_decay,
            betas=settings.betas,
            # A fused optimizer would undo the loss scale of 16-bit training itself, after clipping.
            fused=settings.precision != "16" and self.device.type in ("cpu", "cuda"),
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        if self.trainer.should_stop:
            return -1
        step = self.step
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = self.settings.learning_rate * self.settings.factor(step)
        part = batch_idx % self.settings.accumulate
        self._seed(int(random_bits(self.settings.seed, step, part)) >> 1)
        return None

    def training_step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        inputs, labels = batch
        output = self.model(self._cast(inputs), labels=labels)
        loss = output.loss
        if loss is None:
            total, count = loss_sum(output.logits, labels, self.head_kind)
            loss = total / count.clamp(min=1)
        auxiliary = sum(output.losses.values(), start=torch.zeros_like(loss))
        return {"loss": loss + auxiliary, "main": loss.detach(), "auxiliary": auxiliary.detach()}

    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        limit = self.settings.clip if self.settings.clip is not None else math.inf
        self.gradient_norm = nn.utils.clip_grad_norm_(self.model.parameters(), limit)

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        output = self.model(self._cast(inputs))
        loss, count = loss_sum(output.logits, labels, self.head_kind)
        right = (
            torch.zeros_like(count) if self.head_kind == "regression" else (output.logits.argmax(-1) == labels).sum()
        )
        # Counts and sums of a large set outgrow float32, and mps has no float64.
        self._totals.append(torch.stack([part.float() for part in (loss, count, right)]).cpu().double())

    def on_validation_epoch_end(self) -> None:
        self._conclude("valid")

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.validation_step(batch)

    def on_test_epoch_end(self) -> None:
        self._conclude("test")

    def _conclude(self, split: Split) -> None:
        self.metrics = _metrics(torch.stack(self._totals).sum(0), self.description)
        self._totals.clear()
        self.log_dict({f"{split}_{name}": value for name, value in self.metrics.items()})

    def _seed(self, seed: int) -> None:
        # `torch.manual_seed` seeds every kind of device, and where CUDA is not in use it records a traceback to do so.
        torch.default_generator.manual_seed(seed)
        if self.device.type == "cuda":
            with torch.cuda.device(self.device):
                torch.cuda.manual_seed(seed)
        elif self.device.type == "mps":
            torch.mps.manual_seed(seed)

    def _cast(self, inputs: Tensor) -> Tensor:
        return inputs.to(self._dtype_of_model) if inputs.is_floating_point() else inputs


def loss_sum(logits: Tensor, labels: Tensor, head_kind: str) -> tuple[Tensor, Tensor]:
    """Sum of the losses and number of labels that count.

    Language models and classifiers: cross entropy in nats over the labels that are not `IGNORE`. Regression: squared
    error over all outputs. Half precision is widened first: a sum of thousands of terms needs more than its eight bits.
    """
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    if head_kind == "regression":
        loss = F.mse_loss(logits, labels.to(logits.dtype).view_as(logits), reduction="sum")
        return loss, torch.tensor(labels.numel(), device=logits.device)
    logits, labels = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
    return F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum"), (labels != IGNORE).sum()


def _metrics(totals: Tensor, description: Description) -> dict[str, float]:
    loss, count, right = totals.tolist()
    metrics = {"loss": loss / max(1.0, count)}
    if description.head_kind != "regression":
        metrics["accuracy"] = right / max(1.0, count)
    if description.metric == "bits_per_byte":
        metrics["bits_per_byte"] = metrics["loss"] / math.log(2)
    return metrics
