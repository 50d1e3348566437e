"""What components say about themselves: the class docstring and the docstring under each field."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from functools import cache
from pathlib import Path

from zoo.component import Component

INHERITED_FIELD = "What holds for everything inside; by default what holds around it."


@cache
def _classes(file: str) -> Mapping[str, ast.ClassDef]:
    tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    return {node.name: node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


@cache
def field_docs(component: type[Component]) -> Mapping[str, str]:
    """The docstring under each field of a component, those of its bases included, as single lines."""
    found: dict[str, str] = dict.fromkeys(("norm", "activation", "linear", "position"), INHERITED_FIELD)
    for base in reversed(component.__mro__):
        if not issubclass(base, Component) or base is Component:
            continue
        node = _classes(inspect.getfile(base)).get(base.__name__)
        for field, text in zip(node.body, node.body[1:], strict=False) if node is not None else ():
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                found[field.target.id] = " ".join(text.value.value.split())
    return {name: text for name, text in found.items() if name in component.model_fields}


def summary(component: type[Component]) -> str:
    """The first sentence of a component's docstring, on one line."""
    paragraph = inspect.cleandoc(component.__doc__ or "").split("\n\n")[0]
    return " ".join(paragraph.split())
