"""Packed sequences: several sequences in one row of tokens, told apart by an integer id for each token."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks


def check(primitive: str, segments: Tensor | None, batch: int, tokens: int) -> None:
    """Require integer ids `[batch, tokens]`."""
    if segments is not None:
        checks.integers(primitive, "segments", segments)
        checks.shape(primitive, "segments", segments, "batch, tokens", (batch, tokens))


def runs(segments: Tensor) -> Tensor:
    """Number the runs of equal ids from zero: `[batch, tokens]` to `[batch, tokens]`, never decreasing.

    Run 0 is that of the first token, which is also the one that a state from before belongs to.
    """
    changes = (segments[:, 1:] != segments[:, :-1]).cumsum(1)
    return F.pad(changes, (1, 0))


def starts(segments: Tensor) -> Tensor:
    """True where a token begins a new run; never for the first token. `[batch, tokens]`."""
    return F.pad(torch.ne(segments[:, 1:], segments[:, :-1]), (1, 0))
