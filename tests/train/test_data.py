"""Every data set: samples by number, determinism, parts that never meet, and words for what is wrong."""

from __future__ import annotations

import builtins
import math
import os
import sysconfig
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.train.data import SPLITS, Data, load_data
from zoo.train.data import text as text_module
from zoo.train.data.base import EVALUATION_TOKENS, IGNORE, Shuffle
from zoo.train.data.random import random_below, random_bits

NAMES = [
    "bytes:stdlib",
    "digits",
    "copy:length=6,vocab=5",
    "recall:pairs=4,vocab=12",
    "selective_copy:length=3,noise=9",
]


def _all(data: Data, split) -> tuple[np.ndarray, np.ndarray]:
    inputs, labels = zip(*data.evaluation_batches(split), strict=True)
    return np.concatenate(inputs), np.concatenate(labels)


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_shapes_match_the_description(name: str) -> None:
    data = load_data(name, batch=5)
    about = data.describe()
    batches = [data.train_batch(3), next(data.evaluation_batches("valid")), next(data.evaluation_batches("test"))]
    counts = (5, *(min(data.evaluation_batch, about.sizes[split] or 0) for split in SPLITS[1:]))
    for (inputs, labels), count in zip(batches, counts, strict=True):
        assert inputs.shape == (count, *about.input_shape)
        assert labels.shape == (count, *about.label_shape)
        assert inputs.dtype == (np.int64 if about.input_kind == "tokens" else np.float32)
        if about.vocab is not None:
            assert 0 <= inputs.min() <= inputs.max() < about.vocab
        asked = labels[labels != IGNORE]
        assert asked.size
        assert 0 <= asked.min() <= asked.max() < (about.vocab or about.classes or 0)
    assert about.direction == ("minimize" if name.startswith("bytes") else "maximize")


def test_the_stream_is_a_function_of_seed_and_number(name: str) -> None:
    one, two = load_data(name, batch=4, seed=7), load_data(name, batch=8, seed=7)
    other = load_data(name, batch=8, seed=8)
    late = two.train_batch(500)
    halves = [one.train_batch(1001), one.train_batch(1000)][::-1]
    for whole, first, second in zip(late, *halves, strict=True):
        np.testing.assert_array_equal(whole, np.concatenate([first, second]))
    assert any((a != b).any() for a, b in zip(late, other.train_batch(500), strict=True))
    for a, b in zip(next(one.evaluation_batches("valid", 4)), next(other.evaluation_batches("valid", 4)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_evaluation_covers_each_sample_once_or_a_spread_of_them(name: str) -> None:
    data = load_data(name, batch=40)
    size = data.describe().sizes["test"]
    assert size is not None
    inputs, _ = _all(data, "test") if size < 2000 else (np.empty(size), None)
    assert len(inputs) == size
    several = data.evaluation_batch
    some = [len(batch) for batch, _ in data.evaluation_batches("test", min(size, several + 10))]
    assert some == ([several, 10] if size >= several + 10 else [size])


def test_evaluation_is_in_large_batches_whatever_that_of_the_training(name: str) -> None:
    small, large = load_data(name, batch=1), load_data(name, batch=5000)
    size = math.prod(small.describe().input_shape)
    assert small.evaluation_batch * size >= EVALUATION_TOKENS
    assert large.evaluation_batch == 5000
    samples = [np.concatenate(part) for part in zip(*small.evaluation_batches("valid", 90), strict=True)]
    for one, other in zip(samples, next(large.evaluation_batches("valid", 90)), strict=True):
        np.testing.assert_array_equal(one, other)


def test_unknown_names_meet_the_nearest() -> None:
    for given_name, words in {
        "digit": "did you mean 'digits'?",
        "recal:pairs=3": "did you mean 'recall'?",
        "byte:stdlib": "did you mean 'bytes'?",
        "bytes": "'bytes:stdlib' or 'bytes:PATH'",
        "imagenet": "known: bytes",
        "digits:size=3": "takes no parameters",
    }.items():
        with pytest.raises(ZooError, match=words):
            load_data(given_name)


# Random numbers and order


def test_random_bits_are_even_and_depend_on_every_coordinate() -> None:
    bits = random_bits(1, np.arange(4000)[:, None], np.arange(3))
    assert len(np.unique(bits)) == bits.size
    ones = np.unpackbits(bits.view(np.uint8)).mean()
    assert abs(ones - 0.5) < 0.005
    counts = np.bincount(random_below(10, 0, np.arange(20000)), minlength=10)
    assert abs(counts / 2000 - 1).max() < 0.08


@given(count=st.integers(1, 50), seed=st.integers(0, 2**62), epoch=st.integers(0, 5))
def test_shuffle_shows_each_thing_once_per_epoch(count: int, seed: int, epoch: int) -> None:
    epochs, things = Shuffle(count, seed)(np.arange(epoch * count, (epoch + 1) * count))
    assert (epochs == epoch).all()
    assert sorted(things) == list(range(count))
    _, later = Shuffle(count, seed)(np.arange((epoch + 1) * count, (epoch + 2) * count))
    assert count < 20 or (things != later).any()


# Bytes


def test_stdlib_parts_share_no_file_content() -> None:
    data = load_data("bytes:stdlib", context=128)
    about = data.describe()
    assert about.vocab == 256
    assert about.details["split"] == "by file"
    train, valid, test = (about.details[f"{split}_bytes"] for split in SPLITS)
    assert 1_000_000 < train <= text_module.STDLIB_LIMIT  # type: ignore[operator]
    assert valid > 100_000  # type: ignore[operator]
    assert test > 100_000  # type: ignore[operator]
    texts = {split: bytes(data._parts[split]) for split in SPLITS}  # type: ignore[attr-defined]
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    for content in (file.read_bytes() for file in files[::4]):
        assert sum(content in text for text in texts.values()) == 1 or len(content) < 1000


def test_labels_are_the_next_bytes(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)) * 40)
    data = load_data(f"bytes:{path}", context=16, batch=3)
    for inputs, labels in (data.train_batch(0), next(data.evaluation_batches("test"))):
        np.testing.assert_array_equal(labels[:, :-1], inputs[:, 1:])
        np.testing.assert_array_equal(labels, (inputs + 1) % 250)


