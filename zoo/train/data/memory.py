"""Three tasks that only a memory can solve, drawn without end, each with a known optimum of zero loss.

Labels are `IGNORE` where nothing is asked. Every sequence belongs to one part by a hash of its content, whatever seed
and number it was drawn with, so the parts are disjoint by construction. Validation and test sequences do not depend on
the seed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError, did_you_mean
from zoo.train.data.base import IGNORE, SPLITS, Batch, Data, Description, Split, split_of
from zoo.train.data.random import fold, random_below, random_bits

EVALUATION_SIZE = 1024
MINIMUM_SEQUENCES = 1000
"""Fewer different sequences than this cannot be told apart from a table, nor split into three parts with certainty."""

Tokens = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class MemoryTask(ABC):
    """A task with its sizes. `keys` below are hashes, one per sequence, from which all its random draws follow."""

    vocab: int
    """Number of different tokens, markers included."""

    name: ClassVar[str]
    summary: ClassVar[str]

    @classmethod
    @abstractmethod
    def fitting(cls, context: int, **given: int) -> MemoryTask:
        """The task with the given sizes, the others chosen so that a sequence fills `context` tokens at most."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Length of a sequence."""

    @property
    @abstractmethod
    def sequences(self) -> float:
        """How many different sequences there are."""

    @abstractmethod
    def draw(self, keys: NDArray[np.uint64]) -> Batch:
        """Inputs and labels, `[count, tokens]`, for these keys."""

    @abstractmethod
    def check(self) -> None:
        """Raises ZooError if the sizes contradict each other."""

    def sizes(self) -> dict[str, int]:
        """The task's parameters by name."""
        return {item.name: getattr(self, item.name) for item in fields(self)}

    @classmethod
    def syntax(cls) -> str:
        """The name with all parameters, for lists of what there is."""
        return f"{cls.name}:" + ",".join(f"{item.name}=N" for item in fields(cls))


