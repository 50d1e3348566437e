"""Spaces: spec files with holes, and the points that fill them.

A point is a flat mapping from the names of decisions to values: paths such as `body.layers[3].mixer`, or the name of
what is shared. It holds the decisions that are active and no others.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import SpecError, ZooError
from zoo.search.counting import below, size
from zoo.search.program import (
    Block,
    Decide,
    Decision,
    Listing,
    Point,
    Program,
    Value,
    Walk,
    compile_program,
    same,
)
from zoo.spec.construct import construct
from zoo.spec.document import METADATA, read, read_text_as
from zoo.spec.template import Fields, Formula, Hole, Items, Leaf, Part, Template

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.component import Component

BASELINE_FIELDS = ("mixer", "channel", "")


class Space:
    """All specs that a template can be filled to."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layers: dict[Any, Component | None] = {}
        """Layers that tables have filled in for their places, by all that they follow from; None for invalid ones."""

    @classmethod
    def from_template(cls, template: Template) -> Space:
        """The space of a template; a `SpecError` tells of decisions that cannot be told apart."""
        return cls(compile_program(template))

    @classmethod
    def parse(cls, text: str, file: str = "<text>") -> Space:
        """The space that a YAML text describes."""
        return cls.from_template(read_text_as(text, file))

    @property
    def template(self) -> Template:
        return self.program.template

    @property
    def name(self) -> str | None:
        given = self.template.source.entries.get("name")
        return given.value if given is not None and isinstance(given.value, str) else None

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Every decision that can become active, in the order of the document."""
        return tuple(self.program.decisions.values())

    @cached_property
    def hash(self) -> str:
        """The identity of the space, 16 hexadecimal digits: what is fixed and what is open, but no names or sources."""
        known: dict[int, str] = {}
        variables = {name: _digest(part, known) for name, part in sorted(self.template.variables.items())}
        root = {key: _digest(part, known) for key, part in self.template.root.entries.items() if key not in METADATA}
        return _sha([root, variables])

    def size(self) -> int | None:
        """The exact number of points; None if there is none, or too many shared choices decide about depth."""
        return size(self.program)

    def spec_at(self, point: Mapping[str, Value]) -> Spec:
        """The spec of a point; a `SpecError` for combinations that are invalid across fields.

        Decisions that are not active are ignored; a missing or impossible value is a `ZooError`.
        """

        def choose(hole: Hole, path: str) -> Any:
            if path not in point:
                raise ZooError(f"the point has no value for {path!r}")
            value = point[path]
            if not hole.admits(value):
                self.program.decisions[path].canonical(value)
            return value

        try:
            return construct(self.template.fill(choose))  # type: ignore[return-value]
        except ValueError as error:
            raise ZooError(f"a point outside the space: {error}") from None

    def point_of(self, spec: Spec) -> Point:
        """A point whose spec is this one; a `ZooError` says where a spec that is not in the space differs."""
        from zoo.search.matching import point_of

        return point_of(self, spec)

    def decide(self, choose: Callable[[Decision], Value]) -> Point:
        """The point that comes of asking for each active decision, in the order in which they become active."""
        return self.program.walk(choose).point

    def walk(self, point: Mapping[str, Value]) -> Walk:
        """A pass over the template at a point, with the layers that are there."""
        return self.program.walk(lambda decision: _value(point, decision))

    def normalised(self, point: Mapping[str, Value]) -> Point:
        """The point without inactive decisions; what is missing or impossible gets its first value."""
        return self.walk(point).point

    def first(self) -> Point:
        """The point that takes the first value everywhere."""
        return self.normalised({})

    def key(self, point: Mapping[str, Value]) -> str:
        """The identity of a point: 16 hexadecimal digits, the same in every run."""
        return point_key(self.normalised(point))

    def sample(self, rng: random.Random) -> Point:
        """A point at random.

        Inside a layer each option is as likely as its share of the points below it, so that layers are drawn evenly.
        What stands outside of layers, such as depth and width, is drawn evenly by value: evenly by points nearly all
        draws would have the largest depth.
        """
        return self.decide(lambda decision: self._draw(decision, rng))

    def _draw(self, decision: Decision, rng: random.Random) -> Value:
        weights = self._weights.get(decision.name)
        if weights is None:
            return decision.draw(rng)
        index = rng.randrange(weights[-1])
        return next(label for label, edge in zip(decision.labels, weights, strict=True) if index < edge)

    @cached_property
    def _weights(self) -> dict[str, tuple[int, ...]]:
        """For choices inside layers whose options differ in points below them, how many those are, added up."""
        found: dict[str, tuple[int, ...]] = {}
        for step in _decides(self.program):
            if step.branches and step.decision.name in self._owner:
                total, edges = 0, []
                for label in step.decision.labels:
                    total += below(step.branches.get(label, ()))
                    edges.append(total)
                found[step.decision.name] = tuple(edges)
        return found

    def mutate(self, point: Mapping[str, Value], rng: random.Random, changes: int = 1) -> Point:
        """The point with `changes` decisions changed, one after the other; what becomes active by that is drawn.

        A layer is as likely to be picked as a decision outside of layers, then one of its decisions; a number moves to
        a value nearby rather than far away. The point itself comes back only if nothing can be changed.
        """
        changed = self.normalised(point)
        for _ in range(changes):
            groups: dict[str, list[Decision]] = {}
            for name in changed:
                decision = self.program.decisions[name]
                if decision.count is None or decision.count > 1:
                    groups.setdefault(self._owner.get(name, name), []).append(decision)
            if not groups:
                break
            decision = rng.choice(rng.choice(list(groups.values())))
            other = decision.other(changed[decision.name], rng)
            changed = self.complete({**changed, decision.name: other}, rng)
        return changed

    def cross(self, a: Mapping[str, Value], b: Mapping[str, Value], rng: random.Random) -> Point:
        """A child of two points: each layer, and each decision outside of layers, is that of one or the other."""
        parents: dict[str, tuple[Mapping[str, Value], ...]] = {}

        def choose(decision: Decision) -> Value:
            group = self._owner.get(decision.name, decision.name)
            if group not in parents:
                parents[group] = (a, b) if rng.random() < 0.5 else (b, a)
            return self._taken(decision, parents[group], rng)

        return self.decide(choose)

    def complete(self, point: Mapping[str, Value], rng: random.Random) -> Point:
        """The point without inactive decisions, and with missing ones drawn at random."""
        return self.decide(lambda decision: self._taken(decision, (point,), rng))

    def _taken(self, decision: Decision, points: Iterable[Mapping[str, Value]], rng: random.Random) -> Value:
        """The value of the first point that has one, or one at random."""
        for point in points:
            if decision.name in point:
                try:
                    return decision.canonical(point[decision.name])
                except ValueError:
                    continue
        return self._draw(decision, rng)

    @cached_property
    def _owner(self) -> dict[str, str]:
        """The unit that a decision belongs to."""
        return {decision.name: unit.name for unit in self.program.units for decision in unit.decisions}

    def homogeneous(self) -> dict[str, Point]:
        """Baselines: for each option of the layers' mixers the point in which every layer takes it.

        Where no mixer is open in layers, the channel mixers, or else whole layers. Other decisions are at the middle of
        their range. A baseline is called by its option.
        """
        for field in BASELINE_FIELDS:
            groups = self._per_layer(field)
            if groups:
                labels = dict.fromkeys(label for choices in groups for label in choices[0].labels)
                return {str(label): self._all_take(groups, label) for label in labels}
        return {}

    def _per_layer(self, field: str) -> list[list[Decision]]:
        """The choices at one field of the layers, those of equal layers together."""
        groups: dict[int, list[Decision]] = {}
        for unit in self.program.units:
            name = f"{unit.name}.{field}" if field else unit.name
            for decision in unit.decisions:
                if decision.name == name and decision.kind == "choice" and len(decision.labels) > 1:
                    groups.setdefault(id(unit.part), []).append(decision)
        return list(groups.values())

    def _all_take(self, groups: Iterable[Iterable[Decision]], label: Value) -> Point:
        taken = {
            decision.name: label
            for choices in groups
            for decision in choices
            if any(same(label, other) for other in decision.labels)
        }
        return self.decide(lambda decision: taken.get(decision.name, decision.middle))

    def validate(self) -> None:
        """A `SpecError` with the places of every option that is wrong on its own.

        Each option is tried with the others at their first value, equal layers trying different options at once; one
        that fails there is tried in other company before it is called wrong. Every place is reported once.
        """
        from zoo.search.validation import problems

        found = problems(self)
        if found:
            raise SpecError(found)


def point_key(point: Mapping[str, Value]) -> str:
    """`Space.key` of a point that is normalised."""
    return _sha(sorted(point.items()))


def load_space(name: str | Path) -> Space:
    """The space of a file or a shipped name; a spec without holes is a space of one point."""
    return Space.from_template(read(name))


def _value(point: Mapping[str, Value], decision: Decision) -> Value:
    if decision.name in point:
        try:
            return decision.canonical(point[decision.name])
        except ValueError:
            pass
    return decision.first


def _decides(program: Program) -> Iterator[Decide]:
    """Every step that asks a decision."""

    def visit(block: Block) -> Iterator[Decide]:
        for step in block:
            if isinstance(step, Decide):
                yield step
                for branch in step.branches.values():
                    yield from visit(branch)
            elif isinstance(step, Listing):
                for entry in step.entries:
                    yield from visit(entry.block)

    yield from visit(program.root)
    for block in program.shared.values():
        yield from visit(block)


def _sha(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(part: Part, known: dict[int, str]) -> str:
    """The identity of a part: what it says, not where it stands."""
    if id(part) not in known:
        known[id(part)] = _sha(_content(part, known))
    return known[id(part)]


def _content(part: Part, known: dict[int, str]) -> Any:
    if isinstance(part, Leaf):
        return part.value.plain()
    if isinstance(part, Formula):
        return ["formula", part.expression.text]
    if isinstance(part, Fields):
        return ["fields", {key: _digest(item, known) for key, item in part.entries.items()}]
    if isinstance(part, Items):
        return [
            "items",
            *(
                [
                    item.suffix,
                    _digest(item.part, known),
                    [[_digest(guard.count, known), guard.path, guard.index] for guard in item.guards],
                ]
                for item in part.items
            ),
        ]
    options = [[option.label, _digest(option.part, known)] for option in part.options]
    return ["hole", part.kind, options, part.low, part.high, part.step, part.log, part.name]


__all__ = ["Decision", "Point", "Space", "Value", "load_space", "point_key"]
