"""Bytes as a language: the standard library's source text, or a file or folder of the user's. 256 tokens, no tokenizer.

Folders are split by file, by a hash of each file's path inside the folder, so that adding a file moves no other; files
with the same content count as one, at the first of their paths. A single file is split into contiguous blocks: the
first 80% to train on, then 10% to validate and 10% to test. Windows never leave their part.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from zoo.errors import ZooError, nearest_file
from zoo.train.data.base import SPLITS, Batch, Data, Description, Shuffle, Split, split_of
from zoo.train.data.random import random_below

CONTEXT = 256
STDLIB_LIMIT = 16 * 2**20
"""Bytes of the standard library that are read at most: whole files, chosen by the hash of their paths."""
FOLDER_LIMIT = 2**30
"""Bytes of a user's folder that are held in memory at most; a single file is mapped and may be of any size."""

_SKIPPED = frozenset({"__pycache__", "site-packages", "dist-packages", "node_modules"})
_STDLIB_SKIPPED = _SKIPPED | {"test", "tests", "idle_test"}
_PROBES = 64

Parts = dict[Split, NDArray[np.uint8]]
Details = Mapping[str, str | int | float]
T = TypeVar("T")


class ByteWindows(Data):
    """Windows of `context` bytes with the byte after each as its label.

    Each epoch cuts the training part into windows from a new offset and shows them in a new order; those of the other
    parts are fixed and lie side by side.
    """

    def __init__(
        self,
        name: str,
        parts: Parts,
        *,
        context: int,
        batch: int,
        seed: int,
        fingerprint: str,
        details: Details,
    ) -> None:
        self._parts = parts
        self._context = context
        length = len(parts["train"])
        windows = max(1, (length - context) // context)
        self._offsets = min(context, length - windows * context)
        self._shuffle = Shuffle(windows, seed)
        description = Description(
            name=name,
            input_kind="tokens",
            head_kind="language_model",
            input_shape=(context,),
            label_shape=(context,),
            vocab=256,
            sizes={
                "train": windows,
                "valid": (len(parts["valid"]) - 1) // context,
                "test": (len(parts["test"]) - 1) // context,
            },
            metric="bits_per_byte",
            fingerprint=fingerprint,
            details={**details} | {f"{split}_bytes": len(parts[split]) for split in SPLITS},
        )
        super().__init__(description, batch=batch, seed=seed)

    def samples(self, split: Split, numbers: NDArray[np.int64]) -> Batch:
        starts = numbers * self._context
        if split == "train":
            epochs, windows = self._shuffle(numbers)
            starts = windows * self._context + random_below(self._offsets, self.seed, epochs)
        text = self._parts[split][starts[:, None] + np.arange(self._context + 1)].astype(np.int64)
        return text[:, :-1], text[:, 1:]


def load_bytes(source: str, *, context: int | None, batch: int, seed: int) -> ByteWindows:
    """`stdlib`, or the path of a file or folder. Raises ZooError if it cannot be read or is too short."""
    context = context or CONTEXT
    if source == "stdlib":
        folder = Path(sysconfig.get_path("stdlib"))
        files = _limited(_unique(folder, [path for path in _files(folder, _STDLIB_SKIPPED) if path.suffix == ".py"]))
        if not files:
            raise ZooError(f"this Python's standard library has no source text in {folder}; give 'bytes:PATH' instead")
        parts, details = _split_by_file(files, context)
        fingerprint = _fingerprint_of_files(files)
    elif stat.S_ISDIR(mode := _mode(path := Path(source).expanduser())):
        files = _unique(path, _within_limit(path, list(_files(path, _SKIPPED))))
        if not files:
            raise ZooError(f"folder {path} holds no files with content (names that begin with a dot are skipped)")
        parts, details = _split_by_file(files, context)
        fingerprint = _fingerprint_of_files(files)
    elif stat.S_ISREG(mode):
        text = _map(path)
        parts, details = _blocks([text]), {"split": "contiguous blocks"}
        fingerprint = _fingerprint_of_file(text)
    else:
        raise ZooError(f"{path} is neither a file nor a folder")
    _check_lengths(source, parts, context)
    return ByteWindows(
        f"bytes:{source}", parts, context=context, batch=batch, seed=seed, fingerprint=fingerprint, details=details
    )


def _files(folder: Path, skipped: frozenset[str]) -> Iterator[Path]:
    for parent, names, files in os.walk(folder, onerror=_refuse):
        names[:] = sorted(name for name in names if name not in skipped and not name.startswith("."))
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _within_limit(folder: Path, paths: list[Path]) -> list[Path]:
    total = sum(path.stat().st_size for path in paths)
    if total > FOLDER_LIMIT:
        raise ZooError(
            f"folder {folder} holds {total:,} bytes, more than the {FOLDER_LIMIT:,} that are read into memory; "
            "join its files into one, which is mapped instead, or name a folder inside it"
        )
    return paths


def _unique(folder: Path, paths: Iterable[Path]) -> dict[str, bytes]:
    """Contents by path inside the folder; of files with equal content only the first path is kept."""
    seen: dict[bytes, str] = {}
    contents: dict[str, bytes] = {}
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in paths):
        content = _read(path, path.read_bytes)
        if content and seen.setdefault(_digest(content), name) == name:
            contents[name] = content
    return contents


