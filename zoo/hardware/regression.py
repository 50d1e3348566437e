"""Times as sums of counted work: non-negative coefficients fitted robustly on relative error, with honest intervals.

Every term of the sum is a figure that is known beforehand, such as multiplications, bytes or launches, so a coefficient
is a cost per unit, and cannot be negative. Few measurements are enough, fewer still with another device as a prior.
What times do that no sum can say, such as to grow faster than the work once caches are too small for all of it, is
learned behind the sum, where that predicts measurements better that were held out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
GAIN = 0.05
"""The share by which errors of what was held out have to fall for a growth to be kept."""
FEWEST_GROWN = 30
"""Measurements, or wholes, from which on a growth is looked for."""
MOST_GROWTH = 0.5
"""The power beyond which a growth is none of caches but of a wrong sum."""
ROUNDING = 1e-9
"""What a rank may be off by, as `(1 - 0.9) / 2` is off from 0.05."""
LEAST_NOISE = 1e-4
"""Relative deviations below this are no outliers, however small all others are."""


@dataclass(frozen=True)
class Growth:
    """What is learned behind a sum `s` of seconds: a time is `s (s / pivot)^power`, for sums from `low` to `high`.

    Beyond these, which are those that it was learned from, times grow as the sums do.
    """

    power: float
    pivot: float
    low: float
    high: float

    def __call__(self, seconds: float) -> float:
        """The time for a sum; it grows with the sum."""
        return seconds * (min(max(seconds, self.low), self.high) / self.pivot) ** self.power

    def inverse(self, time: float) -> float:
        """The sum that has a time."""
        if self(self.low) < time < self(self.high):
            return self.pivot * (time / self.pivot) ** (1 / (1 + self.power))
        end = self.low if time <= self(self.low) else self.high
        return time * (end / self.pivot) ** -self.power


PROPORTIONAL = Growth(0.0, 1.0, 1.0, 1.0)
"""Nothing is learned: a time is the sum."""


@dataclass(frozen=True)
class Regression:
    """`seconds = growth(sum_j coefficients_j features_j)`, what is known of its errors, and how sure the coefficients
    are.

    names: of the features. covariance: of the coefficients, `[features, features]`, as far as those above zero vary;
    errors: relative errors of each measurement, or each whole of parts, as predicted without it. shrinkage: the
    strength of the prior.
    """

    names: tuple[str, ...]
    coefficients: Floats
    covariance: Floats
    errors: Floats
    shrinkage: float = 0.0
    growth: Growth = PROPORTIONAL

    def predict(self, features: ArrayLike) -> Floats:
        """Seconds for `[rows, features]`."""
        return np.array([self.growth(float(each)) for each in self.sums(features)])

    def sums(self, features: ArrayLike) -> Floats:
        """What adds up over the parts of a whole, for `[rows, features]`."""
        return np.asarray(features, dtype=np.float64) @ self.coefficients

    def spread(self, coverage: float) -> float:
        """The relative error that a new measurement exceeds with probability `1 - coverage`.

        The quantile of the errors that a conformal interval takes: the `ceil((n + 1) coverage)`-th smallest of `n`
        (Vovk et al. 2005; on leave-one-out errors, Barber et al. 2021, arXiv 1905.02928). Infinite where there are too
        few measurements to say.
        """
        if not 0 < coverage < 1:
            raise ZooError(f"a coverage lies between 0 and 1, found {coverage}")
        rank = math.ceil((len(self.errors) + 1) * coverage - ROUNDING)
        return math.inf if rank > len(self.errors) else float(np.sort(np.abs(self.errors))[rank - 1])

    def upper(self, quantile: float) -> float:
        """The factor on a prediction below which a share `quantile` of new measurements lies."""
        if not 0 < quantile < 1:
            raise ZooError(f"a quantile lies between 0 and 1, found {quantile}")
        rank = math.ceil((len(self.errors) + 1) * quantile - ROUNDING)
        return math.inf if rank > len(self.errors) else 1 + float(np.sort(self.errors)[rank - 1])

    def lower(self, quantile: float) -> float:
        """The factor on a prediction above which a share `1 - quantile` of new measurements lies; 0 where unknown."""
        rank = math.floor((len(self.errors) + 1) * quantile + ROUNDING)
        return 0.0 if rank < 1 else 1 + float(np.sort(self.errors)[rank - 1])

    def interval(self, coverage: float) -> tuple[float, float]:
        """The factors on a prediction between which a share `coverage` of new measurements lies, as many beyond either
        end.
        """
        outside = (1 - coverage) / 2
        return self.lower(outside), self.upper(1 - outside)

    def widened(self, names: Sequence[str]) -> Self:
        """The same over more features, of which those that it does not know cost nothing."""
        places = [list(names).index(name) for name in self.names]
        coefficients, covariance = np.zeros(len(names)), np.zeros((len(names), len(names)))
        coefficients[places] = self.coefficients
        covariance[np.ix_(places, places)] = self.covariance
        return replace(self, names=tuple(names), coefficients=coefficients, covariance=covariance)

    def judged(self, rows: NDArray[np.bool_]) -> Self:
        """The same, whose errors are those of some of the measurements only."""
        return replace(self, errors=self.errors[rows])

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
            "covariance": [_rounded(row) for row in self.covariance[np.ix_(active, active)]],
            "errors": _rounded(self.errors),
            "shrinkage": self.shrinkage,
            "growth": asdict(self.growth),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Self:
        """What `as_data` gave; a `ZooError` says what is missing or does not fit."""
        try:
            names = tuple(map(str, data["names"]))
            arrays = (np.asarray(data[key], dtype=np.float64) for key in ("coefficients", "covariance", "errors"))
            coefficients, among_active, errors = arrays
            growth = Growth(**{key: float(value) for key, value in data["growth"].items()})
            shrinkage = float(data["shrinkage"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ZooError(f"no regression: {type(error).__name__}: {error}") from None
        count, active = len(names), np.flatnonzero(coefficients)
        if coefficients.shape != (count,) or errors.ndim != 1:
            raise ZooError(f"a regression on {count} features whose coefficients or errors have other sizes")
        if not np.isfinite(coefficients).all() or (coefficients < 0).any():
            raise ZooError("the coefficients of a regression are costs, finite and not negative")
        if among_active.size != len(active) ** 2:
            raise ZooError(f"a regression with {len(active)} costs above zero whose covariance has other sizes")
        if not (-1 < growth.power < math.inf and 0 < growth.pivot < math.inf and 0 < growth.low <= growth.high):
            raise ZooError(f"times grow with the sums that they follow from, found {growth}")
        covariance = np.zeros((count, count))
        covariance[np.ix_(active, active)] = among_active.reshape(len(active), len(active))
        return cls(names, coefficients, covariance, errors, shrinkage, growth)


def _rounded(values: Floats) -> list[float]:
    """With more digits than any measurement has."""
    return [float(f"{value:.6g}") for value in values]


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
    and errors are those of wholes that the fit has not seen. A `Growth` behind the sum is fitted to what was held out,
    and kept where it predicts that better, each part of it from the growth of the rest.
    Features that never occur keep the prior's cost, or zero. O(rows features^2) for each of a few solutions.

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
    growth, errors = _grown(took / (1 + errors), errors)
    return Regression(tuple(names), coefficients, covariance, errors, strength, growth)


def _grown(sums: Floats, errors: Floats) -> tuple[Growth, Floats]:
    """The growth behind sums of what was held out, and the errors that are left with it: none, and the same, where they
    hardly become less.
    """
    if len(errors) < FEWEST_GROWN:
        return PROPORTIONAL, errors
    pivot = float(np.median(sums))
    logs, wanted = np.log(sums / pivot), np.log1p(errors)
    left = np.empty(len(errors))
    for few in _few(len(errors)):
        rest = np.delete(np.arange(len(errors)), few)
        left[few] = np.expm1(wanted[few] - _power(logs[rest], wanted[rest]) * logs[few])
    if np.abs(left).mean() > (1 - GAIN) * np.abs(errors).mean():
        return PROPORTIONAL, errors
    return Growth(_power(logs, wanted), pivot, float(sums.min()), float(sums.max())), left


def _power(x: Floats, y: Floats) -> float:
    return min(max(slope(x, y), -MOST_GROWTH), MOST_GROWTH)


def slope(x: Floats, y: Floats) -> float:
    """Of the line through the origin that fits `y` robustly."""
    found, weights = 0.0, np.ones(len(x))
    for _ in range(ROUNDS):
        found = float((weights * x * y).sum() / max(float((weights * x * x).sum()), 1e-300))
        weights, _ = _huber(y - found * x)
    return found


def without(regression: Regression, *names: str) -> Regression:
    """The same with some features costing nothing."""
    kept = np.array([name not in names for name in regression.names])
    return replace(regression, coefficients=np.where(kept, regression.coefficients, 0.0))


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
    penalty = np.where(known, math.sqrt(strength * len(seconds)) / float(np.median(seconds)), 0.0)
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
    if penalty.any():
        problem = np.concatenate([problem, np.column_stack([np.diag(penalty), penalty * anchor])])
    problem = _reduced(problem)
    return nnls(problem[:, :-1], problem[:, -1])[0]
