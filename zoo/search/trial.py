"""Trials of a search, and which of them are better than others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

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


class Archive:
    """The complete trials and the order among them, kept up as they come in: one more costs O(trials).

    Values are turned so that less is better. A trial dominates another if it is nowhere worse and somewhere better.
    """

    def __init__(self, objectives: Sequence[Objective]) -> None:
        self.objectives = tuple(objectives)
        self.trials: list[Trial] = []
        self._costs = np.zeros((64, len(self.objectives)))
        self._beaten = np.zeros(64, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.trials)

    @property
    def costs(self) -> NDArray[np.float64]:
        """`[trials, objectives]`."""
        return self._costs[: len(self.trials)]

    @property
    def beaten(self) -> NDArray[np.int64]:
        """How many others dominate each trial."""
        return self._beaten[: len(self.trials)]

    def add(self, trial: Trial) -> None:
        """Take a trial in; one that is not complete is left out."""
        if trial.status != "complete":
            return
        new = [objective.oriented(value) for objective, value in zip(self.objectives, trial.values, strict=True)]
        below, above = (self.costs < new).any(axis=1), (self.costs > new).any(axis=1)
        self.beaten[above & ~below] += 1
        count = len(self.trials)
        if count == len(self._costs):
            self._costs = np.concatenate([self._costs, np.zeros_like(self._costs)])
            self._beaten = np.concatenate([self._beaten, np.zeros_like(self._beaten)])
        self._costs[count], self._beaten[count] = new, (below & ~above).sum()
        self.trials.append(trial)

    def front(self) -> list[Trial]:
        """The trials that no other dominates, the best on the first objective first; of equals only the earliest."""
        found: dict[tuple[float, ...], Trial] = {}
        for index in np.flatnonzero(self.beaten == 0):
            found.setdefault(tuple(self.costs[index]), self.trials[index])
        return [found[costs] for costs in sorted(found)]

    def best(self) -> Trial | None:
        """The best trial on the first objective; of equals on it the one that is better on the next."""
        return next(iter(self.front()), None)
