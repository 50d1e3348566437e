"""Times as sums of counted work: non-negative coefficients fitted robustly on relative error, with honest intervals.

Every term of the sum is a figure that is known beforehand, such as multiplications, bytes or launches, so a coefficient
is a cost per unit, and cannot be negative. Few measurements are enough, fewer still with another device as a prior.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import nnls

from zoo.errors import ZooError

Floats = NDArray[np.float64]

HUBER = 1.345
"""Residuals beyond so many standard deviations count by their size in place of its square (Huber 1964)."""
ROUNDS = 6
"""Rounds of reweighting; weights hardly move after the fourth."""
FOLDS = 20
"""Into how many groups wholes are divided, each predicted from the parts of all others."""
SHRINKAGES = (0.0, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of a prior that leave-one-out error chooses from."""
RIDGE = 1e-9
"""The strength with which costs are drawn to zero that nothing is known of: no more than tells features apart that are
multiples of each other.
"""
FEWEST_SCALED = 30
"""Errors from which on they tell whether they change with the size of what is predicted."""
LEAST_ERROR = 0.1
"""What is added to errors whose logarithm is fitted, in shares of their median, so that those near zero do not decide.
"""
TELLING = 2.0
"""Standard deviations that a power is off zero by for it to be told from none."""
MOST_POWER = 0.5
"""The power beyond which errors change with something else than the size of a prediction."""
ROUNDING = 1e-9
"""What a rank may be off by, as `(1 - 0.9) / 2` is off from 0.05."""
LEAST_NOISE = 1e-4
"""Relative deviations below this are no outliers, however small all others are."""


@dataclass(frozen=True)
class Scale:
    """How far errors of a prediction of `s` seconds reach, beside those of one of `pivot`: `(s / pivot)^power`, for `s`
    from `low` to `high`; beyond them as at the ends.
    """

    power: float = 0.0
    pivot: float = 1.0
    low: float = 1.0
    high: float = 1.0

    def __call__(self, seconds: ArrayLike) -> Any:
        return (np.clip(seconds, self.low, self.high) / self.pivot) ** self.power


