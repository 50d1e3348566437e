"""A small space, and an evaluator and a latency that answer at once, for tests of the search loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from zoo.accounting import Workload, metrics
from zoo.latency import Context, LatencyFigure, Phase
from zoo.search.evaluate import Evaluation, EvaluationError
from zoo.search.results import Results
from zoo.search.space import Space
from zoo.search.study import SearchListener, SearchSettings, run_search

TINY = """
name: tiny-hybrid
width: {choice: [16, 32, 48]}
context: 64
stem: {type: token, vocab: 64}
head: {type: language_model}
body:
  layers:
    repeat: {int: [2, 3]}
    of:
      mixer: {choice: [{type: attention, heads: 2}, {type: mamba2, state_dim: 8, head_dim: 8}, identity]}
      channel: {type: glu, hidden: {choice: [16, 32, 64]}}
"""

TWELVE = """
name: twelve
width: {choice: [16, 32]}
context: 32
stem: {type: token, vocab: 64}
head: {type: language_model}
body:
  layers:
    - {mixer: {choice: [{type: attention, heads: 2}, identity]}, channel: {type: mlp, hidden: {choice: [16, 32, 48]}}}
"""
"""A space of twelve architectures."""


def tiny() -> Space:
    return Space.parse(TINY)


class FakeEvaluator:
    """A loss that follows from the spec alone, reported four times on the way; mixed and wide specs are better."""

    def __init__(self, fail: Callable[[Any], str] | None = None, before: Callable[[int], None] | None = None) -> None:
        self.evaluated: list[str] = []
        self.fail = fail
        self.before = before

    def identity(self) -> Mapping[str, Any]:
        return {"data": "fake", "steps": 4}

    def metrics(self) -> Mapping[str, str]:
        return {"loss": "minimize", "accuracy": "maximize"}

    def evaluate(
        self,
        spec: Any,
        trial_number: int,
        report: Callable[[int, float], None],
        should_stop: Callable[[], bool],
    ) -> Evaluation:
        if self.before is not None:
            self.before(len(self.evaluated))
        self.evaluated.append(spec.hash)
        reason = self.fail(spec) if self.fail is not None else ""
        if reason:
            raise EvaluationError(reason)
        kinds = {layer.mixer.type for layer in spec.body.layers}
        loss = 3.0 + int(spec.hash[:6], 16) / 2**26 - 0.2 * len(kinds) - spec.width / 100
        for step in range(1, 5):
            report(step, loss + 1 / step)
            if should_stop():
                return Evaluation(metrics={"loss": loss + 1 / step}, stopped=True)
        return Evaluation(metrics={"loss": loss, "accuracy": 1 / (1 + loss)})


class FakeLatency:
    """A nanosecond for each floating-point operation."""

    def __init__(self) -> None:
        self.asked = 0

    def latency(self, spec: Any, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        self.asked += 1
        work = Workload(context.batch, context.seq, context.past)
        found = metrics(spec, work)["flops" if phase == "forward" else "decode_flops"] * 1e-9
        return LatencyFigure(found * (0.5 + quantile), found, found, "fake", "cpu")


def search(
    out: Path,
    evaluator: FakeEvaluator | None = None,
    listener: SearchListener | None = None,
    **settings: Any,
) -> Results:
    """A search of the small space with what is fake."""
    given = {"space": tiny(), "trials": 12, "budget": "params<=40k", "command": "zoo search tiny.yaml", **settings}
    return run_search(
        SearchSettings(out=out, **given),
        evaluator=evaluator or FakeEvaluator(),
        progress=listener,
        latency=lambda device: FakeLatency(),
    )
