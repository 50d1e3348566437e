"""Counting and repairing candidates of a hybrid space of 24 layers, one core.

    python -m bench.bench_space --json bench/results/space.json

Figures of random points with all 24 layers from warm tables, against the same figures counted from whole specs in the
same run; sampling and repair to a budget that few points meet; the time in which an impossible budget is explained.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.record import arguments, finish, publish
from zoo.accounting import Workload, metrics
from zoo.search.budget import Budget
from zoo.search.repair import Repair
from zoo.search.space import load_space
from zoo.search.table import CostTable

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


def counting() -> list[dict[str, Any]]:
    """Candidates a second from point to all metrics."""
    space, rng = load_space(SPACE), random.Random(0)
    points = [space.complete({"body.layers.repeat": 24}, rng) for _ in range(POINTS)]
    table = CostTable(space, Workload())
    start = time.process_time()
    found = [table.figures(point) for point in points]
    cold = time.process_time() - start
    assert all(found[index] == metrics(space.spec_at(points[index])) for index in range(5))
    warm = POINTS / seconds(lambda: [table.figures(point) for point in points])
    extras = {"one": lambda place: place.tokens.rows / 3e9, "two": lambda place: place.scope.width / 7e9}
    extended = CostTable(space, Workload(), extras)
    for point in points:
        extended.figures(point)
    more = POINTS / seconds(lambda: [extended.figures(point) for point in points])
    whole = WHOLE / seconds(lambda: [metrics(space.spec_at(point)) for point in points[:WHOLE]])
    return [
        {"what": "candidates/s from tables", "found": warm, "required": 5e4, "met": warm >= 5e4},
        {"what": "candidates/s from tables, two extras", "found": more, "required": 2e4, "met": more >= 2e4},
        {"what": "candidates/s, first 2,000 of a fresh table", "found": POINTS / cold, "required": 0.0, "met": True},
        {"what": "candidates/s from whole specs", "found": whole, "required": 0.0, "met": True},
        {"what": "tables over whole specs, times", "found": warm / whole, "required": 0.0, "met": True},
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
