"""Schedules at their corners, against the formulas, and against torch's own cosine."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zoo.train.schedule import cosine, warmup_stable_decay


def test_warmup_rises_linearly_and_wastes_no_step() -> None:
    assert [cosine(step, 100, warmup=4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert [warmup_stable_decay(step, 100, warmup=4, decay=10) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_cosine_corners() -> None:
    assert cosine(10, 110, warmup=10, minimum=0.1) == 1.0
    assert cosine(60, 110, warmup=10, minimum=0.1) == pytest.approx(0.55)
    assert cosine(110, 110, warmup=10, minimum=0.1) == pytest.approx(0.1)
    assert cosine(10**6, 110, warmup=10, minimum=0.1) == pytest.approx(0.1)


def test_cosine_agrees_with_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.2)
    for step in range(50):
        assert cosine(step, 50, minimum=0.2) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize(("shape", "half"), [("linear", 0.5), ("sqrt", 1 - math.sqrt(0.5))])
def test_warmup_stable_decay_corners(shape, half: float) -> None:
    def factor(step: int) -> float:
        return warmup_stable_decay(step, 100, warmup=10, decay=20, minimum=0.2, shape=shape)

    assert [factor(step) for step in (9, 10, 50, 79, 80)] == [1.0] * 5
    assert factor(90) == pytest.approx(0.2 + 0.8 * half)
    assert factor(100) == pytest.approx(0.2)
    assert factor(1000) == pytest.approx(0.2)


def test_no_decay_is_constant_and_all_warmup_is_allowed() -> None:
    assert [warmup_stable_decay(step, 10) for step in (0, 5, 10, 20)] == [1.0] * 4
    assert cosine(9, 10, warmup=10) == 1.0
    assert cosine(10, 10, warmup=10, minimum=0.3) == pytest.approx(0.3)


@given(
    steps=st.integers(1, 500),
    warmup=st.floats(0, 0.5),
    decay=st.floats(0, 0.5),
    minimum=st.floats(0, 1),
)
def test_factors_rise_then_never_rise_again(steps: int, warmup: float, decay: float, minimum: float) -> None:
    rise, fall = round(steps * warmup), round(steps * decay)
    for factors in (
        [cosine(step, steps, warmup=rise, minimum=minimum) for step in range(steps)],
        [warmup_stable_decay(step, steps, warmup=rise, decay=fall, minimum=minimum) for step in range(steps)],
    ):
        assert all(0 <= factor <= 1 for factor in factors)
        assert factors[:rise] == sorted(factors[:rise])
        assert factors[rise:] == sorted(factors[rise:], reverse=True)
        assert all(factor >= minimum - 1e-12 for factor in factors[rise:])
