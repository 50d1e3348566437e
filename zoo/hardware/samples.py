"""What is timed to calibrate a device: small models drawn from `calibration/*.yaml`, chosen for what they tell.

The files are spaces in the spec language, so that what a calibration spans can be read and extended. Half of the models
are chosen greedily for information per second (D-optimal design: the largest gain in the log determinant of the normal
matrix), the other half as drawn, since only those say how wrong a prediction is for a model like any other.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.accounting import Workload
from zoo.errors import SpecError, ZooError
from zoo.hardware.features import Part, Phase, cold_share, features, moved, with_cold
from zoo.hardware.work import held_bytes, parts_of
from zoo.spec.construct import construct
from zoo.spec.document import read_text_as

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.spec.template import Hole, Template

LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
BATCHES = (1, 1, 2, 4, 8)
CACHE = 8 * 2**20
"""Bytes of the cache of a device that nothing is known of yet."""
TRIES = 50
"""Draws of a template until one is valid."""
RIDGE = 1e-6
"""What a feature is taken to be known by beforehand, in shares of a model's time."""


@dataclass(frozen=True)
class Sample:
    """A model and the work it is timed on: `batch` sequences of `tokens`, and one token behind `past` others."""

    spec: Spec
    batch: int
    tokens: int
    past: int
    typical: bool
    """Whether it was taken as it was drawn, so that errors on it are those of any model."""
    dtype: str = "float32"
    thorough: bool = False
    """Whether it is trained too, and what it holds of memory is measured."""

    @property
    def key(self) -> str:
        """What tells it from other samples, in every run."""
        return f"{self.spec.hash} batch={self.batch} tokens={self.tokens} past={self.past} dtype={self.dtype}"

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What can be timed: only language models decode."""
        return ("forward", "decode") if self.spec.root().causal else ("forward",)

    @property
    def work(self) -> Workload:
        """What the model is asked to do."""
        return Workload(self.batch, self.tokens, self.past, self.dtype)

    def parts(self, phase: Phase) -> tuple[Part, ...]:
        """What a device meets, part by part."""
        return self._forward if phase == "forward" else parts_of(self.spec, self.work, phase)

    @cached_property
    def _forward(self) -> tuple[Part, ...]:
        """Kept, since choosing a sample, timing it and writing down what was timed all ask for it."""
        return parts_of(self.spec, self.work, "forward")

    def held(self, phase: Phase) -> float:
        """Bytes that are counted to be held at once."""
        return held_bytes(self.spec, self.work, phase)

    @cached_property
    def known(self) -> dict[str, float]:
        """The features of its forward pass, with what is cold on a device of an ordinary cache."""
        counts = features(self.parts("forward"))
        return with_cold(counts, cold_share(moved(counts), CACHE))


def templates() -> list[Template]:
    """The shipped calibration spaces."""
    folder = files("zoo.hardware") / "calibration"
    found = sorted((file for file in folder.iterdir() if file.name.endswith(".yaml")), key=lambda file: file.name)
    return [read_text_as(file.read_text(encoding="utf-8"), file.name) for file in found]


def drawn(rng: random.Random, dtype: str = "float32", typical: bool = False) -> Iterator[Sample]:
    """Samples without end; two of three are language models."""
    shapes = templates()
    while True:
        template = rng.choice(shapes)
        for _ in range(TRIES):
            try:
                spec: Any = construct(template.fill(lambda hole, _: _value(hole, rng)))
                break
            except SpecError:
                continue
        else:
            raise ZooError(f"no valid model in {TRIES} draws from {template.source.mark or 'a calibration space'}")
        tokens, past = rng.choices(LENGTHS, k=2) if spec.root().causal else (spec.context, 0)
        yield Sample(spec, rng.choice(BATCHES), min(tokens, spec.context), min(past, spec.context - 1), typical, dtype)


def _value(hole: Hole, rng: random.Random) -> Any:
    labels = hole.labels()
    return rng.choice(labels) if labels else rng.uniform(hole.low, hole.high)


def chosen(pool: Sequence[Sample], guess: Callable[[Sample], float], price: Callable[[float], float]) -> list[Sample]:
    """The pool in the order in which its samples tell most for what they cost.

    guess: seconds of a sample's forward pass. price: seconds that timing takes for such a pass. O(pool^2 features).
    """
    names = sorted({name for sample in pool for name in sample.known})
    seconds = np.array([guess(sample) for sample in pool])
    matrix = np.array([[sample.known.get(name, 0.0) for name in names] for sample in pool])
    shares = matrix / np.maximum(matrix.mean(axis=0), 1e-300) * seconds.mean() / seconds[:, None]
    shares /= np.linalg.norm(shares, axis=0, keepdims=True) / np.sqrt(len(pool))
    costs = np.array([price(second) for second in seconds])
    inverse = np.eye(len(names)) / RIDGE
    # What each sample adds to the determinant, `x (X^T X)^-1 x`, follows the inverse by the same formula (Sherman and
    # Morrison 1950).
    added = (shares**2).sum(axis=1) / RIDGE
    left = np.ones(len(pool), dtype=bool)
    order: list[Sample] = []
    while left.any():
        gains = np.log1p(np.maximum(added, 0.0)) / costs
        best = int(np.argmax(np.where(left, gains, -np.inf)))
        direction = inverse @ shares[best]
        grown = 1 + shares[best] @ direction
        inverse -= np.outer(direction, direction) / grown
        added -= (shares @ direction) ** 2 / grown
        left[best] = False
        order.append(pool[best])
    return order


def take(
    pool: Iterable[Sample], count: int, guess: Callable[[Sample], float], longest: float, seen: set[str]
) -> list[Sample]:
    """The next `count` samples of a pool that no one has seen and that take at most `longest` seconds."""
    found: list[Sample] = []
    for sample in pool:
        if len(found) == count:
            break
        if sample.key not in seen and guess(sample) <= longest:
            seen.add(sample.key)
            found.append(sample)
    return found
