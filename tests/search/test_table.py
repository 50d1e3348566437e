from __future__ import annotations

import itertools
import random
from typing import Any

import numpy as np
import pytest
import spaces
from hypothesis import given, settings
from hypothesis import strategies as st

from zoo.accounting import Place, Workload, metrics, places
from zoo.errors import SpecError, ZooError
from zoo.search import table
from zoo.search.budget import METRICS
from zoo.search.options import largest_sum, smallest_sum
from zoo.search.program import Point
from zoo.search.space import Space, load_space
from zoo.search.table import CostTable, Extra
from zoo.spec.document import spec_names

REAL = sorted(spaces.real())
SHIPPED = [name for name in spec_names() if load_space(name).decisions]
WORKLOADS = [Workload(), Workload(batch=3, seq=12, past=40, dtype="bfloat16")]
COUNTED = [metric.name for metric in METRICS.values() if not metric.needs_measurement]


def counted(space: Space, point: Point, work: Workload) -> dict[str, Any] | None:
    """The figures of a whole spec, None if it is invalid."""
    try:
        return metrics(space.spec_at(point), work)
    except SpecError:
        return None


@pytest.mark.parametrize("work", WORKLOADS, ids=["default", "other"])
@pytest.mark.parametrize("name", [*REAL, *SHIPPED])
def test_figures_are_those_of_the_whole_spec(name: str, work: Workload) -> None:
    space = spaces.real()[name] if name in REAL else load_space(name)
    costs = CostTable(space, work)
    rng = random.Random(0)
    drawn = [space.sample(rng) for _ in range(12)]
    drawn += [space.mutate(point, rng, changes=3) for point in drawn]
    for point in drawn:
        assert costs.figures(point) == counted(space, point, work)
    assert costs.separable


