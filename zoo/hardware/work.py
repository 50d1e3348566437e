"""What a device does in one phase of a spec, piece by piece, and the bytes that are counted to be held meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

from zoo.accounting import OPTIMIZER_PASSES, TRAINED_BYTES, Piece, Place, Workload, figures, places, total
from zoo.cost import Operator
from zoo.hardware.features import Part, Phase

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

_FAR = 1 << 40
"""A capacity beyond every window."""
UPDATE = "update"
"""The kind of operator that clipping and AdamW are, once for each tensor of parameters."""


def parts_of(spec: Spec, work: Workload, phase: Phase) -> tuple[Part, ...]:
    """The pieces of each part of a spec, in order."""
    return tuple(pieces_of(place, phase) for place in places(spec.fill(), work.at(spec.context)))


def pieces_of(place: Place, phase: Phase) -> Part:
    """The pieces of a part; in training there is one more, which updates its parameters."""
    pieces = place.pieces(phase == "decode")
    if phase != "train":
        return pieces
    counts = [
        parameter.count
        for _, component, scope in place.component.walk(place.scope)
        for parameter in component.parameters(scope).values()
    ]
    return (*pieces, Piece(place.path, UPDATE, tuple(map(_update, counts)))) if counts else pieces


def _update(count: int) -> Operator:
    moved = float(OPTIMIZER_PASSES * TRAINED_BYTES * count)
    return Operator(UPDATE, 0.0, 0.0, 0.0, moved, output=0.0, weights=0.0, steps=0.0, calls=1.0)


def held_bytes(spec: Spec, work: Workload, phase: Phase) -> float:
    """Bytes that are held at once: weights and intermediate results, in decoding the state before and behind the token
    too, and in training all of `train_memory`, see `zoo.accounting.figures`.
    """
    spec, work = spec.fill(), work.at(spec.context)
    counted = figures(total(spec, work), work)
    if phase == "train":
        return counted["train_memory"]
    if phase == "forward":
        return counted["weights"] + counted["activations"]
    peak = max(place.cost(decoding=True).peak for place in places(spec, work))
    return counted["weights"] + counted["state"] + _replaced(spec, work) + peak


def _replaced(spec: Spec, work: Workload) -> int:
    """Bytes of states that a step replaces rather than writes into: those that do not grow with every capacity."""
    total = 0
    for place in places(spec, work):
        for _, component, scope in place.component.walk(place.scope):
            ends = component.state(scope, _FAR), component.state(scope, _FAR + 1)
            now = component.state(scope, (work.past or 0) + 1)
            total += sum(item.bytes(work.element_bytes) for name, item in now.items() if ends[0][name] == ends[1][name])
    return total * work.batch
