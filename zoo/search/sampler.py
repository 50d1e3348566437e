"""What to try next: evolution over the points of a space, and Optuna's samplers.

A proposer gives a stream of points for each trial; the search takes the first that, repaired, is new. The stream of
trial `n` depends on the seed and the trials before `n` only, so a search that goes on after a crash goes on the same.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from zoo.errors import ZooError, did_you_mean
from zoo.search.objective import Objective
from zoo.search.trial import Archive, Point

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from zoo.search.ledger import Codec
    from zoo.search.space import Decision, Space

SAMPLERS = {
    "evolution": "values that good trials share, mutation and crossover of the best, and a tenth at random",
    "tpe": "Optuna's tree-structured Parzen estimator",
    "nsga2": "Optuna's NSGA-II",
    "gp": "Optuna's Gaussian process",
    "random": "independent draws",
}
PRUNERS = {
    "none": "train every candidate to the end",
    "median": "stop a candidate that is worse than the median of those before at the same step",
    "halving": "successive halving: at each rung only the best quarter goes on",
}

RANDOM_SHARE = 0.1
"""Share of evolution's proposals that are drawn anew."""
MODEL_SHARE = 0.7
"""Share of the others that are drawn from what good trials have in common; the rest descend from parents."""
FIRST_RANDOM = 8
"""Complete trials before which all proposals are drawn anew."""
GOOD_SHARE, GOOD_MOST = 0.15, 25
"""Trials that count as good: a share of all, at least two and at most so many."""
DRAWS = 12
"""Values of a decision that are drawn for the most promising to be taken."""
MANY_VALUES = 32
"""Values of a decision up to which they are counted one by one."""
POPULATION = 20
"""Trials of a generation of NSGA-II: small, since an evaluation here is a training run."""
ASKS = 4
"""Proposals of an Optuna sampler for one trial; when all have been seen, their neighbours are tried."""


class Proposer(Protocol):
    """Proposes points."""

    def stream(self, number: int) -> Iterator[Point]:
        """Points to try as trial `number`, without end; the search repairs them."""
        ...


def generator(seed: int, number: int, purpose: str) -> random.Random:
    """Random numbers for one purpose in one trial, the same in every session."""
    return random.Random(f"{seed}:{number}:{purpose}")


class Evolution:
    """Steady-state evolution with a model of what good trials have in common.

    Trials are ordered by how many others dominate them (Fonseca and Fleming 1993). A proposal is, one in ten, a random
    point. Most others are drawn from `Marginals`. The rest are children: half of them mix two parents, all are changed
    in one place, and a parent is the best trial with probability 1/2, the next with 1/4, and so on, chance deciding
    between equals. Changes become more as the stream goes on, so that it leaves a neighbourhood that is used up.
    """

    def __init__(self, space: Space, archive: Archive, seed: int) -> None:
        self.space = space
        self.archive = archive
        self.seed = seed
        self._marginals = Marginals(archive)

    def stream(self, number: int) -> Iterator[Point]:
        rng = generator(self.seed, number, "evolution")
        self._marginals.update()
        attempt = 0
        while True:
            yield self._proposal(rng, attempt)
            attempt += 1

    def _proposal(self, rng: random.Random, further: int) -> Point:
        if len(self.archive) < FIRST_RANDOM or rng.random() < RANDOM_SHARE:
            return self.space.sample(rng)
        if rng.random() < MODEL_SHARE:
            drawn = self.space.decide(lambda decision: self._marginals.draw(decision, rng))
            return self.space.mutate(drawn, rng, further) if further else drawn
        child = self._parent(rng)
        if rng.random() < 0.5:
            child = self.space.cross(child, self._parent(rng), rng)
        return self.space.mutate(child, rng, 1 + further)

    def _parent(self, rng: random.Random) -> Point:
        rank = 0
        while rank + 1 < len(self.archive) and rng.random() < 0.5:
            rank += 1
        beaten = self.archive.beaten
        equals = np.flatnonzero(beaten == beaten[self._marginals.order[rank]])
        return self.archive.trials[rng.choice(equals)].point


