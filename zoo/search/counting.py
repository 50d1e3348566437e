"""How many points a space has, exactly.

The points below a block are counted as a polynomial: for each set of shared names that is active, how many ways there
are to decide everything else. Independent steps multiply, options add, and a shared name counts once for a whole
point, however often it is referred to. Decisions that numbers of layers follow from are tried one value after the
other, shared ones for the whole document, others for the one list whose length they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from functools import reduce
from itertools import groupby

from zoo.errors import ZooError
from zoo.search.program import Block, Count, Decide, Decision, Entry, Listing, Point, Program, Refer, Value, evaluate

Polynomial = Mapping[frozenset[str], int]
ONE: Polynomial = {frozenset(): 1}
MAX_ASSIGNMENTS = 100_000
"""How many combinations of shared decisions that lengths depend on are tried."""


def size(program: Program) -> int | None:
    """The number of points of a space.

    None if a decision is a range of real numbers, or if numbers of layers follow from too many shared decisions.
    """
    if any(decision.count is None for decision in program.decisions.values()):
        return None
    known = _assignments(program)
    return None if known is None else sum(_Counter(program, each).points() for each in known)


def _assignments(program: Program) -> list[Point] | None:
    """Every assignment of the shared decisions that numbers of layers follow from; None if there are too many."""
    known: list[Point] = [{}]
    done: set[str] = set()
    for name in sorted(_references(count.block for count in _counts(program))):
        if name not in done:
            known = [more for point in known for more in _assigned(program, (Refer(name),), point, done)]
            done |= {name} | _closure(program, name)
        if len(known) > MAX_ASSIGNMENTS:
            return None
    return known


def _assigned(program: Program, block: Block, point: Point, done: set[str]) -> Iterator[Point]:
    """A point with all values of what a block asks."""
    if not block:
        yield point
        return
    step, rest = block[0], block[1:]
    if isinstance(step, Refer):
        inside = program.shared[step.name] if step.name not in done else ()
        yield from _assigned(program, (*inside, *rest), point, done | {step.name})
    elif isinstance(step, Decide):
        name = step.decision.name
        for value in [point[name]] if name in point else step.decision.values():
            branch = step.branches.get(value, ())
            yield from _assigned(program, (*branch, *rest), {**point, name: value}, done)
    else:
        raise ZooError("a number of layers cannot follow from a list")


def _references(blocks: Iterable[Block]) -> set[str]:
    """The shared names that blocks refer to themselves."""
    found: set[str] = set()
    for block in blocks:
        for step in block:
            if isinstance(step, Refer):
                found.add(step.name)
            elif isinstance(step, Decide):
                found |= _references(step.branches.values())
    return found


def _closure(program: Program, name: str) -> set[str]:
    """All shared names that one leads to."""
    found: set[str] = set()
    pending = {name}
    while pending:
        new = _references(program.shared[each] for each in pending) - found
        found |= new
        pending = new
    return found


def _counts(program: Program) -> Iterator[Count]:
    def visit(block: Block) -> Iterator[Count]:
        for step in block:
            if isinstance(step, Decide):
                for branch in step.branches.values():
                    yield from visit(branch)
            elif isinstance(step, Listing):
                for entry in step.entries:
                    yield from (count for count, _ in entry.guards)
                    yield from visit(entry.block)

    yield from visit(program.root)
    for block in program.shared.values():
        yield from visit(block)


class _Counter:
    """Counts the points under one assignment of the shared decisions that lengths follow from."""

    def __init__(self, program: Program, known: Point) -> None:
        self.program = program
        self.known = known
        self.parts: dict[int, Polynomial] = {}

    def points(self) -> int:
        """The points that this assignment adds to those of the assignments before it.

        Where a decision of the assignment is not active, only the assignment with its first value counts.
        """
        first = {name for name, value in self.known.items() if value == self.program.decisions[name].first}
        total = 0
        for active, number in self.closed(self.block(self.program.root, {})).items():
            if all(f"={name}" in active or name in first for name in self.known):
                total += number
        return total

    def closed(self, found: Polynomial) -> Polynomial:
        """A polynomial with what the shared names ask multiplied in, each once."""
        pending = [(active, frozenset[str](), number) for active, number in found.items()]
        result: dict[frozenset[str], int] = {}
        while pending:
            active, done, number = pending.pop()
            name = min((name for name in active - done if not name.startswith("=")), default=None)
            if name is None:
                result[active] = result.get(active, 0) + number
                continue
            for more, times in self.block(self.program.shared[name], {}).items():
                pending.append((active | more, done | {name}, number * times))
        return result

    def block(self, block: Block, lengths: Point) -> Polynomial:
        """What the steps of a block ask; `lengths` holds the private decisions that lengths around it follow from."""
        return _product(self.step(step, lengths) for step in block)

    def step(self, step: Decide | Refer | Listing, lengths: Point) -> Polynomial:
        if isinstance(step, Refer):
            return {frozenset((step.name,)): 1}
        if isinstance(step, Listing):
            return self.listing(step.entries, 0, lengths)
        name = step.decision.name
        if name in self.known:
            inside = self.block(step.branches.get(self.known[name], ()), lengths)
            return {active | {f"={name}"}: number for active, number in inside.items()}
        return self.options(step.decision, step.branches, lengths)

    def options(self, decision: Decision, branches: Mapping[Value, Block], lengths: Point) -> Polynomial:
        total: dict[frozenset[str], int] = {}
        plain = (decision.count or 0) - len(branches)
        if plain:
            total[frozenset()] = plain
        for branch in branches.values():
            for active, number in self.block(branch, lengths).items():
                total[active] = total.get(active, 0) + number
        return total

    def listing(self, entries: tuple[Entry, ...], level: int, lengths: Point) -> Polynomial:
        """The entries of a list, of which `level` guards are known to hold."""

        def guard(entry: Entry) -> Count | None:
            return entry.guards[level][0] if len(entry.guards) > level else None

        groups = [(count, tuple(group)) for count, group in groupby(entries, guard)]
        return _product(
            _product(self.entry(entry, lengths) for entry in group)
            if count is None
            else self.guarded(count, group, level, lengths)
            for count, group in groups
        )

    def guarded(self, count: Count, entries: tuple[Entry, ...], level: int, lengths: Point) -> Polynomial:
        total: dict[frozenset[str], int] = {}
        for found, shared in self.lengths(count.block, lengths):
            number = evaluate(count, self.program.template, {**self.known, **found})
            there = tuple(entry for entry in entries if entry.guards[level][1] < number)
            for active, ways in self.listing(there, level + 1, found).items():
                active |= shared
                total[active] = total.get(active, 0) + ways
        return total

    def lengths(self, block: Block, lengths: Point) -> Iterator[tuple[Point, frozenset[str]]]:
        """Every assignment of the private decisions of a length, with the shared names that it refers to."""
        if not block:
            yield lengths, frozenset()
            return
        step, rest = block[0], block[1:]
        if isinstance(step, Refer):
            for found, shared in self.lengths(rest, lengths):
                yield found, shared | {step.name}
        elif isinstance(step, Decide):
            name = step.decision.name
            for value in [lengths[name]] if name in lengths else step.decision.values():
                inside = (*step.branches.get(value, ()), *rest)
                yield from self.lengths(inside, {**lengths, name: value})

    def entry(self, entry: Entry, lengths: Point) -> Polynomial:
        """What an entry asks; units of one part ask the same under other names."""
        if entry.unit is None:
            return self.block(entry.block, lengths)
        known = self.parts.get(id(entry.unit.part))
        if known is None:
            known = self.parts[id(entry.unit.part)] = self.block(entry.block, lengths)
        return known


def _product(factors: Iterable[Polynomial]) -> Polynomial:
    return reduce(_times, factors, ONE)


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    total: dict[frozenset[str], int] = {}
    for (mine, ways), (theirs, others) in ((x, y) for x in a.items() for y in b.items()):
        both = mine | theirs
        total[both] = total.get(both, 0) + ways * others
    return total


def below(block: Block) -> int:
    """How many ways there are to decide what is private in a block; a real number counts as one way.

    A list counts with all its items, since how many of them there are is decided elsewhere.
    """
    return math.prod(_below(step) for step in block)


def _below(step: Decide | Refer | Listing) -> int:
    if isinstance(step, Refer):
        return 1
    if isinstance(step, Listing):
        return math.prod(below(entry.block) for entry in step.entries)
    plain = (step.decision.count or 1) - len(step.branches)
    return plain + sum(below(branch) for branch in step.branches.values())
