"""What a search optimises: figures that training finds, and figures that budgets speak of."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from zoo.errors import ZooError, did_you_mean
from zoo.search.budget import METRICS, Budget, BudgetError, Term

Direction = Literal["minimize", "maximize"]

TRAINED: dict[str, Direction] = {"loss": "minimize", "accuracy": "maximize", "bits_per_byte": "minimize"}
"""Figures of a trained candidate on the validation part, and which way is better."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One figure to optimise; `term` names the circumstances of one that is not trained, and its bounds say nothing."""

    name: str
    direction: Direction
    term: Term | None = None

    @property
    def trained(self) -> bool:
        return self.term is None

    def oriented(self, value: float) -> float:
        """The value with a sign such that less is better."""
        return -value if self.direction == "maximize" else value

    def better(self, value: float, other: float) -> bool:
        return self.oriented(value) < self.oriented(other)


def parse_objectives(text: str, budget: Budget | None = None) -> tuple[Objective, ...]:
    """The objectives that `loss,latency@cpu{seq=512}` names.

    A metric without device and circumstances takes those of the budget's only term on that metric. Raises `ZooError`
    for an unknown name, one that is given twice, and none at all.
    """
    parts = [part.strip() for part in re.split(r",(?![^{]*\})", text) if part.strip()]
    if not parts:
        raise ZooError(f"an objective is needed, for example loss; known: {', '.join([*TRAINED, *METRICS])}")
    objectives = tuple(_objective(part, budget or Budget()) for part in parts)
    names = [objective.name for objective in objectives]
    for name in names:
        if names.count(name) > 1:
            raise ZooError(f"objective {name!r} is given twice")
    return objectives


def _objective(text: str, budget: Budget) -> Objective:
    name = (re.match(r"\w*", text) or [""])[0]
    rest = text[len(name) :].strip()
    if name in TRAINED:
        if rest:
            raise ZooError(f"objective {text!r}: {name} depends on no device and no context; leave {rest!r} out")
        return Objective(name, TRAINED[name])
    if name not in METRICS:
        raise ZooError(f"unknown objective {name or text!r}{did_you_mean(name, [*TRAINED, *METRICS])}")
    if not rest:
        same = [term for term in budget.terms if term.metric == name]
        if len(same) == 1:
            return Objective(name, "minimize", same[0])
    try:
        (term,) = Budget.parse(f"{name}>=0{'s' if METRICS[name].needs_measurement else ''}{rest}").terms
    except BudgetError as error:
        raise ZooError(f"objective {text!r}: {error.problems[0].message}") from None
    return Objective(text.replace(" ", ""), "minimize", term)