@dataclass(frozen=True)
class Regression:
    """`seconds = sum_j coefficients_j features_j`, what is known of its errors, and how sure the coefficients are.

    names: of the features. covariance: of the coefficients, `[features, features]`, as far as those above zero vary;
    errors: relative errors of each measurement, or each whole of parts, as `predicted` without it, in seconds.
    shrinkage: the strength of the prior.
    """

    names: tuple[str, ...]
    coefficients: Floats
    covariance: Floats
    errors: Floats
    predicted: Floats
    shrinkage: float = 0.0

    def predict(self, features: ArrayLike) -> Floats:
        """Seconds for `[rows, features]`."""
        return np.asarray(features, dtype=np.float64) @ self.coefficients

    def upper(self, quantile: float, seconds: ArrayLike | None = None) -> Any:
        """The factors on predictions of so many `seconds` below which a share `quantile` of new measurements lies.

        The `ceil((n + 1) quantile)`-th smallest of `n` errors, as a conformal interval takes it (Vovk et al. 2005; on
        leave-one-out errors, Barber et al. 2021, arXiv 1905.02928): of logarithms of measured over predicted times,
        each over its `scale` (Lei et al. 2018, arXiv 1604.04173, section 5.2). Infinite where there are too few
        measurements to say. Times the predictions they grow with these.
        """
        if not 0 < quantile < 1:
            raise ZooError(f"a quantile lies between 0 and 1, found {quantile}")
        rank = math.ceil((len(self.errors) + 1) * quantile - ROUNDING)
        return self._factor(math.inf if rank > len(self.errors) else self._scores[rank - 1], seconds)

    def lower(self, quantile: float, seconds: ArrayLike | None = None) -> Any:
        """The factors on predictions above which a share `1 - quantile` of new measurements lies; 0 where unknown."""
        rank = math.floor((len(self.errors) + 1) * quantile + ROUNDING)
        return self._factor(-math.inf if rank < 1 else self._scores[rank - 1], seconds)

    def interval(self, coverage: float, seconds: ArrayLike | None = None) -> tuple[Any, Any]:
        """The factors on predictions between which a share `coverage` of new measurements lies, as many beyond either
        end; by default on those of a usual size. Where there are too few errors to tell one end from the other, both
        are equally far away.
        """
        outside, count = (1 - coverage) / 2, len(self.errors) + 1
        rank = math.ceil(count * coverage - ROUNDING)
        if count * outside + ROUNDING >= 1 or rank >= count:
            return self.lower(outside, seconds), self.upper(1 - outside, seconds)
        furthest = float(np.sort(np.abs(self._scores))[rank - 1])
        return self._factor(-furthest, seconds), self._factor(furthest, seconds)

    def _factor(self, score: float, seconds: ArrayLike | None) -> Any:
        """The factor of a score: no further from one than leaves a longer prediction's larger than a shorter one's."""
        power = abs(self.scale.power)
        if seconds is None or not power or math.isinf(score):
            return math.exp(score)
        return np.exp(np.clip(score * self.scale(seconds), -1 / power, 1 / power))

    @cached_property
    def _scores(self) -> Floats:
        return np.sort(np.log1p(self.errors) / self.scale(self.predicted))

    @cached_property
    def scale(self) -> Scale:
        """How errors change with the size of a prediction: the power that fits their logarithms, where there are
        enough to tell that from none.
        """
        if len(self.errors) < FEWEST_SCALED:
            return Scale()
        reach = np.abs(np.log1p(self.errors))
        logs, sizes = np.log(self.predicted), np.log(reach + max(LEAST_ERROR * float(np.median(reach)), LEAST_NOISE))
        away = logs - logs.mean()
        power = float(away @ sizes / max(float(away @ away), 1e-300))
        left = sizes - sizes.mean() - power * away
        deviation = math.sqrt(float(left @ left) / (len(logs) - 2) / max(float(away @ away), 1e-300))
        if abs(power) < TELLING * deviation:
            return Scale()
        power = min(max(power, -MOST_POWER), MOST_POWER)
        return Scale(power, math.exp(logs.mean()), float(self.predicted.min()), float(self.predicted.max()))

    def widened(self, names: Sequence[str]) -> Self:
        """The same over more features, of which those that it does not know cost nothing."""
        places = [list(names).index(name) for name in self.names]
        coefficients, covariance = np.zeros(len(names)), np.zeros((len(names), len(names)))
        coefficients[places] = self.coefficients
        covariance[np.ix_(places, places)] = self.covariance
        return replace(self, names=tuple(names), coefficients=coefficients, covariance=covariance)

    def judged(self, rows: NDArray[np.bool_]) -> Self:
        """The same, whose errors are those of some of the measurements only."""
        return replace(self, errors=self.errors[rows], predicted=self.predicted[rows])

    @property
    def error(self) -> float:
        """Mean absolute relative error on measurements that the fit has not seen."""
        return float(np.mean(np.abs(self.errors)))

    def as_data(self) -> dict[str, Any]:
        """Everything, as data for JSON; of the covariance what belongs to coefficients above zero."""
        active = np.flatnonzero(self.coefficients)
        return {
            "names": list(self.names),
            "coefficients": _rounded(self.coefficients),
            "covariance": [_rounded(row, 3) for row in self.covariance[np.ix_(active, active)]],
            "errors": _rounded(self.errors),
            "predicted": _rounded(self.predicted),
            "shrinkage": self.shrinkage,
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """What `as_data` gave; a `ZooError` says what is missing or does not fit."""
        try:
            names = tuple(map(str, data["names"]))
            keys = ("coefficients", "covariance", "errors", "predicted")
            coefficients, among_active, errors, predicted = (np.asarray(data[key], dtype=np.float64) for key in keys)
            shrinkage = float(data["shrinkage"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ZooError(f"no regression: {type(error).__name__}: {error}") from None
        count, active = len(names), np.flatnonzero(coefficients)
        if len(set(names)) < count:
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ZooError(f"a regression that has {', '.join(twice)} twice")
        if coefficients.shape != (count,) or errors.ndim != 1 or predicted.shape != errors.shape:
            raise ZooError(f"a regression on {count} features whose coefficients or errors have other sizes")
        if not (np.isfinite(errors).all() and (errors > -1).all()):
            raise ZooError("the errors of a regression are shares by which times exceed predictions, above -1")
        if len(errors) < 2 or not (np.isfinite(predicted).all() and (predicted > 0).all()):
            raise ZooError("a regression has predicted two measurements at least, finite and above zero")
        if not np.isfinite(coefficients).all() or (coefficients < 0).any():
            raise ZooError("the coefficients of a regression are costs, finite and not negative")
        if among_active.size != len(active) ** 2:
            raise ZooError(f"a regression with {len(active)} costs above zero whose covariance has other sizes")
        if not (np.isfinite(among_active).all() and (among_active.reshape(len(active), -1).diagonal() >= 0).all()):
            raise ZooError("a covariance is finite, and no variance is below zero")
        covariance = np.zeros((count, count))
        covariance[np.ix_(active, active)] = among_active.reshape(len(active), len(active))
        return cls(names, coefficients, covariance, errors, predicted, shrinkage)


def _rounded(values: Floats, digits: int = 6) -> list[float]:
    """With more digits than any measurement has."""
    return [float(f"{value:.{digits}g}") for value in values]


@dataclass(frozen=True)
class Wholes:
    """What the rows of a fit are parts of, timed by themselves: models, where the rows are their modules.

    of: for each row the whole that it belongs to. features, seconds: of each whole, as `[wholes, features]`.
    """

    of: NDArray[np.intp]
    features: Floats
    seconds: Floats

    def folds(self) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp]]]:
        """The rows of a few wholes, and these few; every whole is among the few once."""
        for few in _few(len(self.seconds)):
            yield np.flatnonzero(np.isin(self.of, few)), few


