"""Mixers inside a model, which gives them positions, states and packed sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.model import Spec
from zoo.model import Model, build

VOCAB = 11


def model(mixer: Any, *, context: int = 24, width: int = 24, **settings: Any) -> Model:
    """One layer with nothing but the mixer, in float64, with weights at which it matters."""
    fields: dict[str, Any] = {
        "width": width,
        "context": context,
        "init_std": 0.5,
        "stem": {"type": "token", "vocab": VOCAB},
        "body": {"type": "stack", "layers": [{"mixer": mixer}]},
        "head": "language_model",
    }
    return build(Spec(**fields | settings), dtype=torch.float64).eval()


def words(batch: int, tokens: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def streamed(built: Model, inputs: Tensor, pieces: Sequence[int], capacity: int | None = None) -> Tensor:
    """The outputs for `inputs` fed `pieces[0]`, `pieces[1]`, ... tokens at a time."""
    state, outputs = built.init_state(inputs.shape[0], capacity), []
    for piece in inputs.split(list(pieces), dim=1):
        output = built(piece, state=state)
        assert output.state is not None
        state = output.state
        outputs.append(output.logits)
    return torch.cat(outputs, dim=1)


def packed_and_apart(built: Model, lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The outputs for sequences laid end to end, and those of each sequence by itself, end to end."""
    inputs = words(1, sum(lengths))
    segments = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    apart = [built(piece).logits for piece in inputs.split(list(lengths), dim=1)]
    return built(inputs, segments=segments).logits, torch.cat(apart, dim=1)
