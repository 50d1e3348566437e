"""What every data set promises: samples by number, as a pure function of the seed, in three parts that never meet."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from zoo.train.data.random import random_bits

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, Split, Split] = ("train", "valid", "test")
EVALUATION_TOKENS = 8192
EVALUATION_LOGITS = 2**26
IGNORE = -100
"""Label of a position at which nothing is asked."""

Batch = tuple[NDArray, NDArray]


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What a data set is and what it asks of a model, known before anything is trained."""

    name: str
    input_kind: Literal["tokens", "image"]
    head_kind: Literal["language_model", "classifier", "regression"]
    input_shape: tuple[int, ...]
    """Without the batch: `[tokens]` or `[channels, height, width]`."""
    label_shape: tuple[int, ...]
    vocab: int | None = None
    """Token ids and labels are below it; None for images."""
    classes: int | None = None
    """Classes of a classifier; None for language models."""
    sizes: dict[Split, int | None]
    """Samples of each part; None where they never end."""
    metric: Literal["bits_per_byte", "accuracy", "loss"]
    """The figure by which models are compared on this data."""
    optimum_loss: float | None = None
    optimum_accuracy: float | None = None
    fingerprint: str
    """Changes when the samples do."""
    details: Mapping[str, str | int | float] = field(default_factory=dict)
    """Further facts to show, such as where the text came from."""

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        """Whether a better model has a lower or a higher `metric`."""
        return "maximize" if self.metric == "accuracy" else "minimize"

    @property
    def tokens_per_sample(self) -> int:
        """What one sample counts for in a rate: its tokens, or one for an image."""
        return self.input_shape[0] if self.input_kind == "tokens" else 1


class Data(ABC):
    """Samples by number. Training samples form one endless stream; those of the other parts are counted."""

    def __init__(self, description: Description, *, batch: int, seed: int) -> None:
        self._description = description
        self.batch = batch
        self.seed = seed

    def describe(self) -> Description:
        """What this data set is and what it asks of a model."""
        return self._description

    @abstractmethod
    def samples(self, split: Split, numbers: NDArray[np.int64]) -> Batch:
        """Inputs and labels of the samples with these numbers, stacked: a pure function of the arguments and seed.

        Training numbers are unbounded; those of `valid` and `test` are below `describe().sizes`.
        """

    def train_batch(self, number: int) -> Batch:
        """The `number`-th batch of the training stream, so that a run can go on anywhere without replaying."""
        return self.samples("train", np.arange(number * self.batch, (number + 1) * self.batch))

    @property
    def evaluation_batch(self) -> int:
        """Samples of one forward pass of an evaluation.

        Those of training, or as many more as make `EVALUATION_TOKENS` tokens or pixels: nothing is kept for a backward
        pass, and tiny batches would cost more than the training. Logits stay below `EVALUATION_LOGITS`.
        """
        size = math.prod(self._description.input_shape)
        logits = size * (self._description.vocab or 1)
        return max(self.batch, min(math.ceil(EVALUATION_TOKENS / size), EVALUATION_LOGITS // logits))

    def evaluation_batches(self, split: Split, limit: int | None = None) -> Iterator[Batch]:
        """All samples of a part in order, or `limit` of them at even distances; the last batch may be smaller."""
        size = self._description.sizes[split]
        if size is None:
            raise ValueError(f"{split!r} samples of {self._description.name} never end")
        count = size if limit is None else min(size, limit)
        numbers = np.arange(count) * size // count
        for start in range(0, count, self.evaluation_batch):
            yield self.samples(split, numbers[start : start + self.evaluation_batch])


class Shuffle:
    """An endless stream over `count` things that shows each once per epoch, in an order new to each epoch."""

    def __init__(self, count: int, seed: int) -> None:
        self.count = count
        self.seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}

    def __call__(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Epoch and thing for each number of the stream."""
        epochs, positions = np.divmod(numbers, self.count)
        things = np.empty_like(numbers)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            things[chosen] = self._order(int(epoch))[positions[chosen]]
        return epochs, things

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                self._orders.clear()
            self._orders[epoch] = np.argsort(random_bits(self.seed, epoch, np.arange(self.count)), kind="stable")
        return self._orders[epoch]


def split_of(digest: NDArray[np.uint64] | int) -> NDArray[np.int64]:
    """The part, as an index into SPLITS, of things with these 64-bit hashes: 80% train, 10% valid, 10% test."""
    tenth = np.asarray(digest, dtype=np.uint64) % np.uint64(10)
    return np.where(tenth < 8, 0, np.where(tenth == 8, 1, 2))
