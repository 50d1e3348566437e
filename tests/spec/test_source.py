"""YAML is read as data and nothing else; what is ambiguous or grows without end is refused at its place."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from zoo.errors import Problem, SpecError, ZooError
from zoo.spec.document import load, parse
from zoo.spec.source import MAX_BYTES, parse_yaml, read_text, scalar


def problem(text: str) -> tuple[int, int, str]:
    """Line, column and message of the first problem of a text."""
    with pytest.raises(SpecError) as error:
        parse_yaml(text)
    mark = error.value.problems[0].mark
    assert mark is not None
    return mark.line, mark.column, error.value.problems[0].message


@pytest.mark.parametrize(
    ("text", "line", "column", "message"),
    [
        ("a: [1, 2\nb: 3", 2, 2, "expected ',' or ']'"),
        ("a: b: c", 1, 5, "mapping values are not allowed"),
        ("a: 1\nb: [1, {c: 2\n\n", 2, 8, "expected ',' or '}'"),
        ('a: "x', 1, 4, "unexpected end of stream"),
        ("a:\n\tb: 1", 2, 1, "a tab in the indentation"),
        ("a: *b", 1, 4, "no anchor `&b`"),
        ("a: 1\nb: 2\na: 3", 3, 1, "stands twice; the first is on line 1"),
        ("a: 1\nb: x\x01y", 2, 5, "control character"),
        ("a: 1\n---\nb: 2", 2, 1, "a second document"),
        ("", 1, 1, "empty"),
        ("# nothing\n", 1, 1, "empty"),
        ("a: !!python/object/apply:os.system [echo]", 1, 4, "unknown tag"),
        ("a: !!binary aGk=", 1, 4, "unknown tag"),
        ("a: !include x.yaml", 1, 4, "unknown tag '!include'; known: !remove, !replace"),
        ("a: .nan", 1, 4, "finite"),
        ("a: 1\nb: -.INF", 2, 4, "finite"),
        ("a: 1e999", 1, 4, "finite"),
        ("x: &x {a: 1}\ny: {<<: *x}", 2, 5, "merge keys"),
        ("? [a]\n: b", 1, 3, "a key must be a word"),
        ("{é漢: .inf}", 1, 6, "finite"),
        ("a: {heads: !remove}", 1, 19, "a tag ends with a blank"),
        ("a: 1\u2028b: .nan", 2, 4, "finite"),
    ],
)
def test_refused_at_its_place(text: str, line: int, column: int, message: str) -> None:
    found = problem(text)
    assert found[:2] == (line, column)
    assert message in found[2]


def test_carriage_returns_and_a_byte_order_mark_change_nothing() -> None:
    text = "a: 1\nb: {c: [x, 2.5]}\n"
    expected = {"a": 1, "b": {"c": ["x", 2.5]}}
    for variant in (text, text.replace("\n", "\r\n"), text.replace("\n", "\r"), "\ufeff" + text):
        assert parse_yaml(variant).plain() == expected
    assert problem("\ufeffa: .nan")[:2] == (1, 4)
    assert problem("a: 1\r\nb: .nan\r\n")[:2] == (2, 4)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("1e-5", 1e-5),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("+3", 3),
        ("010", 10),
        ("1_000", 1000),
        ("0x1F", 31),
        ("0x_", "0x_"),
        ("0o17", 15),
        ("0o_", "0o_"),
        ("2024-01-31", "2024-01-31"),
        ("12:30", "12:30"),
        ("1.2.3", "1.2.3"),
        ("1" + "0" * 300, 10**300),
    ],
)
def test_words_follow_the_core_schema(text: str, value: object) -> None:
    found = scalar(text)
    assert found == value and type(found) is type(value)


def test_quotes_and_the_string_tag_make_text() -> None:
    assert parse_yaml("a: '1'\nb: \"true\"\nc: !!str 5\nd: |\n  no\n").plain() == {
        "a": "1",
        "b": "true",
        "c": "5",
        "d": "no\n",
    }


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: *a}", "a: &a {b: [{c: *a}]}"])
def test_an_alias_cannot_hold_itself(text: str) -> None:
    assert "holds itself" in problem(text)[2]


def test_aliases_are_read_where_they_stay_small() -> None:
    assert parse_yaml("a: &x {b: 1}\nc: [*x, *x]").plain() == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_expanding_aliases_are_refused_quickly() -> None:
    lines = ["a0: &a0 x"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 30)]
    started = time.process_time()
    assert "aliases written out" in problem("\n".join(lines))[2]
    assert time.process_time() - started < 5


@pytest.mark.parametrize("text", ["a: " + "[" * 300_000, "a: " + "[" * 200_000 + "]" * 200_000, "{a: " * 100_000])
def test_deep_nesting_does_not_overflow_the_stack(text: str) -> None:
    assert "levels deep" in problem(text)[2]


def test_a_huge_file_is_refused_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "huge.yaml"
    with file.open("wb") as out:
        out.truncate(100 * 2**20)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("was read"))
    with pytest.raises(ZooError, match="100 MiB is no spec; files up to 4 MiB"):
        load(file)
    assert MAX_BYTES == 4 * 2**20


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "latin.yaml"
    file.write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ZooError, match=r"latin.yaml: not UTF-8 text \(byte 9\)"):
        read_text(file)
    file.write_bytes("name: x".encode("utf-16"))
    with pytest.raises(ZooError, match="not UTF-8"):
        read_text(file)
    with pytest.raises(ZooError, match="directory"):
        read_text(tmp_path)


def test_many_mistakes_are_not_all_printed() -> None:
    with pytest.raises(SpecError) as error:
        parse_yaml("a: 1\n" * 50_000)
    assert len(error.value.problems) == 100
    assert str(error.value).endswith("... and 50 more")


def test_a_tag_never_executes(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    for tag in (
        "!!python/object/apply:os.mkdir",
        "!!python/object/new:os.mkdir",
        "!<tag:yaml.org,2002:python/name:os>",
    ):
        with pytest.raises(SpecError, match="unknown tag"):
            parse(f"width: {tag} [{witness}]")
    assert not witness.exists()


def test_what_cannot_be_read_does_not_hide_other_mistakes() -> None:
    with pytest.raises(SpecError) as error:
        parse(
            "width: .nan\nbody: {layers: [{mixer: atention}]}\nstem: {type: token, vocab: 9, vocab: 8}\nhead: classifer"
        )
    lines = [(p.mark.line, p.mark.column) for p in error.value.problems if p.mark is not None]
    assert lines == [(1, 8), (2, 25), (3, 31), (4, 7)]


@pytest.mark.parametrize(
    ("text", "column", "whole"),
    [
        ("a: {b: $(multiple(8/3 * d, 64)), c: 1}", 8, '"$(multiple(8/3 * d, 64))"'),
        ("a: [1, $(max(d, min(e, 3))), 2]", 8, '"$(max(d, min(e, 3)))"'),
        ("a: {b: $(max(d,\n  64))}", 8, '"$(max(d, 64))"'),
        ('a: {b: $(f("x", 1))}', 8, "'$(f(\"x\", 1))'"),
    ],
)
def test_an_expression_that_a_comma_cuts_is_told_to_be_quoted(text: str, column: int, whole: str) -> None:
    problems: list[Problem] = []
    tree = parse_yaml(text, problems=problems)
    (found,) = problems
    assert found.mark is not None and (found.mark.line, found.mark.column) == (1, column)
    assert found.message.endswith(f"put the whole expression in quotes: {whole}")
    inside = tree.entries["a"]
    assert list(inside.entries) in ([], ["b"], ["b", "c"]) and len(inside.items) in (0, 3)


def test_an_expression_that_is_never_closed_is_none_that_a_comma_cuts() -> None:
    assert parse_yaml("a: {b: $(8 * (d, c: 1)}").plain() == {"a": {"b": "$(8 * (d", "c": "1)"}}


def test_a_long_number_is_told_by_its_length() -> None:
    assert "below 1.8e308; got 9999" in (message := problem(f"a: {'9' * 5000}")[2])
    assert "a number of 5,000 digits" in message
