from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from zoo.search.objective import parse_objectives
from zoo.search.trial import Archive, Status, Trial


def trial(number: int, values: tuple[float, ...], status: Status = "complete") -> Trial:
    return Trial(
        number=number, key=str(number), point={}, status=status, spec={}, spec_hash=str(number), shape={}, values=values
    )


def dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x <= y for x, y in zip(a, b, strict=True))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=30))
def test_the_archive_agrees_with_comparing_all_with_all(pairs: list[tuple[int, int]]) -> None:
    archive = Archive(parse_objectives("loss,accuracy"))
    for number, (loss, accuracy) in enumerate(pairs):
        archive.add(trial(number, (float(loss), float(accuracy))))
    costs = [(float(loss), -float(accuracy)) for loss, accuracy in pairs]
    assert archive.beaten.tolist() == [sum(dominates(a, b) for a in costs) for b in costs]
    best = {costs[member.number] for member in archive.front()}
    assert best == {b for b in costs if not any(dominates(a, b) for a in costs)}
    assert [costs[member.number] for member in archive.front()] == sorted(best)


def test_only_complete_trials_count_and_the_earlier_of_equals_is_best() -> None:
    archive = Archive(parse_objectives("loss"))
    assert archive.best() is None
    archive.add(trial(0, (), "failed"))
    archive.add(trial(1, (2.0,)))
    archive.add(trial(2, (2.0,)))
    best = archive.best()
    assert best is not None and best.number == 1
