"""The data sets as a Lightning data module."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from zoo.train.data.base import Batch, Data, Split


class DataModule(LightningDataModule):
    """Batches of a data set as tensors `(inputs, labels)`.

    `span` says, each time an epoch begins, which batches of the training stream it is made of: the first and the one
    after the last, or None for no end. Asked that late, it lets a resumed run go on at its own step.
    """

    def __init__(
        self,
        data: Data,
        *,
        span: Callable[[], tuple[int, int | None]] = lambda: (0, None),
        evaluation_samples: int | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.span = span
        self.evaluation_samples = evaluation_samples

    def train_dataloader(self) -> DataLoader:
        return _loader(lambda: map(self.data.train_batch, _numbers(*self.span())))

    def val_dataloader(self) -> DataLoader:
        return self._evaluation("valid")

    def test_dataloader(self) -> DataLoader:
        return self._evaluation("test")

    def _evaluation(self, split: Split) -> DataLoader:
        return _loader(lambda: self.data.evaluation_batches(split, self.evaluation_samples))


class _Stream(IterableDataset):
    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, labels in self._batches():
            yield torch.from_numpy(inputs), torch.from_numpy(labels)


def _loader(batches: Callable[[], Iterator[Batch]]) -> DataLoader:
    return DataLoader(_Stream(batches), batch_size=None)


def _numbers(first: int, end: int | None) -> Iterator[int]:
    number = first
    while end is None or number < end:
        yield number
        number += 1