def test_an_epoch_sees_every_window_once_from_a_new_offset(tmp_path: Path) -> None:
    path = tmp_path / "random"
    content = np.random.default_rng(0).bytes(10_000)
    path.write_bytes(content)
    data = load_data(f"bytes:{path}", context=20, batch=1)
    count = data.describe().sizes["train"] or 0
    offsets = []
    for epoch in range(4):
        inputs, _ = data.samples("train", np.arange(epoch * count, (epoch + 1) * count))
        places = sorted(content.index(row.astype(np.uint8).tobytes()) for row in inputs)
        offsets.append(places[0])
        assert places == list(range(places[0], places[0] + 20 * count, 20))
        assert places[-1] + 21 <= 8000
    assert len(set(offsets)) > 1


def _folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def _marked(mark: int, length: int = 400) -> bytes:
    """Content in which every window of eight bytes tells which file it is from."""
    return b"".join(b"<%05d>" % mark for _ in range(length // 7))


def test_a_folder_is_split_by_file_and_equal_files_stay_together(tmp_path: Path) -> None:
    files = {f"d{number % 5}/{number}.txt": _marked(number) for number in range(60)}
    copies = {f"copies/{number}-{copy}.txt": _marked(number) for number in range(60) for copy in range(3)}
    folder = _folder(tmp_path, files | copies | {"empty.txt": b"", ".hidden": _marked(777), ".git/x": _marked(778)})
    data = load_data(f"bytes:{folder}", context=15, batch=4)
    assert data.describe().details["files"] == 60
    homes: dict[bytes, set[str]] = defaultdict(set)
    for split in SPLITS:
        text = bytes(data._parts[split])  # type: ignore[attr-defined]
        for piece in text.replace(b">", b">\n").split():
            homes[piece].add(split)
    assert len(homes) == 60
    assert all(len(where) == 1 for where in homes.values())
    assert {split for where in homes.values() for split in where} == set(SPLITS)


def test_adding_a_file_moves_no_other(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {f"{number}.txt": _marked(number) for number in range(50)})
    before = load_data(f"bytes:{folder}", context=15)
    _folder(tmp_path, {"!first.txt": _marked(999)})
    after = load_data(f"bytes:{folder}", context=15)
    assert before.describe().fingerprint != after.describe().fingerprint
    for split in SPLITS:
        old, new = (set(bytes(data._parts[split]).split(b">")) for data in (before, after))  # type: ignore[attr-defined]
        assert old <= new


def test_few_files_are_split_into_blocks(tmp_path: Path) -> None:
    folder = _folder(tmp_path, {"a": _marked(1, 700), "b": _marked(2, 700), "copy-of-b": _marked(2, 700)})
    about = load_data(f"bytes:{folder}", context=15).describe()
    assert about.details["files"] == 2
    assert about.details["split"] == "contiguous blocks of each file"


def test_a_file_is_split_into_blocks_that_do_not_overlap(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    content = np.random.default_rng(0).integers(0, 256, 3001, dtype=np.uint8).tobytes()
    path.write_bytes(content)
    data = load_data(f"bytes:{path}", context=32)
    parts = [bytes(data._parts[split]) for split in SPLITS]  # type: ignore[attr-defined]
    assert b"".join(parts) == content
    assert [len(part) for part in parts] == [2401, 300, 300]


def test_a_changed_file_has_another_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "text"
    fingerprints = set()
    for content in (b"a" * 5000, b"a" * 5001, b"a" * 4000 + b"b" * 1000):
        path.write_bytes(content)
        fingerprints.add(load_data(f"bytes:{path}").describe().fingerprint)
    assert len(fingerprints) == 3


def test_texts_that_cannot_be_read_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "corpus.txt").write_bytes(b"x" * 100)
    (tmp_path / "nothing.txt").touch()
    (tmp_path / "hollow").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = {
        "corpsu.txt": "no file or folder .*did you mean 'corpus.txt'",
        "zzz": "no file or folder [^;]*$",
        "corpus.txt": r"100 bytes leave 10 .* context 256 takes 257; context=9 or less would fit.*2,570 bytes",
        "nothing.txt": "is empty",
        "hollow": "holds no files",
        "pipe": "neither a file nor a folder",
        "corpus.txt/deeper": "cannot read",
    }
    for name, words in cases.items():
        with pytest.raises(ZooError, match=words):
            load_data(f"bytes:{tmp_path / name}")

    def refuse(*_: object) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ZooError, match=r"cannot read .*corpus\.txt: Permission denied"):
        load_data(f"bytes:{tmp_path}")


def test_the_shortest_text_that_fits_fits(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(b"x" * 170)
    data = load_data(f"bytes:{path}", context=16)
    assert data.describe().sizes == {"train": 7, "valid": 1, "test": 1}
    path.write_bytes(b"x" * 169)
    with pytest.raises(ZooError, match="too short"):
        load_data(f"bytes:{path}", context=16)


def test_a_folder_beyond_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _folder(tmp_path, {"a": b"x" * 600, "b": b"y" * 600})
    monkeypatch.setattr(text_module, "FOLDER_LIMIT", 1000)
    with pytest.raises(ZooError, match=r"1,200 bytes, more than the 1,000"):
        load_data(f"bytes:{tmp_path}", context=8)


# Digits


def test_digits_are_stratified_normalised_and_disjoint() -> None:
    data = load_data("digits", batch=64)
    about = data.describe()
    sizes = [about.sizes[split] for split in SPLITS]
    assert sum(size or 0 for size in sizes) == 1797
    train, classes = data.samples("train", np.arange(about.sizes["train"] or 0))
    assert abs(train.mean()) < 1e-5
    assert abs(train.std() - 1) < 1e-5
    seen = {image.tobytes() for image in train}
    shares = [np.bincount(classes, minlength=10) / len(classes)]
    for split in ("valid", "test"):
        images, labels = _all(data, split)
        assert not seen & {image.tobytes() for image in images}
        seen |= {image.tobytes() for image in images}
        shares.append(np.bincount(labels, minlength=10) / len(labels))
    assert np.ptp(shares, axis=0).max() < 0.01


def test_equal_digits_share_a_part() -> None:
    from zoo.train.data.digits import Digits

    images = np.repeat(np.random.default_rng(0).normal(size=(40, 8, 8)), 3, axis=0)
    data = Digits(images, np.repeat(np.arange(40) % 10, 3), batch=4, seed=0)
    parts = [{image.tobytes() for image in data._parts[split][0]} for split in SPLITS]
    assert sum(len(part) for part in parts) == 40


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments, **keywords):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ZooError, match=r"pip install zoo-nas\[digits\]"):
        load_data("digits")


