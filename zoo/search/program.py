"""What a template asks, and in which order: the decisions of a space and when each of them is open.

A template is compiled once into blocks of steps. A walk over the steps, given a way to choose values, meets exactly the
decisions that `Template.fill` would ask for: those are the active ones.

Decisions are shared or private. A hole with a name, a hole in `vars`, and whatever stands inside them is shared: it is
decided once, when something that is active first refers to it. A *unit* is an item of a list called `layers`; decisions
inside it that are not shared are its own.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

from zoo.errors import Problem, SpecError
from zoo.spec.template import NAMED_FIELDS, Fields, Filling, Formula, Hole, Items, Leaf, Part, Template
from zoo.spec.tree import Tree

Value = None | bool | int | float | str
Point = dict[str, Value]
"""Values of all active decisions, by name."""
Setting = tuple[tuple[int, Value], ...]
"""What a unit's own decisions are: indices of those that are active, in the order in which they are met, and values."""

Choose = Callable[["Decision"], Value]
"""Gives a decision a value."""

UNITS = "layers"
"""The field whose items are units."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One value that is open.

    kind: `"choice"` of `labels`, `"int"` from `low` to `high` in steps of `step`, or `"float"`; `log` for ranges that
    are searched on a logarithmic scale. conditions: other decisions with the values that they must have for this one
    to be open at the first place where it stands, as far as one decision alone tells.
    """

    name: str
    kind: str
    labels: tuple[Value, ...] = ()
    low: float = 0
    high: float = 0
    step: int = 1
    log: bool = False
    conditions: tuple[tuple[str, tuple[Value, ...]], ...] = ()
    hole: Hole = field(repr=False, compare=False, default_factory=lambda: Hole("choice"))

    @property
    def count(self) -> int | None:
        """How many values it can take; None for a range of real numbers."""
        if self.kind == "choice":
            return len(self.labels)
        return (int(self.high) - int(self.low)) // self.step + 1 if self.kind == "int" else None

    def values(self) -> Sequence[Value]:
        """Every value; for a range of real numbers its ends and its middle."""
        if self.kind == "choice":
            return self.labels
        if self.kind == "int":
            return range(int(self.low), int(self.high) + 1, self.step)
        return tuple(dict.fromkeys((self.low, self.middle, self.high)))

    def spread(self, most: int) -> list[Value]:
        """Every value; of more than `most`, and of real numbers, that many from the first to the last."""
        if self.kind == "float":
            found = [self.number(self.low + (self.high - self.low) * index / (most - 1)) for index in range(most)]
            return list(dict.fromkeys(found))
        values = self.values()
        if len(values) <= most:
            return list(values)
        return [values[index * (len(values) - 1) // (most - 1)] for index in range(most)]

    @property
    def first(self) -> Value:
        """The first option, or the lower end."""
        return self.labels[0] if self.kind == "choice" else self.number(self.low)

    @property
    def middle(self) -> Value:
        """The option in the middle, or the middle of the range; the lower of two."""
        if self.kind == "choice":
            return self.labels[(len(self.labels) - 1) // 2]
        if self.log:
            return self.number(math.sqrt(self.low * self.high))
        return self.number((self.low + self.high) / 2 if self.kind == "float" else (self.low + self.high) // 2)

    def number(self, value: float) -> Value:
        """The value of the range that is nearest to a number, not above it on a grid with steps."""
        value = min(max(value, self.low), self.high)
        if self.kind == "float":
            return float(value)
        return int(self.low) + (int(value) - int(self.low)) // self.step * self.step

    def canonical(self, value: Any) -> Value:
        """The value as this decision spells it (4 for 4.0); a `ValueError` if it can not take it."""
        if self.kind == "choice":
            option = self.hole.option(value)
            if option is None:
                raise ValueError(f"expected one of {', '.join(map(str, self.labels))}; got {value!r}")
            return option.label
        if not self.hole.admits(value):
            grid = f" in steps of {self.step}" if self.step > 1 else ""
            whole = "a whole number" if self.kind == "int" else "a number"
            raise ValueError(f"expected {whole} from {self.low} to {self.high}{grid}; got {value!r}")
        return int(value) if self.kind == "int" else float(value)

    def draw(self, rng: random.Random) -> Value:
        """A value at random: each option and each number as likely as any other, on the scale of `log`."""
        if self.kind == "choice":
            return rng.choice(self.labels)
        if self.log:
            top = self.high + (1 if self.kind == "int" else 0)
            return self.number(math.exp(rng.uniform(math.log(self.low), math.log(top))))
        if self.kind == "int":
            return int(self.low) + self.step * rng.randrange((int(self.high) - int(self.low)) // self.step + 1)
        return rng.uniform(self.low, self.high)

    def other(self, value: Value, rng: random.Random) -> Value:
        """A value that differs: any other option; a number nearby rather than far away."""
        if self.kind == "choice":
            return rng.choice([label for label in self.labels if not same(label, value)] or [value])
        assert isinstance(value, int | float)
        if self.count == 1 or self.low == self.high:
            return value
        to, back = (math.log, math.exp) if self.log else (float, float)
        spread = max((to(self.high) - to(self.low)) / 8, 1.0 * self.step if self.kind == "int" and not self.log else 0)
        for _ in range(16):
            moved = back(to(value) + rng.gauss(0, spread))
            found = self.number(round(moved) if self.kind == "int" else moved)
            if found != value:
                return found
        return self.first if value != self.first else self.number(self.high)


def same(a: Value, b: Value) -> bool:
    """Equality in which types count, so that 1 and true stay apart."""
    return a == b and type(a) is type(b)


@dataclass(frozen=True, slots=True, eq=False)
class Decide:
    """Ask a decision, then what its option asks."""

    decision: Decision
    branches: Mapping[Value, Block]


@dataclass(frozen=True, slots=True)
class Refer:
    """Ask what a shared name asks, unless that was done before."""

    name: str


@dataclass(frozen=True, slots=True, eq=False)
class Count:
    """A number of repetitions: the part that it follows from, and what that asks."""

    part: Part
    path: str
    block: Block


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """A layer that may be there.

    name: its path in the template, with which the names of its decisions begin. part: what it is made of; layers that
    are repeated share it. where: its path in a spec, in which a number stands for the position of a listed entry.
    decisions: its own, in the order in which they are met.
    """

    name: str
    part: Part
    where: tuple[str | int, ...]
    decisions: tuple[Decision, ...]
    block: Block
    index: Mapping[str, int] = field(init=False, repr=False)
    """The numbers of its decisions by name."""
    levels: tuple[int, ...] = field(init=False, repr=False)
    """For each decision how many others lie above it: whether it is asked follows from those with a smaller number."""

    def __post_init__(self) -> None:
        index = {decision.name: number for number, decision in enumerate(self.decisions)}
        object.__setattr__(self, "index", index)
        object.__setattr__(self, "levels", self._levels())

    def _levels(self) -> tuple[int, ...]:
        levels = [0] * len(self.decisions)
        pending: list[tuple[Block, int]] = [(self.block, 0)]
        while pending:
            block, level = pending.pop()
            for step in block:
                if isinstance(step, Listing):
                    # How many entries there are may follow from any decision in front of them.
                    return tuple(range(len(self.decisions)))
                if isinstance(step, Decide):
                    levels[self.index[step.decision.name]] = level
                    pending += [(inside, level + 1) for inside in step.branches.values()]
        return tuple(levels)

    def steps(self, setting: Setting) -> list[list[str]]:
        """The names of the decisions of each level of a setting; where there is none, one level without decisions."""
        slots = sorted((slot for slot, _ in setting), key=self.levels.__getitem__)
        levels = groupby(slots, key=self.levels.__getitem__)
        return [[self.decisions[slot].name for slot in level] for _, level in levels] or [[]]

    def setting(self, program: Program, point: Mapping[str, Value]) -> Setting:
        """Its own active decisions at a point, as indices into `decisions` with values."""
        walk = Walk(program, lambda decision: point[decision.name])
        walk.block(self.block)
        return self._own(walk.point)

    def complete(self, program: Program, point: Mapping[str, Value], choose: Choose) -> Setting:
        """A setting whose values are chosen, shared decisions being as the point says or at their first value."""

        def decide(decision: Decision) -> Value:
            return choose(decision) if decision.name in self.index else point.get(decision.name, decision.first)

        walk = Walk(program, decide)
        walk.block(self.block)
        return self._own(walk.point)

    def _own(self, point: Point) -> Setting:
        index = self.index
        return tuple((index[name], value) for name, value in point.items() if name in index)

    def every(self, program: Program, point: Mapping[str, Value]) -> Iterator[Setting]:
        """All settings that it can have beside what a point says of shared decisions."""

        def run(choose: Choose) -> Point:
            walk = Walk(program, choose)
            walk.block(self.block)
            return walk.point

        return map(self._own, every(run, self.index, point))


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """An item of a list: there if each count is above its index, asked in turn."""

    number: int
    guards: tuple[tuple[Count, int], ...]
    block: Block
    unit: Unit | None


@dataclass(frozen=True, slots=True, eq=False)
class Listing:
    """A list with open items."""

    entries: tuple[Entry, ...]


Step = Decide | Refer | Listing
Block = tuple[Step, ...]


@dataclass(frozen=True, eq=False)
class Program:
    """A compiled template: the steps of its root, those of each shared name, and all decisions, units and counts.

    A count is found by the identity of its part and its path.
    """

    template: Template
    root: Block
    shared: Mapping[str, Block]
    decisions: Mapping[str, Decision]
    units: tuple[Unit, ...]
    counts: Mapping[tuple[int, str], Count]

    def walk(self, choose: Choose, *, every_layer: bool = False) -> Walk:
        """Go through the template, asking `choose` for each decision that is active, or would be for some layers."""
        walk = Walk(self, choose, every_layer=every_layer)
        walk.block(self.root)
        return walk

    @cached_property
    def outside(self) -> tuple[Decision, ...]:
        """The decisions that belong to no unit."""
        return tuple(decision for decision in self.decisions.values() if decision.name not in self.inside)

    @cached_property
    def inside(self) -> frozenset[str]:
        """The names of the decisions that belong to a unit."""
        return frozenset(decision.name for unit in self.units for decision in unit.decisions)

    @cached_property
    def lengths(self) -> frozenset[str]:
        """The decisions outside of units that say how many units there are, and nothing else."""
        reached = self.reach(self.root)
        return frozenset(decision.name for decision in self.outside if decision.name not in reached)

    def reach(self, block: Block) -> frozenset[str]:
        """The decisions that a block may ask, those of lengths of its units aside."""
        reached: set[str] = set()
        self._reach(block, reached, set())
        return frozenset(reached)

    def _reach(self, block: Block, reached: set[str], names: set[str]) -> None:
        for step in block:
            if isinstance(step, Decide):
                reached.add(step.decision.name)
                for branch in step.branches.values():
                    self._reach(branch, reached, names)
            elif isinstance(step, Refer):
                if step.name not in names:
                    names.add(step.name)
                    self._reach(self.shared[step.name], reached, names)
            else:
                for entry in step.entries:
                    if entry.unit is None:
                        for count, _ in entry.guards:
                            self._reach(count.block, reached, names)
                    self._reach(entry.block, reached, names)


def every(run: Callable[[Choose], Point], names: Collection[str], point: Mapping[str, Value]) -> Iterator[Point]:
    """All results of `run` over the values of the named decisions, like an odometer.

    Other decisions are as the point says, or at their first value.
    """
    dials: list[int] = []
    while True:
        sizes: list[int] = []
        yield run(_dialled(dials, sizes, names, point))
        del dials[len(sizes) :]
        while dials and dials[-1] + 1 == sizes[len(dials) - 1]:
            dials.pop()
        if not dials:
            return
        dials[-1] += 1


def _dialled(dials: list[int], sizes: list[int], names: Collection[str], point: Mapping[str, Value]) -> Choose:
    """Gives the named decisions the values that the dials show, and notes how many values each has."""

    def choose(decision: Decision) -> Value:
        if decision.name not in names:
            return point.get(decision.name, decision.first)
        values = decision.values()
        if len(sizes) == len(dials):
            dials.append(0)
        sizes.append(len(values))
        return values[dials[len(sizes) - 1]]

    return choose


class Walk:
    """One pass over a program: the values chosen, and the units that are there."""

    def __init__(self, program: Program, choose: Choose, *, every_layer: bool = False) -> None:
        self.program = program
        self.choose = choose
        self.every_layer = every_layer
        self.point: Point = {}
        self.units: list[Unit] = []
        self.positions: dict[int, int] = {}
        self._referred: set[str] = set()
        self._counts: dict[int, int] = {}

    def block(self, block: Block) -> None:
        for step in block:
            if isinstance(step, Decide):
                value = self.point[step.decision.name] = self.choose(step.decision)
                if self.every_layer and step.decision.name in self.program.inside:
                    for branch in step.branches.values():
                        self.block(branch)
                elif step.branches and value in step.branches:
                    self.block(step.branches[value])
            elif isinstance(step, Refer):
                if step.name not in self._referred:
                    self._referred.add(step.name)
                    self.block(self.program.shared[step.name])
            else:
                self._listing(step)

    def _listing(self, listing: Listing) -> None:
        position = 0
        for entry in listing.entries:
            for count, index in entry.guards:
                if self._count(count) <= index:
                    break
            else:
                self.positions[entry.number] = position
                position += 1
                if entry.unit is not None:
                    self.units.append(entry.unit)
                self.block(entry.block)

    def _count(self, count: Count) -> int:
        known = self._counts.get(id(count))
        if known is None:
            self.block(count.block)
            known = self._counts[id(count)] = evaluate(count, self.program.template, self.point)
        return known

    def where(self, unit: Unit) -> str:
        """The path of a unit in the spec."""
        return "".join(part if isinstance(part, str) else f"[{self.positions[part]}]" for part in unit.where)


def evaluate(count: Count, template: Template, point: Mapping[str, Value]) -> int:
    """The number of repetitions at a point that holds what it follows from."""
    value = Filling(template, lambda hole, path: point[path]).part(count.part, count.path).value
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def compile_program(template: Template) -> Program:
    """The program of a template; a `SpecError` tells of decisions that cannot be told apart."""
    compiler = _Compiler(template)
    root = compiler.fields(template.root, "", ("",))
    if compiler.problems:
        raise SpecError(compiler.problems.values())
    return Program(template, root, compiler.shared, compiler.decisions, tuple(compiler.units), compiler.counts)


class _Compiler:
    def __init__(self, template: Template) -> None:
        self.template = template
        self.problems: dict[str, Problem] = {}
        self.shared: dict[str, Block] = {}
        self.holders: dict[str, Part] = {}
        self.decisions: dict[str, Decision] = {}
        self.counts: dict[tuple[int, str], Count] = {}
        self.units: list[Unit] = []
        self.own: list[Decision] | None = None
        self.conditions: tuple[tuple[str, tuple[Value, ...]], ...] = ()
        self.entries = 0

    def block(self, part: Part, path: str, where: tuple[str | int, ...] | None) -> Block:
        """What a part at `path` asks; `where` is its place in a spec, None in what is shared."""
        if isinstance(part, Leaf):
            return ()
        if isinstance(part, Formula):
            return tuple(Refer(name) for name in sorted(part.expression.names) if self.know(name))
        if isinstance(part, Hole):
            return self.hole(part, path, where)
        if isinstance(part, Fields):
            return self.fields(part, path, where)
        return self.items(part, path, where)

    def fields(self, part: Fields, path: str, where: tuple[str | int, ...] | None) -> Block:
        steps: list[Step] = []
        for key, item in part.entries.items():
            inside = f"{path}.{key}" if path else key
            place = None if where is None else _extended(where, f".{key}" if path else key)
            if not path and key in NAMED_FIELDS and key not in self.template.variables:
                steps += self.named(key, item)
            elif key == UNITS and isinstance(item, Items) and where is not None and self.own is None:
                steps += self.items(item, inside, place, units=True)
            else:
                steps += self.block(item, inside, place)
        return tuple(steps)

    def named(self, key: str, part: Part) -> Block:
        """A field of the root that expressions may use: shared, like a variable."""
        if isinstance(part, Leaf) or (isinstance(part, Hole) and part.name is not None):
            return self.block(part, key, None)
        self.define(key, part)
        return (Refer(key),)

    def know(self, name: str) -> bool:
        """Whether a name in an expression stands for something; `Template.fill` reports it if not."""
        if name in self.shared:
            return True
        part = self.template.variables.get(name)
        if part is None and name in NAMED_FIELDS:
            part = self.template.root.entries.get(name)
        if part is None:
            return False
        self.define(name, part)
        return True

    def define(self, name: str, part: Part) -> None:
        """Compile what a shared name stands for, once, as belonging to no unit."""
        if name in self.shared:
            if self.holders[name] is not part and not _alike(self.holders[name], part):
                self.clash(name, part.mark if isinstance(part, Hole) else None)
            return
        self.shared[name], self.holders[name] = (), part
        own, self.own = self.own, None
        if isinstance(part, Hole) and part.name in (None, name):
            self.shared[name] = (self.decide(part, name, None),)
        else:
            self.shared[name] = self.block(part, name, None)
        self.own = own

    def clash(self, name: str, mark: Any) -> None:
        message = f"two different holes are called {name!r}; give one of them another `name`"
        self.problems.setdefault(name, Problem(name, message, mark))

    def hole(self, hole: Hole, path: str, where: tuple[str | int, ...] | None) -> Block:
        if hole.name is None:
            return (self.decide(hole, path, where),)
        self.define(hole.name, hole)
        return (Refer(hole.name),)

    def decide(self, hole: Hole, name: str, where: tuple[str | int, ...] | None) -> Decide:
        labels = tuple(hole.labels()) if hole.kind == "choice" else ()
        if len(set(labels)) < len(labels):
            message = f"values such as {_twins(labels)} look alike to the search; name them: `choice: {{yes: ...}}`"
            self.problems.setdefault(f"{name} ", Problem(name, message, hole.mark))
        decision = Decision(name, hole.kind, labels, hole.low, hole.high, hole.step, hole.log, self.conditions, hole)
        if name in self.decisions:
            self.clash(name, hole.mark)
        self.decisions[name] = decision
        if self.own is not None:
            self.own.append(decision)
        branches: dict[Value, Block] = {}
        before = self.conditions
        for option in hole.options:
            self.conditions = (*before, (name, (option.label,)))
            inside = f"{name}.{option.label}" if isinstance(option.label, str) else name
            block = self.block(option.part, inside, where)
            if block:
                branches[option.label] = block
        self.conditions = before
        return Decide(decision, branches)

    def items(self, part: Items, path: str, where: tuple[str | int, ...] | None, *, units: bool = False) -> Block:
        entries: list[Entry] = []
        for item in part.items:
            self.entries += 1
            number, name = self.entries, path + item.suffix
            before = self.conditions
            guards: list[tuple[Count, int]] = []
            for guard in item.guards:
                count = self.count(guard.count, guard.path)
                guards.append((count, guard.index))
                self.conditions += _reaching(count, guard.index)
            place = None if where is None else (*where, number)
            if units:
                self.own = own = []
                block = self.block(item.part, name, place)
                self.own = None
                assert place is not None
                unit = Unit(name, item.part, place, tuple(own), block)
                self.units.append(unit)
            else:
                unit, block = None, self.block(item.part, name, place)
            self.conditions = before
            entries.append(Entry(number, tuple(guards), block, unit))
        return (Listing(tuple(entries)),)

    def count(self, part: Part, path: str) -> Count:
        known = self.counts.get((id(part), path))
        if known is None:
            known = self.counts[id(part), path] = Count(part, path, self.block(part, path, None))
        return known


def _extended(where: tuple[str | int, ...], text: str) -> tuple[str | int, ...]:
    """A place one field further down."""
    last = where[-1] if where else ""
    return (*where[:-1], last + text) if isinstance(last, str) else (*where, text)


def _reaching(count: Count, index: int) -> tuple[tuple[str, tuple[Value, ...]], ...]:
    """The values of the one hole that a count is, for which it is above an index."""
    part = count.part
    if not isinstance(part, Hole) or any(not isinstance(option.part, Leaf) for option in part.options):
        return ()
    if part.kind == "choice":
        values = {option.label: option.part.value.value for option in part.options if isinstance(option.part, Leaf)}
    else:
        values = {value: value for value in part.labels()}
    return ((part.name or count.path, tuple(label for label, value in values.items() if _above(value, index))),)


def _above(value: Any, index: int) -> bool:
    return isinstance(value, int) and value > index


def _alike(a: Part, b: Part) -> bool:
    """Whether two parts that were written twice say the same."""
    if isinstance(a, Leaf) and isinstance(b, Leaf):
        return _plain(a.value) == _plain(b.value)
    if isinstance(a, Formula) and isinstance(b, Formula):
        return a.expression.text == b.expression.text
    if isinstance(a, Fields) and isinstance(b, Fields):
        return list(a.entries) == list(b.entries) and all(
            _alike(part, b.entries[key]) for key, part in a.entries.items()
        )
    if isinstance(a, Items) and isinstance(b, Items):
        return len(a.items) == len(b.items) and all(
            x.suffix == y.suffix and not x.guards and not y.guards and _alike(x.part, y.part)
            for x, y in zip(a.items, b.items, strict=True)
        )
    if isinstance(a, Hole) and isinstance(b, Hole):
        mine, theirs = (
            (h.kind, [option.label for option in h.options], h.low, h.high, h.step, h.log, h.name) for h in (a, b)
        )
        return repr(mine) == repr(theirs) and all(
            _alike(x.part, y.part) for x, y in zip(a.options, b.options, strict=True)
        )
    return False


def _plain(value: Tree) -> str:
    return repr(value.plain())


def _twins(labels: tuple[Value, ...]) -> str:
    pair: Iterator[tuple[Value, Value]] = (
        (a, b) for index, a in enumerate(labels) for b in labels[index + 1 :] if a == b
    )
    a, b = next(pair)
    return f"{a!r} and {b!r}"
