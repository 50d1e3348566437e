"""Files that are whole or not there, and that hold tensors and plain values only: loading one never executes code."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from zoo.errors import ZooError

FORMAT = 1


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place, on the disk, once the block has written it.

    Whenever the process or machine dies, `path` is the old file or the new one. Raises ZooError where writing fails;
    the old file then stays.
    """
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        if os.name == "posix":
            _sync(path.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        kept = "; the file that was there is unchanged" if path.exists() else ""
        raise ZooError(f"cannot write {path}: {reason}{kept}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values. Raises TypeError for anything that could not be loaded again without code."""
    _refuse_objects(content, "checkpoint")
    with replacing(path) as temporary, temporary.open("wb") as file:
        writer = _Writer(file)
        try:
            torch.save({"format": FORMAT, **content}, writer)  # type: ignore[arg-type]
        except RuntimeError:
            # torch reports a failed write as a RuntimeError that no longer says why.
            raise writer.failure or OSError(errno.EIO, "the write failed") from None


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. Raises ZooError for a file that is broken, foreign or holds code."""
    try:
        with warnings.catch_warnings():
            # Of files that other programs wrote; they are refused below for what they hold.
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ZooError(
            f"{path} is refused: it holds Python objects other than tensors and plain values, or is no checkpoint; "
            "loading such a file could execute code"
        ) from None
    except Exception as error:  # Garbage makes an unpickler fail in any way there is.
        raise ZooError(
            f"cannot load the checkpoint {path}: it is damaged or incomplete ({_first_line(error)})"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise ZooError(f"{path} is not a training checkpoint of format {FORMAT}; found {found!r}")
    return content


def save_weights(path: Path, model: nn.Module, metadata: dict[str, str]) -> None:
    """Write the parameters and buffers as safetensors; tied parameters are written once."""
    with replacing(path) as temporary:
        try:
            save_model(model, str(temporary), metadata)
        except SafetensorError as error:
            raise OSError(errno.ENOSPC if "os error 28" in str(error) else errno.EIO, str(error)) from None


def load_weights(path: Path, model: nn.Module) -> None:
    """Fill the model from safetensors. Raises ZooError if the file is damaged or belongs to another architecture."""
    try:
        load_model(model, str(path))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise ZooError(f"cannot load the weights {path}: {error}") from None


class _Writer:
    """Passes bytes on, and remembers the error of the first write that failed."""

    def __init__(self, file: Any) -> None:
        self._file = file
        self.failure: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return self._file.write(content)
        except OSError as error:
            self.failure = self.failure or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _refuse_objects(value: Any, path: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _refuse_objects(key, f"{path} key")
            _refuse_objects(item, f"{path}.{key}")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _refuse_objects(item, f"{path}.{index}")
    elif not isinstance(value, Tensor) and type(value) not in (str, int, float, bool, bytes, type(None)):
        raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]