def test_digits_have_no_context() -> None:
    with pytest.raises(ZooError, match="no context"):
        load_data("digits", context=64)


# Memory tasks


def _oracle(name: str, sequence: np.ndarray) -> list[int]:
    """The answers, worked out from what a model sees."""
    kind = name.partition(":")[0]
    if kind == "copy":
        length = len(sequence) // 2
        return sequence[:length].tolist()
    if kind == "recall":
        pairs = len(sequence) // 3
        book = dict(zip(sequence[: 2 * pairs : 2].tolist(), sequence[1 : 2 * pairs : 2].tolist(), strict=True))
        return [book[key] for key in sequence[2 * pairs :].tolist()]
    return [token for token in sequence.tolist() if token > 1]


@pytest.mark.parametrize("name", ["copy", "recall", "selective_copy", *NAMES[2:]])
def test_an_oracle_attains_the_stated_optimum(name: str) -> None:
    data = load_data(name, batch=50)
    about = data.describe()
    assert (about.optimum_loss, about.optimum_accuracy) == (0.0, 1.0)
    for inputs, labels in (data.train_batch(0), next(data.evaluation_batches("valid"))):
        for sequence, asked in zip(inputs, labels, strict=True):
            assert _oracle(name, sequence) == asked[asked != IGNORE].tolist()


