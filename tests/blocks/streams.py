"""A mixer fed in pieces, each going on from the state after the one before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from places import Built, context
from torch import Tensor

from zoo.builder import empty_state


def stream(ours: Built, x: Tensor, pieces: Sequence[int]) -> Tensor:
    """The outputs for `x` `[batch, tokens, width]`, fed `pieces[0]`, `pieces[1]`, ... tokens at a time."""
    state, past, outputs = empty_state(ours.component, ours.scope, x.shape[0], x.shape[1], x), 0, []
    for piece in x.split(list(pieces), dim=1):
        y, state = ours.module(piece, replace(context(piece), past=past), state)
        outputs.append(y)
        past += piece.shape[1]
    return torch.cat(outputs, dim=1)
