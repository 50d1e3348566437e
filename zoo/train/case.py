"""One training step as a call without arguments, to be timed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zoo.model import Model
from zoo.train.data.base import Description
from zoo.train.module import TrainingModule
from zoo.train.settings import TrainSettings

_STANDING_STILL = 1e-12
"""A learning rate below the rounding of the parameters: every step finds what the first one found."""


def training_case(model: Model, batch: int, tokens: int, precision: str = "32") -> Callable[[], object]:
    """A call that trains `model`, with parameters in float32, one step further on `batch` samples.

    Forward pass, loss, backward pass, clipping and AdamW are those of `zoo train` in this `precision` (32, bf16, 16),
    in the same order; choosing and copying samples, and what Lightning does around a step, are left out. `tokens` is
    the length of a sample; images have their own. Raises `ZooError` for a precision that the device does not train in.
    """
    inputs = model.example_inputs(batch, tokens)
    place = inputs.device
    values = {"data": "example", "batch": batch, "learning_rate": _STANDING_STILL, "schedule": "constant"}
    settings = TrainSettings.parse({**values, "precision": precision, "device": str(place)})
    label_shape = _label_shape(model, tokens)
    description = _description(model, tuple(inputs.shape[1:]), label_shape)
    module = TrainingModule(model.train(), settings, description).to(place)
    labels = torch.zeros(batch, *label_shape, device=place)
    if model.head_kind != "regression":
        labels = labels.long()
    optimizer = module.configure_optimizers()
    half = {"bf16": torch.bfloat16, "16": torch.float16}.get(precision)
    scaler = torch.amp.GradScaler(place.type, enabled=precision == "16")

    def step() -> None:
        # Timing forbids gradients, to all but this.
        with torch.inference_mode(False):
            with torch.autocast(place.type, dtype=half, enabled=half is not None):
                loss = module.training_step((inputs, labels))["loss"]
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            module.configure_gradient_clipping(optimizer)
            scaler.step(optimizer)
            scaler.update()

    return step


def _label_shape(model: Model, tokens: int) -> tuple[int, ...]:
    """The shape of one sample's labels."""
    if model.head_kind == "language_model":
        return (tokens,)
    return (getattr(model.spec.head, "outputs", 1),) if model.head_kind == "regression" else ()


def _description(model: Model, input_shape: tuple[int, ...], label_shape: tuple[int, ...]) -> Description:
    kind: Any = model.head_kind
    return Description(
        name="example",
        input_kind="tokens" if len(input_shape) == 1 else "image",
        head_kind=kind,
        input_shape=input_shape,
        label_shape=label_shape,
        sizes={},
        metric="loss",
        fingerprint="",
    )
