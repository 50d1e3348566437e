"""What candidates cost, looked up layer by layer: thousands of candidates a second.

The cost of a model is the sum of the tallies of its parts (`zoo.accounting`). What a layer costs follows from its own
decisions and from the scope that it stands in; what surrounds the layers follows from the decisions outside of them,
how many layers there are aside, and from which forms of layers occur at all (a stack's final norm hangs on its layers'
residual form). Each of these is counted once, by the same code that counts whole specs, and looked up from then on, so
that `CostTable.figures(point)` equals `metrics(space.spec_at(point), work)` exactly.

All that was counted stands in one array, a row for a layer or for another part. A candidate is then a list of rows: its
layers' are found by their decisions, and its figures are the sums of the columns, added in the order of the parts.
Those of many candidates are added up together.

Where that does not hold, because layers hand on another scope than they get or are hidden inside another component,
whole specs are counted.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from itertools import accumulate, chain, islice, pairwise, product, takewhile, zip_longest
from operator import itemgetter, or_
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from zoo.accounting import MAXIMA, Place, Tally, Workload, figures, metrics, places
from zoo.component import Component, Scope, Slot, slots
from zoo.cost import Call
from zoo.errors import SpecError, ZooError
from zoo.search.options import Floats, Options, largest_sum, smallest_sum
from zoo.search.program import Choose, Decision, Point, Setting, Unit, Value, every
from zoo.spec.construct import complaints
from zoo.spec.template import Filling

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.search.space import Space

TALLY = len(Tally._fields)
LARGEST = slice(MAXIMA, TALLY)
"""A row begins with the fields of a tally. All columns add up but these, of which the largest counts."""
MAX_OPTIONS = 256
"""Settings of a layer up to which all are looked at; beyond, that many and the extremes that a descent finds."""
MAX_VALUES = 24
"""Values of one decision that a descent looks at, spread evenly."""
MAX_ASSIGNMENTS = 256
"""Assignments of the decisions outside of layers up to which all of them are looked at; beyond, that many."""
DRAWS = 64
"""Points that are drawn to find an extreme where layers cannot be told apart."""
SURVEYS = 4
"""How many points are drawn to find a valid one with the same surroundings; then as many whose layers are alike."""
LESS = 1e-9
"""By what share a figure has to be less for a descent to go on."""
MAX_ROWS = 200_000
"""Rows, ways to them, and whole candidates that are remembered before everything is forgotten."""


INVALID = 0
"""The row of a layer that cannot be built where it stands."""
UNKNOWN = -1
"""In place of the row of a layer that was not counted yet."""

Kind = tuple[int, int, tuple[Value, ...]]
"""The part that layers are made of, the number of their spot, and what they refer to outside of them."""

Frame = tuple[tuple[int, ...], ...]
"""The rows of what stands behind, between and in front of the lists of layers, from the last to the first."""


@dataclass(frozen=True, slots=True)
class Extra:
    """A figure of a model that follows from sums over its parts.

    part: what a part adds to each sum. whole: the figures of `[..., sums]`, which grow with each of them; the only sum
    itself by default. views: weights of the sums that make a number of each part; from the layers that are best by
    these, models are looked for whose figure is the least or largest.
    """

    part: Callable[[Place], Sequence[float]]
    whole: Callable[[Floats], Floats] = itemgetter((..., 0))
    views: Sequence[Sequence[float]] = ((1.0,),)

    @property
    def sums(self) -> int:
        return len(self.views[0])


class Rows:
    """Rows of numbers that become more: `values` is `[rows, columns]`, of which the first `len` are in use."""

    def __init__(self, columns: int) -> None:
        self.values: Floats = np.zeros((256, columns))
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def append(self, row: Sequence[float]) -> int:
        """Where the row stands."""
        if self._count == len(self.values):
            self.values = np.concatenate([self.values, np.zeros_like(self.values)])
        self.values[self._count] = row
        self._count += 1
        return self._count - 1


Node = tuple[Callable[[Mapping[str, Value]], Any], dict[Any, "Node | int"]]
"""What takes the values of decisions of a layer that are asked together out of a point, and what follows for them:
further decisions, or the layer's row."""


