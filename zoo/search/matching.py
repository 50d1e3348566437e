"""From a spec back to a point of a space.

The template is laid over the components of the spec. What is written in both must agree; what only one of them says is
left open, since defaults and fields that others follow from (`ratio` becomes `hidden`) look different in a finished
spec. Layers are matched one by one. Specs are then built from what is left, and layers that come out different move on
to their next possibility, until the hash of a whole spec agrees.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.component import Component
from zoo.errors import SpecError, ZooError
from zoo.search.program import UNITS, Choose, Decision, Point, Value, Walk, evaluate, every
from zoo.spec.document import METADATA, canonical, plain, spec_hash
from zoo.spec.template import Fields, Filling, Formula, Hole, Items, Leaf, Part
from zoo.spec.tree import Tree

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.search.space import Space

MAX_ALTERNATIVES = 256
"""Possibilities that are looked at for one layer, for everything outside of layers, and specs that are built."""

NO, PERHAPS, YES = range(3)


class Layer(NamedTuple):
    """A layer that is to be matched: its part and path in the template, its place in the spec, what stands there."""

    part: Part
    path: str
    where: str
    target: Any


class Found(NamedTuple):
    """Decisions that agree with the spec so far, and layers that have not been looked at."""

    values: Point
    layers: tuple[Layer, ...] = ()

    def with_value(self, name: str, value: Value) -> Found:
        return Found({**self.values, name: value}, self.layers)


class Miss(NamedTuple):
    """Where a spec differs from the space."""

    where: str
    message: str


def point_of(space: Space, spec: Spec) -> Point:
    """A point whose spec has the hash of this one; a `ZooError` says where a spec that is not in the space differs."""
    matcher = _Matcher(space, spec)
    wanted = spec_hash(spec)
    for found in islice(matcher.outside(), MAX_ALTERNATIVES):
        for values, choices in matcher.layers(found.values, found.layers):
            point = matcher.settled(values, found.layers, choices, wanted)
            if point is not None:
                return point
    where, message = matcher.miss()
    raise ZooError(f"the spec is not in the space{f' {space.name!r}' if space.name else ''}: {where}: {message}")


class _Matcher:
    def __init__(self, space: Space, spec: Spec) -> None:
        self.space = space
        self.program = space.program
        self.spec = spec.fill()
        self.misses: list[Miss] = []
        self.own = {decision.name for unit in self.program.units for decision in unit.decisions}
        stages = getattr(self.spec.body, "stages", ())
        self.widths = {self.spec.width, *(width for stage in stages if (width := getattr(stage, "width", None)))}

    def miss(self) -> Miss:
        """The innermost place at which the spec was found to differ, the last of several."""
        nothing = Miss("spec", "no combination of its options gives this spec")
        return max(reversed(self.misses), key=lambda miss: len(re.findall(r"[.\[]", miss.where)), default=nothing)

    def missed(self, where: str, message: str) -> None:
        self.misses.append(Miss(where or "spec", message))

    def outside(self) -> Iterator[Found]:
        """Possibilities for the decisions outside of layers."""
        root = self.space.template.root
        entries = {key: part for key, part in root.entries.items() if key not in METADATA}
        yield from self.fields(entries, self.spec, "", "", Found({}))

    def layers(self, values: Point, layers: tuple[Layer, ...]) -> Iterator[tuple[Point, list[list[Point]]]]:
        """For each layer what its own decisions may be, under every assignment of shared ones that suits all layers."""
        choices: list[list[Point]] = []
        for index, layer in enumerate(layers):
            groups: dict[tuple[tuple[str, Value], ...], list[Point]] = {}
            matched = self.match(layer.part, layer.target, layer.path, layer.where, Found(values))
            for found in islice(matched, MAX_ALTERNATIVES):
                shared = tuple((name, value) for name, value in found.values.items() if name not in self.own)
                groups.setdefault(shared, []).append(
                    {name: value for name, value in found.values.items() if name in self.own}
                )
            if len(groups) != 1:
                for shared, own in groups.items():
                    for more, rest in self.layers(dict(shared), layers[index + 1 :]):
                        yield more, [*choices, own, *rest]
                return
            shared, own = next(iter(groups.items()))
            values = dict(shared)
            choices.append(own)
        yield values, choices

    def settled(
        self, values: Point, layers: tuple[Layer, ...], choices: list[list[Point]], wanted: str
    ) -> Point | None:
        """The point at which everything agrees, None if there is none; layers that differ take their next choice."""
        picks = [0] * len(layers)
        filled: Spec | None = None
        for _ in range(MAX_ALTERNATIVES):
            point = dict(values)
            for own, pick in zip(choices, picks, strict=True):
                point |= own[pick]
            point = self.space.normalised(point)
            try:
                spec = self.space.spec_at(point)
            except SpecError as error:
                wrong = [i for i, each in enumerate(layers) if any(_inside(p.path, each.where) for p in error.problems)]
                if not wrong:
                    return None
            else:
                filled = spec.fill()
                wrong = [i for i, each in enumerate(layers) if _at(filled, each.where) != each.target]
                if not wrong:
                    if spec_hash(spec) == wanted:
                        return point
                    self.missed(*_gap(canonical(spec), canonical(self.spec), ""))
                    return None
            for index in wrong:
                picks[index] += 1
                if picks[index] == len(choices[index]):
                    where = layers[index].where
                    built = _plain(_at(filled, where)) if filled is not None else None
                    self.missed(*_gap(built, _plain(layers[index].target), where))
                    return None
        return None

    def match(
        self, part: Part, target: Any, path: str, where: str, found: Found, holder: Any = None
    ) -> Iterator[Found]:
        """All ways to decide what is open in a part such that it may have become the target."""
        if isinstance(part, Leaf):
            if agreement(part.value, target):
                yield found
            else:
                self.missed(*_difference(part.value, target, where))
        elif isinstance(part, Formula):
            yield from self.formula(part, target, path, where, found)
        elif isinstance(part, Hole):
            yield from self.hole(part, target, path, where, found, holder)
        elif isinstance(part, Fields):
            yield from self.node(part, target, path, where, found)
        else:
            yield from self.items(part, target, path, where, found)

    def node(self, part: Fields, target: Any, path: str, where: str, found: Found) -> Iterator[Found]:
        if not isinstance(target, Component):
            self.missed(where, f"the space has a node, the spec {_shown(target)}")
            return
        kind = part.entries.get("type")
        if isinstance(kind, Leaf) and kind.value.value != target.type:
            self.missed(where, f"the space has {kind.value.value!r}, the spec {target.type!r}")
            return
        entries = {key: item for key, item in part.entries.items() if item is not kind or not isinstance(item, Leaf)}
        yield from self.fields(entries, target, path, where, found)

    def fields(
        self, entries: Mapping[str, Part], target: Component, path: str, where: str, found: Found
    ) -> Iterator[Found]:
        if not entries:
            yield found
            return
        (key, part), *rest = entries.items()
        if key != "type" and key not in type(target).model_fields:
            self.missed(where, f"{target.type!r} has no {key!r}")
            return
        inside, place = (f"{path}.{key}", f"{where}.{key}") if path else (key, key)
        value = getattr(target, key)
        if key == UNITS and isinstance(part, Items) and f"{inside}{part.items[0].suffix}" in self.units:
            matched = self.listed(part, value, inside, place, found)
        else:
            matched = self.match(part, value, inside, place, found, target)
        for one in matched:
            yield from self.fields(dict(rest), target, path, where, one)

    @property
    def units(self) -> set[str]:
        return {unit.name for unit in self.program.units}

    def present(self, part: Items, found: Found) -> Iterator[tuple[Found, list[tuple[Part, str]]]]:
        """Every way to decide how many items of a list there are, with those that are there."""
        counts = [self.program.counts[id(g.count), g.path] for item in part.items for g in item.guards]
        unique = list(dict.fromkeys(counts))

        def run(choose: Choose) -> Point:
            walk = Walk(self.program, choose)
            for count in unique:
                walk.block(count.block)
            return walk.point

        open_names = run(lambda decision: decision.first) if unique else {}
        names = {decision.name for decision in self.program.decisions.values()} - found.values.keys()
        for values in every(run, names if open_names else set(), found.values):
            merged = {**found.values, **values}
            numbers = {id(count): evaluate(count, self.space.template, merged) for count in unique}
            there = [
                (item.part, item.suffix)
                for item in part.items
                if all(numbers[id(self.program.counts[id(g.count), g.path])] > g.index for g in item.guards)
            ]
            yield Found(merged, found.layers), there

    def listed(self, part: Items, target: Any, path: str, where: str, found: Found) -> Iterator[Found]:
        """Ways to have as many layers as the spec; what is in them is left for later."""
        lengths: set[int] = set()
        for one, there in self.present(part, found):
            lengths.add(len(there))
            if len(there) == len(target):
                layers = tuple(
                    Layer(item, path + suffix, f"{where}[{index}]", target[index])
                    for index, (item, suffix) in enumerate(there)
                )
                yield Found(one.values, one.layers + layers)
        if len(target) not in lengths:
            self.missed(where, f"the spec has {len(target)} layers, the space {_lengths(lengths)}")

    def items(self, part: Items, target: Any, path: str, where: str, found: Found) -> Iterator[Found]:
        if not isinstance(target, tuple | list):
            self.missed(where, f"the space has a list, the spec {_shown(target)}")
            return
        for one, there in self.present(part, found):
            if len(there) == len(target):
                yield from self.chain(there, target, path, where, 0, one)

    def chain(
        self, there: list[tuple[Part, str]], target: Any, path: str, where: str, index: int, found: Found
    ) -> Iterator[Found]:
        if index == len(there):
            yield found
            return
        part, suffix = there[index]
        for one in self.match(part, target[index], path + suffix, f"{where}[{index}]", found):
            yield from self.chain(there, target, path, where, index + 1, one)

    def formula(self, part: Formula, target: Any, path: str, where: str, found: Found) -> Iterator[Found]:
        """Every assignment of what an expression follows from under which its value agrees."""
        name = part.expression.text[1:]
        variable = self.space.template.variables.get(name)
        if variable is not None and not isinstance(variable, Hole | Leaf):
            yield from self.match(variable, target, name, where, found)
            return
        blocks = [self.program.shared[each] for each in sorted(part.expression.names) if each in self.program.shared]

        def run(choose: Choose) -> Point:
            walk = Walk(self.program, choose)
            for block in blocks:
                walk.block(block)
            return walk.point

        seen: list[Any] = []
        weighed: list[tuple[int, Point]] = []
        names = self.program.decisions.keys() - found.values.keys()
        for values in islice(every(run, names, found.values), MAX_ALTERNATIVES):
            merged = {**found.values, **values}
            tree = Filling(self.space.template, lambda hole, path, m=merged: m[path]).part(part, path)
            seen.append(tree.plain())
            weighed.append((agreement(tree, target), merged))
        for level in (YES, PERHAPS):
            for agreed, merged in weighed:
                if agreed == level:
                    yield Found(merged, found.layers)
        if not any(agreed for agreed, _ in weighed):
            self.missed(where, f"the space has {_options(seen)}, the spec {_shown(target)}")

    def hole(self, hole: Hole, target: Any, path: str, where: str, found: Found, holder: Any) -> Iterator[Found]:
        name = hole.name or path
        if hole.kind != "choice":
            for value in self.numbers(self.program.decisions[name], target, found, holder):
                yield found.with_value(name, value)
            return
        known = name in found.values
        options = [each for each in hole.options if not known or each.label == found.values[name]]
        likely = sorted(
            (each for each in options if _rank(each.part, target)), key=lambda each: -_rank(each.part, target)
        )
        matched = False
        for option in likely:
            inside = f"{name}.{option.label}" if isinstance(option.label, str) else name
            for one in self.match(option.part, target, inside, where, found.with_value(name, option.label), holder):
                matched = True
                yield one
        if not matched:
            offered = _options([_offered(option.part, option.label) for option in options])
            self.missed(where, f"the space has {offered}, the spec {_shown(target)}")

    def numbers(self, decision: Decision, target: Any, found: Found, holder: Any) -> Iterator[Value]:
        """Values of a range that may have become the target; where it was replaced by what follows from it, guesses."""
        if decision.name in found.values:
            yield found.values[decision.name]
            return
        if target is not None:
            if decision.hole.admits(target):
                yield decision.canonical(target)
            else:
                self.missed(
                    decision.name, f"the space goes from {decision.low} to {decision.high}, the spec has {target}"
                )
            return
        if decision.kind == "int":
            yield from islice(decision.values(), MAX_ALTERNATIVES)
            return
        sizes = [getattr(holder, field) for field in type(holder).model_fields] if holder is not None else []
        numbers = [size for size in sizes if isinstance(size, int) and not isinstance(size, bool)]
        guesses = [size / width for size in numbers for width in self.widths]
        yield from (guess for guess in [*guesses, *decision.values()] if decision.hole.admits(guess))  # type: ignore[misc]


def agreement(tree: Tree, target: Any) -> int:
    """Whether what is written may have become the target: `NO`, `PERHAPS` where one side says nothing, or `YES`."""
    value = tree.value
    if isinstance(target, Component):
        if isinstance(value, str):
            return YES if value == target.type else NO
        if not isinstance(value, dict):
            return PERHAPS if value is None else NO
        kind = value.get("type")
        if kind is not None and kind.value != target.type:
            return NO
        rest = [(key, item) for key, item in value.items() if key != "type"]
        return min(
            (agreement(item, getattr(target, key)) if key in type(target).model_fields else NO for key, item in rest),
            default=YES,
        )
    if isinstance(value, dict):
        return NO
    if isinstance(value, list):
        if not isinstance(target, tuple | list) or len(value) != len(target):
            return PERHAPS if target is None else NO
        return min((agreement(item, other) for item, other in zip(value, target, strict=True)), default=YES)
    if value is None or target is None:
        return YES if value is target else PERHAPS
    return YES if value == target and isinstance(value, bool) == isinstance(target, bool) else NO


def _rank(part: Part, target: Any) -> int:
    if isinstance(part, Leaf):
        return agreement(part.value, target)
    kind = part.entries.get("type") if isinstance(part, Fields) else None
    other = isinstance(kind, Leaf) and isinstance(target, Component) and kind.value.value != target.type
    return NO if other else PERHAPS


def _difference(tree: Tree, target: Any, where: str) -> tuple[str, str]:
    """The innermost place at which what is written differs from the target, and how."""
    if isinstance(target, Component):
        for key, item in tree.entries.items():
            if key == "type" and item.value != target.type:
                break
            if key in type(target).model_fields and not agreement(item, getattr(target, key)):
                return _difference(item, getattr(target, key), f"{where}.{key}" if where else key)
    if isinstance(target, tuple) and len(tree.items) == len(target):
        for index, (item, other) in enumerate(zip(tree.items, target, strict=True)):
            if not agreement(item, other):
                return _difference(item, other, f"{where}[{index}]")
    return where, f"the space has {_brief(tree.plain())}, the spec {_shown(target)}"


def _offered(part: Part, label: Value) -> Any:
    return label if isinstance(label, str) or not isinstance(part, Leaf) else part.value.plain()


def _inside(path: str, where: str) -> bool:
    return path == where or path.startswith((f"{where}.", f"{where}["))


def _at(spec: Any, where: str) -> Any:
    for name in re.findall(r"[^.\[\]]+", where):
        if name.isdigit():
            if not isinstance(spec, tuple) or int(name) >= len(spec):
                return None
            spec = spec[int(name)]
        else:
            spec = getattr(spec, name, None)
    return spec


def _plain(part: Any) -> Any:
    return plain(part) if isinstance(part, Component) else part


def _gap(ours: Any, theirs: Any, where: str) -> tuple[str, str]:
    """The first place at which two canonical forms differ, and how."""
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.keys() == theirs.keys():
        for key, value in ours.items():
            if value != theirs[key]:
                return _gap(value, theirs[key], f"{where}.{key}" if where else key)
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        for index, (value, other) in enumerate(zip(ours, theirs, strict=True)):
            if value != other:
                return _gap(value, other, f"{where}[{index}]")
    return where, f"the space gives {_brief(ours)}, the spec {_brief(theirs)}"


def _shown(target: Any) -> str:
    return repr(target.type) if isinstance(target, Component) else repr(target)


def _brief(value: Any) -> str:
    return repr(value.get("type", "a node")) if isinstance(value, dict) else repr(value)


def _options(values: list[Any]) -> str:
    unique = list(dict.fromkeys(_brief(value) for value in values))
    return " or ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)


def _lengths(lengths: set[int]) -> str:
    ordered = sorted(lengths)
    return f"from {ordered[0]} to {ordered[-1]}" if len(ordered) > 1 else str(ordered[0] if ordered else 0)
