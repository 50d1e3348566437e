"""From a proposal to the nearest point that meets a budget.

Everything that can be counted is settled before anything is built: a proposal that misses the budget is changed until
it meets it, by as few decisions as possible.

1. Descent: of all changes of one layer, and of one decision outside of layers, the one that takes most violation away
   per decision disturbed, until nothing is violated. Violation is summed over the terms, each as a share of its bound,
   so that lower bounds pull upwards as upper ones push down. Changes of all layers are weighed at once, as arrays.
2. Where no single change helps, pairs of layers change together; then a point that is known to meet the budget is
   moved towards the proposal as far as the budget lets it.
3. What was changed without need is changed back.

Where layers cannot be told apart (`zoo.search.table`), a random walk takes the place of the descent.

The result is checked against the tables, which are exact: it never violates a term.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate, pairwise
from operator import or_
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zoo.accounting import Workload
from zoo.errors import ZooError
from zoo.quantity import format_quantity
from zoo.search.budget import Budget, Term
from zoo.search.options import Floats, Options
from zoo.search.program import Decision, Point, Setting, Unit, Value
from zoo.search.table import CostTable, alternatives

if TYPE_CHECKING:
    from zoo.search.space import Space

MAX_STEPS = 256
"""Single changes after which a descent gives up."""
PAIRS = 4096
"""Pairs of layers that are tried together where no single change helps."""
MAX_VALUES = 24
"""Values of a decision outside of layers that are tried; of more, that many spread evenly."""
STARTS = 8
"""Points from which a feasible one is looked for under one assignment of the decisions outside of layers."""
MAX_BOARDS = 1024
"""Assignments of the decisions outside of layers that are remembered before they are forgotten."""
MAX_ANCHORS = 8
MAX_DESCENTS = 48
"""Points that meet the budget, and attempts to find one, after which no more are looked for."""
NEARLY_AS_GOOD = 0.5
"""The score, as a share of the best, above which changes of several layers are made at once."""
ROUNDING = 1e-9
"""By how much, as a share, sums may be off."""
WALKS = 4
STRIDES = 64
"""Random walks, and steps of each, where layers cannot be weighed one by one."""
NOTHING_VALID = "no point of the space was found to be valid"
TIES = 1e-9
"""By how much, as a share, scores may differ that count as equal."""


def workload(term: Term) -> Workload:
    """The work under which a term's figure is counted."""
    context = term.context
    return Workload(context.batch or 1, context.seq, context.past, context.dtype or "float32")


def label(term: Term) -> str:
    """What the figure of a term is called among a trial's metrics: its metric, device and circumstances."""
    return f"{term.metric}{'@' if term.device else ''}{term.device or ''}{term.context}"


def column(term: Term) -> str:
    """What a table calls the figure of a term that it can count."""
    return label(term) if term.needs_measurement else term.metric


def _countable(term: Term, tables: Mapping[Workload, CostTable]) -> bool:
    table = tables.get(workload(term))
    return not term.needs_measurement or (table is not None and label(term) in table.extras)


@dataclass(slots=True, eq=False)
class Kind:
    """Layers that are made alike and stand alike: their positions, and what each setting adds to the terms.

    values and peaks: `[settings, sums]`; most terms are one sum over the parts, some are made of several.
    """

    members: list[int]
    options: Options
    values: Floats
    peaks: Floats
    has_peaks: bool


@dataclass(slots=True, eq=False)
class Board:
    """The layers under one assignment of the decisions outside of them.

    kind_of: for each layer the number of its kind. spans: the first layer of each list and the one behind its last.
    forms: which forms layers may have, if there are several. frames: what stands around the layers adds to each sum,
    and its peaks, for the forms that occur in each list.
    """

    units: tuple[Unit, ...]
    kinds: list[Kind]
    kind_of: list[int]
    spans: tuple[tuple[int, int], ...]
    forms: list[int | None]
    frames: dict[tuple[int, ...], tuple[Floats, Floats]]


@dataclass(slots=True, eq=False)
class State:
    """Where a repair stands: the decisions outside of layers, the setting of each layer, and what they come to.

    outside: all of them; those that are not active now may become so as layers change.
    """

    outside: Point
    board: Board
    picks: list[int]
    base: Floats
    floor: Floats
    sums: Floats
    violation: float