def asking(names: Sequence[str]) -> Node:
    """The decisions of these names, nothing being known yet of what follows for their values."""
    return itemgetter(*names) if names else lambda point: (), {}


@dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """Where the layers of a list stand: their slot and scope, and the calls that they get."""

    slot: Slot
    scope: Scope
    tokens: Call
    token: Call

    def like(self, other: Spot) -> bool:
        """Whether a layer costs the same at both; the number of layers only matters to their initialisation."""
        mine, theirs = self.scope.at(depth=1), other.scope.at(depth=1)
        return (self.tokens, self.token) == (other.tokens, other.token) and mine == theirs


@dataclass(slots=True, eq=False)
class Surroundings:
    """What stands around the layers under one assignment of the decisions outside of them, lengths aside.

    work: with lengths filled in. spots: where the layers of each list stand, and the number of that spot. frames: for
    the forms that occur in each list, the rows around the lists. broken: which lists were empty or not where something
    outside of the layers was invalid. hopeless: lists for which no valid point was found.
    """

    work: Workload
    spots: dict[tuple[str | int, ...], tuple[Spot, int]] = field(default_factory=dict)
    frames: dict[tuple[int, ...], Frame] = field(default_factory=dict)
    broken: set[tuple[bool, ...]] = field(default_factory=set)
    hopeless: list[set[tuple[str | int, ...]]] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Layout:
    """Which layers there are under one assignment of all decisions outside of them.

    spans: for each list of layers, its first and the one behind its last in `units`. seams: where in `units` the rows
    of a frame go. shape: which lists have layers. trees: for each unit how its row is found, as far as it is known.
    """

    surroundings: Surroundings
    units: tuple[Unit, ...]
    places: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]
    seams: tuple[int, ...]
    shape: tuple[bool, ...]
    trees: list[Node]

    def rows(self, point: Mapping[str, Value]) -> list[int]:
        """The row of each layer at a point, `UNKNOWN` if it was not counted yet."""
        found: list[int] = []
        for read, following in self.trees:
            try:
                node: Any = following[read(point)]
                while node.__class__ is not int:
                    read, following = node
                    node = following[read(point)]
            except KeyError:
                node = UNKNOWN
            found.append(node)
        return found


