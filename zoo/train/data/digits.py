"""Handwritten digits of scikit-learn: 1,797 images of 8x8 pixels in ten classes."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError
from zoo.train.data.base import SPLITS, Batch, Data, Description, Shuffle, Split

SHARES = (0.7, 0.15, 0.15)
"""Shares of each class that go to the parts."""


class Digits(Data):
    """Images `[batch, 1, 8, 8]` with the mean and deviation of the training part taken out, and classes `[batch]`."""

    def __init__(self, images: NDArray[np.float64], classes: NDArray[np.int64], *, batch: int, seed: int) -> None:
        digests = [hashlib.blake2b(image.tobytes(), digest_size=16).digest() for image in images]
        parts = _stratified(digests, classes)
        pixels = images[parts["train"]]
        normalised = ((images - pixels.mean()) / pixels.std()).astype(np.float32)[:, None]
        self._parts = {split: (normalised[chosen], classes[chosen]) for split, chosen in parts.items()}
        self._shuffle = Shuffle(len(parts["train"]), seed)
        description = Description(
            name="digits",
            input_kind="image",
            head_kind="classifier",
            input_shape=(1, 8, 8),
            label_shape=(),
            classes=10,
            sizes={split: len(parts[split]) for split in SPLITS},
            metric="accuracy",
            fingerprint=hashlib.blake2b(b"".join(digests) + classes.tobytes(), digest_size=16).hexdigest(),
        )
        super().__init__(description, batch=batch, seed=seed)

    def samples(self, split: Split, numbers: NDArray[np.int64]) -> Batch:
        if split == "train":
            _, numbers = self._shuffle(numbers)
        images, classes = self._parts[split]
        return images[numbers], classes[numbers]


def load_digits(*, context: int | None, batch: int, seed: int) -> Digits:
    """Raises ZooError without scikit-learn, and for a context, which images do not have."""
    if context is not None:
        raise ZooError(f"data set 'digits' holds images and has no context; leave out context={context}")
    try:
        from sklearn.datasets import load_digits as load
    except ImportError:
        raise ZooError("data set 'digits' needs scikit-learn: pip install zoo-nas[digits]") from None
    images, classes = load(return_X_y=True)
    return Digits(np.asarray(images).reshape(-1, 8, 8), np.asarray(classes, dtype=np.int64), batch=batch, seed=seed)


def _stratified(digests: list[bytes], classes: NDArray[np.int64]) -> dict[Split, NDArray[np.int64]]:
    """Image numbers of each part: each class is dealt out in the order of the images' hashes, equal images together."""
    parts: dict[Split, list[int]] = {split: [] for split in SPLITS}
    bounds = np.cumsum(SHARES)
    home: dict[bytes, Split] = {}
    for digit in np.unique(classes):
        members = sorted(np.flatnonzero(classes == digit), key=lambda number: digests[number])
        for rank, number in enumerate(members):
            part = SPLITS[min(2, int(np.searchsorted(bounds, rank / len(members), side="right")))]
            parts[home.setdefault(digests[number], part)].append(int(number))
    return {split: np.array(sorted(numbers), dtype=np.int64) for split, numbers in parts.items()}
