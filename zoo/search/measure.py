"""Figures of candidates before they are trained: counted from tables, or told by whoever knows a device."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from zoo.accounting import Workload, metrics
from zoo.latency import Context, LatencyFigure, LatencySource, Phase
from zoo.search.budget import Budget, Term, TermContext
from zoo.search.latencies import from_parts
from zoo.search.objective import Objective
from zoo.search.repair import Repair, label, workload
from zoo.search.table import CostTable, Extra
from zoo.search.trial import Point

if TYPE_CHECKING:
    from zoo.blocks.model import Spec
    from zoo.search.space import Space

SHRINKS = 4
"""How often a candidate that measures too slow is made smaller before it is dropped."""
MARGIN = 0.97
"""Aim of a shrunk candidate as a share of the budget."""


def latency_context(term: Term, spec: Spec) -> Context:
    """The work under which a term's figure is measured; lengths that it leaves open are the model's context."""
    context = term.context
    return Context(
        batch=context.batch or 1,
        seq=spec.context if context.seq is None else context.seq,
        past=spec.context if context.past is None else context.past,
        dtype=context.dtype or "float32",
    )


def told(source: LatencySource, spec: Spec, term: Term, quantile: float | None = None) -> LatencyFigure:
    """What a source says of a spec under a term, at a quantile that is not the term's if given."""
    return source.latency(
        spec, latency_context(term, spec), phase_of(term), quantile_of(term) if quantile is None else quantile
    )


def phase_of(term: Term) -> Phase:
    """What a term on a latency times."""
    return "decode" if term.metric == "decode" else "forward"


def quantile_of(term: Term) -> float:
    """The quantile that a term speaks of: the median unless it names one."""
    return 0.5 if term.context.quantile is None else term.context.quantile


@dataclass(slots=True)
class Fitted:
    """A point that meets the whole budget, or why none near it does; `tried` are the points that did not."""

    point: Point
    spec: Any
    measured: dict[str, float] = field(default_factory=dict)
    reason: str = ""
    tried: list[Point] = field(default_factory=list)