class Marginals:
    """How much more often good trials have a value than all others do, each decision by itself.

    For a decision with `k` values, of which `v` occurs in `g` of `G` good trials and in `b` of `B` others,
    `l = (g + 1/k) / (G + 1)` and `h = (b + 1/k) / (B + 1)`; of values drawn from `l` that with the largest `l / h` is
    taken (the categorical case of Bergstra et al. 2011, Algorithms for Hyper-Parameter Optimization, section 4).
    """

    def __init__(self, archive: Archive) -> None:
        self.archive = archive
        self.order = np.argsort(archive.beaten)
        """Numbers of the trials, the best first."""
        self._counted = 0
        self._best: set[int] = set()
        self._all: dict[str, Counter[Any]] = {}
        self._good: dict[str, Counter[Any]] = {}
        self._weights: dict[str, tuple[list[float], list[float]]] = {}

    def update(self) -> None:
        """Count the trials that came in since the last time; O(trials), with a small constant."""
        trials = self.archive.trials
        for trial in trials[self._counted :]:
            _count(self._all, trial.point, 1)
        self._counted = len(trials)
        self.order = np.argsort(self.archive.beaten, kind="stable")
        self._weights = {}
        best = set(self.order[: max(2, min(GOOD_MOST, math.ceil(GOOD_SHARE * len(trials))))].tolist())
        for index in best - self._best:
            _count(self._good, trials[index].point, 1)
        for index in self._best - best:
            _count(self._good, trials[index].point, -1)
        self._best = best

    def draw(self, decision: Decision, rng: random.Random) -> Any:
        """A value for a decision."""
        if decision.count is None or decision.count > MANY_VALUES:
            # In an order that does not hang on when each trial became a good one.
            good = sorted(self._good.get(decision.name, Counter()).elements(), key=repr)
            return rng.choice(good) if good else decision.draw(rng)
        if decision.name not in self._weights:
            self._weights[decision.name] = self._weighed(decision)
        likely, ratios = self._weights[decision.name]
        drawn = rng.choices(range(len(likely)), cum_weights=likely, k=DRAWS)
        return decision.values()[max(drawn, key=ratios.__getitem__)]

    def _weighed(self, decision: Decision) -> tuple[list[float], list[float]]:
        """For each value `l`, added up, and `l / h`."""
        good, everything = self._good.get(decision.name, Counter()), self._all.get(decision.name, Counter())
        values = decision.values()
        prior = 1 / len(values)
        low, high = good.total() + 1, everything.total() - good.total() + 1
        likely = [(good[value] + prior) / low for value in values]
        other = [(everything[value] - good[value] + prior) / high for value in values]
        return list(accumulate(likely)), [here / there for here, there in zip(likely, other, strict=True)]


def _count(counts: dict[str, Counter[Any]], point: Mapping[str, Any], times: int) -> None:
    for name, value in point.items():
        if name not in counts:
            counts[name] = Counter()
        counts[name][value] += times


class RandomDraws:
    """Independent draws, the baseline that every other sampler has to beat."""

    def __init__(self, space: Space, seed: int) -> None:
        self.space = space
        self.seed = seed

    def stream(self, number: int) -> Iterator[Point]:
        rng = generator(self.seed, number, "random")
        while True:
            yield self.space.sample(rng)


