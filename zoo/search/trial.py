"""Trials of a search, and which of them are better than others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zoo.search.objective import Objective

Status = Literal["complete", "pruned", "failed", "dropped"]
"""Trained to the end; stopped early for being worse; broken down; never trained, because it measured too slow."""

Point = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One architecture and all that is known of it.

    values: of the objectives, in their order; empty unless it is complete. metrics: every figure by name. slack: by
    term of the budget, the distance from its bound as a share of it. also_seen: keys of points that were given up on
    the way to this one. history: the reported metric by step. seconds: by phase.
    """

    number: int
    key: str
    point: Point
    status: Status
    spec: Any
    spec_hash: str
    shape: dict[str, Any]
    """What `zoo.search.architecture.architecture` says of it."""
    values: tuple[float, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    slack: dict[str, float] = field(default_factory=dict)
    baseline: str | None = None
    adjusted: bool = False
    """Whether a baseline had to be changed to meet the budget."""
    reason: str = ""
    also_seen: tuple[str, ...] = ()
    history: dict[int, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    finished: str = ""
    """When, in ISO 8601."""

    @property
    def trained(self) -> bool:
        """Whether training time was spent on it."""
        return self.status != "dropped"


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether `a` is nowhere above `b` and somewhere below it."""
    return all(x <= y for x, y in zip(a, b, strict=True)) and a != b


@dataclass(slots=True)
class Member:
    """A complete trial with its values turned so that less is better, and how many trials dominate it."""

    trial: Trial
    costs: tuple[float, ...]
    beaten: int = 0


class Archive:
    """The complete trials and the order among them, kept up as trials come in; one more costs O(trials)."""

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.objectives = tuple(objectives)
        self.members: list[Member] = []

    def add(self, trial: Trial) -> bool:
        """Take a trial in, and tell whether it is on the front now."""
        if trial.status != "complete":
            return False
        costs = tuple(objective.oriented(value) for objective, value in zip(self.objectives, trial.values, strict=True))
        new = Member(trial, costs)
        for member in self.members:
            if dominates(member.costs, costs):
                new.beaten += 1
            elif dominates(costs, member.costs):
                member.beaten += 1
        self.members.append(new)
        return new.beaten == 0

    def front(self) -> list[Trial]:
        """The trials that no other dominates, the best on the first objective first; the earlier of equals only."""
        found: dict[tuple[float, ...], Trial] = {}
        for member in self.members:
            if member.beaten == 0:
                found.setdefault(member.costs, member.trial)
        return [found[costs] for costs in sorted(found)]

    def best(self) -> Trial | None:
        """The best trial on the first objective; of equals on it the one that is better on the next."""
        return next(iter(self.front()), None)

    def __iter__(self) -> Iterator[Trial]:
        return (member.trial for member in self.members)