class CostTable:
    """The figures of all points of a space under one workload.

    `extras` are further figures by name, such as the seconds that a model of a device gives a whole for sums of what it
    gives each part: that is asked for once for each part that is told apart, with an empty path where layers share what
    was counted.
    """

    def __init__(self, space: Space, work: Workload, extras: Mapping[str, Extra] | None = None) -> None:
        self.space = space
        self.work = work
        self.extras = dict(extras or {})
        taken = self.extras.keys() & figures(Tally(), work).keys()
        if taken:
            raise ZooError(f"an extra figure may not be called {min(taken)!r}, which is a figure of every model")
        ends = [*accumulate((extra.sums for extra in self.extras.values()), initial=TALLY)]
        self._spans = {name: slice(*span) for name, span in zip(self.extras, pairwise(ends))}
        self._columns = ends[-1]
        self.separable = True
        program = space.program
        self._outside = {decision.name: decision.first for decision in program.outside}
        self._firsts = tuple(self._outside.values())
        self._forget()

    def _forget(self) -> None:
        self._layouts: dict[tuple[Value, ...], Layout] = {}
        self._surroundings: dict[tuple[Value, ...], Surroundings] = {}
        self._spots: list[Spot] = []
        self._known: dict[Kind, dict[Setting, int]] = {}
        self._trees: dict[tuple[Unit, Kind], Node] = {}
        self._ways = 0
        self._rows = Rows(self._columns)
        self._rows.append([0.0] * self._columns)
        self._form_of: dict[int, int] = {}
        self._forms: dict[Any, int] = {}
        self._whole: dict[Any, dict[str, float] | None] = {}
        self._options: dict[Kind, Options] = {}

    def figures(self, point: Mapping[str, Value]) -> dict[str, float] | None:
        """All analytic figures of a normalised point; None for combinations that are invalid across fields."""
        self._tidy()
        found = self._found(point)
        if found is None:
            return None if self.separable else self._counted(point)
        rows, work = found
        parts = self._rows.values.take(rows, axis=0)
        values = np.add.reduce(parts)
        values[LARGEST] = np.maximum.reduce(parts[:, LARGEST])
        return self._named(self._totals(values).tolist(), work)

    def figures_of(self, points: Sequence[Mapping[str, Value]]) -> list[dict[str, float] | None]:
        """The figures of each of many points: their rows are gathered and added up together."""
        self._tidy()
        found = list(map(self._found, points))
        if not self.separable:
            return list(map(self._counted, points))
        # The row of invalid layers is all zeros, so that it can fill up shorter lists.
        rows = list(zip_longest(*(each[0] for each in found if each), fillvalue=INVALID))
        parts = self._rows.values[np.array(rows, dtype=np.intp)]
        values = np.add.reduce(parts)
        values[..., LARGEST] = np.maximum.reduce(parts[..., LARGEST], initial=0.0)
        summed = iter(self._totals(values).tolist())
        return [each and self._named(next(summed), each[1]) for each in found]

    def _tidy(self) -> None:
        """Forget everything if it has become much."""
        if max(len(self._rows), self._ways) > MAX_ROWS:
            self._forget()

    def _found(self, point: Mapping[str, Value]) -> tuple[list[int], Workload] | None:
        """The rows of all parts in order, and the work with lengths filled in; None unless valid and separable."""
        if not self.separable:
            return None
        layout = self._layouts.get(tuple(map(point.get, self._outside, self._firsts))) or self.layout(point)
        found = self._parts(point, layout)
        if found is None:
            return None
        rows, frame = found
        for position, between in zip(layout.seams, frame):
            rows[position:position] = between
        return rows, layout.surroundings.work

    def _totals(self, values: Floats) -> Floats:
        """A tally and the extra figures, `[..., tally and extras]`, of the sums over all parts."""
        if self._columns == TALLY:
            return values
        extras = [extra.whole(values[..., self._spans[name]])[..., None] for name, extra in self.extras.items()]
        return np.concatenate([values[..., :TALLY], *extras], axis=-1)

    def _named(self, values: list[float], work: Workload) -> dict[str, float]:
        counted = figures(Tally._make(values[:TALLY]), work)
        if self.extras:
            counted.update(zip(self.extras, values[TALLY:]))
        return counted

    def layout(self, point: Mapping[str, Value]) -> Layout:
        """Which layers there are at a point; decisions that are not active there count as at their first value."""
        key = tuple(map(point.get, self._outside, self._firsts))
        known = self._layouts.get(key)
        if known is None:
            walk = self.space.walk(point)
            units = tuple(walk.units)
            lengths = self.space.program.lengths
            around = tuple(value for name, value in zip(self._outside, key, strict=True) if name not in lengths)
            if around not in self._surroundings:
                self._surroundings[around] = Surroundings(self.work)
            starts = [i for i, unit in enumerate(units) if not i or unit.where[:-1] != units[i - 1].where[:-1]]
            spans = tuple(zip(starts, [*starts[1:], len(units)]))
            where = tuple(walk.where(unit) for unit in units)
            known = self._layouts[key] = Layout(
                self._surroundings[around],
                units,
                where,
                spans,
                (len(units), *reversed(starts)),
                tuple(start < stop for start, stop in spans),
                [asking(())] * len(units),
            )
        return known

    def _parts(self, point: Mapping[str, Value], layout: Layout) -> tuple[list[int], Frame] | None:
        """The row of each layer, and those of what stands around them; None if the point is invalid."""
        while True:
            rows = layout.rows(point)
            if min(rows, default=1) > INVALID:
                frame = layout.surroundings.frames.get(self.forms(rows, layout))
                if frame is not None:
                    return rows, frame
            if INVALID in rows or layout.shape in layout.surroundings.broken or not self._learn(point, layout):
                return None

    def forms(self, rows: Sequence[int], layout: Layout) -> tuple[int, ...]:
        """The forms of layers that occur in each list, a bit for each."""
        if len(self._forms) == 1:
            return layout.shape
        return tuple(reduce(or_, map(self._form_of.__getitem__, rows[start:stop]), 0) for start, stop in layout.spans)

    def _learn(self, point: Mapping[str, Value], layout: Layout) -> bool:
        """Count what is not known of a point yet; false if that finds it invalid, or the space not separable."""
        around = layout.surroundings
        lists = {unit.where[:-1] for unit in layout.units}
        if not (around.frames and lists <= around.spots.keys()) and not self._survey(self._shortened(point), lists):
            return self._survey(point, lists) and self.separable
        rows = layout.rows(point)
        for number, unit in enumerate(layout.units):
            if rows[number] == UNKNOWN:
                setting = unit.setting(self.space.program, point)
                rows[number] = self.row(unit, setting, point, layout)
                layout.trees[number] = self._tree(unit, setting, rows[number], point, around)
        if INVALID in rows:
            return False
        if self.forms(rows, layout) not in around.frames:
            return self._survey(point, lists) and self.separable
        return True

    def _shortened(self, point: Mapping[str, Value]) -> Point:
        """The point with its lengths at their first values, so that little is counted to know what is around layers.

        Decisions that are not active any more stay, so that what is around the layers is the same.
        """
        lengths = self.space.program.lengths
        kept = {name: value for name, value in point.items() if name not in lengths}
        return {**kept, **self.space.normalised(kept)}

    def _kind(self, unit: Unit, point: Mapping[str, Value], around: Surroundings) -> Kind:
        """What all layers have in common that are made alike and stand alike: the same setting has the same row."""
        shared = tuple(point.get(name, self._outside[name]) for name in self._referred(unit))
        return id(unit.part), around.spots[unit.where[:-1]][1], shared

    def _referred(self, unit: Unit) -> tuple[str, ...]:
        """The decisions outside of layers that a layer's own settings or values may follow from."""
        known = self._references.get(id(unit.part))
        if known is None:
            own = {decision.name for decision in unit.decisions}
            known = tuple(sorted(self.space.program.reach(unit.block) - own))
            self._references[id(unit.part)] = known
        return known

    @cached_property
    def _references(self) -> dict[int, tuple[str, ...]]:
        return {}

    def options(self, unit: Unit, point: Mapping[str, Value], layout: Layout) -> Options:
        """Everything that a layer can be where it stands, the decisions outside of it as at the point.

        With more than `MAX_OPTIONS` settings that many drawn ones, and those that a descent to the smallest and to the
        largest number of parameters passes through.
        """
        kind = self._kind(unit, point, layout.surroundings)
        known = self._options.get(kind)
        if known is None:
            rows: dict[Setting, int] = {}
            for setting in self._settings(unit, point, layout):
                row = self.row(unit, setting, point, layout)
                if row != INVALID:
                    rows[setting] = row
            values = self._rows.values[list(rows.values())]
            known = self._options[kind] = Options(
                list(rows),
                np.delete(values, LARGEST, axis=1),
                values[:, LARGEST],
                [self._form_of[row] for row in rows.values()],
                len(unit.decisions),
            )
        return known

    def _settings(self, unit: Unit, point: Mapping[str, Value], layout: Layout) -> Iterator[Setting]:
        program = self.space.program
        found = list(islice(unit.every(program, point), MAX_OPTIONS + 1))
        if len(found) <= MAX_OPTIONS:
            yield from found
            return
        rng = random.Random(0)
        for _ in range(MAX_OPTIONS):
            yield unit.complete(program, point, lambda decision: decision.draw(rng))
        for sign in (1, -1):
            yield from self._descent(unit, point, layout, sign)

    def _descent(self, unit: Unit, point: Mapping[str, Value], layout: Layout, sign: int) -> Iterator[Setting]:
        """Settings on the way to few parameters, or to many with a sign of -1, one decision after the other."""
        program, params = self.space.program, Tally._fields.index("params")
        values: Point = {}
        for decision in unit.decisions:
            weighed: list[tuple[float, int, Value]] = []
            for number, value in enumerate(decision.spread(MAX_VALUES)):
                tried = {**values, decision.name: value}
                setting = unit.complete(program, point, lambda other, t=tried: t.get(other.name, other.first))
                row = self.row(unit, setting, point, layout)
                yield setting
                if row != INVALID:
                    weighed.append((sign * self._rows.values[row, params], number, value))
            if weighed:
                values[decision.name] = min(weighed, key=lambda found: found[:2])[2]

    def row(self, unit: Unit, setting: Setting, point: Mapping[str, Value], layout: Layout) -> int:
        """Where it stands what a layer adds under a setting of its own decisions, the others as at the point."""
        known = self._known.setdefault(self._kind(unit, point, layout.surroundings), {})
        if setting not in known:
            known[setting] = self._single(unit, setting, point, layout.surroundings)
        return known[setting]

    def _tree(self, unit: Unit, setting: Setting, row: int, point: Mapping[str, Value], around: Surroundings) -> Node:
        """The tree in which a layer finds its row, this one among them."""
        first, *others = unit.steps(setting)
        root = read, following = self._trees.setdefault((unit, self._kind(unit, point, around)), asking(first))
        values = {unit.decisions[slot].name: value for slot, value in setting}
        for names in others:
            read, following = cast(Node, following.setdefault(read(values), asking(names)))
        following[read(values)] = row
        self._ways += 1
        return root

    def _single(self, unit: Unit, setting: Setting, point: Mapping[str, Value], around: Surroundings) -> int:
        """Count one layer by itself."""
        spot = around.spots[unit.where[:-1]][0]
        component = self._layer(unit, setting, point, spot.slot, spot.scope)
        if component is None:
            return INVALID
        row = self._row_of(Place("", component, spot.scope, spot.tokens, spot.token), around.work)
        self._form_of[row] = self._form(component)
        return row

    def _layer(
        self, unit: Unit, setting: Setting, point: Mapping[str, Value], slot: Slot, scope: Scope
    ) -> Component | None:
        """A layer filled in for its place, None if it is invalid there; the tables of a space share them."""
        shared = {name: point.get(name) for name in self._referred(unit)}
        key = (id(unit.part), setting, tuple(shared.values()), scope.at(depth=1))
        known = self.space.layers
        if key not in known:
            if len(known) > MAX_ROWS:
                known.clear()
            known[key] = self._made(unit, setting, point, slot, scope)
        return known[key]

    def _made(
        self, unit: Unit, setting: Setting, point: Mapping[str, Value], slot: Slot, scope: Scope
    ) -> Component | None:
        values = {unit.decisions[index].name: value for index, value in setting}
        decisions = self.space.program.decisions

        def choose(hole: Any, path: str) -> Any:
            return values[path] if path in values else point.get(path, decisions[path].first)

        filling = Filling(self.space.template, choose)
        tree = filling.part(unit.part, unit.name)
        try:
            component = slot.coerce(tree.plain()).fill(scope)
        except ZooError:
            return None
        if filling.problems or next(complaints(component, "", scope), None) is not None:
            return None
        return component

    def _row_of(self, place: Place, work: Workload) -> int:
        sums = chain.from_iterable(extra.part(place) for extra in self.extras.values())
        return self._rows.append([*place.tally(work), *sums])

    def _form(self, component: Component) -> int:
        """The bit that stands for the form of a layer."""
        form = type(component), type(getattr(component, "residual", None))
        return 1 << self._forms.setdefault(form, len(self._forms))

    def _survey(self, point: Mapping[str, Value], wanted: set[tuple[str | int, ...]]) -> bool:
        """Count a whole spec to learn where layers stand and what is around them; false if that was not to be had."""
        layout = self.layout(point)
        around = layout.surroundings
        lists = {unit.where[:-1] for unit in layout.units}
        if not wanted <= lists:
            return False
        try:
            spec = self.space.spec_at(point).fill()
        except SpecError as error:
            if not any(_inside(problem.path, place) for problem in error.problems for place in layout.places):
                around.broken.add(layout.shape)
            return False
        work = around.work = self.work.at(spec.context)
        index = {place: number for number, place in enumerate(layout.places)}
        span_of = {number: span for span, ends in enumerate(layout.spans) for number in range(*ends)}
        found: dict[int, Place] = {}
        frame: list[list[int]] = [[] for _ in range(len(layout.spans) + 1)]
        segment = 0
        for place in places(spec, work):
            number = index.get(re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", place.path))
            if number is None:
                frame[segment].append(self._row_of(place, work))
            else:
                found[number] = place
                segment = span_of[number] + 1
        spots = {number: Spot(_slot(spec, place.path), *place[2:]) for number, place in found.items()}
        if len(found) < len(layout.units) or not all(
            spots[start].like(spots[number]) and _hands_on(found[number])
            for start, stop in layout.spans
            for number in range(start, stop)
        ):
            self.separable = False
            return False
        for start, _ in layout.spans:
            around.spots[layout.units[start].where[:-1]] = spots[start], self._number(spots[start])
        occurring = [self._form(found[number].component) for number in range(len(layout.units))]
        around.frames[tuple(reduce(or_, occurring[start:stop], 0) for start, stop in layout.spans)] = tuple(
            map(tuple, reversed(frame))
        )
        return True

    def range_of(self, metric: str) -> tuple[float, float]:
        """The smallest and the largest value of a metric that a point of the space reaches.

        Exact as long as `MAX_OPTIONS` and `MAX_ASSIGNMENTS` are not exceeded and layers can be told apart, and the
        metric is one sum over the parts; of several the best that descents find. A `ZooError` if no point is valid.
        """
        return self.extreme(metric)[0], self.extreme(metric, largest=True)[0]

    def extreme(self, metric: str, *, largest: bool = False) -> tuple[float, Point]:
        """The smallest or the largest value of a metric, and a point that has it."""
        sign = -1 if largest else 1
        best: tuple[float, Point] | None = None
        rng = random.Random(0)
        drawn = (self.space.sample(rng) for _ in range(DRAWS))
        for point in chain(self.assignments(), takewhile(lambda _: not self.separable, drawn)):
            found = self._extreme(metric, point, largest)
            if found is not None and (best is None or sign * found[0] < sign * best[0]):
                best = found
        if best is None:
            raise ZooError(f"no point of the space was found to be valid, so that there is no {metric}")
        return best

    def assignments(self) -> Iterator[Point]:
        """Points with different values of the decisions outside of layers; the layers' own are at their first.

        Decisions that other layers would make active are among them.
        """
        program = self.space.program

        def run(choose: Choose) -> Point:
            return program.walk(choose, every_layer=True).point

        around = program.reach(program.root) & set(self._outside)
        found = list(islice(every(run, around, {}), MAX_ASSIGNMENTS + 1))
        if len(found) > MAX_ASSIGNMENTS:
            rng = random.Random(0)
            ends = [run(lambda decision, end=end: decision.values()[end]) for end in (0, -1)]
            found = ends + [self.space.sample(rng) for _ in range(MAX_ASSIGNMENTS // 4)]
        for point in found:
            lengths = list(islice(every(run, program.lengths, point), MAX_ASSIGNMENTS + 1))
            yield from lengths if len(found) * len(lengths) <= MAX_ASSIGNMENTS else self._ends(point)

    def _ends(self, point: Point) -> Iterator[Point]:
        """The point with the smallest and with the largest values of all lengths."""
        lengths = self.space.program.lengths
        for end in (0, -1):

            def choose(decision: Decision, end: int = end) -> Value:
                return decision.values()[end] if decision.name in lengths else point.get(decision.name, decision.first)

            yield {**point, **self.space.decide(choose)}

    def _extreme(self, metric: str, point: Point, largest: bool) -> tuple[float, Point] | None:
        """The extreme under the decisions outside of layers that a point has; None if nothing there is valid."""
        figures = self.figures(point)
        layout = self.layout(point)
        if not self.separable or not self.surveyed(point):
            return None if figures is None else (figures[metric], self.space.normalised(point))
        columns, peaks = self.sums(metric, layout.surroundings.work)
        views = self.extras[metric].views if metric in self.extras else ((1.0,),)
        options = [self.options(unit, point, layout) for unit in layout.units]
        sign = -1 if largest else 1
        best: tuple[float, Point] | None = None
        for form, view in product(alternatives(options), views):
            kept = [each.of_form(form) for each in options]
            if all(map(len, kept)):
                weights, peak = columns @ view, peaks @ view
                parts = [(o.sums[keep] @ weights, o.peaks[keep] @ peak) for o, keep in zip(options, kept, strict=True)]
                _, picks = (largest_sum if largest else smallest_sum)(parts, float(self._floor(layout) @ peak))
                changed = self._changed(point, layout, options, kept, picks)
                frame = self.frame(changed)
                if len(views) > 1 and frame is not None:
                    adding = [o.sums[keep] @ columns for o, keep in zip(options, kept, strict=True)]
                    base = (frame[0] @ columns).sum(axis=0)
                    picks = _descended(base, adding, picks, lambda sums: sign * self.made(metric, sums))
                    changed = self._changed(point, layout, options, kept, picks)
                figures = self.figures(changed)
                if figures is not None and (best is None or sign * figures[metric] < sign * best[0]):
                    best = figures[metric], changed
        return best

    def _changed(
        self,
        point: Point,
        layout: Layout,
        options: Sequence[Options],
        kept: Sequence[NDArray[np.int64]],
        picks: Sequence[int],
    ) -> Point:
        """The point with the setting of each layer that is picked of those that are kept for it."""
        changed = dict(point)
        for unit, each, keep, pick in zip(layout.units, options, kept, picks, strict=True):
            changed |= {unit.decisions[slot].name: value for slot, value in each.settings[keep[pick]]}
        return self.space.normalised(changed)

    def frame(self, point: Mapping[str, Value]) -> tuple[Floats, Floats] | None:
        """What stands around the lists of layers of a valid point: `[parts, figures]` of what adds up, and
        `[parts, 2]` of what the largest counts of; None for another point."""
        found = self._parts(point, self.layout(point))
        return None if found is None else self._around(found[1])

    def _around(self, frame: Frame) -> tuple[Floats, Floats]:
        values = self._rows.values[list(chain.from_iterable(frame))]
        return np.delete(values, LARGEST, axis=1), values[:, LARGEST]

    def _floor(self, layout: Layout) -> Floats:
        """The largest peaks of what stands around the layers, `[2]`."""
        _, peaks = self._around(next(iter(layout.surroundings.frames.values())))
        return peaks.max(axis=0, initial=0.0)

    def sums(self, metric: str, work: Workload) -> tuple[Floats, Floats]:
        """What makes a metric as sums over the parts, of which most metrics have one: the weights in each of every
        column that adds up, `[columns, sums]`, and of those of which the largest counts, `[2, sums]`."""
        if metric in self.extras:
            own = np.eye(self._columns)[:, self._spans[metric]]
            return np.delete(own, LARGEST, axis=0), own[LARGEST]
        nothing, big = figures(Tally(), work)[metric], 2.0**40
        weights = np.zeros((self._columns, 1))
        for column, name in enumerate(Tally._fields):
            weights[column] = (figures(Tally()._replace(**{name: big}), work)[metric] - nothing) / big
        return np.delete(weights, LARGEST, axis=0), weights[LARGEST]

    def width(self, metric: str) -> int:
        """How many sums make a metric."""
        return self.extras[metric].sums if metric in self.extras else 1

    def made(self, metric: str, sums: Floats) -> Floats:
        """A metric, `[...]`, of the sums `[..., sums]` that make it."""
        return self.extras[metric].whole(sums) if metric in self.extras else sums[..., 0]

    def surveyed(self, point: Mapping[str, Value]) -> bool:
        """Whether it is known where the layers of a point stand; a valid one is looked for if its own are not."""
        layout = self.layout(point)
        lists = {unit.where[:-1] for unit in layout.units}
        around = layout.surroundings
        if around.frames and lists <= around.spots.keys():
            return True
        if lists in around.hopeless:
            return False
        rng = random.Random(0)
        outside = {name: point.get(name, first) for name, first in self._outside.items()}
        for number in range(2 * SURVEYS):
            found = self.space.complete(outside, rng) if number < SURVEYS else self._uniform(outside, rng)
            drawn = {**outside, **found}
            if self._survey(self._shortened(drawn), lists) or self._survey(drawn, lists):
                return True
        around.hopeless.append(lists)
        return False

    def _uniform(self, outside: Point, rng: random.Random) -> Point:
        """A point at random whose layers of one part are alike: where few of them are valid, it is so more often."""
        program = self.space.program
        places = {name: (id(unit.part), slot) for unit in program.units for name, slot in unit.index.items()}
        drawn: dict[tuple[int, int], Value] = {}

        def choose(decision: Decision) -> Value:
            if decision.name in outside:
                return outside[decision.name]
            return drawn.setdefault(places[decision.name], decision.draw(rng))

        return self.space.decide(choose)

    def _summed(self, spec: Spec) -> dict[str, float]:
        found = metrics(spec, self.work)
        if self.extras:
            parts = list(places(spec.fill(), self.work))
            for name, extra in self.extras.items():
                found[name] = float(extra.whole(reduce(np.add, [np.array(extra.part(place)) for place in parts])))
        return found

    def _number(self, spot: Spot) -> int:
        """The number of a spot; those at which layers cost the same have one in common."""
        for number, known in enumerate(self._spots):
            if known.slot == spot.slot and known.like(spot):
                return number
        self._spots.append(spot)
        return len(self._spots) - 1

    def _counted(self, point: Mapping[str, Value]) -> dict[str, float] | None:
        """The figures of a whole spec."""
        key = tuple(point.items())
        if key not in self._whole:
            if len(self._whole) > MAX_ROWS:
                self._whole.clear()
            try:
                self._whole[key] = self._summed(self.space.spec_at(point))
            except SpecError:
                self._whole[key] = None
        return self._whole[key]


def _descended(
    base: Floats, options: Sequence[Floats], picks: Sequence[int], figure: Callable[[Floats], Floats]
) -> list[int]:
    """Picks of one of the options of each layer, `[settings, sums]`, such that no other of one layer alone makes the
    figure of all sums less.
    """
    picks = list(picks)
    total = base + sum(each[pick] for each, pick in zip(options, picks, strict=True))
    settled = False
    while not settled:
        settled = True
        for layer, each in enumerate(options):
            rest = total - each[picks[layer]]
            figures = figure(rest + each)
            best = int(np.argmin(figures))
            now = figures[picks[layer]]
            if figures[best] < now - LESS * abs(now):
                picks[layer], total, settled = best, rest + each[best], False
    return picks


def alternatives(options: Sequence[Options]) -> list[int | None]:
    """Restrictions to try where what stands around layers hangs on their forms: none, and all layers of one form."""
    found = sorted({form for each in {id(o): o for o in options}.values() for form in each.forms})
    return [None, *found] if len(found) > 1 else [None]


def _inside(path: str, place: str) -> bool:
    return path == place or path.startswith((f"{place}.", f"{place}["))


def _hands_on(place: Place) -> bool:
    """Whether what follows a layer stands where it stands."""
    return place.component.out(place.scope) == place.scope


def _slot(spec: Component, path: str) -> Slot:
    """The slot that a listed part sits in."""
    holder: Any = spec
    *names, group, _ = path.split(".")
    for name in names:
        holder = holder[int(name)] if name.isdigit() else getattr(holder, name)
    return slots(type(holder))[group]