class Meter:
    """Counts and measures candidates of a space under the terms of a budget and the objectives.

    Latencies that are sums over the parts of a model, as predictors and rooflines give them, are in the tables too, so
    that the repair meets them like any other figure.

    sources: whatever tells latencies, by device. device: where terms that name none are measured.
    """

    def __init__(
        self,
        space: Space,
        budget: Budget,
        objectives: Sequence[Objective],
        sources: Callable[[str], LatencySource],
        device: str = "cpu",
    ) -> None:
        self.space = space
        self.budget = budget
        self.device = device
        self._sources = sources
        wanted = [*budget.terms, *(objective.term for objective in objectives if objective.term is not None)]
        self.measured = _unique(term for term in wanted if term.needs_measurement)
        self.counted = _unique(term for term in wanted if not term.needs_measurement)
        shrinking = [self.proxy(term, 1.0) for term in budget.terms if term.needs_measurement]
        self._labels = [(term, label(term)) for term in self.counted]
        self._named = [(term, str(term), label(term)) for term in budget.terms]
        works = dict.fromkeys([Workload(), *map(workload, [*self.counted, *shrinking])])
        extras: dict[Workload, dict[str, Extra]] = {work: {} for work in works}
        for term in self.measured:
            dtype = term.context.dtype or "float32"
            seconds = from_parts(self.source(term), dtype, phase_of(term), quantile_of(term))
            if seconds is not None:
                extras.setdefault(workload(term), {})[label(term)] = seconds
        self.tables: Mapping[Workload, CostTable] = {
            work: CostTable(space, work, theirs) for work, theirs in extras.items()
        }

    def figures(self, point: Point) -> dict[str, float]:
        """Everything that is counted: all metrics under the default work, and those that terms ask for elsewhere."""
        found = dict(self.tables[Workload()].figures(point) or {})
        for term, name in self._labels:
            if name not in found:
                counted = self.tables[workload(term)].figures(point)
                assert counted is not None
                found[name] = counted[term.metric]
        return found

    def slack(self, figures: Mapping[str, float]) -> dict[str, float]:
        """How far each term of the budget is from its bound, as a share of it."""
        return {text: term.slack(figures[name]) for term, text, name in self._named}

    def latency(self, spec: Spec, term: Term) -> float:
        """Seconds that a term speaks of, for a spec."""
        return told(self.source(term), spec, term).seconds

    def source(self, term: Term) -> LatencySource:
        """Who tells the latency that a term speaks of."""
        return self._sources(term.device or self.device)

    def fit(
        self,
        point: Point,
        spec: Spec,
        rng: random.Random,
        usable: Callable[[Point], bool],
        measuring: Callable[[Point], None],
        keep: Collection[str] = (),
    ) -> Fitted:
        """Measure a point that meets what can be counted; while it is too slow, shrink it and measure again.

        `usable` says whether a smaller point may be taken; decisions named in `keep` stay as they are. Work is cut by
        what the measured excess asks for.
        """
        tried: list[Point] = []
        slowest = ""
        bounds: dict[tuple[str, Workload], Term] = {}
        while True:
            if self.measured:
                measuring(point)
            measured = {label(term): self.latency(spec, term) for term in self.measured}
            over = [
                (term, measured[label(term)])
                for term in self.budget.terms
                if term.needs_measurement and measured[label(term)] > term.high
            ]
            under = [term for term in self.budget.terms if term.needs_measurement and not over]
            missed = next((term for term in under if term.violation(measured[label(term)])), None)
            if not over and missed is None:
                return Fitted(point, spec, measured, tried=tried)
            tried.append(point)
            if missed is not None:
                return Fitted(
                    point,
                    spec,
                    measured,
                    f"takes {measured[label(missed)] * 1e3:.3g}ms where the budget says {missed.describe()}",
                    tried[:-1],
                )
            term, seconds = max(over, key=lambda found: found[1] / found[0].high)
            slowest = slowest or f"takes {seconds * 1e3:.3g}ms where the budget says {term.describe()}"
            for late, took in over:
                proxy = self.proxy(late, 1.0)
                work = workload(proxy)
                now = (self.tables[work].figures(point) or {})[proxy.metric]
                bounds[proxy.metric, work] = self.proxy(late, now * late.high / took * MARGIN)
            smaller = None
            if len(tried) <= SHRINKS:
                tighter = Budget((*self.budget.terms, *bounds.values()))
                smaller = Repair(self.space, self.tables, tighter)(point, rng, keep)
            if smaller is None or not usable(smaller):
                return Fitted(tried[0], self.space.spec_at(tried[0]), {}, slowest, tried[1:])
            point = smaller
            spec = self.space.spec_at(point)

    def proxy(self, term: Term, high: float) -> Term:
        """A bound on the counted work behind a latency."""
        context = term.context
        if term.metric == "decode":
            return Term("decode_flops", high=high, context=TermContext(batch=context.batch, past=context.past))
        return Term("flops", high=high, context=TermContext(batch=context.batch, seq=context.seq))


def resolved(budget: Budget, sources: Callable[[str], LatencySource], device: str = "cpu") -> Budget:
    """The budget with `60% of NAME` put into numbers: counted, or measured where it is a latency."""

    def lookup(name: str, term: Term) -> float:
        from zoo.spec.document import load

        spec = load(name)
        if term.needs_measurement:
            return told(sources(term.device or device), spec, term).seconds
        return float(metrics(spec, workload(term))[term.metric])

    return budget.resolve(lookup)


def _unique(terms: Iterable[Term]) -> tuple[Term, ...]:
    """One term for each figure, whatever its bounds."""
    return tuple({label(term): replace(term, low=0.0, high=float("inf")) for term in terms}.values())
