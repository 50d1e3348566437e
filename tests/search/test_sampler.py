from __future__ import annotations

import random
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

import fakes
import optuna
import pytest
from fakes import FakeEvaluator, search

from zoo.search.evaluate import Evaluation
from zoo.search.ledger import Ledger
from zoo.search.objective import parse_objectives
from zoo.search.sampler import POPULATION, Evolution, RandomDraws
from zoo.search.space import Space
from zoo.search.trial import Archive, Trial

LOSS = parse_objectives("loss")


def test_a_stream_depends_on_seed_and_trials_only(tmp_path: Path) -> None:
    results = search(tmp_path / "run")
    space = fakes.tiny()
    archive = Archive(LOSS)

    def drawn(number: int, seed: int = 0) -> list[Any]:
        return list(islice(Evolution(space, archive, seed).stream(number), 20))

    empty = drawn(3)
    assert empty == drawn(3) and empty != drawn(4) and empty != drawn(3, seed=1)
    for trial in results.trials:
        archive.add(trial)
    assert drawn(3) == drawn(3) != empty
    assert all(space.normalised(point) == point for point in drawn(3))
    draws = RandomDraws(space, 0)
    assert list(islice(draws.stream(1), 5)) == list(islice(draws.stream(1), 5)) != list(islice(draws.stream(2), 5))


def test_what_good_trials_share_does_not_hang_on_when_they_came_in() -> None:
    space = Space.parse("""
width: {int: [64, 1024], step: 4}
stem: {type: token, vocab: 256}
body: {layers: {repeat: 3, of: {mixer: {choice: [pooling, identity]}, channel: null}}}
head: language_model
""")
    rng, archive = random.Random(0), Archive(LOSS)
    watched = Evolution(space, archive, 0)
    for number in range(60):
        point = space.sample(rng)
        archive.add(trial(number, point, rng.random()))
        next(watched.stream(number))
    drawn = [list(islice(evolution.stream(60), 30)) for evolution in (watched, Evolution(space, archive, 0))]
    assert drawn[0] == drawn[1] and len({point["width"] for point in drawn[0]}) > 3


def trial(number: int, point: Any, loss: float) -> Trial:
    key = str(number)
    return Trial(
        number=number, key=key, point=point, status="complete", spec={}, spec_hash=key, shape={}, values=(loss,)
    )


class Additive(FakeEvaluator):
    """Each layer adds what its mixer and its channel mixer are worth at its place."""

    def evaluate(self, spec: Any, *rest: Any) -> Evaluation:
        worth = {"attention": 3, "mamba2": 1, "identity": 0}
        layers = enumerate(spec.body.layers)
        total = sum(worth[layer.mixer.type] * (2 + index) + layer.channel.hidden / 16 for index, layer in layers)
        return Evaluation(metrics={"loss": 50.0 - total - spec.width / 8})


def test_evolution_learns(tmp_path: Path) -> None:
    best: dict[str, list[float]] = {"evolution": [], "random": []}
    for sampler, found in best.items():
        for seed in range(4):
            settings = {"sampler": sampler, "seed": seed, "trials": 30, "budget": "params<=30k"}
            results = search(tmp_path / f"{sampler}-{seed}", Additive(), **settings)
            assert results.best is not None
            found.append(results.best.values[0])
    assert fmean(best["evolution"]) < fmean(best["random"]) - 1


@pytest.mark.parametrize("objective", ["loss", "loss,params"])
def test_nsga2_counts_generations_with_the_baselines_in_the_first(tmp_path: Path, objective: str) -> None:
    results = search(tmp_path / "run", sampler="nsga2", trials=POPULATION + 5, objective=objective)
    trials = Ledger.open(tmp_path / "run").frozen
    generations = [trial.system_attrs["InOrder:generation"] for trial in trials]
    assert generations == [0] * POPULATION + [1] * 5
    assert all(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials) and results.stopped == "finished"