def fit(
    features: ArrayLike,
    seconds: ArrayLike,
    names: Sequence[str],
    *,
    prior: Regression | None = None,
    wholes: Wholes | None = None,
) -> Regression:
    """Fit times to features, `[rows, features]` and `[rows]`.

    Minimises `sum_i w_i huber(features_i c / seconds_i - 1) + s sum_j (c_j - p_j)^2` over `c >= 0`, each coefficient in
    units of its mean share; `p` is the prior's coefficients scaled to these times, the second sum is over the features
    that the prior knows, and `s` is chosen by leave-one-out error. `w` is one or, where rows are parts of `wholes`, the
    share of a row in its whole; then the coefficients are scaled so that half of the wholes take longer than predicted,
    and errors are those of wholes that the fit has not seen. Features that never occur keep the prior's cost, or zero.
    O(rows features^2) for each of a few solutions.

    Raises `ZooError` for sizes that do not fit, and for times or features that are negative or not finite.
    """
    given, times = np.asarray(features, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    _check(given, times, names, prior)
    if prior is None:
        start, known = np.zeros(len(names)), np.zeros(len(names), dtype=bool)
    else:
        known = np.isin(names, prior.names)
        start = _scaled(prior.widened(names).coefficients, known, given, times)
    strengths = SHRINKAGES if prior is not None else SHRINKAGES[:1]
    fits = [_solved(given, times, start, known, strength, wholes) for strength in strengths]
    coefficients, covariance, errors, strength = min(fits, key=lambda found: float(np.mean(np.abs(found[2]))))
    absent = ~given.any(axis=0)
    coefficients = np.where(absent, start, coefficients)
    took = times if wholes is None else wholes.seconds
    return Regression(tuple(names), coefficients, covariance, errors, took / (1 + errors), strength)


def slope(x: Floats, y: Floats) -> float:
    """Of the line through the origin that fits `y` robustly."""
    found, weights = 0.0, np.ones(len(x))
    for _ in range(ROUNDS):
        found = float((weights * x * y).sum() / max(float((weights * x * x).sum()), 1e-300))
        weights, _ = _huber(y - found * x)
    return found


def _check(features: Floats, seconds: Floats, names: Sequence[str], prior: Regression | None) -> None:
    if features.ndim != 2 or seconds.shape != features.shape[:1] or features.shape[1] != len(names):
        raise ZooError(
            f"{list(features.shape)} features with {len(names)} names and {list(seconds.shape)} times; expected "
            "[rows, features], a name for each feature and a time for each row"
        )
    if len(seconds) < 2:
        raise ZooError(f"a fit needs at least two measurements, found {len(seconds)}")
    if not (np.isfinite(features).all() and (features >= 0).all()):
        raise ZooError("features are counts: finite and not negative")
    wrong = np.flatnonzero(~(np.isfinite(seconds) & (seconds > 0)))
    if len(wrong):
        raise ZooError(f"measured times are above zero; row {wrong[0]} has {seconds[wrong[0]]}")
    missing = sorted(set(prior.names if prior is not None else ()) - set(names))
    if missing:
        raise ZooError(f"the prior was fitted to further features: {', '.join(missing)}")


def _scaled(coefficients: Floats, known: NDArray[np.bool_], features: Floats, seconds: Floats) -> Floats:
    """The prior's coefficients for a device that is some constant times slower, whatever else there is beside them."""
    predicted = features @ coefficients
    usable = predicted > 0
    if not usable.any():
        return coefficients
    if known.all():
        return coefficients * np.median(seconds[usable] / predicted[usable])
    columns = np.column_stack([predicted, features[:, ~known]])
    unit = np.maximum(columns.mean(axis=0), 1e-300)
    scale = nnls(columns / unit / seconds[:, None], np.ones(len(seconds)))[0][0] / unit[0]
    return coefficients * scale


def _solved(
    features: Floats,
    seconds: Floats,
    prior: Floats,
    known: NDArray[np.bool_],
    strength: float,
    wholes: Wholes | None,
) -> tuple[Floats, Floats, Floats, float]:
    """Coefficients, their covariance, errors on what was held out, and the strength itself."""
    unit = features.mean(axis=0)
    unit[unit == 0] = 1.0
    shares = features / unit / seconds[:, None]
    anchor = prior * unit
    # A share of the whole is what the prior may differ by, whatever the feature's unit.
    strengths = np.where(known, max(strength, RIDGE), RIDGE)
    penalty = np.sqrt(strengths * len(seconds)) / float(np.median(seconds))
    importance = np.ones(len(seconds)) if wholes is None else np.sqrt(seconds / wholes.seconds[wholes.of])
    weights = importance
    for _ in range(ROUNDS):
        found = _least(_problem(shares, weights), anchor, penalty)
        trust, noise = _huber(shares @ found - 1)
        weights = importance * np.sqrt(trust)
    whole = shares if wholes is None else wholes.features / unit / wholes.seconds[:, None]
    scale = 1.0 if wholes is None else 1 / max(float(np.median(whole @ found)), 1e-6)
    predicted = np.empty(len(whole))
    folds = [(row, row) for row in np.arange(len(seconds))[:, None]] if wholes is None else [*wholes.folds()]
    rest = _leaving_out(_problem(shares, weights), [rows for rows, _ in folds])
    for (_, few), problem in zip(folds, rest, strict=True):
        predicted[few] = scale * whole[few] @ _least(problem, anchor, penalty)
    # Measured over predicted: the factor by which a new measurement may exceed its prediction.
    errors = 1 / np.maximum(predicted, 1e-6) - 1
    active = np.flatnonzero(found > 0)
    normal = (shares * weights[:, None]).T @ (shares * weights[:, None]) + np.diag(penalty**2)
    covariance = np.zeros_like(normal)
    covariance[np.ix_(active, active)] = np.linalg.pinv(normal[np.ix_(active, active)]) * noise**2
    return scale * found / unit, scale**2 * covariance / np.outer(unit, unit), errors, strength


def _huber(residuals: Floats) -> tuple[Floats, float]:
    """How much each residual counts, and the standard deviation of those that are no outliers."""
    sizes = np.abs(residuals)
    noise = max(LEAST_NOISE, 1.4826 * float(np.median(sizes)))
    return np.minimum(1.0, HUBER * noise / np.maximum(sizes, 1e-300)), noise


def _few(count: int) -> Iterator[NDArray[np.intp]]:
    """Numbers up to `count`, in `FOLDS` groups."""
    for fold in range(min(FOLDS, count)):
        yield np.arange(fold, count, FOLDS)


def _problem(shares: Floats, weights: Floats) -> Floats:
    """`|shares c - 1|^2` with weights, as the equations `[rows, columns + 1]` whose last column is to be reached."""
    return np.column_stack([shares, np.ones(len(shares))]) * weights[:, None]


def _reduced(problem: Floats) -> Floats:
    """The same in at most as many rows as there are columns."""
    return np.asarray(np.linalg.qr(problem, mode="r")) if len(problem) > problem.shape[1] else problem


def _leaving_out(problem: Floats, groups: Sequence[NDArray[np.intp]]) -> Iterator[Floats]:
    """For each group of rows the problem without them.

    What lies before a group and what lies behind it are reduced one after the other, so that no row is met more than
    a few times however many groups there are.
    """
    each = [_reduced(problem[group]) for group in groups]
    for before, behind in zip(_up_to(each), reversed([*_up_to(each[::-1])]), strict=True):
        yield np.concatenate([before, behind])


def _up_to(problems: Sequence[Floats]) -> Iterator[Floats]:
    """For each problem all that lie before it, together."""
    none = problems[0][:0]
    return accumulate(problems[:-1], lambda some, more: _reduced(np.concatenate([some, more])), initial=none)


def _least(problem: Floats, anchor: Floats, penalty: Floats) -> Floats:
    """Its non-negative solution, near `anchor` as far as the `penalty` on each coefficient says."""
    problem = _reduced(np.concatenate([problem, np.column_stack([np.diag(penalty), penalty * anchor])]))
    return nnls(problem[:, :-1], problem[:, -1])[0]
