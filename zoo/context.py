"""What travels beside the tensor through a forward pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

StateTree = Mapping[str, Any]
"""A state: tensors by the names that a component declares, and the states of its children by theirs."""


@dataclass(slots=True)
class Context:
    """What a component may need beside `x`.

    positions: integer position of each token, `[tokens]` or, for packed sequences, `[batch, tokens]`.
    past: how many tokens the state has already seen. grid: extent of the token grid, without the `prefix` extra tokens.
    segments: for packed sequences, `[batch, tokens]` integers that name the sequence of each token.
    losses: auxiliary losses, already weighted, by name; components add to it.
    hidden: where layers append their outputs, or None when nobody asked. checkpointing: recompute each layer in the
    backward pass. shared: values that all layers of one forward pass agree on, such as a sampled width.
    labels: `[batch, tokens]` targets, where only the loss is wanted; a head that can compute it without all scores at
    once puts it into `loss` and returns the scores of no token.
    """

    positions: Tensor
    past: int = 0
    grid: tuple[int, ...] = ()
    prefix: int = 0
    segments: Tensor | None = None
    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    hidden: list[Tensor] | None = None
    checkpointing: bool = False
    shared: dict[str, Any] = field(default_factory=dict)
    labels: Tensor | None = None
    loss: Tensor | None = None

    def add_loss(self, name: str, value: Tensor) -> None:
        """Add an auxiliary loss; all that share a name are summed."""
        self.losses.setdefault(name, []).append(value)
