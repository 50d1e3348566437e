"""What a predictor knows of a call: for each kind of operator, how much of everything that takes time there is.

A kind has its own terms, so that a predictor learns what a FLOP of attention and what a FLOP of a projection cost on a
device; so has a type of component, whose Python code takes time too. All are counts, which add up over pieces, parts
and models.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal

from zoo.accounting import Piece
from zoo.cost import Operator

Phase = Literal["forward", "decode", "train"]
PHASES: tuple[Phase, ...] = ("forward", "decode", "train")

Part = Sequence[Piece]
"""The pieces of one part of a model, see `zoo.accounting.Place`."""

_BYTES = (".inputs", ".weights", ".outputs")
LARGE = 1 << 20
"""Bytes of an operand from which on the caches of a core do not keep it until it is read."""
CHILLED = ("calls", "inputs", "weights", "packed_weights")
"""Terms that cost more where a model moves more than a cache keeps until it is called again."""
FEWEST_PACKED = 0.75
"""FLOPs for each byte of weights from which on these meet several rows: one row of float32 has a half, two have one,
less what biases add to the weights. Half precision has one with a single row, and is taken to pack always."""


def features(parts: Iterable[Part], phase: Phase = "forward") -> dict[str, float]:
    """Counts by name, `KIND.TERM` of operators and `TYPE.modules` of components; those that are zero are left out.

    All add up over parts. What does not is whether a whole model stays in a cache from one call to the next: see
    `with_cold`.

    calls: starts. flops: of matrix products that are computed, with the backward ones in training. pointwise: other
    operations. inputs, weights, outputs: bytes read and made. large_inputs, large_outputs: bytes of those that do not
    stay in a cache. packed_weights: weights that meet several rows, which products of matrices lay out anew before;
    with one row they are read as they lie. steps: parts that wait for each other.
    """
    return summed(counts for part in parts for _, counts in by_piece(part, phase))


def by_piece(part: Part, phase: Phase = "forward") -> Iterator[tuple[str, dict[str, float]]]:
    """The path and the counts of each piece of a part."""
    for piece in part:
        found = summed(_of_operator(operator, phase) for operator in piece.operators)
        yield piece.path, found | {f"{piece.type}.modules": 1.0}


def moved(counts: Mapping[str, float]) -> float:
    """Bytes that operators read and write, of their counts."""
    return sum(amount for name, amount in counts.items() if name.endswith(_BYTES))


def cold_share(moved: float, cache: float) -> float:
    """The share of what a model of `moved` bytes needs that is in no cache when it is called again.

    `m^2 / (m^2 + cache^2)`: a fifth where it moves half of what the cache holds, four fifths where it moves double.
    """
    return moved**2 / (moved**2 + cache**2)


def cold(name: str) -> str | None:
    """What the cold ones among a feature are called, `KIND.cold_TERM`; None for a term to which it is all the same."""
    kind, _, term = name.rpartition(".")
    return f"{kind}.cold_{term}" if term in CHILLED else None


def with_cold(counts: Mapping[str, float], share: float) -> dict[str, float]:
    """The counts, and how much of each is cold where a share of all is."""
    chilled = ((cold(name), amount * share) for name, amount in counts.items())
    return {**counts, **{name: amount for name, amount in chilled if name is not None}}


def summed(counts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The sums of counts by name."""
    found: dict[str, float] = {}
    for one in counts:
        for name, amount in one.items():
            found[name] = found.get(name, 0.0) + amount
    return found


def _of_operator(operator: Operator, phase: Phase) -> dict[str, float]:
    weights, outputs = operator.weights, operator.output
    inputs = max(0.0, operator.traffic - weights - outputs)
    packed = weights if operator.flops >= FEWEST_PACKED * weights else 0.0
    terms = {
        "calls": 1.0,
        "flops": operator.computed(phase == "train"),
        "pointwise": operator.pointwise,
        "inputs": inputs,
        "weights": weights,
        "packed_weights": packed,
        "outputs": outputs,
        "large_inputs": inputs if inputs >= LARGE else 0.0,
        "large_outputs": outputs if outputs >= LARGE else 0.0,
        "steps": operator.steps,
    }
    return {f"{operator.kind}.{term}": amount * operator.calls for term, amount in terms.items() if amount}