@pytest.mark.parametrize("whole", [False, True], ids=["by layer", "whole"])
@pytest.mark.parametrize("name", REAL)
def test_extra_figures_follow_from_sums_over_the_parts(name: str, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    extras = {
        "seconds": Extra(lambda place: (place.component.cost(place.scope, place.tokens).traffic / 3e9,)),
        "mixers": Extra(
            lambda place: (float(hasattr(place.component, "mixer")), 1.0),
            lambda sums: 2 * sums[..., 0] * sums[..., 1] ** 2,
            ((1.0, 0.0), (0.0, 1.0)),
        ),
    }
    if whole:
        monkeypatch.setattr(table, "_hands_on", lambda place: False)
    space, work = spaces.real()[name], Workload(batch=2, seq=24)
    costs = CostTable(space, work, extras)
    rng = random.Random(0)
    for point in [space.sample(rng) for _ in range(12)]:
        expected = counted(space, point, work)
        if expected is not None:
            parts = list(places(space.spec_at(point).fill(), work))
            expected |= {
                "seconds": sum(extras["seconds"].part(place)[0] for place in parts),
                "mixers": 2 * sum(extras["mixers"].part(place)[0] for place in parts) * len(parts) ** 2,
            }
        assert costs.figures(point) == expected
    for name in extras:
        low, high = costs.range_of(name)
        assert 0 < low <= high


@pytest.mark.parametrize("seed", range(30))
def test_the_extremes_of_a_figure_that_is_no_sum_are_those_of_all_points(seed: int) -> None:
    """Layers are cheap while little is moved and dear when much is, so that which is best hangs on all others."""
    mixers = ("attention", "mamba2", "linear_attention", "pooling")
    space = Space.parse(
        "width: 64\nstem: {type: token, vocab: 256}\nhead: language_model\n"
        f"body: {{layers: {{repeat: 4, of: {{mixer: {{choice: [{', '.join(mixers)}]}}}}}}}}\n"
    )
    rng = np.random.default_rng(seed)
    sums = {name: tuple(rng.uniform(0, 1, 3) * (1e-3, 3e-3, 1e6)) for name in mixers}

    def part(place: Place) -> tuple[float, ...]:
        mixer = getattr(place.component, "mixer", None)
        return sums[mixer.type] if mixer is not None else (1e-4, 0.0, 1e5)

    def whole(sums: np.ndarray) -> np.ndarray:
        warm, chill, moved = np.moveaxis(sums, -1, 0)
        return warm + chill * moved**2 / (moved**2 + 4e12)

    views = [(0.0, 0.0, 1.0), *((1.0, share, 0.0) for share in (0.0, 0.5, 1.0))]
    costs = CostTable(space, Workload(), {"time": Extra(part, whole, views)})
    every = [(costs.figures(point) or {})["time"] for point in spaces.points(space)]
    assert len(every) == len(mixers) ** 4
    assert costs.range_of("time") == pytest.approx((min(every), max(every)))


@settings(max_examples=40)
@given(spaces.models(), st.integers(0, 99))
def test_figures_of_any_space_one_by_one_and_together(space: Space, seed: int) -> None:
    rng, work = random.Random(seed), Workload(batch=2, seq=12, past=5, dtype="bfloat16")
    points = [space.sample(rng) for _ in range(3)]
    points += [space.mutate(point, rng) for point in points]
    expected = [counted(space, point, work) for point in points]
    one, together = CostTable(space, work), CostTable(space, work)
    assert [one.figures(point) for point in points] == expected
    assert together.figures_of(points) == expected
    assert one.figures_of(points) == [together.figures(point) for point in points] == expected
    assert one.separable and together.separable


@pytest.mark.parametrize("whole", [False, True], ids=["by layer", "whole"])
def test_figures_of_many_points(whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if whole:
        monkeypatch.setattr(table, "_hands_on", lambda place: False)
    space = spaces.real()["shared"]
    costs = CostTable(space, Workload(), {"parts": Extra(lambda place: (1.0,))})
    rng = random.Random(0)
    points = [space.sample(rng) for _ in range(30)]
    found = costs.figures_of(points)
    assert None in found and len({figures["depth"] for figures in found if figures}) > 1
    assert found == [CostTable(space, Workload(), costs.extras).figures(point) for point in points]
    assert costs.figures_of([]) == [] and costs.figures_of(points[:1]) == found[:1]
    invalid = [point for point, figures in zip(points, found, strict=True) if figures is None]
    assert costs.figures_of(invalid) == [None] * len(invalid)


def test_an_extra_figure_may_not_hide_another() -> None:
    with pytest.raises(ZooError, match="may not be called 'flops'"):
        CostTable(spaces.hybrid(), Workload(), {"flops": Extra(lambda place: (0.0,))})


def test_figures_all_over_a_space() -> None:
    space = spaces.real()["stages"]
    costs = CostTable(space, Workload())
    for point in itertools.islice(spaces.points(space), 0, None, 101):
        assert costs.figures(point) == counted(space, point, Workload())


def test_layers_that_decide_about_what_follows_them() -> None:
    space = spaces.real()["residuals"]
    costs = CostTable(space, Workload())
    found = {tuple(point.values()): costs.figures(point) for point in spaces.points(space)}
    for point in spaces.points(space):
        assert found[tuple(point.values())] == counted(space, point, Workload())
    pre, post = found[5, *["pre"] * 5], found[5, *["post"] * 5]
    assert pre is not None and post is not None and pre["params"] == post["params"] + 32
    assert CostTable(space, Workload()).range_of("params")[0] == post["params"]


def test_layers_that_change_the_stream_are_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "_hands_on", lambda place: False)
    space = spaces.real()["everything"]
    costs = CostTable(space, Workload())
    rng = random.Random(0)
    for point in [space.sample(rng) for _ in range(10)]:
        assert costs.figures(point) == counted(space, point, Workload())
    assert not costs.separable


def test_forgetting_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_ROWS", 5)
    space = spaces.real()["everything"]
    costs = CostTable(space, Workload())
    rng = random.Random(0)
    for point in [space.sample(rng) for _ in range(20)]:
        assert costs.figures(point) == counted(space, point, Workload())


@pytest.mark.parametrize("name", REAL)
def test_forgetting_in_the_middle_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_ROWS", 20)
    space = spaces.real()[name]
    costs = CostTable(space, Workload())
    rng = random.Random(1)
    for point in [space.sample(rng) for _ in range(20)]:
        assert costs.figures(point) == counted(space, point, Workload())


def test_decisions_that_only_some_layers_ask() -> None:
    space = spaces.real()["optional"]
    every = list(spaces.points(space))
    found = [counted(space, point, Workload()) for point in every]
    for point, figures in zip(every, found, strict=True):
        assert CostTable(space, Workload()).figures(point) == figures
    values = [figures["params"] for figures in found if figures is not None]
    assert CostTable(space, Workload()).range_of("params") == (min(values), max(values))


def test_invalid_combinations_have_no_figures() -> None:
    space = spaces.real()["shared"]
    costs = CostTable(space, Workload())
    point = {**space.first(), "heads": 3}
    assert costs.figures(point) is None
    assert costs.figures({**point, "d": 48}) is not None
    assert costs.figures(point) is None


def test_every_metric_of_a_budget_has_a_figure() -> None:
    found = CostTable(spaces.hybrid(), Workload()).figures(spaces.hybrid().first())
    assert found is not None and set(COUNTED) <= found.keys()
    assert found["depth"] == 8


@pytest.mark.parametrize("metric", COUNTED)
def test_ranges_are_exact(metric: str) -> None:
    space = spaces.real()["stages"]
    costs = CostTable(space, Workload(batch=2))
    found = [figures for point in spaces.points(space) if (figures := costs.figures(point)) is not None]
    values = [figures[metric] for figures in found]
    assert costs.range_of(metric) == (min(values), max(values))
    for largest, expected in ((False, min(values)), (True, max(values))):
        value, point = costs.extreme(metric, largest=largest)
        figures = costs.figures(point)
        assert figures is not None and figures[metric] == value == expected


def test_ranges_of_large_layers_are_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "MAX_OPTIONS", 8)
    space = spaces.hybrid()
    bounded = CostTable(space, Workload()).range_of("params")
    monkeypatch.undo()
    assert bounded == CostTable(space, Workload()).range_of("params")


def test_a_space_without_valid_points_has_no_range() -> None:
    text = "width: 32\nstem: {type: token, vocab: 64}\nhead: language_model\nbody:\n  layers:\n"
    space = Space.parse(text + "    - {mixer: {type: attention, heads: {choice: [3, 5]}}}")
    with pytest.raises(ZooError, match="no point of the space was found to be valid"):
        CostTable(space, Workload()).range_of("params")


PARTS = st.lists(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=4), min_size=1, max_size=4
)


@given(PARTS, st.integers(0, 9))
def test_extreme_sums(parts: list[list[tuple[int, int]]], floor: int) -> None:
    def total(picked: tuple[tuple[int, int], ...]) -> int:
        return sum(value for value, _ in picked) + max(floor, *(peak for _, peak in picked))

    arrays = [tuple(np.array(column, dtype=float) for column in zip(*part)) for part in parts]
    every = [total(picked) for picked in itertools.product(*parts)]
    for search, expected in ((smallest_sum, min(every)), (largest_sum, max(every))):
        value, picks = search(arrays, floor)  # type: ignore[arg-type]
        assert value == expected == total(tuple(part[pick] for part, pick in zip(parts, picks)))