def _limited(files: dict[str, bytes], limit: int = STDLIB_LIMIT) -> dict[str, bytes]:
    chosen: dict[str, bytes] = {}
    for name in sorted(files, key=lambda name: (_digest(name.encode()), name)):
        if len(files[name]) <= limit:
            chosen[name] = files[name]
            limit -= len(files[name])
    return chosen


def _split_by_file(files: dict[str, bytes], context: int) -> tuple[Parts, Details]:
    """Parts by file; where that leaves one without a window, contiguous blocks of every file."""
    grouped: dict[Split, list[bytes]] = {split: [] for split in SPLITS}
    for name in sorted(files):
        hashed = int.from_bytes(_digest(name.encode())[:8], "big")
        grouped[SPLITS[int(split_of(hashed))]].append(files[name])
    parts: Parts = {split: np.frombuffer(b"".join(contents), np.uint8) for split, contents in grouped.items()}
    if all(len(part) > context for part in parts.values()):
        return parts, {"files": len(files), "split": "by file"}
    texts = [np.frombuffer(files[name], np.uint8) for name in sorted(files)]
    return _blocks(texts), {"files": len(files), "split": "contiguous blocks of each file"}


def _blocks(texts: list[NDArray[np.uint8]]) -> Parts:
    pieces: dict[Split, list[NDArray[np.uint8]]] = {split: [] for split in SPLITS}
    for text in texts:
        tenth = len(text) // 10
        valid, test = len(text) - 2 * tenth, len(text) - tenth
        pieces["train"].append(text[:valid])
        pieces["valid"].append(text[valid:test])
        pieces["test"].append(text[test:])
    return {split: part[0] if len(part) == 1 else np.concatenate(part) for split, part in pieces.items()}


def _check_lengths(source: str, parts: Parts, context: int) -> None:
    shortest = min(SPLITS, key=lambda split: len(parts[split]))
    if len(parts[shortest]) > context:
        return
    total = sum(len(part) for part in parts.values())
    longest = len(parts[shortest]) - 1
    raise ZooError(
        f"{source} is too short: its {total:,} bytes leave {len(parts[shortest]):,} for the {shortest} part, and one "
        f"window of context {context} takes {context + 1:,}; "
        + (f"context={longest} or less would fit, or " if longest >= 1 else "")
        + f"give at least {10 * (context + 1):,} bytes"
    )


def _mode(path: Path) -> int:
    return _read(path, path.stat).st_mode


def _map(path: Path) -> NDArray[np.uint8]:
    if not path.stat().st_size:
        raise ZooError(f"{path} is empty")
    return _read(path, lambda: np.memmap(path, dtype=np.uint8, mode="r"))


def _read(path: Path, read: Callable[[], T]) -> T:
    try:
        return read()
    except FileNotFoundError:
        siblings = [entry.name for entry in islice(path.parent.iterdir(), 1000)] if path.parent.is_dir() else []
        close = nearest_file(path.name, ["stdlib", *siblings] if path.parent == Path() else siblings)
        raise ZooError(f"no file or folder {path}{f'; did you mean {close!r}?' if close else ''}") from None
    except OSError as error:
        raise ZooError(f"cannot read {path}: {error.strerror or error}") from None


def _refuse(error: OSError) -> None:
    raise ZooError(f"cannot read {error.filename}: {error.strerror or error}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _fingerprint_of_files(files: dict[str, bytes]) -> str:
    return _digest(b"".join(_digest(name.encode()) + _digest(files[name]) for name in sorted(files))).hex()


def _fingerprint_of_file(text: NDArray[np.uint8]) -> str:
    """From the length and probes at even distances, so that a file of any size is told apart at once."""
    starts = range(0, len(text), max(1, len(text) // _PROBES))
    return _digest(
        b"".join([str(len(text)).encode(), *(text[start : start + 4096].tobytes() for start in starts)])
    ).hex()
