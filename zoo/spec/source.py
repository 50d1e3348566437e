"""Text to trees: YAML, read as data and nothing else.

Scalars follow the YAML 1.2 core schema: only `true` and `false` are booleans, `1e-5` is a number, `no` is a word. What
could make a small file large or ambiguous is refused: duplicate keys, merge keys, tags, aliases that expand without
end, files above `MAX_BYTES`, numbers that are not finite.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from zoo.errors import Mark, Problem, SpecError, ZooError
from zoo.expression import MAX_LENGTH
from zoo.spec.tree import BROKEN, REMOVE, REPLACE, Broken, Scalar, Tree

MAX_BYTES = 4 * 2**20
MAX_NODES = 100_000
MAX_DEPTH = 100
MAX_PROBLEMS = 100

_INTEGER = re.compile(r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.inf|\.nan", re.IGNORECASE)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")
_UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_STRING_TAGS = ("!", "tag:yaml.org,2002:str")
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
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ZooError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise ZooError(f"{path}: not UTF-8 text (byte {error.start})") from None


def parse_yaml(text: str, file: str = "<text>", problems: list[Problem] | None = None) -> Tree:
    """The one YAML document in `text`; a `SpecError` says where it is malformed.

    Values that cannot be taken are noted in `problems` and become `BROKEN`, so that the rest can be checked; without
    `problems` they are a `SpecError` too.
    """
    text = text.removeprefix("\ufeff")
    lines = _LINE_BREAK.split(text)
    found = _UNPRINTABLE.search(text)
    if found is not None:
        *before, last = _LINE_BREAK.split(text[: found.start()])
        place = Mark(file, len(before) + 1, len(last) + 1, _UNPRINTABLE.sub("?", lines[len(before)]))
        raise SpecError([Problem("", f"not YAML: the control character {found[0]!r}", place)])
    reader = _Reader(text, file, lines)
    try:
        result = reader.document()
    except yaml.MarkedYAMLError as error:
        raise SpecError([*reader.problems, reader.explained(error)]) from None
    if problems is None and reader.problems:
        raise SpecError(reader.problems)
    if problems is not None:
        problems += reader.problems
    return result


class _Sized(NamedTuple):
    """A value, how many values it holds with aliases written out, and how deep they are nested."""

    tree: Tree
    size: int
    height: int


class _Reader:
    """Turns the events of one document into a tree and collects what is wrong with it.

    Events, unlike the nodes that PyYAML makes of them, can be refused before a deeply nested text overflows the stack.
    """

    def __init__(self, text: str, file: str, lines: list[str]) -> None:
        self.events: Iterator[yaml.Event] = iter(yaml.parse(text, Loader=_Loader))
        self.file = file
        self.lines = lines
        self.problems: list[Problem] = []
        self.anchors: dict[str, _Sized | None] = {}
        self.count = 0

    def document(self) -> Tree:
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise SpecError([Problem("", "the document is empty; expected a mapping", Mark(self.file, 1, 1))])
        result = self.value(next(self.events), depth=0).tree
        next(self.events)
        second = next(self.events)
        if isinstance(second, yaml.DocumentStartEvent):
            self.refuse("a second document begins here; a file holds one", second)
        return result

    def mark(self, event: yaml.Event) -> Mark:
        return self.place(event.start_mark)

    def place(self, mark: yaml.Mark) -> Mark:
        text = self.lines[mark.line] if mark.line < len(self.lines) else ""
        return Mark(self.file, mark.line + 1, mark.column + 1, text)

    def refuse(self, message: str, event: yaml.Event) -> None:
        raise SpecError([*self.problems, Problem("", message, self.mark(event))])

    def note(self, path: str, message: str, event: yaml.Event) -> None:
        self.problems.append(Problem(path, message, self.mark(event)))
        if len(self.problems) >= MAX_PROBLEMS:
            raise SpecError(self.problems)

    def value(self, event: yaml.Event, depth: int) -> _Sized:
        if isinstance(event, yaml.AliasEvent):
            known = self.anchors.get(event.anchor)
            if known is None:
                held = event.anchor in self.anchors
                message = "an alias holds itself" if held else f"no anchor `&{event.anchor}` stands above this alias"
                self.refuse(message, event)
                raise AssertionError
            self.grow(known, depth, event)
            return known
        self.grow(_Sized(Tree(None), 1, 0), depth, event)
        anchor = getattr(event, "anchor", None)
        if anchor is not None:
            self.anchors[anchor] = None
        if isinstance(event, yaml.MappingStartEvent):
            found = self.mapping(event, depth)
        elif isinstance(event, yaml.SequenceStartEvent):
            found = self.sequence(event, depth)
        else:
            assert isinstance(event, yaml.ScalarEvent)
            found = _Sized(Tree(self.scalar(event), self.mark(event), tag=self.tag(event)), 1, 0)
        if anchor is not None:
            self.anchors[anchor] = found
        return found

    def grow(self, by: _Sized, depth: int, event: yaml.Event) -> None:
        self.count += by.size
        if self.count > MAX_NODES:
            self.refuse(f"more than {MAX_NODES} values, with aliases written out", event)
        if depth + by.height > MAX_DEPTH:
            self.refuse(f"nested more than {MAX_DEPTH} levels deep", event)

    def tag(self, event: yaml.Event) -> str:
        """A tag that `merge` understands; any other is noted."""
        given = getattr(event, "tag", None)
        if given in (REMOVE, REPLACE):
            return given
        if given is not None and not (isinstance(event, yaml.ScalarEvent) and given in _STRING_TAGS):
            self.note("", f"unknown tag {given!r}; known: {REMOVE}, {REPLACE}", event)
        return ""

    def sequence(self, start: yaml.SequenceStartEvent, depth: int) -> _Sized:
        tag, items = self.tag(start), []
        cut = 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item = self.value(event, depth + 1)
            if cut > 0 and isinstance(event, yaml.ScalarEvent):
                cut += _open(event.value)
                continue
            if start.flow_style and (cut := self.cut(event, "")):
                item = _Sized(Tree(BROKEN, self.mark(event)), 1, 0)
            items.append(item)
        return _around(Tree([item.tree for item in items], self.mark(start), tag=tag), items)

    def mapping(self, start: yaml.MappingStartEvent, depth: int) -> _Sized:
        tag = self.tag(start)
        entries: dict[str, _Sized] = {}
        keys: dict[str, Mark] = {}
        cut = 0
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            name = self.value(event, depth + 1).tree
            content = next(self.events)
            inside = self.value(content, depth + 1)
            if not isinstance(event, yaml.ScalarEvent):
                self.note("", "a key must be a word", event)
                continue
            key = event.value
            if cut > 0 and isinstance(content, yaml.ScalarEvent) and not content.value:
                cut += _open(key)
                continue
            if start.flow_style and (cut := self.cut(content, key)):
                inside = _Sized(Tree(BROKEN, self.mark(content)), 1, 0)
            if key == "<<" and not event.style:
                self.note("", "merge keys are not read; use `extends`, or a name of `vars`", event)
            elif key in entries:
                self.note(key, f"the key stands twice; the first is on line {keys[key].line}", event)
            else:
                entries[key] = inside
                assert name.mark is not None
                keys[key] = name.mark
        held = {key: item.tree for key, item in entries.items()}
        return _around(Tree(held, self.mark(start), keys, tag), list(entries.values()))

    def scalar(self, event: yaml.ScalarEvent) -> Scalar | Broken:
        if event.style or event.tag in _STRING_TAGS:
            return event.value
        value = scalar(event.value)
        if isinstance(value, float) and not math.isfinite(value):
            what = shortened(event.value)
            if _NOT_FINITE.fullmatch(event.value):
                self.note("", f"numbers must be finite; got {what}", event)
            else:
                digits = sum(map(str.isdigit, event.value))
                long = f", a number of {digits:,} digits" if digits > len(what) else ""
                self.note("", f"numbers must be finite, below 1.8e308; got {what}{long}", event)
            return BROKEN
        return value

    def cut(self, event: yaml.Event, path: str) -> int:
        """How many brackets an expression in a flow collection leaves open where a comma has cut it, which is noted."""
        if not isinstance(event, yaml.ScalarEvent) or event.style or not event.value.startswith("$("):
            return 0
        place = event.start_mark
        rest = " ".join([self.lines[place.line][place.column :], *self.lines[place.line + 1 :]])
        whole = _balanced(rest[: 2 * MAX_LENGTH])
        if _open(event.value) <= 0 or whole is None:
            return 0
        message = f"YAML ends {shortened(event.value)!r} at the comma; put the whole expression in quotes: "
        self.note(path, message + (f"'{whole}'" if '"' in whole else f'"{whole}"'), event)
        return _open(event.value)

    def explained(self, error: yaml.MarkedYAMLError) -> Problem:
        """The parser's complaint; where it is about the end of the text, at what was never closed."""
        mark = error.problem_mark
        assert mark is not None
        rest = self.lines[mark.line :] or [""]
        ended = not "".join([rest[0][mark.column :], *rest[1:]]).strip()
        place = self.place(error.context_mark if ended and error.context_mark is not None else mark)
        line = self.lines[mark.line] if mark.line < len(self.lines) else ""
        if "\t" in line[: len(line) - len(line.lstrip())]:
            return Problem("", "not YAML: a tab in the indentation; use blanks", place)
        if error.context == "while scanning a tag":
            return Problem("", "not YAML: a tag ends with a blank: `{window: !remove }`", place)
        parts = [part for part in (error.problem, error.context) if part]
        return Problem("", "not YAML: " + ", ".join(parts), place)


def _around(tree: Tree, items: list[_Sized]) -> _Sized:
    return _Sized(tree, 1 + sum(item.size for item in items), 1 + max((item.height for item in items), default=0))


def _open(text: str) -> int:
    """How many more round brackets are opened than closed."""
    return text.count("(") - text.count(")")


def _balanced(text: str) -> str | None:
    """The expression that a text begins with, up to the bracket that closes it, unless the collection ends before."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "(") - (char == ")")
        if char in "[]{}":
            return None
        if char == ")" and not depth:
            return " ".join(text[: index + 1].split())
    return None


def scalar(text: str) -> Scalar:
    """What an unquoted word of YAML stands for."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text) and len(text) < 400:
        digits = text.replace("_", "")
        return int(digits, 0) if digits[:2] in ("0x", "0o") else int(digits)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _NOT_FINITE.fullmatch(text):
        return float(text.lower().replace(".", ""))
    return text


def shortened(text: str, most: int = 60) -> str:
    """A text for a message, cut where it is long."""
    return text if len(text) <= most else f"{text[: most - 3]}..."
