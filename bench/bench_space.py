"""Counting and repairing candidates of a hybrid space of 24 layers, one core.

    python -m bench.bench_space --json bench/results/space.json

All analytic figures of random points with all 24 layers of the shipped `spaces/hybrid-24` from warm tables: one at a
time, as a trial asks for them, and together in the numbers in which a sweep of a space does; both once more with the
latencies of a roofline and of a predictor among the figures; against the same figures counted from whole specs in the
same run.

In the space of `tests/search/hybrid.yaml`: sampling and repair to a budget that few points meet, and the time in which
an impossible budget is explained.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import arguments, finish, publish
from zoo.accounting import Workload, metrics
from zoo.hardware.predictor import PredictedLatency, Predictor
from zoo.hardware.profile import load_profile
from zoo.hardware.regression import Regression
from zoo.hardware.roofline import RooflineLatency
from zoo.hardware.work import parts_of
from zoo.search.budget import Budget
from zoo.search.latencies import from_parts
from zoo.search.repair import Repair
from zoo.search.space import Space, load_space
from zoo.search.study import SWEPT
from zoo.search.table import CostTable, Extra

SHIPPED = "spaces/hybrid-24"
SPACE = Path(__file__).parent.parent / "tests" / "search" / "hybrid.yaml"
POINTS = 2000
WHOLE = 40
REPEATS = 5
BUDGETS = ("params<=20M", "params<=8M", "params<=20M flops<=20G state<=3MB{seq=4096}")
IMPOSSIBLE = "params<=100k flops<=1G{seq=512}"


def seconds(run: Callable[[], object]) -> float:
    """Processor seconds of the fastest of some runs, so that the load of others does not count."""
    taken: list[float] = []
    for _ in range(REPEATS):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def latencies(space: Space) -> dict[str, Extra]:
    """Of an H100 by its roofline, and by a predictor that gives each operation and each call a femtosecond."""
    specs = [space.spec_at(point) for point in space.homogeneous().values()]
    pieces = [piece for spec in specs for part in parts_of(spec, Workload(), "forward") for piece in part]
    kinds = sorted({operator.kind for piece in pieces for operator in piece.operators})
    names = tuple(f"{kind}.{what}" for kind in kinds for what in ("flops", "calls"))
    known = Regression(names, np.full(len(names), 1e-15), np.eye(len(names)), np.linspace(-0.1, 0.1, 41), np.ones(41))
    profile = load_profile("h100")
    sources = {
        "roofline": RooflineLatency(profile),
        "predictor": PredictedLatency(Predictor(profile, "0" * 12, "float32", {"forward": known}, {"forward": 8e6})),
    }
    found = {name: from_parts(source, "float32", "forward", 0.5) for name, source in sources.items()}
    return {name: seconds for name, seconds in found.items() if seconds is not None}


def counting() -> list[dict[str, Any]]:
    """Candidates a second from point to all metrics."""
    space, rng = load_space(SHIPPED), random.Random(0)
    points = [space.complete({"body.layers.repeat": 24}, rng) for _ in range(POINTS)]
    table = CostTable(space, Workload())
    start = time.process_time()
    found = [table.figures(point) for point in points]
    cold = time.process_time() - start
    assert all(found[index] == metrics(space.spec_at(points[index])) for index in range(5))
    extended = CostTable(space, Workload(), latencies(space))
    assert len(extended.extras) == 2

    def together(costs: CostTable) -> list[Any]:
        return [figures for i in range(0, POINTS, SWEPT) for figures in costs.figures_of(points[i : i + SWEPT])]

    def one_by_one(costs: CostTable) -> list[Any]:
        return [costs.figures(point) for point in points]

    assert found == together(table) and together(extended) == one_by_one(extended)
    rows: list[dict[str, Any]] = []
    for costs, what, required in ((table, "", 5e4), (extended, ", with roofline and predictor", 2e4)):
        for count, how in ((one_by_one, "one at a time"), (together, f"{SWEPT} together")):
            rate = POINTS / seconds(lambda count=count, costs=costs: count(costs))
            row = {"what": f"candidates/s from tables, {how}{what}", "found": rate}
            rows.append({**row, "required": required, "met": rate >= required})
    whole = WHOLE / seconds(lambda: [metrics(space.spec_at(point)) for point in points[:WHOLE]])
    return [
        *rows,
        {"what": "candidates/s, first 2,000 of a fresh table", "found": POINTS / cold, "required": 0.0, "met": True},
        {"what": "candidates/s from whole specs", "found": whole, "required": 0.0, "met": True},
        {"what": "tables over whole specs, times", "found": rows[0]["found"] / whole, "required": 0.0, "met": True},
    ]


def repairing(budget: str) -> dict[str, Any]:
    """Median milliseconds of sampling a point and repairing it."""
    space, rng = load_space(SPACE), random.Random(0)
    repair = Repair(space, {}, Budget.parse(budget))
    assert repair.infeasible() is None
    for _ in range(20):
        repair(space.sample(rng), rng)
    taken: list[float] = []
    for _ in range(300):
        start = time.process_time()
        found = repair(space.sample(rng), rng)
        taken.append(time.process_time() - start)
        assert found is not None and repair.feasible(found)
    median = 1e3 * statistics.median(taken)
    return {"what": f"ms to sample and repair, {budget}", "found": median, "required": 5.0, "met": median <= 5}


def explaining() -> dict[str, Any]:
    """Seconds from a fresh space to the reason why a budget cannot be met."""
    start = time.process_time()
    reason = Repair(load_space(SPACE), {}, Budget.parse(IMPOSSIBLE)).infeasible()
    taken = time.process_time() - start
    assert reason is not None
    return {"what": "s to explain an impossible budget", "found": taken, "required": 2.0, "met": taken <= 2}


def validating() -> dict[str, Any]:
    """Seconds to read and check the space."""
    start = time.process_time()
    load_space(SPACE).validate()
    taken = time.process_time() - start
    return {"what": "s to read and validate the space", "found": taken, "required": 0.3, "met": taken <= 0.3}


if __name__ == "__main__":
    given = arguments("Counting and repairing candidates of a hybrid space.")
    rows = [*counting(), *map(repairing, BUDGETS), explaining(), validating()]
    finish(publish("space", rows, given.json))
