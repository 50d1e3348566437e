"""Values of a document with their places, and how one document overrides another.

A `Tree` is what YAML can say: a scalar, a list or a mapping, and where it was written. Places survive every
transformation, so that an error found in the last step still points at the line that the user wrote.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from zoo.errors import Mark

REMOVE = "!remove"
REPLACE = "!replace"

Scalar = None | bool | int | float | str


@dataclass(frozen=True, slots=True, eq=False)
class Tree:
    """A value and its place. `keys` holds the places of a mapping's keys; `tag` is `!remove`, `!replace` or empty."""

    value: Scalar | list[Tree] | dict[str, Tree]
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

    def place(self, path: str) -> Mark | None:
        """Where the value at `path` (`body.layers[3].mixer`) was written, or the nearest thing above it."""
        mark, node = self.mark, self
        for part in re.findall(r"[^.\[\]]+", path):
            if part.isdigit() and isinstance(node.value, list) and int(part) < len(node.value):
                node = node.value[int(part)]
            elif part in node.entries:
                node = node.entries[part]
            else:
                break
            mark = node.mark or mark
        return mark

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


def merge(base: Tree, over: Tree) -> Tree:
    """`over` laid on `base`: mappings merge key by key, anything else replaces.

    A mapping whose `type` differs from the one below replaces it, since its keys mean something else; so does one
    tagged `!replace`. A key tagged `!remove` takes the one below away.
    """
    if over.tag == REPLACE or not isinstance(over.value, dict):
        return Tree(over.value, over.mark, over.keys)
    if not isinstance(base.value, dict):
        return _as_node(base, over)
    new_type, old_type = over.entries.get("type"), base.entries.get("type")
    if new_type is not None and (old_type is None or new_type.value != old_type.value):
        return without_tags(over)
    entries = dict(base.entries)
    for key, item in over.entries.items():
        if item.tag == REMOVE:
            entries.pop(key, None)
        else:
            entries[key] = merge(entries[key], item) if key in entries else without_tags(item)
    return Tree(entries, over.mark or base.mark, {**base.keys, **over.keys})


def _as_node(base: Tree, over: Tree) -> Tree:
    """A mapping laid on the scalar that stands for a node without fields: `rmsnorm` under `{eps: 1e-6}`."""
    if isinstance(base.value, str) and not base.value.startswith("$") and "type" not in over.entries:
        return merge(Tree({"type": base}, base.mark), over)
    return without_tags(over)


def without_tags(node: Tree) -> Tree:
    """The same with `!remove` entries dropped and tags forgotten, for where there is nothing below."""
    if isinstance(node.value, dict):
        kept = {key: without_tags(item) for key, item in node.value.items() if item.tag != REMOVE}
        return Tree(kept, node.mark, node.keys)
    if isinstance(node.value, list):
        return Tree([without_tags(item) for item in node.value], node.mark)
    return Tree(node.value, node.mark)


def walk(node: Tree, path: str = "") -> Iterator[tuple[str, Tree]]:
    """Every value inside, with its path, parents first."""
    yield path, node
    for key, item in node.entries.items():
        yield from walk(item, f"{path}.{key}" if path else key)
    for index, item in enumerate(node.items):
        yield from walk(item, f"{path}[{index}]")
