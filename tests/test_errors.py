"""How mistakes are shown."""

from __future__ import annotations

import pytest

from zoo.errors import (
    MAX_SHOWN,
    Mark,
    OutOfMemoryError,
    Problem,
    SpecError,
    ZooError,
    did_you_mean,
    memory_explained,
    nearest,
    nearest_file,
)


def test_a_problem_shows_place_line_and_caret() -> None:
    mark = Mark("a.yaml", 3, 5, "    widht: 3")
    assert str(Problem("body.widht", "unknown key", mark)) == (
        "a.yaml:3:5: body.widht: unknown key\n        widht: 3\n        ^"
    )
    assert str(Problem("", "m", Mark("a.yaml", 1, 1))) == "a.yaml:1:1: m"
    assert str(Problem("width", "m")) == "width: m"
    assert str(Problem("", "m")) == "m"


@pytest.mark.parametrize("column", [1, 60, 61, 250, 400, 500])
def test_long_lines_are_cut_around_the_caret(column: int) -> None:
    text = "".join(chr(97 + index % 26) for index in range(500))
    _, line, pointer = str(Problem("", "m", Mark("f", 1, column, text))).splitlines()
    assert len(line) <= 124
    assert line[pointer.index("^")] == text[column - 1]
    assert line.strip() in text


@pytest.mark.parametrize(
    ("before", "cells"), [("abc", 3), ("\t\t", 2), ("漢字", 4), ("e\u0301", 1), ("ｆｕ", 4), ("é", 1)]
)
def test_the_caret_counts_columns_of_a_terminal(before: str, cells: int) -> None:
    pointer = str(Problem("", "m", Mark("f", 1, len(before) + 1, before + "x"))).splitlines()[2]
    assert pointer == " " * (4 + cells) + "^"


def test_problems_stand_once_and_in_the_order_of_lines() -> None:
    def at(line: int, column: int, file: str = "a") -> Mark:
        return Mark(file, line, column, "text")

    problems = [
        Problem("c", "third", at(9, 1)),
        Problem("b", "second", at(2, 7)),
        Problem("x", "elsewhere", at(1, 1, "b")),
        Problem("a", "first", at(2, 3)),
        Problem("b2", "second", at(2, 7)),
        Problem("", "nowhere"),
        Problem("", "nowhere"),
    ]
    error = SpecError(problems)
    assert [problem.message for problem in error.problems] == ["nowhere", "first", "second", "third", "elsewhere"]
    assert error.problems[2].path == "b"
    assert isinstance(error, ZooError) and error.exit_code == 2


def test_a_flood_is_cut() -> None:
    error = SpecError([Problem(str(index), "wrong") for index in range(MAX_SHOWN + 7)])
    assert len(error.problems) == MAX_SHOWN + 7
    assert str(error).splitlines()[-1] == "... and 7 more"


def test_suggestions() -> None:
    known = ["heads", "head_dim", "Window"]
    assert nearest("haeds", known) == "heads"
    assert nearest("window", known) == "Window"
    assert nearest("zzz", known) is None
    assert did_you_mean("haeds", known) == "; did you mean 'heads'?"
    assert did_you_mean("zzz", known) == "; known: Window, head_dim, heads"
    assert did_you_mean("zzz", []) == ""


@pytest.mark.parametrize(
    ("name", "known", "best"),
    [
        ("nofile.yaml", ["14role.yaml", "other.yaml"], None),
        ("hybird.yaml", ["hybrid.yaml", "space.yaml"], "hybrid.yaml"),
        ("hybird.yaml", ["hybrid.yml", "hybird2.txt"], "hybird2.txt"),
        ("stdlb", ["st.db", "stdlib"], "stdlib"),
        ("stdlb", ["st.db"], None),
    ],
)
def test_files_are_near_only_if_they_are(name: str, known: list[str], best: str | None) -> None:
    assert nearest_file(name, known) == best


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes."), 1),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total capacity of 79 GiB"), 1),
        (RuntimeError("CUDA error: out of memory"), 0),
        (MemoryError(), 0),
    ],
)
def test_running_out_of_memory_is_explained(error: Exception, size: int) -> None:
    with pytest.raises(OutOfMemoryError) as told, memory_explained("training on cpu", "Take --batch 1"):
        raise error
    assert str(told.value).startswith("out of memory while training on cpu")
    assert str(told.value).endswith(". Take --batch 1")
    assert (" were asked for at once" in str(told.value)) == size


def test_other_errors_are_none_of_memory() -> None:
    with pytest.raises(RuntimeError, match="shapes"), memory_explained("training", "x"):
        raise RuntimeError("shapes do not match")