@pytest.mark.parametrize(
    "name", ["copy:length=6,vocab=5", "recall:pairs=2,vocab=14", "selective_copy:length=2,noise=12"]
)
def test_parts_of_memory_tasks_are_disjoint_whatever_the_seed(name: str) -> None:
    """Tasks so small that nearly every sequence that exists is drawn."""
    sets = {
        "train": {row.tobytes() for seed in (0, 1) for row in load_data(name, batch=6000, seed=seed).train_batch(0)[0]},
        "valid": {row.tobytes() for row in _all(load_data(name), "valid")[0]},
        "test": {row.tobytes() for row in _all(load_data(name), "test")[0]},
    }
    assert all(len(rows) > 50 for rows in sets.values())
    assert not sets["train"] & sets["valid"]
    assert not sets["train"] & sets["test"]
    assert not sets["valid"] & sets["test"]


@given(context=st.integers(12, 300), kind=st.sampled_from(["copy", "recall", "selective_copy"]))
def test_default_sizes_fit_any_context(context: int, kind: str) -> None:
    data = load_data(kind, context=context, batch=2)
    assert data.train_batch(0)[0].shape[1] <= context


def test_memory_tasks_refuse_what_makes_no_sense() -> None:
    cases = {
        "copy:lenght=3": "no parameter 'lenght'; did you mean 'length'?",
        "copy:length=three": "whole number",
        "copy:length=-3": "whole number",
        "copy:length=0": "whole number",
        "copy:length": "whole number",
        "copy:length=3,length=4": "given twice",
        "copy:vocab=2": "at least 3",
        "copy:length=2,vocab=5": "only 16 different sequences",
        "recall:pairs=10,vocab=12": "vocab=20 or more, or pairs=6 or fewer",
        "selective_copy:vocab=3": "at least 4",
    }
    for name, words in cases.items():
        with pytest.raises(ZooError, match=words):
            load_data(name)
    with pytest.raises(ZooError, match="takes 80 tokens, but the context is 64"):
        load_data("copy:length=40", context=64)
