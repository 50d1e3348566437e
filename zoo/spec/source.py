"""Text to trees: YAML, read as data and nothing else.

Scalars follow the YAML 1.2 core schema: only `true` and `false` are booleans, `1e-5` is a number, `no` is a word. What
could make a small file large or ambiguous is refused: duplicate keys, aliases that expand without end, files above
`MAX_BYTES`, numbers that are not finite.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import yaml

from zoo.errors import Mark, Problem, SpecError, ZooError
from zoo.spec.tree import REMOVE, REPLACE, Scalar, Tree

MAX_BYTES = 4 * 2**20
MAX_NODES = 100_000
MAX_DEPTH = 100

_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9_]*)|0x[0-9a-fA-F_]+|0o[0-7_]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.inf|\.nan", re.IGNORECASE)
_WORDS = {"": None, "~": None, "null": None, "Null": None, "NULL": None} | {
    spelling: spelling.lower() == "true" for spelling in ("true", "True", "TRUE", "false", "False", "FALSE")
}
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_text(path: Path) -> str:
    """The text of a file, refused above `MAX_BYTES`."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ZooError(f"{path}: {size / 2**20:.0f} MiB is no spec; files up to {MAX_BYTES // 2**20} MiB are read")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ZooError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_yaml(text: str, file: str = "<text>") -> Tree:
    """The one YAML document in `text`; a `SpecError` says where it is malformed."""
    lines = text.splitlines()
    try:
        nodes = list(yaml.compose_all(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        place = error.problem_mark or error.context_mark
        raise SpecError([Problem("", _explain(error, lines), _mark(place, file, lines))]) from None
    except yaml.YAMLError as error:
        raise SpecError([Problem("", f"not YAML: {str(error).splitlines()[0]}", Mark(file, 1, 1))]) from None
    except RecursionError:
        raise SpecError([Problem("", "nested too deeply", Mark(file, 1, 1))]) from None
    if not nodes or nodes[0] is None:
        raise SpecError([Problem("", "the document is empty; expected a mapping", Mark(file, 1, 1))])
    if len(nodes) > 1:
        mark = _mark(nodes[1].start_mark, file, lines)
        raise SpecError([Problem("", "a second document begins here; a file holds one", mark)])
    reader = _Reader(file, lines)
    result = reader.tree(nodes[0], depth=0)
    if reader.problems:
        raise SpecError(reader.problems)
    return result


class _Reader:
    """Turns the nodes of one document into a tree and collects what is wrong with them."""

    def __init__(self, file: str, lines: list[str]) -> None:
        self.file = file
        self.lines = lines
        self.problems: list[Problem] = []
        self.count = 0

    def tree(self, node: yaml.Node, depth: int) -> Tree:
        mark = _mark(node.start_mark, self.file, self.lines)
        self.count += 1
        if self.count > MAX_NODES:
            raise SpecError([Problem("", f"aliases expand to more than {MAX_NODES} values", mark)])
        if depth > MAX_DEPTH:
            raise SpecError([Problem("", f"nested more than {MAX_DEPTH} levels deep, or an alias holds itself", mark)])
        tag = node.tag if node.tag in (REMOVE, REPLACE) else ""
        if (not tag and node.tag.startswith("!")) or "python" in node.tag:
            self.problems.append(Problem("", f"unknown tag {node.tag!r}; known: {REMOVE}, {REPLACE}", mark))
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, mark, tag, depth)
        if isinstance(node, yaml.SequenceNode):
            return Tree([self.tree(item, depth + 1) for item in node.value], mark, tag=tag)
        return Tree(self._scalar(node, mark), mark, tag=tag)

    def _mapping(self, node: yaml.MappingNode, mark: Mark | None, tag: str, depth: int) -> Tree:
        entries: dict[str, Tree] = {}
        keys: dict[str, Mark] = {}
        for key_node, value_node in node.value:
            key_mark = _mark(key_node.start_mark, self.file, self.lines)
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(Problem("", "a key must be a word", key_mark))
                continue
            key = key_node.value
            if key in entries:
                first = keys[key]
                self.problems.append(Problem(key, f"the key stands twice; the first is on line {first.line}", key_mark))
                continue
            entries[key] = self.tree(value_node, depth + 1)
            if key_mark is not None:
                keys[key] = key_mark
        return Tree(entries, mark, keys, tag)

    def _scalar(self, node: yaml.Node, mark: Mark | None) -> Scalar:
        if getattr(node, "style", None):
            return str(node.value)
        value = scalar(str(node.value))
        if isinstance(value, float) and not math.isfinite(value):
            self.problems.append(Problem("", f"numbers must be finite; got {node.value}", mark))
        return value


def scalar(text: str) -> Scalar:
    """What an unquoted word of YAML stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and len(text) < 400:
        return int(text.replace("_", ""), 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def _mark(place: yaml.Mark | None, file: str, lines: list[str]) -> Mark | None:
    if place is None:
        return None
    text = lines[place.line] if place.line < len(lines) else ""
    return Mark(file, place.line + 1, place.column + 1, text)


def _explain(error: yaml.MarkedYAMLError, lines: list[str]) -> str:
    place = error.problem_mark
    line = lines[place.line] if place is not None and place.line < len(lines) else ""
    if "\t" in line[: len(line) - len(line.lstrip())]:
        return "not YAML: a tab in the indentation; use blanks"
    parts = [part for part in (error.problem, error.context) if part]
    return "not YAML: " + ", ".join(parts)
