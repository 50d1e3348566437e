"""The mixer of this package under zoo's contract, and in a model."""

from __future__ import annotations

import torch
from zoo_running_mean import RunningMean

import zoo
from zoo.testing import ComponentContract, Example


class TestRunningMean(ComponentContract):
    examples = (Example(RunningMean()), Example(RunningMean(scaled=False), causal=False))


def test_zoo_finds_it_by_its_type() -> None:
    spec = zoo.parse(
        """
        width: 16
        context: 12
        stem: {type: token, vocab: 5}
        body: {layers: [{mixer: running_mean, channel: glu}, {mixer: {type: running_mean, scaled: false}}]}
        head: language_model
        """
    )
    assert zoo.RunningMean is RunningMean
    assert zoo.build(spec).generate(torch.tensor([[1, 2]]), 3, temperature=0).shape == (1, 5)
    assert zoo.parse(zoo.dump(spec)) == spec
