"""Which options of a space are wrong, found by building as few specs as possible.

An option counts as right once a valid spec has it. Layers do not influence each other's validity, so that layers made
of one part try different options in one spec; a layer that turns out wrong goes back to first values, and the spec is
tried again for the sake of the others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING

from zoo.errors import Problem, SpecError
from zoo.search.program import Decision, Unit, Value, Walk

if TYPE_CHECKING:
    from zoo.search.space import Space

COMPANIES = 12
"""Random points in which an option that failed beside first values is tried again before it is called wrong."""
RETRIES = 3

Place = tuple[int, int] | str
"""A decision, the same for all layers of one part: the part and a number in it; or one outside of layers, by name."""
Choice = tuple[Place, Value]


def problems(space: Space) -> list[Problem]:
    """The problems of every option that is in no valid spec, each place once."""
    return _Validator(space).problems()


class _Validator:
    def __init__(self, space: Space) -> None:
        self.space = space
        self.places: dict[str, Place] = {}
        self.units: dict[str, Unit] = {}
        for unit in space.program.units:
            for slot, decision in enumerate(unit.decisions):
                self.places[decision.name] = id(unit.part), slot
                self.units[decision.name] = unit
        for decision in space.program.outside:
            self.places[decision.name] = decision.name
        self.right: set[Choice] = set()
        self.tried: set[Choice] = set()
        self.blamed: dict[Choice, tuple[Problem, ...]] = {}
        self.general: tuple[Problem, ...] = ()

    def problems(self) -> list[Problem]:
        self.attempt()
        for decision in self.space.program.outside:
            for value in self.values(decision):
                if (decision.name, value) not in self.tried:
                    self.attempt(outside={decision.name: value})
        while True:
            before = len(self.tried)
            self.attempt()
            if len(self.tried) == before:
                break
        rng = random.Random(0)
        for number in range(COMPANIES):
            wrong = self.tried - self.right
            if not wrong:
                return []
            forced = sorted(((place, value) for place, value in wrong if isinstance(place, str)), key=str)
            self.tried = set(self.right)
            self.attempt(outside=dict([rng.choice(forced)]) if forced else {}, rng=rng, alike=number % 2 == 1)
            self.tried |= wrong
        found = [problem for choice in self.tried - self.right for problem in self.blamed.get(choice, ())]
        return _once(found or (() if self.right or not self.general else self.general))

    def values(self, decision: Decision) -> tuple[Value, ...]:
        """What is tried of a decision: every option, the ends of a range."""
        return decision.labels if decision.kind == "choice" else (decision.first, decision.values()[-1])

    def attempt(
        self, outside: dict[str, Value] | None = None, rng: random.Random | None = None, *, alike: bool = False
    ) -> None:
        """Build a spec with as many untried options of layers as there are layers to try them in.

        What else is drawn with `rng` is drawn once for all layers that are `alike`.
        """
        outside = outside or {}
        failed: set[str] = set()
        for _ in range(RETRIES):
            walk = self.space.program.walk(partial(self.choose, outside, failed, rng, {} if alike else None))
            choices = {name: (self.places[name], value) for name, value in walk.point.items()}
            self.tried |= {*choices.values()}
            try:
                self.space.spec_at(walk.point)
            except SpecError as error:
                found = self.blame(error.problems, walk, choices, outside)
                if not found - failed:
                    return
                failed |= found
            else:
                self.right |= {*choices.values()}
                return

    def choose(
        self,
        outside: dict[str, Value],
        failed: set[str],
        rng: random.Random | None,
        drawn: dict[Place, Value] | None,
        decision: Decision,
    ) -> Value:
        """The value to try: one that is asked for, an untried one in a layer that has not failed, else a plain one."""
        name = decision.name
        if name in outside:
            return outside[name]
        unit = self.units.get(name)
        if unit is not None and unit.name not in failed:
            for value in self.values(decision):
                if (self.places[name], value) not in self.tried:
                    self.tried.add((self.places[name], value))
                    return value
        if name in self.space.program.lengths:
            return self.values(decision)[-1]
        if rng is None:
            return decision.first
        value = decision.draw(rng)
        return value if drawn is None else drawn.setdefault(self.places[name], value)

    def blame(
        self, found: Iterable[Problem], walk: Walk, choices: dict[str, Choice], outside: dict[str, Value]
    ) -> set[str]:
        """Lay each problem on the options of the layer that it is in, or on the options outside; the layers' names."""
        layers: dict[str, list[Problem]] = {}
        around: list[Problem] = []
        for problem in found:
            for unit in walk.units:
                where = walk.where(unit)
                if problem.path == where or problem.path.startswith((f"{where}.", f"{where}[")):
                    layers.setdefault(unit.name, []).append(problem)
                    break
            else:
                around.append(problem)
        for unit in walk.units:
            for decision in unit.decisions:
                if unit.name in layers and decision.name in choices:
                    self.blamed.setdefault(choices[decision.name], tuple(layers[unit.name]))
        inside = [problem for each in layers.values() for problem in each]
        for name in outside:
            if name in choices:
                self.blamed.setdefault(choices[name], tuple(around or inside))
        self.general = self.general or (*around, *inside)
        return set(layers)


def _once(found: Iterable[Problem]) -> list[Problem]:
    """One problem for each field at each place, however many layers have it, in the order of the document."""
    unique: dict[object, Problem] = {}
    for problem in found:
        mark = problem.mark
        place = (mark.file, mark.line, mark.column) if mark else None
        unique.setdefault((place, re.sub(r"\d+", "", problem.path)), problem)
    return sorted(unique.values(), key=lambda each: (each.mark.line, each.mark.column) if each.mark else (0, 0))