class Change(NamedTuple):
    """A layer given another option of its kind, and the violation that this takes away per decision disturbed."""

    score: float
    position: int
    kind: Kind
    pick: int


class Repair:
    """Brings points under a budget; only terms that can be counted are looked at.

    Those are the ones on the spec alone, and those on a latency that a table has among its extras, by `label`.
    """

    def __init__(self, space: Space, tables: Mapping[Workload, CostTable], budget: Budget) -> None:
        self.space = space
        self.terms = [term for term in budget.terms if _countable(term, tables)]
        works = dict.fromkeys([workload(term) for term in self.terms] or [*tables][:1] or [Workload()])
        self.tables = {work: tables.get(work) or CostTable(space, work) for work in works}
        self._of_term = [self.tables[workload(term)] for term in self.terms]
        self._first = next(iter(self.tables.values()))
        of_term = list(zip(self.terms, self._of_term, strict=True))
        ends = [*accumulate((table.width(column(term)) for term, table in of_term), initial=0)]
        self._spans = [slice(*span) for span in pairwise(ends)]
        self._sums = ends[-1]
        self._plain = not any(column(term) in table.extras for term, table in of_term)
        self._lows = np.array([term.low for term in self.terms])
        self._highs = np.array([term.high for term in self.terms])
        self._per_low = 1 / np.where(self._lows > 0, self._lows, 1.0)
        self._per_high = 1 / np.where(self._highs > 0, self._highs, 1.0)
        self._strict_low = np.array([term.low_strict for term in self.terms], dtype=bool)
        self._strict_high = np.array([term.high_strict for term in self.terms], dtype=bool)
        self._strict = bool((self._strict_low | self._strict_high).any())
        self._boards: dict[tuple[Value, ...], Board | None] = {}
        self._offers: dict[int, tuple[Options, Floats, Floats]] = {}
        self._carries: dict[tuple[int, int], list[tuple[list[int], list[int], int]]] = {}
        self._anchors: list[Point] | None = None
        self._outside = {decision.name: decision.first for decision in space.program.outside}

    def __call__(self, proposal: Point, rng: random.Random, keep: Collection[str] = ()) -> Point | None:
        """The nearest point to a normalised one that was found to be valid and to meet every term that can be counted.

        The proposal itself if it does; None if no such point was found. Decisions named in `keep` stay as they are.
        """
        if self.feasible(proposal):
            return proposal
        if len(self._boards) > MAX_BOARDS:
            self._boards, self._offers, self._carries = {}, {}, {}
        kept = frozenset(keep)
        state = self._state(proposal) or self._beside(proposal, kept, rng)
        if state is not None:
            found = self._settled(self._descended(state, kept, rng), proposal, kept)
            if found is not None:
                return found
        elif not self._separable():
            found = self._wandered(proposal, kept, rng)
            if self.feasible(found):
                return found
        ranked = sorted(self.anchors(), key=lambda anchor: _disturbance(proposal, anchor))
        for anchor in ranked:
            if all(name in anchor and anchor[name] == proposal.get(name) for name in kept & anchor.keys()):
                return self._approached(anchor, proposal)
        if kept:
            return None
        return self._approached(ranked[0], proposal) if ranked else None

    def feasible(self, point: Mapping[str, Value]) -> bool:
        """Whether a normalised point is valid and meets every term that can be counted."""
        return self.violation(point) == 0

    def violation(self, point: Mapping[str, Value]) -> float:
        """By how much a point misses the terms, as shares of their bounds, added up; infinite for an invalid one."""
        return self._missed({work: table.figures(point) for work, table in self.tables.items()})

    def violations(self, points: Sequence[Mapping[str, Value]]) -> list[float]:
        """The same of each of many points, counted together."""
        counted = [table.figures_of(points) for table in self.tables.values()]
        return [self._missed(dict(zip(self.tables, each, strict=True))) for each in zip(*counted, strict=True)]

    def _missed(self, figures: Mapping[Workload, Mapping[str, float] | None]) -> float:
        total = 0.0
        for found in figures.values():
            if found is None:
                return math.inf
        for term in self.terms:
            found = figures[workload(term)]
            assert found is not None
            total += term.violation(found[column(term)])
        return total

    def infeasible(self) -> str | None:
        """Why no point meets the budget; None if one is known that does.

        Each term that nothing can meet is named with the value that comes nearest to it; if each can be met alone, the
        nearest point to meeting all.
        """
        if self.anchors():
            return None
        try:
            return "\n".join(self._unreachable_terms()) or self._conflict()
        except ZooError as error:
            return str(error)

    def _unreachable_terms(self) -> Iterator[str]:
        """What is to be said of each term that no point meets."""
        for term, table in zip(self.terms, self._of_term, strict=True):
            above = term.high < math.inf
            for largest in [False] * above + [True] * (term.low > 0 or term.low_strict):
                value, point = self._furthest(term, table, largest=largest)
                missed = value < term.low if largest else value > term.high
                strict = term.low_strict if largest else term.high_strict
                if missed or (strict and value == (term.low if largest else term.high)):
                    yield self._unreachable(term, value, point, largest=largest)

    def _furthest(self, term: Term, table: CostTable, *, largest: bool) -> tuple[float, Point]:
        """The smallest or largest value of a term that is known to be reached, and where."""
        found = [table.extreme(column(term), largest=largest)]
        tried = zip(table.figures_of(self._tried), self._tried, strict=True)
        found += [(figures[column(term)], point) for figures, point in tried if figures is not None]
        return (max if largest else min)(found, key=lambda each: each[0])

    def _unreachable(self, term: Term, value: float, point: Point, *, largest: bool) -> str:
        shown = format_quantity(value, term.dimension)
        relaxed = _rounded(value, up=not largest)
        relation = ">=" if largest else "<="
        where = f"@{term.device}" if term.device else ""
        bound = format_quantity(relaxed, term.dimension)
        names = self._sizes(point)
        widest = f", or add {'larger' if largest else 'smaller'} choices to `{names[0]}`" if names else ""
        return (
            f"{term.text or term} cannot be met: the {'largest' if largest else 'smallest'} reachable value is {shown} "
            f"({self._described(point)}); relax it to {term.metric}{relation}{bound}{where}{term.context}{widest}"
        )

    def _conflict(self) -> str:
        """The nearest point to all terms that was found, and how far it is from each."""
        rng = random.Random(0)
        tried = list(self._tried)
        for term, table in zip(self.terms, self._of_term, strict=True):
            for largest in (False, True):
                tried.append(table.extreme(column(term), largest=largest)[1])
                state = self._state(tried[-1])
                if state is not None:
                    tried.append(self.space.normalised(self._point(self._descended(state, frozenset(), rng))))
        violations = self.violations(tried)
        if min(violations, default=math.inf) == math.inf:
            return NOTHING_VALID
        best = tried[violations.index(min(violations))]
        parts: list[str] = []
        for term, table in zip(self.terms, self._of_term, strict=True):
            figures = table.figures(best)
            assert figures is not None
            value = figures[column(term)]
            shown = f"{term.metric} {format_quantity(value, term.dimension)}"
            excess = term.violation(value)
            wanted = term.text or str(term)
            parts.append(f"{shown} misses {wanted} by {100 * excess:.2g}%" if excess else f"{shown} meets {wanted}")
        return (
            "each term can be met alone, but no point was found that meets all: the nearest has "
            f"{', '.join(parts)} ({self._described(best)})"
        )

    def _described(self, point: Mapping[str, Value]) -> str:
        """The decisions outside of layers, and how many layers there are."""
        program = self.space.program
        around = [f"{name}={point[name]}" for name in self._outside if name in point and name not in program.lengths]
        figures = self._first.figures(point)
        count = figures["depth"] if figures else 0
        return ", ".join([*around[:4], f"{count} layer{'s' * (count != 1)}"])

    def _sizes(self, point: Mapping[str, Value]) -> list[str]:
        """The decisions outside of layers that are numbers, width first."""
        found = [
            name
            for name in self._outside
            if isinstance(value := point.get(name), int | float) and not isinstance(value, bool)
        ]
        return sorted(found, key=lambda name: name != "width")

    def anchors(self) -> list[Point]:
        """Points that meet the budget, from different corners of the space; none if none was found.

        Looked for once, under the assignments of the decisions outside of layers that a table looks at, leaving out
        those under which some term is out of reach: from the layers that are the best for each term, and from some at
        random.
        """
        if self._anchors is None:
            self._anchors, self._tried = [], []
            rng = random.Random(0)
            assignments = list(self._first.assignments())
            rng.shuffle(assignments)
            for point in assignments:
                for start in self._starts(point, rng):
                    state = self._descended(start, frozenset(), rng, outside=False)
                    found = self.space.normalised(self._point(state))
                    self._tried.append(found)
                    if self.feasible(found):
                        self._anchors.append(found)
                        break
                if len(self._anchors) == MAX_ANCHORS or len(self._tried) > MAX_DESCENTS:
                    break
            if not self._separable():
                walked = [self._wandered(self.space.sample(rng), frozenset(), rng) for _ in range(WALKS)]
                self._anchors += [point for point in walked if self.feasible(point)]
        return self._anchors

    def _separable(self) -> bool:
        return all(table.separable for table in self.tables.values())

    def _wandered(self, point: Point, kept: frozenset[str], rng: random.Random) -> Point:
        """Where a random walk of single changes ends that never goes further away from the budget."""
        violation = self.violation(point)
        for _ in range(STRIDES):
            if violation == 0:
                break
            tried = self.space.mutate(point, rng)
            if any(name in tried and tried[name] != point.get(name) for name in kept & point.keys()):
                continue
            after = self.violation(tried)
            if after <= violation:
                point, violation = tried, after
        return point

    def _within_reach(self, board: Board, point: Point) -> bool:
        """Whether each term alone might be met by the layers of a board."""
        if len(board.forms) > 1:
            return True
        base, floor = self._frame(board, [0] * len(board.units), point)
        low, high, least, most = base.copy(), base.copy(), floor, floor
        for kind in board.kinds:
            low += kind.values.min(axis=0) * len(kind.members)
            high += kind.values.max(axis=0) * len(kind.members)
            least = np.maximum(least, kind.peaks.min(axis=0))
            most = np.maximum(most, kind.peaks.max(axis=0))
        slack = 1 + ROUNDING
        low, high = self._figures(low + least), self._figures(high + most)
        return bool((low <= self._highs * slack).all() and (high * slack >= self._lows).all())

    def _starts(self, point: Point, rng: random.Random) -> Iterator[State]:
        """States under one assignment of the decisions outside of layers: the extremes of each term, then any."""
        outside = self._around(point)
        board = self._board(point)
        if board is None or not self._within_reach(board, point):
            return
        drawn: list[list[int]] = []
        # Settings are compared as models of nothing else, since what a layer costs may depend on all of them.
        scored = [self._figures(len(board.units) * (kind.values + kind.peaks)) for kind in board.kinds]
        for number, term in enumerate(self.terms):
            for sign in [1] * (term.high < math.inf) + [-1] * (term.low > 0):
                for form in board.forms:
                    kept = [kind.options.of_form(form) for kind in board.kinds]
                    if all(map(len, kept)):
                        scores = [sign * figures[:, number] for figures in scored]
                        best = [int(keep[np.argmin(score[keep])]) for keep, score in zip(kept, scores, strict=True)]
                        drawn.append([best[kind] for kind in board.kind_of])
        while len(drawn) < STARTS:
            drawn.append([rng.randrange(len(board.kinds[kind].options)) for kind in board.kind_of])
        for picks in drawn:
            yield self._at(outside, board, picks)

    def _around(self, point: Mapping[str, Value]) -> Point:
        """The decisions outside of layers; those that no layer of the point makes active are at their first value."""
        return {name: point.get(name, first) for name, first in self._outside.items()}

    def _board(self, point: Mapping[str, Value]) -> Board | None:
        """The layers under the decisions outside of them that a point has; None if nothing valid is there."""
        key = tuple(self._around(point).values())
        if key not in self._boards:
            self._boards[key] = self._laid(point)
        return self._boards[key]

    def _laid(self, point: Mapping[str, Value]) -> Board | None:
        layouts = {work: table.layout(point) for work, table in self.tables.items()}
        if not all(table.separable and table.surveyed(point) for table in self.tables.values()):
            return None
        units = next(iter(layouts.values())).units
        kinds: dict[int, Kind] = {}
        kind_of: list[int] = []
        for position, unit in enumerate(units):
            options = self._first.options(unit, point, layouts[self._first.work])
            if not len(options):
                return None
            if id(options) not in kinds:
                values, peaks = self._offered(unit, point, options)
                kinds[id(options)] = Kind([], options, values, peaks, bool(peaks.any()))
            kinds[id(options)].members.append(position)
            kind_of.append(list(kinds).index(id(options)))
        spans = layouts[self._first.work].spans
        return Board(units, [*kinds.values()], kind_of, spans, alternatives([k.options for k in kinds.values()]), {})

    def _frame(self, board: Board, picks: list[int], outside: Point) -> tuple[Floats, Floats]:
        """What stands around the layers adds to each sum, and its peaks: that hangs on the forms of the layers."""
        key: tuple[int, ...] = ()
        if len(board.forms) > 1:
            bits = [board.kinds[kind].options.forms[pick] for kind, pick in zip(board.kind_of, picks, strict=True)]
            key = tuple(reduce(or_, bits[start:stop], 0) for start, stop in board.spans)
        if key not in board.frames:
            point = self.space.normalised(self._placed(board, picks, outside))
            base, floor = np.zeros(self._sums), np.zeros(self._sums)
            for span, term, table in zip(self._spans, self.terms, self._of_term, strict=True):
                frame = table.frame(point)
                if frame is None:
                    return base, floor
                sums, peaks = frame
                weights, peak = table.sums(column(term), table.layout(point).surroundings.work)
                base[span] = (sums @ weights).sum(axis=0)
                floor[span] = (peaks @ peak).max(axis=0, initial=0.0)
            board.frames[key] = base, floor
        return board.frames[key]

    def _offered(self, unit: Unit, point: Mapping[str, Value], options: Options) -> tuple[Floats, Floats]:
        """What each setting of a layer adds to each sum, and its peaks, `[settings, sums]`."""
        if id(options) not in self._offers:
            values = np.zeros((len(options), self._sums))
            peaks = np.zeros_like(values)
            for span, term, table in zip(self._spans, self.terms, self._of_term, strict=True):
                layout = table.layout(point)
                weights, peak = table.sums(column(term), layout.surroundings.work)
                theirs = options if table is self._first else table.options(unit, point, layout)
                values[:, span] = theirs.sums @ weights
                peaks[:, span] = theirs.peaks @ peak
            self._offers[id(options)] = options, values, peaks
        return self._offers[id(options)][1:]

    def _state(self, point: Point) -> State | None:
        """Where a point stands; layers whose setting is invalid or not among the options get the nearest that is."""
        board = self._board(point)
        if board is None:
            return None
        program = self.space.program
        picks = [
            self._pick(board.kinds[kind].options, unit.setting(program, point))
            for unit, kind in zip(board.units, board.kind_of, strict=True)
        ]
        outside = self._around(point)
        return self._at(outside, board, picks)

    def _beside(self, point: Point, kept: frozenset[str], rng: random.Random) -> State | None:
        """The nearest to the budget of the states that one decision outside of layers makes of an invalid point."""
        found: list[State] = []
        for name in self._outside:
            if name in point and name not in kept:
                for value in _spread(self.space.program.decisions[name], point[name]):
                    state = self._state(self.space.normalised({**point, name: value}))
                    if state is not None:
                        found.append(state)
        rng.shuffle(found)
        return min(found, key=lambda state: state.violation, default=None)

    def _pick(self, options: Options, setting: Setting) -> int:
        """The index of a setting, or of the first of those that have most of its values."""
        known = options.index.get(setting)
        if known is not None:
            return known
        wanted = set(setting)
        return int(np.argmax([len(wanted & set(other)) for other in options.settings]))

    def _at(self, outside: Point, board: Board, picks: list[int]) -> State:
        """The state in which each layer has the option picked for it."""
        base, floor = self._frame(board, picks, outside)
        values, peaks = base.copy(), floor
        for kind in board.kinds:
            picked = [picks[position] for position in kind.members]
            values += np.add.reduce(kind.values.take(picked, axis=0))
            if kind.has_peaks:
                peaks = np.maximum(peaks, np.maximum.reduce(kind.peaks.take(picked, axis=0)))
        values += peaks
        return State(outside, board, picks, base, floor, values, float(self._violations(values)))

    def _figures(self, sums: Floats) -> Floats:
        """The figure of each term, `[..., terms]`, of the sums `[..., sums]` of a model."""
        if self._plain:
            return sums
        made = [t.made(column(term), sums[..., s]) for s, term, t in zip(self._spans, self.terms, self._of_term)]
        return np.stack(made, axis=-1)

    def _violations(self, sums: Floats) -> Floats:
        """Violation of all terms together, for sums `[..., sums]` of models."""
        values = self._figures(sums)
        total = (
            np.maximum(values - self._highs, 0.0) @ self._per_high
            + np.maximum(self._lows - values, 0.0) @ self._per_low
        )
        if self._strict:
            edge = (self._strict_high & (values == self._highs)) | (self._strict_low & (values == self._lows))
            total = total + edge.any(axis=-1) * np.finfo(float).eps
        return total

    def _descended(self, state: State, kept: frozenset[str], rng: random.Random, *, outside: bool = True) -> State:
        """Changes of layers and of single decisions outside of them as long as they help; pairs where they do not.

        Decisions outside of layers are weighed in the beginning, after each of them that was changed, and where
        nothing else helps.
        """
        look_outside = outside
        for _ in range(MAX_STEPS):
            if state.violation == 0:
                break
            inside = self._layer_changes(state, kept, rng)
            around = self._best_outside(state, kept, rng) if look_outside or (outside and not inside) else None
            if around is not None and (not inside or around[0] > inside[0].score):
                state, look_outside = around[1], outside
                continue
            look_outside = False
            better = (self._taken(state, inside) if inside else None) or self._best_pair(state, kept, rng)
            if better is None:
                break
            state = better
        return state

    def _layer_changes(self, state: State, kept: frozenset[str], rng: random.Random) -> list[Change]:
        """For each layer the change that takes most violation away per decision disturbed, the best first."""
        found: list[Change] = []
        total, rests = self._rests(state)
        for kind in state.board.kinds:
            current = np.array([state.picks[position] for position in kind.members])
            if kept or kind.has_peaks:
                distinct, rest, alike = current, rests[kind.members], np.arange(len(current))
            else:
                distinct, alike = np.unique(current, return_inverse=True)
                rest = np.broadcast_to(state.floor, (len(distinct), self._sums))
            after = (total - kind.values[distinct])[:, None] + kind.values + np.maximum(rest[:, None], kind.peaks)
            gain = (state.violation - self._violations(after)) / np.maximum(kind.options.distances[distinct], 1)
            if kept:
                gain = np.where(self._allowed(kind, state, kept), gain, -math.inf)
            best = gain.max(axis=1)
            ties = [np.flatnonzero(row) for row in gain >= best[:, None] * (1 - TIES)]
            scores = best.tolist()
            for position, row in zip(kind.members, alike.tolist(), strict=True):
                if scores[row] > 0:
                    pick = int(ties[row][int(rng.random() * len(ties[row]))])
                    found.append(Change(scores[row], position, kind, pick))
        rng.shuffle(found)
        return sorted(found, key=lambda change: -change.score)

    def _taken(self, state: State, changes: Sequence[Change]) -> State | None:
        """The state after the best change, or after as many of those nearly as good as it takes to meet the budget."""
        good = [change for change in changes if change.score >= changes[0].score * NEARLY_AS_GOOD]
        deltas = [kind.values[pick] - kind.values[state.picks[position]] for _, position, kind, pick in good]
        ahead = self._violations(state.sums + np.cumsum(deltas, axis=0))
        for count in dict.fromkeys((int(np.argmin(ahead)) + 1, 1)):
            picks = list(state.picks)
            for change in good[:count]:
                picks[change.position] = change.pick
            found = self._at(state.outside, state.board, picks)
            if found.violation < state.violation:
                return found
        return None

    def _rests(self, state: State) -> tuple[Floats, Floats]:
        """The values without peaks, and for each layer the largest peak of everything else."""
        board = state.board
        total = state.base.copy()
        peaks = np.zeros((len(board.units) + 1, self._sums))
        peaks[-1] = state.floor
        for kind in board.kinds:
            picked = [state.picks[position] for position in kind.members]
            total += kind.values[picked].sum(axis=0)
            peaks[kind.members] = kind.peaks[picked]
        order = np.sort(peaks, axis=0)
        largest, second = order[-1], order[-2] if len(order) > 1 else order[-1]
        unique = (peaks == largest).sum(axis=0) == 1
        return total, np.where((peaks[:-1] == largest) & unique, second, largest)

    def _allowed(self, kind: Kind, state: State, kept: frozenset[str]) -> np.ndarray:
        """For each layer of a kind and each option whether it leaves what is to be kept as it is."""
        codes = kind.options.codes
        allowed = np.ones((len(kind.members), len(kind.options)), dtype=bool)
        for row, position in enumerate(kind.members):
            for slot, decision in enumerate(state.board.units[position].decisions):
                if decision.name in kept:
                    allowed[row] &= codes[:, slot] == codes[state.picks[position], slot]
        return allowed

    def _best_outside(self, state: State, kept: frozenset[str], rng: random.Random) -> tuple[float, State] | None:
        """The change of one decision outside of layers that takes most violation away per decision disturbed.

        A length disturbs the decisions of the layers that come or go, any other decision as many as half the layers.
        """
        best: list[tuple[float, State]] = []
        lengths = self.space.program.lengths
        for name in self.space.normalised(self._point(state)):
            decision = self.space.program.decisions[name]
            if name not in state.outside or name in kept or decision.count == 1:
                continue
            for value in _spread(decision, state.outside[name]):
                other = self._moved(state, name, value, rng)
                if other is None or other.violation >= state.violation:
                    continue
                disturbed = (len(state.board.units) + 1) // 2
                if name in lengths:
                    disturbed = sum(len(unit.decisions) + 1 for unit in {*state.board.units} ^ {*other.board.units})
                best.append(((state.violation - other.violation) / max(1, disturbed), other))
        top = max((score for score, _ in best), default=0.0)
        ties = [found for found in best if found[0] >= top * (1 - TIES)]
        return rng.choice(ties) if ties else None

    def _moved(self, state: State, name: str, value: Value, rng: random.Random) -> State | None:
        """The state with one decision outside of layers changed; layers keep their settings where they can."""
        outside = {**state.outside, name: value}
        board = self._board(outside)
        if board is None:
            return None
        picks = [
            there[state.picks[sources[int(rng.random() * len(sources))]]] if sources else int(rng.random() * many)
            for sources, there, many in self._carried(state.board, board)
        ]
        return self._at(outside, board, picks)

    def _carried(self, old: Board, new: Board) -> list[tuple[list[int], list[int], int]]:
        """For each layer of a board where it takes its setting from, its options by those there, and how many it has.

        A layer that is on both takes its own; one that is new any of those of its part, so that what is proposed for
        the others goes on in it.
        """
        key = id(old), id(new)
        if key not in self._carries:
            positions = {unit.name: position for position, unit in enumerate(old.units)}
            alike: dict[int, list[int]] = {}
            for position, unit in enumerate(old.units):
                alike.setdefault(id(unit.part), []).append(position)
            maps: dict[tuple[int, int], list[int]] = {}
            carry: list[tuple[list[int], list[int], int]] = []
            for unit, kind in zip(new.units, new.kind_of, strict=True):
                options = new.kinds[kind].options
                sources = [positions[unit.name]] if unit.name in positions else alike.get(id(unit.part), [])
                if not sources:
                    carry.append(([], [], len(options)))
                    continue
                before = old.kinds[old.kind_of[sources[0]]].options
                sources = [source for source in sources if old.kinds[old.kind_of[source]].options is before]
                pair = id(before), id(options)
                if pair not in maps:
                    maps[pair] = [self._pick(options, setting) for setting in before.settings]
                carry.append((sources, maps[pair], len(options)))
            self._carries[key] = carry
        return self._carries[key]

    def _best_pair(self, state: State, kept: frozenset[str], rng: random.Random) -> State | None:
        """Two layers changed together, the best of many pairs drawn at random; None if none helps."""
        if len(state.board.units) < 2 or kept:
            return None
        source = np.random.default_rng(rng.getrandbits(64))
        board = state.board
        total, _ = self._rests(state)
        kinds = [board.kinds[kind] for kind in board.kind_of]
        values = [kind.values - kind.values[pick] for kind, pick in zip(kinds, state.picks, strict=True)]
        sizes = np.array([len(kind.options) for kind in kinds])
        starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        changes = np.concatenate(values)
        first, second = source.integers(0, len(changes), (2, PAIRS))
        owner = np.repeat(np.arange(len(sizes)), sizes)
        apart = owner[first] != owner[second]
        first, second = first[apart], second[apart]
        if not len(first):
            return None
        peak = state.sums - total
        after = self._violations(total + peak + changes[first] + changes[second])
        for index in np.argsort(after)[:8]:
            picks = list(state.picks)
            for chosen in (first[index], second[index]):
                picks[int(owner[chosen])] = int(chosen - starts[owner[chosen]])
            found = self._at(state.outside, board, picks)
            if found.violation < state.violation:
                return found
        return None

    def _point(self, state: State) -> Point:
        return self._placed(state.board, state.picks, state.outside)

    def _placed(self, board: Board, picks: list[int], outside: Point) -> Point:
        point = dict(outside)
        for unit, kind, pick in zip(board.units, board.kind_of, picks, strict=True):
            for slot, value in board.kinds[kind].options.settings[pick]:
                point[unit.decisions[slot].name] = value
        return point

    def _settled(self, state: State, proposal: Point, kept: frozenset[str]) -> Point | None:
        """The point of a state with needless changes taken back, if it meets the budget indeed."""
        if state.violation > 0:
            return None
        state = self._restored(state, proposal)
        found = self.space.normalised(self._point(state))
        if any(name in proposal and name in found and found[name] != proposal[name] for name in kept):
            return None
        return found if self.feasible(found) else None

    def _restored(self, state: State, proposal: Point) -> State:
        """The state with each layer given back what was proposed for it, where the budget allows that."""
        program = self.space.program
        for position, (unit, kind) in enumerate(zip(state.board.units, state.board.kind_of, strict=True)):
            settled = state.board.kinds[kind].options.settings[state.picks[position]]
            if all(proposal.get(unit.decisions[slot].name) == value for slot, value in settled):
                continue
            if any(decision.name in proposal for decision in unit.decisions):
                wanted = unit.complete(
                    program, {**proposal, **state.outside}, lambda each: proposal.get(each.name, each.first)
                )
                pick = state.board.kinds[kind].options.index.get(wanted)
                if pick is not None and pick != state.picks[position]:
                    picks = list(state.picks)
                    picks[position] = pick
                    tried = self._at(state.outside, state.board, picks)
                    if tried.violation == 0:
                        state = tried
        return state

    def _approached(self, anchor: Point, proposal: Point) -> Point:
        """A point that meets the budget, given what was proposed for one layer after the other while it still does."""
        state = self._state(anchor)
        if state is None or state.violation > 0:
            return anchor
        found = self.space.normalised(self._point(self._restored(state, proposal)))
        return found if self.feasible(found) else anchor


def _disturbance(a: Mapping[str, Value], b: Mapping[str, Value]) -> int:
    """In how many decisions two points differ."""
    return sum(1 for name in a.keys() | b.keys() if name not in a or name not in b or a[name] != b[name])


def _spread(decision: Decision, value: Value) -> list[Value]:
    """Other values of a decision."""
    return [other for other in decision.spread(MAX_VALUES) if other != value or type(other) is not type(value)]


def _rounded(value: float, *, up: bool) -> float:
    """The value with three significant digits, rounded away from what cannot be reached."""
    if value <= 0 or not math.isfinite(value):
        return value
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return (math.ceil if up else math.floor)(value / unit) * unit
