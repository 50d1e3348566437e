"""Times as sums of counted work."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.hardware.regression import Regression, fit

NAMES = ("launches", "flops", "bytes")
TRUE = np.array([2e-6, 1e-10, 5e-10])


def measured(rows: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0.2, 1.0, (rows, 3)) * [1e3, 1e7, 3e6]
    return features, features @ TRUE * np.exp(noise * rng.standard_normal(rows))


def test_exact_times_give_the_coefficients_back() -> None:
    features, seconds = measured(12, 0.0)
    found = fit(features, seconds, NAMES)
    np.testing.assert_allclose(found.coefficients, TRUE, rtol=1e-6)
    assert found.error < 1e-6 and found.interval(0.9) == pytest.approx((1, 1), abs=1e-6)


@given(st.integers(0, 2**16), st.floats(1e-9, 1e9))
def test_the_unit_of_a_feature_changes_nothing(seed: int, unit: float) -> None:
    features, seconds = measured(15, 0.05, seed)
    scaled = features * [1.0, unit, 1.0]
    plain, other = fit(features, seconds, NAMES), fit(scaled, seconds, NAMES)
    np.testing.assert_allclose(other.predict(scaled), plain.predict(features), rtol=1e-6)


def test_costs_are_never_negative() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(1, 2, (20, 3))
    found = fit(features, 5 - features[:, 2], NAMES)
    assert (found.coefficients >= 0).all() and found.coefficients[2] == 0


def test_outliers_hardly_matter() -> None:
    features, seconds = measured(60, 0.02)
    seconds[:6] *= 8
    found = fit(features, seconds, NAMES)
    np.testing.assert_allclose(found.coefficients, TRUE, rtol=0.1)


def test_intervals_cover_what_they_say() -> None:
    covered, below = [], []
    for seed in range(40):
        features, seconds = measured(80, 0.1, seed)
        found = fit(features[:40], seconds[:40], NAMES)
        ratio = seconds[40:] / found.predict(features[40:])
        low, high = found.interval(0.8)
        covered.append(np.mean((low <= ratio) & (ratio <= high)))
        below.append(np.mean(ratio <= found.upper(0.9)))
    assert 0.76 < np.mean(covered) < 0.86 and 0.86 < np.mean(below) < 0.94


def test_intervals_are_as_wide_as_errors_of_that_size_are() -> None:
    rng = np.random.default_rng(0)
    features, seconds = measured(400, 0.0)
    sizes = 10 ** rng.uniform(-2, 2, 400)
    noise = rng.normal(0, 0.05, 400)
    sized = fit(features * sizes[:, None], seconds * sizes * (1 + noise * sizes**-0.3), NAMES)
    power = sized.scale.power
    assert -0.32 < power < -0.2
    small, large = 0.05 * sized.scale.pivot, 20 * sized.scale.pivot
    widths = [math.log(high / low) for low, high in (sized.interval(0.9, each) for each in (small, large))]
    assert widths[0] / widths[1] == pytest.approx(400**-power)
    assert sized.interval(0.9, 1e9) == sized.interval(0.9, sized.scale.high), "beyond what was timed as at its end"
    low, high = sized.interval(0.9, sized.predicted)
    held_out = 1 + sized.errors
    for part in np.array_split(np.argsort(sized.predicted), 4):
        assert 0.8 < np.mean((low <= held_out)[part] & (held_out <= high)[part]) < 0.98
    alike = fit(features * sizes[:, None], seconds * sizes * (1 + noise), NAMES)
    assert abs(alike.scale.power) < 0.05
    assert fit(features[:20], (seconds * (1 + noise))[:20], NAMES).scale.power == 0, "too few to tell"


@given(st.floats(-2, 2), st.floats(0.02, 0.98), st.integers(0, 99))
def test_quantiles_are_above_zero_and_grow_with_what_is_predicted(power: float, quantile: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    predicted = 10 ** rng.uniform(-4, 0, 60)
    errors = np.expm1(np.clip(rng.standard_t(3, 60) * 0.1 * (predicted / 1e-2) ** power, -1.5, 1.5))
    found = Regression(("a",), np.ones(1), np.zeros((1, 1)), errors, predicted)
    times = np.geomspace(1e-5, 10, 200)
    quantiles = times * found.upper(quantile, times)
    assert (quantiles > 0).all() and (np.diff(quantiles) > -1e-12 * quantiles[1:]).all()


def test_too_few_measurements_for_a_coverage_say_nothing() -> None:
    features, seconds = measured(8, 0.1)
    found = fit(features, seconds, NAMES)
    assert found.interval(0.95) == (0, math.inf) and found.upper(0.95) == math.inf
    low, high = found.interval(0.8)
    assert high == pytest.approx(1 / low) == pytest.approx(np.exp(np.abs(np.log1p(found.errors)).max()))
    assert found.upper(0.5) < math.inf


def test_a_prior_from_a_device_of_another_speed_helps_with_few_measurements() -> None:
    with_prior, alone = [], []
    features, seconds = measured(200, 0.02, 99)
    prior = fit(features, 7 * seconds, NAMES)
    for seed in range(20):
        features, seconds = measured(104, 0.1, seed)
        truth = features[4:] @ TRUE
        with_prior.append(
            np.mean(np.abs(fit(features[:4], seconds[:4], NAMES, prior=prior).predict(features[4:]) / truth - 1))
        )
        alone.append(np.mean(np.abs(fit(features[:4], seconds[:4], NAMES).predict(features[4:]) / truth - 1)))
    assert np.mean(with_prior) < 0.8 * np.mean(alone)


def test_a_feature_that_never_occurs_keeps_the_priors_cost() -> None:
    features, seconds = measured(30, 0.0)
    prior = fit(features, 3 * seconds, NAMES)
    features[:, 1] = 0
    seconds = features @ TRUE
    found = fit(features, seconds, NAMES, prior=prior)
    np.testing.assert_allclose(found.coefficients, TRUE, rtol=1e-4)
    assert fit(features, seconds, NAMES).coefficients[1] == 0


def test_it_survives_json() -> None:
    found = fit(*measured(12, 0.1), NAMES)
    again = Regression.from_data(json.loads(json.dumps(found.as_data())))
    assert again.as_data() == found.as_data() and again.interval(0.8) == pytest.approx(found.interval(0.8), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ["a"]}, "other sizes"),
        ({"coefficients": [1.0, -1.0, 0.0]}, "not negative"),
        ({"coefficients": [1.0, float("nan"), 0.0]}, "finite"),
        ({"covariance": [[1.0]]}, "3 costs above zero whose covariance has other sizes"),
        ({"errors": ["?"]}, "no regression"),
        ({"predicted": [1.0]}, "other sizes"),
        ({"predicted": [0.0] * 12}, "above zero"),
        ({"errors": [], "predicted": []}, "two measurements"),
        ({"covariance": [[1.0, 0.0, 0.0], [0.0, -1.0, 0.0], [0.0, 0.0, 1.0]]}, "no variance is below zero"),
        ({"covariance": [[float("nan")] * 3] * 3}, "finite"),
        ({"errors": [0.1] * 11 + [-1.0]}, "above -1"),
        ({"errors": [0.1] * 11 + [float("nan")]}, "above -1"),
        ({"names": ["a", "b", "a"]}, "has a twice"),
        ({"shrinkage": "much"}, "no regression"),
    ],
)
def test_damaged_data_is_an_error(change: dict[str, object], message: str) -> None:
    data = fit(*measured(12, 0.1), NAMES).as_data()
    with pytest.raises(ZooError, match=message):
        Regression.from_data({**data, **change})
    with pytest.raises(ZooError, match="no regression: KeyError"):
        Regression.from_data({})


def test_wrong_measurements_are_errors() -> None:
    features, seconds = measured(5, 0.1)
    with pytest.raises(ZooError, match=r"row 2 has -1"):
        fit(features, [1, 1, -1, 1, 1], NAMES)
    with pytest.raises(ZooError, match="above zero; row 0 has nan"):
        fit(features, [float("nan"), 1, 1, 1, 1], NAMES)
    with pytest.raises(ZooError, match="finite and not negative"):
        fit(-features, seconds, NAMES)
    with pytest.raises(ZooError, match="at least two measurements, found 1"):
        fit(features[:1], seconds[:1], NAMES)
    with pytest.raises(ZooError, match="a name for each feature"):
        fit(features, seconds, NAMES[:2])
    prior = fit(features, seconds, ("launches", "flops", "hops"))
    with pytest.raises(ZooError, match="further features: hops"):
        fit(features, seconds, NAMES, prior=prior)


def test_times_without_variance_are_fitted() -> None:
    found = fit(np.ones((6, 3)), np.full(6, 0.5), NAMES)
    np.testing.assert_allclose(found.predict(np.ones((2, 3))), 0.5)


@pytest.mark.parametrize("count", [19, 39, 59, 79])
def test_ranks_that_are_whole_numbers_survive_rounding(count: int) -> None:
    errors = np.arange(count) / 100
    found = Regression(("a",), np.ones(1), np.zeros((1, 1)), errors, np.ones(count))
    tail = (count + 1) // 20
    assert found.interval(0.9) == pytest.approx((1 + errors[tail - 1], 1 + errors[count - tail]))