@dataclass(frozen=True, kw_only=True)
class Copy(MemoryTask):
    """`s_1 ... s_n | s_1 ... s_(n-1)`, asked from the separator on: `s_1 ... s_n`. Token 0 separates.

    The answer is fed back, as in language modelling (Jelassi et al. 2024, "Repeat after me", section 3).
    """

    length: int

    name = "copy"
    summary = "repeat a random string"

    @classmethod
    def fitting(cls, context: int, **given: int) -> Copy:
        return cls(**{"length": max(1, context // 2), "vocab": 16} | given)

    @property
    def tokens(self) -> int:
        return 2 * self.length

    @property
    def sequences(self) -> float:
        return _power(self.vocab - 1, self.length)

    def check(self) -> None:
        if self.vocab < 3:
            raise ZooError(f"copy needs vocab of at least 3 (a separator and two symbols), not {self.vocab}")

    def draw(self, keys: NDArray[np.uint64]) -> Batch:
        string = 1 + random_below(self.vocab - 1, keys[:, None], np.arange(self.length))
        separator = np.zeros((len(keys), 1), dtype=np.int64)
        silent = np.full((len(keys), self.length), IGNORE)
        return np.hstack([string, separator, string[:, :-1]]), np.hstack([silent, string])


@dataclass(frozen=True, kw_only=True)
class Recall(MemoryTask):
    """`k_1 v_1 ... k_n v_n` with different keys, then all keys in another order; each is asked for its value.

    Keys are the lower half of the vocabulary, values the upper. Multi-query associative recall without gaps, after
    Arora et al. 2023 (Zoology), section 3.
    """

    pairs: int

    name = "recall"
    summary = "look up the value that was paired with a key"

    @classmethod
    def fitting(cls, context: int, **given: int) -> Recall:
        vocab = given.get("vocab", 64)
        return cls(**{"pairs": max(1, min(context // 3, vocab // 2)), "vocab": vocab} | given)

    @property
    def tokens(self) -> int:
        return 3 * self.pairs

    @property
    def sequences(self) -> float:
        keys = self.vocab // 2
        orders = math.lgamma(keys + 1) - math.lgamma(keys - self.pairs + 1) + math.lgamma(self.pairs + 1)
        values = self.pairs * math.log(self.vocab - keys)
        return math.exp(min(orders + values, 700))

    def check(self) -> None:
        if self.vocab < 2 * self.pairs:
            raise ZooError(
                f"recall of {self.pairs} pairs needs as many different keys, which are half of the vocabulary: "
                f"vocab={max(4, 2 * self.pairs)} or more, or pairs={max(1, self.vocab // 2)} or fewer"
            )

    def draw(self, keys: NDArray[np.uint64]) -> Batch:
        half = self.vocab // 2
        names = np.argsort(random_bits(keys[:, None], 0, np.arange(half)), axis=1, kind="stable")[:, : self.pairs]
        values = half + random_below(self.vocab - half, keys[:, None], 1, np.arange(self.pairs))
        order = np.argsort(random_bits(keys[:, None], 2, np.arange(self.pairs)), axis=1, kind="stable")
        shown = np.stack([names, values], axis=2).reshape(len(keys), -1)
        asked = np.take_along_axis(names, order, axis=1)
        answers = np.take_along_axis(values, order, axis=1)
        return np.hstack([shown, asked]), np.hstack([np.full_like(shown, IGNORE), answers])


@dataclass(frozen=True, kw_only=True)
class SelectiveCopy(MemoryTask):
    """`length` symbols scattered among `noise` noise tokens, then `length` markers that ask for the symbols in order.

    Token 0 is noise, token 1 the marker. The answer is not fed back (Gu and Dao 2023, Mamba, section 4.1.1).
    """

    length: int
    noise: int

    name = "selective_copy"
    summary = "repeat the symbols that were scattered among noise"

    @classmethod
    def fitting(cls, context: int, **given: int) -> SelectiveCopy:
        length = given.get("length", max(2, context // 8))
        return cls(**{"length": length, "noise": max(1, context - 2 * length), "vocab": 16} | given)

    @property
    def tokens(self) -> int:
        return 2 * self.length + self.noise

    @property
    def sequences(self) -> float:
        places = math.lgamma(self.length + self.noise + 1) - math.lgamma(self.length + 1) - math.lgamma(self.noise + 1)
        return math.exp(min(places + self.length * math.log(max(1, self.vocab - 2)), 700))

    def check(self) -> None:
        if self.vocab < 4:
            raise ZooError(f"selective_copy needs vocab of at least 4 (noise, marker, two symbols), not {self.vocab}")

    def draw(self, keys: NDArray[np.uint64]) -> Batch:
        shown = self.length + self.noise
        ranks = np.argsort(random_bits(keys[:, None], 0, np.arange(shown)), axis=1, kind="stable")
        places = np.sort(ranks[:, : self.length], axis=1)
        symbols = 2 + random_below(self.vocab - 2, keys[:, None], 1, np.arange(self.length))
        memory = np.zeros((len(keys), shown), dtype=np.int64)
        np.put_along_axis(memory, places, symbols, axis=1)
        markers = np.ones((len(keys), self.length), dtype=np.int64)
        return np.hstack([memory, markers]), np.hstack([np.full_like(memory, IGNORE), symbols])


TASKS: dict[str, type[MemoryTask]] = {task.name: task for task in (Copy, Recall, SelectiveCopy)}
DEFAULT_CONTEXT = 64


class MemorySequences(Data):
    """Sequences of a memory task. Draws that belong to another part are drawn again."""

    def __init__(self, name: str, task: MemoryTask, *, batch: int, seed: int) -> None:
        self._task = task
        sizes: dict[Split, int | None] = {"train": None, "valid": EVALUATION_SIZE, "test": EVALUATION_SIZE}
        description = Description(
            name=name,
            input_kind="tokens",
            head_kind="language_model",
            input_shape=(task.tokens,),
            label_shape=(task.tokens,),
            vocab=task.vocab,
            sizes=sizes,
            metric="accuracy",
            optimum_loss=0.0,
            optimum_accuracy=1.0,
            fingerprint=f"{task.name}-1",
            details=dict(task.sizes()),
        )
        super().__init__(description, batch=batch, seed=seed)

    def samples(self, split: Split, numbers: NDArray[np.int64]) -> Batch:
        part = SPLITS.index(split)
        seed = self.seed if split == "train" else 0
        inputs = np.empty((len(numbers), self._task.tokens), dtype=np.int64)
        labels = np.empty_like(inputs)
        pending = np.arange(len(numbers))
        attempt = 0
        while len(pending):
            drawn, asked = self._task.draw(random_bits(seed, part, numbers[pending], attempt))
            mine = split_of(fold(drawn)) == part
            inputs[pending[mine]], labels[pending[mine]] = drawn[mine], asked[mine]
            pending = pending[~mine]
            attempt += 1
        return inputs, labels


def load_memory_task(kind: str, parameters: str, *, context: int | None, batch: int, seed: int) -> MemorySequences:
    """The task `kind` with `name=value,...`. Raises ZooError for what is unknown, not a number, or does not fit."""
    cls = TASKS[kind]
    known = [item.name for item in fields(cls)]
    given: dict[str, int] = {}
    for part in filter(None, parameters.split(",")):
        key, equals, value = (text.strip() for text in part.partition("="))
        if key not in known:
            raise ZooError(f"{kind} has no parameter {key!r}{did_you_mean(key, known)}")
        if key in given:
            raise ZooError(f"{kind}: parameter {key!r} is given twice")
        if not equals or not (value.isascii() and value.isdigit()) or not 1 <= int(value) <= 10**6:
            raise ZooError(f"{kind}: {key} must be a whole number from 1 to 1,000,000, as in {key}=16, not {value!r}")
        given[key] = int(value)
    task = cls.fitting(context or DEFAULT_CONTEXT, **given)
    task.check()
    if context is not None and task.tokens > context:
        raise ZooError(f"{kind} with {_listed(task)} takes {task.tokens} tokens, but the context is {context}")
    if task.sequences < MINIMUM_SEQUENCES:
        raise ZooError(
            f"{kind} with {_listed(task)} has only {task.sequences:.0f} different sequences, too few to train on some "
            f"and test on others; at least {MINIMUM_SEQUENCES:,} are needed: raise a parameter"
        )
    return MemorySequences(f"{kind}:{_listed(task)}", task, batch=batch, seed=seed)


def _listed(task: MemoryTask) -> str:
    return ",".join(f"{name}={value}" for name, value in task.sizes().items())


def _power(base: int, exponent: int) -> float:
    return math.exp(min(exponent * math.log(base), 700))