class Twin:
    """A study in memory with the same trials, on which Optuna's samplers and pruners work at full speed.

    A trial that was asked for stands for the candidate in hand; it is closed when the candidate comes back, in its
    place, as it was trained: repaired, with what the sampler and the pruner noted on it.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        sampler: Callable[[int], optuna.samplers.BaseSampler] | None,
        pruner: optuna.pruners.BasePruner | None,
        seed: int,
    ) -> None:
        import optuna

        from zoo.search.ledger import quiet_optuna

        self._make = sampler
        self._seed = seed
        with quiet_optuna():
            self.study = optuna.create_study(
                directions=[objective.direction for objective in objectives],
                sampler=optuna.samplers.RandomSampler(seed=0),
                pruner=pruner or optuna.pruners.NopPruner(),
            )
        self._asked: optuna.Trial | None = None

    def ask(self, number: int, turn: int = 0) -> optuna.Trial:
        """A running trial, whose sampler draws what its number and turn decide."""
        from zoo.search.ledger import quiet_optuna

        self._close()
        with quiet_optuna():
            if self._make is not None:
                # An instance of its own for each: the state of its generator is nowhere recorded.
                self.study.sampler = self._make(generator(self._seed, number, f"ask {turn}").getrandbits(31))
            self._asked = self.study.ask()
        return self._asked

    @property
    def asked(self) -> optuna.Trial | None:
        """The trial that stands for the candidate in hand."""
        return self._asked

    def notes(self) -> Mapping[str, Any]:
        """What sampler and pruner noted on the candidate in hand; the study has to keep it."""
        if self._asked is None:
            return {}
        return dict(self.study.get_trials(deepcopy=False)[self._asked.number].system_attrs)

    def add(self, frozen: FrozenTrial) -> None:
        """Take in a trial that is done with."""
        self._close()
        self.study.add_trial(frozen)

    def _close(self) -> None:
        if self._asked is not None:
            import optuna

            self.study.tell(self._asked, state=optuna.trial.TrialState.FAIL)
            self._asked = None


class OptunaProposer:
    """Points that one of Optuna's samplers suggests, decision by decision, and then their neighbours."""

    def __init__(self, space: Space, twin: Twin, codec: Codec, seed: int) -> None:
        self.space = space
        self.twin = twin
        self.codec = codec
        self.seed = seed

    def stream(self, number: int) -> Iterator[Point]:
        asked = []
        for turn in range(ASKS):
            asked.append(self._suggested(self.twin.ask(number, turn)))
            yield asked[-1]
        rng = generator(self.seed, number, "neighbours")
        attempt = 0
        while True:
            yield self.space.mutate(rng.choice(asked), rng, 1 + attempt // 8)
            attempt += 1

    def _suggested(self, trial: optuna.Trial) -> Point:
        """A value for each decision that the ones before leave open."""
        return self.space.decide(lambda decision: self.codec.suggest(trial, decision.name))


def optuna_sampler(name: str) -> Callable[[int], optuna.samplers.BaseSampler]:
    """What makes the sampler of that name from a seed."""
    import optuna

    class InOrder(optuna.samplers.NSGAIISampler):
        """NSGA-II whose parents come in the same order whenever they are selected."""

        def select_parent(self, study: optuna.Study, generation: int) -> list[FrozenTrial]:
            return sorted(super().select_parent(study, generation), key=lambda trial: trial.number)

    makers: dict[str, Callable[[int], optuna.samplers.BaseSampler]] = {
        "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
        "nsga2": lambda seed: InOrder(population_size=POPULATION, seed=seed),
        "gp": lambda seed: optuna.samplers.GPSampler(seed=seed),
    }
    return makers[name]


class _Unfailed:
    """A study that shows all trials but the failed ones, as which `Twin` closes its stand-ins."""

    def __init__(self, study: optuna.Study) -> None:
        self._study = study

    def __getattr__(self, name: str) -> Any:
        return getattr(self._study, name)

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[FrozenTrial]:
        found = self._study.get_trials(deepcopy=deepcopy, states=states)
        return [trial for trial in found if trial.state.name != "FAIL"]


def optuna_pruner(name: str) -> optuna.pruners.BasePruner | None:
    """The pruner of that name, None for `none`."""
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if name == "halving":

        class Halving(optuna.pruners.SuccessiveHalvingPruner):
            """Counts a candidate once: what its stand-in in the twin noted, its trial has noted as well."""

            def prune(self, study: Any, trial: FrozenTrial) -> bool:
                view: Any = _Unfailed(study)
                return super().prune(view, trial)

        return Halving(reduction_factor=4)
    return None


def check_names(sampler: str, pruner: str, objectives: Sequence[Objective]) -> None:
    """Raises `ZooError` for an unknown sampler or pruner, and for a pruner that has nothing to compare."""
    if sampler not in SAMPLERS:
        raise ZooError(f"unknown sampler {sampler!r}{did_you_mean(sampler, SAMPLERS)}")
    if pruner not in PRUNERS:
        raise ZooError(f"unknown pruner {pruner!r}{did_you_mean(pruner, PRUNERS)}")
    if pruner == "none":
        return
    if len(objectives) > 1:
        names = ", ".join(objective.name for objective in objectives)
        raise ZooError(f"--pruner {pruner} needs a single objective, found {names}; use --pruner none")
    if not objectives[0].trained:
        raise ZooError(f"--pruner {pruner} needs an objective that training improves, not {objectives[0].name}")
