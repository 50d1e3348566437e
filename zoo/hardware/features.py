"""What a predictor knows of a call: for each kind of operator, how much of everything that takes time there is.

A kind has its own terms, so that a predictor learns what a FLOP of attention and what a FLOP of a projection cost on a
device. All are counts, which add up over operators, layers and models.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from zoo.cost import Operator

Phase = Literal["forward", "decode", "train"]
PHASES: tuple[Phase, ...] = ("forward", "decode", "train")

LARGE = 1 << 20
"""Bytes of a result from which on the caches of a core do not keep it."""
HUGE = 1 << 25
"""Bytes of a result from which on allocators ask the system for new pages each time (glibc's highest threshold)."""


def features(operators: Iterable[Operator], phase: Phase = "forward") -> dict[str, float]:
    r"""Counts by name, `KIND.TERM`; those that are zero are left out.

    calls: starts. flops: of matrix products, with the backward ones in training. pointwise: other operations. traffic:
    bytes moved; weights: bytes of parameters among them. large, huge: bytes of results that do not stay in a cache, and
    that need new memory. steps: parts that wait for each other.
    """
    found: dict[str, float] = {}
    for piece in operators:
        terms = (
            ("calls", 1.0),
            ("flops", piece.flops + piece.backward if phase == "train" else piece.flops),
            ("pointwise", piece.pointwise),
            ("traffic", piece.traffic),
            ("weights", piece.weights),
            ("large", piece.output if piece.output >= LARGE else 0.0),
            ("huge", piece.output if piece.output >= HUGE else 0.0),
            ("steps", piece.steps),
        )
        for term, amount in terms:
            if amount:
                name = f"{piece.kind}.{term}"
                found[name] = found.get(name, 0.0) + amount * piece.calls
    return found
