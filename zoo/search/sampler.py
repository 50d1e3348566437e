"""What to try next: evolution over the points of a space, and Optuna's samplers.

A proposer gives a stream of points for each trial; the search takes the first that, repaired, is new. The stream of
trial `n` depends on the seed and the trials before `n` only, so a search that goes on after a crash goes on the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from zoo.errors import ZooError, did_you_mean
from zoo.search.objective import Objective
from zoo.search.trial import Archive, Point

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

    from zoo.search.ledger import Codec
    from zoo.search.space import Space

SAMPLERS = {
    "evolution": "mutation and crossover among the best, with a tenth at random",
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
TOURNAMENT_SHARE = 0.5
"""Share of all trials among which the best becomes a parent: high, since evaluations are few."""
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
    """Steady-state evolution on the non-dominated order.

    A parent wins a tournament among a random half of the complete trials: fewest trials dominate it (Fonseca and
    Fleming 1993), chance decides between equals. Half of the children mix two parents, all are changed in one place;
    one in ten is a random point instead. Changes become more as the stream goes on, so that it leaves a neighbourhood
    that is used up.
    """

    def __init__(self, space: Space, archive: Archive, seed: int) -> None:
        self.space = space
        self.archive = archive
        self.seed = seed

    def stream(self, number: int) -> Iterator[Point]:
        rng = generator(self.seed, number, "evolution")
        attempt = 0
        while True:
            yield self._child(rng, 1 + attempt // 8)
            attempt += 1

    def _child(self, rng: random.Random, changes: int) -> Point:
        if not len(self.archive) or rng.random() < RANDOM_SHARE:
            return self.space.sample(rng)
        child = self._parent(rng)
        if rng.random() < 0.5:
            child = self.space.cross(child, self._parent(rng), rng)
        return self.space.mutate(child, rng, changes)

    def _parent(self, rng: random.Random) -> Point:
        count = len(self.archive)
        entrants = rng.sample(range(count), min(count, max(2, int(count * TOURNAMENT_SHARE))))
        return self.archive.trials[entrants[self.archive.beaten[entrants].argmin()]].point


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


def optuna_pruner(name: str) -> optuna.pruners.BasePruner | None:
    """The pruner of that name, None for `none`."""
    import optuna

    if name == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=4)
    if name == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(reduction_factor=4)
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
