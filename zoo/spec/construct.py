"""From a tree of nodes to components, with every problem of the document reported at its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from zoo.component import Component, Scope, Slot, slots
from zoo.errors import Problem, SpecError, ZooError, nearest
from zoo.memo import memoized
from zoo.registry import Role, find, types, with_article
from zoo.spec.source import shortened
from zoo.spec.tree import BROKEN, Tree, walk

ROOT = Slot(Role.MODEL, default="model")
STREAM = (Role.MODEL, Role.STEM, Role.BODY, Role.STAGE, Role.REDUCE, Role.POSITION)
"""Roles on whose fields the width, the length or the positions of what stands elsewhere depend."""
_ABOUT = ("name", "summary", "sources", "catalogue", "published")
HARMLESS = frozenset(
    (*_ABOUT, "init_std", "norm", "activation", "linear", "final_norm", "mixer", "channel", "residual")
)
"""Fields on which nothing that stands elsewhere depends."""


def construct(document: Tree, problems: Iterable[Problem] = ()) -> Component:
    """The model that a document without holes describes; a `SpecError` carries all of its problems.

    `problems` are those that are already known. Fields are checked against each other also where other things are
    wrong, in all parts that do not rest on what is wrong.
    """
    maker = _Maker()
    model = maker.node(document, ROOT, "")
    found = [*problems, *maker.problems]
    if model is not None and not maker.adrift:
        wrong = complaints(model.fill(_root(model)), "", maker=maker, document=document)
        found += [Problem(path, message, document.place(path)) for path, message in wrong]
    if found or model is None:
        raise SpecError(found)
    return model


def complaints(
    model: Component,
    path: str,
    scope: Scope | None = None,
    maker: _Maker | None = None,
    document: Tree | None = None,
) -> Iterator[tuple[str, str]]:
    """What is wrong across the fields of a filled component and all inside it: the path to blame, and the message.

    A component that complains is not looked into, since what stands inside it rests on what is wrong; nor is one that
    its `maker` found wrong.
    """
    scope = _root(model) if scope is None else scope
    if model.role is Role.LAYER and path and (maker is None or not maker.problems):
        yield from ((".".join(filter(None, (path, inside))), message) for inside, message in _in_layer(model, scope))
        return
    whole = True
    if maker is not None and maker.problems and document is not None:
        node, there = document.at(path)
        if there and id(node) in maker.wrong:
            return
        whole = not there or id(node) not in maker.partial
    found = list(model.check(scope)) if whole else []
    for complaint in found:
        yield ".".join(part for part in (path, complaint.field) if part), complaint.message
    if found:
        return
    for name, child in model.children(scope).items():
        group, _, index = name.partition(".")
        inside = f"{group}[{index}]" if index else group
        yield from complaints(child.component, f"{path}.{inside}" if path else inside, child.scope, maker, document)


@memoized()
def _in_layer(layer: Component, scope: Scope) -> tuple[tuple[str, str], ...]:
    """The complaints of a layer, by paths inside it, computed once for all places where it stands."""
    return tuple(complaints(layer, "", scope))


def _root(model: Component) -> Scope:
    return model.root()  # type: ignore[attr-defined]


class _Maker:
    """Builds components from the leaves up and collects what goes wrong.

    A component with a wrong field is made without it where that is possible. It is then in `partial` if what stands
    inside it can be checked nevertheless, else in `wrong`; `adrift` tells that nothing can be checked, since the sizes
    of the stream depend on the field.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.wrong: set[int] = set()
        self.partial: set[int] = set()
        self.adrift = False
        self.made: dict[tuple[int, Role], tuple[Tree, Component | None]] = {}

    def node(self, node: Tree, slot: Slot, path: str) -> Component | None:
        """The component that a node stands for, or None after noting why there is none."""
        known = self.made.get((id(node), slot.role))
        if known is None:
            known = self.made[id(node), slot.role] = (node, self._node(node, slot, path))
        return known[1]

    def _node(self, node: Tree, slot: Slot, path: str) -> Component | None:
        if node.value is BROKEN:
            return None
        if isinstance(node.value, str):
            fields, name, place = {}, node.value, node
        elif isinstance(node.value, dict):
            fields = dict(node.value)
            place = fields.pop("type", node)
            name = slot.default if place is node else place.value
        else:
            message = f"expected {with_article(slot.role)}: a type name or a mapping with a `type`; got {said(node)}"
            self._note(path, message, node)
            return None
        if name is BROKEN:
            return None
        if not isinstance(name, str):
            self._typeless(node, place, slot.role, path)
            return None
        try:
            component = find(slot.role, name)
        except ZooError as error:
            self._note(path, str(error), place)
            return None
        values, broken = self._values(component, fields, path)
        if broken:
            self._mark(node, component, broken)
        try:
            return component(**values)
        except SpecError as error:
            wrong = {problem.path.split(".")[0].split("[")[0]: problem for problem in error.problems}
            for field, problem in wrong.items():
                if field not in broken:
                    self._at(node, path, field, problem)
        self._mark(node, component, wrong)
        try:
            return component(**{name: value for name, value in values.items() if name not in wrong})
        except SpecError:
            return None

    def _typeless(self, node: Tree, place: Tree, role: Role, path: str) -> None:
        """Note that a mapping has no type, at the key that was meant to give it, if any."""
        key = next((key for key in node.entries if key != "type" and nearest(key, ("type",))), None)
        if key is None or place is not node:
            self._note(path, f"a {role} needs a `type`; known: {', '.join(types(role))}", place)
        else:
            message = f"unknown key {key!r} of a {role}; did you mean 'type'?"
            self.problems.append(Problem(f"{path}.{key}", message, node.key_place(key)))

    def _mark(self, node: Tree, component: type[Component], fields: Iterable[str]) -> None:
        """Note that fields of a component are missing, and whether those that were meant matter elsewhere."""
        if {nearest(field, component.model_fields) or field for field in fields} <= HARMLESS:
            self.partial.add(id(node))
        else:
            self.wrong.add(id(node))
            self.adrift |= component.role in STREAM

    def _values(
        self, component: type[Component], fields: dict[str, Tree], path: str
    ) -> tuple[dict[str, Any], set[str]]:
        """Values for the fields of a component, and the names of fields whose components could not be made."""
        values: dict[str, Any] = {}
        broken: set[str] = set()
        for name, item in fields.items():
            slot, inside = slots(component).get(name), f"{path}.{name}" if path else name
            if slot is None or item.value is None:
                if any(part.value is BROKEN for _, part in walk(item)):
                    broken.add(name)
                else:
                    values[name] = item.plain()
                continue
            if not slot.many:
                made = self.node(item, slot, inside)
                parts = [made]
                values[name] = made
            elif isinstance(item.value, list):
                parts = [self.node(part, slot, f"{inside}[{index}]") for index, part in enumerate(item.value)]
                values[name] = tuple(parts)
            else:
                if item.value is not BROKEN:
                    self._note(inside, f"expected a list of {slot.role}s; got {said(item)}", item)
                parts = [None]
            if None in parts:
                broken.add(name)
                values.pop(name, None)
        return values, broken

    def _at(self, node: Tree, path: str, field: str, problem: Problem) -> None:
        """Note a component's own problem: at the key if the key is wrong, at its value if the value is."""
        whole = f"{path}.{problem.path}" if path else problem.path
        inside = node.place(problem.path)
        wrong_key = problem.message.startswith("unknown key")
        mark = node.key_place(field) if wrong_key else inside
        self.problems.append(Problem(whole, problem.message, mark or node.mark))

    def _note(self, path: str, message: str, node: Tree) -> None:
        self.problems.append(Problem(path, message, node.mark))


def said(node: Tree) -> str:
    """What stands at a place, for a message."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, list):
        return "a list"
    return "nothing" if node.value is None else shortened(repr(node.value))
