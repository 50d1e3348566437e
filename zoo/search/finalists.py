"""Finalists: the best candidates of a search by predicted latency, measured on this machine when it has ended.

`finalists.json` in the run's folder keeps what was measured, so that a search which goes on measures new ones only.
"""

from __future__ import annotations

import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError
from zoo.latency import LatencySource
from zoo.quantity import finite, format_quantity
from zoo.search.budget import Budget, Term
from zoo.search.measure import label, told
from zoo.search.trial import Trial

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

FILE = "finalists.json"
MOST = 20
"""Candidates that are measured."""
SINGLE = 10
"""Of the best where a single objective leaves a front of one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finalist:
    """One latency of one candidate, predicted and measured, in seconds.

    predicted, low, high: the median and the interval in which 90% of measurements should lie; `high` is None where it
    has no end. measured: the median of the timed runs. bounded: the quantile of them that the term asks for. Both are
    None where `reason` says why nothing was measured. drift: how many times longer than at its calibration the machine
    took for the same work at that time; None where that is not known.
    """

    number: int
    spec_hash: str
    figure: str
    predicted: float
    low: float
    high: float | None
    measured: float | None = None
    bounded: float | None = None
    reason: str = ""
    drift: float | None = None

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from the others."""
        return self.spec_hash, self.figure

    @property
    def inside(self) -> bool:
        """Whether it was measured in the interval."""
        return self.measured is not None and self.low <= self.measured <= (math.inf if self.high is None else self.high)


def chosen(front: Sequence[Trial], complete: Iterable[Trial], single: Callable[[Trial], float] | None) -> list[Trial]:
    """Who is measured: the front; of a `single` objective, oriented so that less is better, the best few."""
    if single is None:
        return list(front[:MOST])
    return sorted(complete, key=single)[:SINGLE]


def pending(trials: Iterable[Trial], terms: Sequence[Term], known: Iterable[Finalist]) -> list[tuple[Trial, Term]]:
    """What is still to be measured."""
    done = {finalist.key for finalist in known if finalist.measured is not None}
    return [(trial, term) for trial in trials for term in terms if (trial.spec_hash, label(term)) not in done]


def measure_finalist(
    trial: Trial,
    term: Term,
    spec: Spec,
    predicted: LatencySource,
    measured: LatencySource,
    drift: float | None = None,
) -> Finalist:
    """Predict and measure one latency of a trial; what keeps it from being measured is its `reason`."""
    expected = told(predicted, spec, term, quantile=0.5)
    found = Finalist(
        number=trial.number,
        spec_hash=trial.spec_hash,
        figure=label(term),
        predicted=expected.seconds,
        low=expected.low,
        high=finite(expected.high),
        drift=drift,
    )
    try:
        median = told(measured, spec, term, quantile=0.5).seconds
        return replace(found, measured=median, bounded=told(measured, spec, term).seconds)
    except ZooError as error:
        return replace(found, reason=str(error))


def load_finalists(folder: Path) -> list[Finalist]:
    """What was measured so far; nothing, with a warning, where the file cannot be read."""
    path = folder / FILE
    try:
        return [Finalist(**record) for record in json.loads(path.read_text(encoding="utf-8"))]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError) as error:
        warnings.warn(f"{path} cannot be read, so finalists are measured anew: {error}", stacklevel=2)
        return []


def finalists_text(finalists: Iterable[Finalist]) -> str:
    """The content of `finalists.json`."""
    return json.dumps([asdict(finalist) for finalist in finalists], indent=1, allow_nan=False) + "\n"


def summary(finalists: Sequence[Finalist], budget: Budget) -> dict[str, Any] | None:
    """What results.json says of finalists: each with whether it is inside its interval and meets the budget.

    For each figure how many were measured, inside, and within the budget (None where nothing bounds it), and a sentence
    with that. None without finalists.
    """
    if not finalists:
        return None
    terms = {label(term): term for term in budget.terms if term.needs_measurement}
    rows = [
        {
            **asdict(finalist),
            "inside": finalist.inside if finalist.measured is not None else None,
            "meets": None
            if finalist.bounded is None or finalist.figure not in terms
            else terms[finalist.figure].violation(finalist.bounded) == 0,
        }
        for finalist in finalists
    ]
    figures = []
    for name in dict.fromkeys(row["figure"] for row in rows):
        mine = [row for row in rows if row["figure"] == name and row["measured"] is not None]
        term = terms.get(name)
        found = {
            "figure": name,
            "measured": len(mine),
            "inside": sum(row["inside"] for row in mine),
            "meets": None if term is None else sum(row["meets"] for row in mine),
            "error": sum(abs(row["predicted"] / row["measured"] - 1) for row in mine) / len(mine) if mine else None,
        }
        drifts = [row["drift"] for row in mine if row["drift"] is not None]
        found["drift"] = statistics.median(drifts) if drifts else None
        figures.append({**found, "sentence": _sentence(found, term)})
    return {"rows": rows, "figures": figures}


def _sentence(found: dict[str, Any], term: Term | None) -> str:
    count = found["measured"]
    if not count:
        return f"No finalist could be measured for {found['figure']}."
    said = (
        f"{found['inside']} of {count} finalists ({found['inside'] / count:.0%}) measured {found['figure']} inside the "
        f"90% interval of its prediction, which was off by {found['error']:.1%} on average"
    )
    if term is not None:
        said = f"{said}; {found['meets']} of {count} meet {term.describe()}"
    if found["drift"] is not None:
        said = f"{said}. The machine took {found['drift']:.2f} times as long for the same as when it was calibrated"
    return f"{said}."


def interval(low: float, high: float | None) -> str:
    """An interval of seconds for people."""
    upper = "no bound" if high is None else format_quantity(high, "time")
    return f"{format_quantity(low, 'time')} to {upper}"
