"""What layers can be, as arrays: to compare all settings of all layers at once, and to find the extremes of a sum."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from zoo.search.program import Setting, Value

Floats = NDArray[np.float64]


class Options:
    """The valid settings of a layer where it stands, with what each adds.

    sums: `[settings, figures]`, what adds up over layers. peaks: `[settings, 2]`, of which the largest count.
    forms: a bit for each setting that stands for its form. decisions: how many the layer has.
    """

    def __init__(
        self, settings: Sequence[Setting], sums: Floats, peaks: Floats, forms: Sequence[int], decisions: int
    ) -> None:
        self.settings = list(settings)
        self.sums = sums
        self.peaks = peaks
        self.forms = list(forms)
        self.decisions = decisions

    def __len__(self) -> int:
        return len(self.settings)

    @cached_property
    def index(self) -> dict[Setting, int]:
        """Where each setting stands."""
        return {setting: number for number, setting in enumerate(self.settings)}

    def of_form(self, form: int | None) -> NDArray[np.int64]:
        """Indices of the settings of one form; of all for None."""
        return np.array([index for index, each in enumerate(self.forms) if form in (None, each)], dtype=np.int64)

    @cached_property
    def codes(self) -> NDArray[np.int64]:
        """Settings as numbers `[settings, decisions]`: equal for equal values, -1 where a decision is not active."""
        known: list[dict[Value, int]] = [{} for _ in range(self.decisions)]
        codes = np.full((len(self.settings), self.decisions), -1)
        for number, setting in enumerate(self.settings):
            for slot, value in setting:
                codes[number, slot] = known[slot].setdefault(value, len(known[slot]))
        return codes

    @cached_property
    def distances(self) -> NDArray[np.int64]:
        """How many decisions that are active in both differ, `[settings, settings]`."""
        found = np.zeros((len(self), len(self)), dtype=np.int64)
        for column in self.codes.T:
            active = column >= 0
            found += (column[:, None] != column) & active[:, None] & active
        return found


def smallest_sum(parts: Sequence[tuple[Floats, Floats]], floor: float) -> tuple[float, list[int]]:
    """One index into each part such that the sum of the values plus the largest of the peaks is smallest.

    A part is values and peaks; `floor` is a peak that is there anyway. Exact, in O(n log n) for n values: the best for
    each bound on the peaks takes from every part the smallest value under that bound.
    """
    bounds = np.unique(np.concatenate([np.array([floor]), *(peaks for _, peaks in parts)]))
    least = max([floor, *(float(peaks.min()) for _, peaks in parts)])
    bounds = bounds[bounds >= least]
    total = bounds.copy()
    picks: list[NDArray[np.int64]] = []
    for values, peaks in parts:
        order = np.argsort(peaks, kind="stable")
        best = np.minimum.accumulate(values[order])
        fresh = np.concatenate([[True], best[1:] < best[:-1]])
        holder = order[np.maximum.accumulate(np.where(fresh, np.arange(len(order)), 0))]
        last = np.searchsorted(peaks[order], bounds, side="right") - 1
        total += best[last]
        picks.append(holder[last])
    chosen = int(np.argmin(total))
    return float(total[chosen]), [int(pick[chosen]) for pick in picks]


def largest_sum(parts: Sequence[tuple[Floats, Floats]], floor: float) -> tuple[float, list[int]]:
    """The same for the largest sum: some part gives the largest peak, all others the largest value."""
    picks = [int(np.argmax(values)) for values, _ in parts]
    total = sum(float(values[pick]) for (values, _), pick in zip(parts, picks, strict=True))
    peak = max([floor, *(float(peaks[pick]) for (_, peaks), pick in zip(parts, picks, strict=True))])
    best, change = total + peak, (-1, -1)
    for number, (values, peaks) in enumerate(parts):
        candidates = total - float(values[picks[number]]) + values + np.maximum(peaks, floor)
        index = int(np.argmax(candidates))
        if candidates[index] > best:
            best, change = float(candidates[index]), (number, index)
    if change[0] >= 0:
        picks[change[0]] = change[1]
    return best, picks
