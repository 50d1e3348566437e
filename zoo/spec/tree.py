"""Values of a document with their places, and how one document overrides another.

A `Tree` is what YAML can say: a scalar, a list or a mapping, and where it was written. Places survive every
transformation, so that an error found in the last step still points at the line that the user wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from zoo.errors import Mark, Problem

REMOVE = "!remove"
REPLACE = "!replace"
OVERRIDES = "overrides"
HOLE_KINDS = ("choice", "int", "float")

Scalar = None | bool | int | float | str


class Broken(Enum):
    """A value that could not be taken and was complained about: nothing that rests on it is."""

    VALUE = "broken"


BROKEN: Final = Broken.VALUE


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A value and its place. `keys` holds the places of a mapping's keys; `tag` is `!remove`, `!replace` or empty."""

    value: Scalar | Broken | list[Tree] | dict[str, Tree]
    mark: Mark | None = None
    keys: Mapping[str, Mark] = field(default_factory=dict)
    tag: str = ""

    @property
    def entries(self) -> dict[str, Tree]:
        """The entries of a mapping; empty for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def items(self) -> list[Tree]:
        """The items of a list; empty for anything else."""
        return self.value if isinstance(self.value, list) else []

    def plain(self) -> Any:
        """The same without places."""
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        return self.value

    def with_entries(self, entries: dict[str, Tree]) -> Tree:
        return Tree(entries, self.mark, self.keys)

    def at(self, path: str) -> tuple[Tree, bool]:
        """The value at `path` (`body.layers[3].mixer`), or the nearest thing above it and False."""
        node = self
        for part in re.findall(r"[^.\[\]]+", path):
            if part.isdigit() and isinstance(node.value, list) and int(part) < len(node.value):
                node = node.value[int(part)]
            elif part in node.entries:
                node = node.entries[part]
            else:
                return node, False
        return node, True

    def place(self, path: str) -> Mark | None:
        """Where the value at `path` was written, or the nearest thing above it."""
        return self.at(path)[0].mark or self.mark

    def key_place(self, key: str) -> Mark | None:
        """Where a key of this mapping was written."""
        return self.keys.get(key) or self.mark


def tree(value: Any) -> Tree:
    """A Python value, made of mappings, lists and scalars, as a tree without places."""
    if isinstance(value, Tree):
        return value
    if isinstance(value, Mapping):
        return Tree({str(key): tree(item) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return Tree([tree(item) for item in value])
    return Tree(value)


def merge(
    base: Tree, over: Tree, problems: list[Problem] | None = None, path: str = "", *, later: bool = False
) -> Tree:
    """`over` laid on `base`: mappings merge key by key, anything else replaces.

    A mapping whose `type` differs from the one below replaces it, since its keys mean something else; so does one
    tagged `!replace`, a hole of another kind, and a pattern laid on what is none. A key tagged `!remove` takes the one
    below away; where there is none `problems` gets a note. With `later` the result is itself to be laid on something,
    as the changes under `overrides` are, and keeps its tags.
    """
    if over.tag == REPLACE or not isinstance(over.value, dict) or _replaces(base, over):
        return over if later else settled(over, problems, path)
    if not isinstance(base.value, dict):
        return merge(Tree({"type": base}, base.mark), over, problems, path, later=later)
    entries = dict(base.entries)
    changes = later or path.endswith(OVERRIDES)
    for key, item in over.entries.items():
        inside = f"{path}.{key}" if path else key
        if key in entries and not (item.tag == REMOVE and not later):
            entries[key] = merge(entries[key], item, problems, inside, later=changes)
        elif key in entries:
            del entries[key]
        elif later:
            entries[key] = item
        else:
            entries |= settled(Tree({key: item}, over.mark, over.keys), problems, path).entries
    return Tree(entries, over.mark or base.mark, {**base.keys, **over.keys})


def _replaces(base: Tree, over: Tree) -> bool:
    """Whether a mapping takes the place of what is below."""
    old, new = base.entries, over.entries
    if not isinstance(base.value, dict):
        fields_of_type = isinstance(base.value, str) and not base.value.startswith("$") and not _shape(new)
        return not fields_of_type or "type" in new
    new_type, old_type = new.get("type"), old.get("type")
    if new_type is not None and (old_type is None or new_type.value != old_type.value):
        return True
    return bool(_shape(new)) and _shape(new) != _shape(old)


def _shape(entries: Mapping[str, Tree]) -> str:
    """What makes a mapping more than fields: the kind of a hole, or a whole pattern."""
    kind = next((kind for kind in HOLE_KINDS if kind in entries), "")
    return kind or ("repeat" if {"repeat", "of"} <= set(entries) else "")


def settled(node: Tree, problems: list[Problem] | None = None, path: str = "") -> Tree:
    """The same without tags, for where there is nothing below; `!remove` is noted, since it has nothing to remove."""
    if isinstance(node.value, dict):
        kept: dict[str, Tree] = {}
        for key, item in node.value.items():
            inside = f"{path}.{key}" if path else key
            if item.tag == REMOVE:
                if problems is not None:
                    problems.append(Problem(inside, f"there is no {key!r} to remove", node.key_place(key)))
            else:
                kept[key] = item if path.endswith(OVERRIDES) else settled(item, problems, inside)
        return Tree(kept, node.mark, node.keys)
    if isinstance(node.value, list):
        items = [settled(item, problems, f"{path}[{index}]") for index, item in enumerate(node.value)]
        return Tree(items, node.mark)
    return Tree(node.value, node.mark)


def walk(node: Tree, path: str = "") -> Iterator[tuple[str, Tree]]:
    """Every value inside, with its path, parents first."""
    yield path, node
    for key, item in node.entries.items():
        yield from walk(item, f"{path}.{key}" if path else key)
    for index, item in enumerate(node.items):
        yield from walk(item, f"{path}[{index}]")
