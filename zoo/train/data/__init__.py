"""Data sets by name, and what each one asks of a model. Nothing here imports torch except `zoo.train.data.module`."""

from __future__ import annotations

from zoo.errors import ZooError, did_you_mean
from zoo.train.data.base import SPLITS, Data, Description, Split
from zoo.train.data.memory import TASKS

__all__ = ["DATA", "SPLITS", "Data", "Description", "Split", "load_data"]

DATA = {
    "bytes:stdlib": "source text of this Python's standard library, byte by byte, split by file",
    "bytes:PATH": "a file or a folder of yours, byte by byte",
    "digits": "8x8 images of handwritten digits, ten classes (scikit-learn)",
    **{task.syntax(): task.summary for task in TASKS.values()},
}
"""Every name that `load_data` knows, with one line on what it is."""


def load_data(name: str, *, context: int | None = None, batch: int = 32, seed: int = 0) -> Data:
    """The data set of that name.

    `context` is the number of tokens of a sample (each data set has a default; `digits` has none), `batch` the samples
    of one forward pass, `seed` the order of the training samples; the split depends on none of them. Raises ZooError
    for an unknown name, a bad parameter, and data that is missing, unreadable or too short.
    """
    kind, _, rest = name.partition(":")
    if kind == "bytes" and rest:
        from zoo.train.data.text import load_bytes

        return load_bytes(rest, context=context, batch=batch, seed=seed)
    if kind == "digits" and not rest:
        from zoo.train.data.digits import load_digits

        return load_digits(context=context, batch=batch, seed=seed)
    if kind in TASKS:
        from zoo.train.data.memory import load_memory_task

        return load_memory_task(kind, rest, context=context, batch=batch, seed=seed)
    if kind == "bytes":
        raise ZooError("data set 'bytes' needs to know which: 'bytes:stdlib' or 'bytes:PATH' for a file or folder")
    if kind == "digits":
        raise ZooError(f"data set 'digits' takes no parameters, but was given {rest!r}")
    raise ZooError(f"unknown data set {name!r}{did_you_mean(kind, ['bytes:stdlib', 'bytes', 'digits', *TASKS])}")
