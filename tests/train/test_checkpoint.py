"""Checkpoints: whole or absent, and never code."""

from __future__ import annotations

import errno
import pickle
import resource
from pathlib import Path

import pytest
import torch
from train.tiny_models import TinyLanguageModel

from zoo.errors import ZooError
from zoo.train.checkpoint import load_checkpoint, load_weights, replacing, save_checkpoint, save_weights


class _Attack:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    content = {"step": 3, "model": {"w": torch.arange(3)}, "state": {"best": None, "list": [1.5, "x", (True, b"y")]}}
    save_checkpoint(tmp_path / "deep" / "c", content)
    loaded = load_checkpoint(tmp_path / "deep" / "c")
    assert torch.equal(loaded["model"].pop("w"), torch.arange(3))
    assert loaded["state"] == content["state"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["c"]


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_file_with_code_is_refused_and_not_run(tmp_path: Path, how: str) -> None:
    victim, path = tmp_path / "executed", tmp_path / "c"
    content = {"format": 1, "model": _Attack(victim)}
    if how == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    with pytest.raises(ZooError, match="refused"):
        load_checkpoint(path)
    assert not victim.exists()


def test_damaged_and_foreign_files_are_explained(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save_checkpoint(path, {"model": {"w": torch.zeros(1000)}})
    whole = path.read_bytes()
    for length in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ZooError, match=r"damaged or incomplete|refused"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(ZooError, match="not a training checkpoint of format 1"):
        load_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ZooError, match="found 'list'"):
        load_checkpoint(path)


def test_objects_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\.state\.0 is a PosixPath"):
        save_checkpoint(tmp_path / "c", {"state": [tmp_path]})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["checkpoint", "weights"])
def test_a_full_disk_leaves_the_file_that_was_there(tmp_path: Path, kind: str) -> None:
    """A limit on the size of files fails the write itself, as a full disk does."""
    path, model = tmp_path / "file", TinyLanguageModel(width=64)

    def write() -> None:
        if kind == "checkpoint":
            save_checkpoint(path, {"model": model.state_dict()})
        else:
            save_weights(path, model, {})

    write()
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(ZooError, match=r"cannot write .*file: .*the file that was there is unchanged"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_no_space_is_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ZooError, match=r"the disk is full$"), replacing(tmp_path / "file"):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_an_interruption_leaves_the_file_that_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "before"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("tied", [False, True])
def test_weights_round_trip(tmp_path: Path, tied: bool) -> None:
    model = TinyLanguageModel(tied=tied)
    save_weights(tmp_path / "w", model, {"spec": "x"})
    other = TinyLanguageModel(tied=tied)
    torch.nn.init.zeros_(other.head.weight)
    load_weights(tmp_path / "w", other)
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    save_weights(tmp_path / "w", TinyLanguageModel(width=8), {})
    with pytest.raises(ZooError, match="cannot load the weights"):
        load_weights(tmp_path / "w", TinyLanguageModel(width=16))
    (tmp_path / "w").write_bytes(b"nonsense")
    with pytest.raises(ZooError, match="cannot load the weights"):
        load_weights(tmp_path / "w", TinyLanguageModel())
