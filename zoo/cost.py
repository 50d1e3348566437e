"""Cost as arithmetic: what one call of a component takes, from its specification alone.

FLOPs count two for each multiply-add of a matrix product and nothing else, as `torch.utils.flop_counter` does;
arithmetic outside matrix products is kept apart in `pointwise`. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, Self


@dataclass(frozen=True, slots=True)
class Call:
    """The shape of one call: `tokens` new tokens for each of `batch` sequences that have seen `past` tokens before.

    `element_bytes` is the size of an element of weights and activations. `packed`: several sequences are laid end to
    end, as training on short samples does.
    """

    batch: int = 1
    tokens: int = 1024
    past: int = 0
    element_bytes: int = 4
    packed: bool = False

    @property
    def rows(self) -> int:
        """Rows of the matrix of activations, `batch * tokens`."""
        return self.batch * self.tokens

    def with_tokens(self, tokens: int) -> Self:
        return replace(self, tokens=tokens)


class Operator(NamedTuple):
    """One piece of a call's work, as a device meets it.

    kind: what computes it, such as `linear` or `attention`; pieces of a kind take time in proportion to their figures.
    flops, backward, pointwise, traffic: as in `Cost`. output: bytes that it makes. weights: bytes of parameters among
    the traffic. steps: how many parts of it have to wait for each other. calls: how often it is started. spared: the
    share of its FLOPs that are counted, as `Cost` counts whole products, but not computed.
    """

    kind: str
    flops: float
    backward: float
    pointwise: float
    traffic: float
    output: float
    weights: float
    steps: float
    calls: float
    spared: float = 0.0

    def computed(self, training: bool = False) -> float:
        """FLOPs of matrix products that are computed in a forward pass or, in training, in both passes."""
        return (self.flops + self.backward if training else self.flops) * (1 - self.spared)

    def repeated(self, times: float) -> Operator:
        return self._replace(calls=self.calls * times)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a call takes.

    flops: of matrix products, forward.
    backward: of matrix products, backward; twice the forward ones unless said otherwise.
    pointwise: floating point operations outside matrix products, forward.
    traffic: bytes read and written, each operand of each fused operation once, forward.
    saved: bytes of activations that the backward pass needs.
    peak: bytes of intermediate results that are alive at once in a forward pass without gradients, beside the input.
    forward_extra: bytes that a forward pass with gradients holds at once beyond `saved`; by default the peak.
    backward_extra: the same of the backward pass, gradients of parameters aside; by default twice the peak, for the
    gradients of a result and of what it was made of.

    kind, weights, steps and spared say as what a device meets it, see `Operator`; a sum of costs has `parts` in their
    place.

    `a + b` runs `b` after `a`: everything adds up, but of the peaks the larger counts. While a training step is at `a`,
    what `b` saves is not there yet, or no more.
    """

    flops: float = 0.0
    backward: float | None = None
    pointwise: float = 0.0
    traffic: float = 0.0
    saved: float = 0.0
    peak: float = 0.0
    forward_extra: float | None = None
    backward_extra: float | None = None
    kind: str = "other"
    weights: float = 0.0
    steps: float = 0.0
    spared: float = 0.0
    parts: tuple[Operator, ...] | None = None

    @property
    def backward_flops(self) -> float:
        return 2 * self.flops if self.backward is None else self.backward

    @property
    def rising(self) -> float:
        """`forward_extra`, known."""
        return self.peak if self.forward_extra is None else self.forward_extra

    @property
    def falling(self) -> float:
        """`backward_extra`, known."""
        return 2 * self.peak if self.backward_extra is None else self.backward_extra

    @property
    def operators(self) -> tuple[Operator, ...]:
        """The pieces of its work, in order."""
        if self.parts is not None:
            return self.parts
        if not (self.flops or self.pointwise or self.traffic):
            return ()
        work = (self.flops, self.backward_flops, self.pointwise, self.traffic)
        met = {"output": self.peak, "weights": self.weights, "steps": self.steps, "calls": 1, "spared": self.spared}
        return (Operator(self.kind, *work, **met),)

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            flops=self.flops + other.flops,
            backward=self.backward_flops + other.backward_flops,
            pointwise=self.pointwise + other.pointwise,
            traffic=self.traffic + other.traffic,
            saved=self.saved + other.saved,
            peak=max(self.peak, other.peak),
            forward_extra=max(self.rising - other.saved, other.rising),
            backward_extra=max(self.falling - other.saved, other.falling),
            parts=self.operators + other.operators,
        )

    def __mul__(self, times: float) -> Cost:
        """The same call `times` times over, one after the other."""
        return Cost(
            flops=self.flops * times,
            backward=self.backward_flops * times,
            pointwise=self.pointwise * times,
            traffic=self.traffic * times,
            saved=self.saved * times,
            peak=self.peak,
            forward_extra=self.rising,
            backward_extra=self.falling,
            parts=tuple(piece.repeated(times) for piece in self.operators),
        )

    def holding(self, extra: float) -> Cost:
        """The same with `extra` bytes held throughout a pass without gradients, as for a stream beside its branch."""
        extras = {"forward_extra": self.rising, "backward_extra": self.falling}
        return replace(self, peak=self.peak + extra, parts=self.operators, **extras)


STREAMS = 4
"""Copies of the stream that a layer's forward pass finds or makes beside what its branches need: in front of the body,
of the layer and of its second branch, and the norm's output."""

FREE = Cost()


def of_one_input(costs: Iterable[Cost], kept: float) -> Cost:
    """Pieces that all read the same `kept` bytes, each of which counts them as saved: they are there once."""
    found = list(costs)
    total = sum(found, FREE)
    return replace(total, saved=total.saved - max(0, len(found) - 1) * kept)


def elementwise(
    elements: float,
    element_bytes: int,
    *,
    operations: float = 1,
    operands: int = 2,
    saved: int = 1,
    kind: str = "elementwise",
) -> Cost:
    """A map over `elements`: `operands` tensors read or written, `saved` of them kept for the backward pass."""
    size = elements * element_bytes
    return Cost(
        pointwise=elements * operations,
        traffic=operands * size,
        saved=saved * size,
        peak=size,
        # Where nothing is saved the gradient of the result is that of what it was made of.
        backward_extra=(operands if saved else 1) * size,
        kind=kind,
    )
