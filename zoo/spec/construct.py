"""From a tree of nodes to components, with every problem of the document reported at its place."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zoo.component import Component, Scope, Slot, slots
from zoo.errors import Problem, SpecError, ZooError
from zoo.registry import Role, find, types
from zoo.spec.tree import Tree

ROOT = Slot(Role.MODEL, default="model")


def construct(document: Tree) -> Component:
    """The model that a document without holes describes; a `SpecError` carries all of its problems."""
    maker = _Maker()
    model = maker.node(document, ROOT, "")
    if maker.problems or model is None:
        raise SpecError(maker.problems)
    problems = [
        Problem(path, message, document.place(path)) for path, message in complaints(model.fill(_root(model)), "")
    ]
    if problems:
        raise SpecError(dict.fromkeys(problems))
    return model


def complaints(model: Component, path: str, scope: Scope | None = None) -> Iterator[tuple[str, str]]:
    """What is wrong across the fields of a filled component and all inside it: the path to blame, and the message.

    A component that complains is not looked into, since what stands inside it rests on what is wrong.
    """
    scope = _root(model) if scope is None else scope
    found = list(model.check(scope))
    for complaint in found:
        yield ".".join(part for part in (path, complaint.field) if part), complaint.message
    if found:
        return
    for name, child in model.children(scope).items():
        group, _, index = name.partition(".")
        inside = f"{group}[{index}]" if index else group
        yield from complaints(child.component, f"{path}.{inside}" if path else inside, child.scope)


def _root(model: Component) -> Scope:
    return model.root()  # type: ignore[attr-defined]


class _Maker:
    """Builds components from the leaves up and collects what goes wrong."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.made: dict[tuple[int, Role], tuple[Tree, Component | None]] = {}

    def node(self, node: Tree, slot: Slot, path: str) -> Component | None:
        """The component that a node stands for, or None after noting why there is none."""
        known = self.made.get((id(node), slot.role))
        if known is None:
            known = self.made[id(node), slot.role] = (node, self._node(node, slot, path))
        return known[1]

    def _node(self, node: Tree, slot: Slot, path: str) -> Component | None:
        if isinstance(node.value, str):
            fields, name, place = {}, node.value, node
        elif isinstance(node.value, dict):
            fields = dict(node.value)
            place = fields.pop("type", node)
            name = slot.default if place is node else place.value
        else:
            self._note(path, f"expected a {slot.role}: a type name or a mapping with a `type`", node)
            return None
        if not isinstance(name, str):
            self._note(path, f"a {slot.role} needs a `type`; known: {', '.join(types(slot.role))}", node)
            return None
        try:
            component = find(slot.role, name)
        except ZooError as error:
            self._note(path, str(error), place)
            return None
        before = len(self.problems)
        values, broken = self._values(component, fields, path)
        try:
            made = component(**values)
        except SpecError as error:
            for problem in error.problems:
                field = problem.path.split(".")[0].split("[")[0]
                if field not in broken:
                    self._at(node, path, field, problem)
            return None
        return made if len(self.problems) == before else None

    def _values(
        self, component: type[Component], fields: dict[str, Tree], path: str
    ) -> tuple[dict[str, Any], set[str]]:
        """Values for the fields of a component, and the names of fields whose components could not be made."""
        values: dict[str, Any] = {}
        broken: set[str] = set()
        for name, item in fields.items():
            slot, inside = slots(component).get(name), f"{path}.{name}" if path else name
            if slot is None or item.value is None:
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
                self._note(inside, f"expected a list of {slot.role}s", item)
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
