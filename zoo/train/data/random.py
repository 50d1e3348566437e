"""Random numbers without a generator: each is a function of its coordinates, so any sample can be drawn at any time."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray


def random_bits(*coordinates: ArrayLike) -> NDArray[np.uint64]:
    """64 random bits for each point of the broadcast coordinates (non-negative integers).

    Each coordinate is folded into the state by the finaliser of SplitMix64 (Steele, Lea and Flood 2014), which is a
    bijection, so that points that differ in the last coordinate only never collide.
    """
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for coordinate in coordinates:
            state = _mix(state + np.uint64(0x9E3779B97F4A7C15) ^ np.asarray(coordinate).astype(np.uint64))
    return np.asarray(state)


def random_below(bound: int, *coordinates: ArrayLike) -> NDArray[np.int64]:
    """Integers from zero to below `bound`; the bias of the remainder is at most `bound / 2**64`."""
    return (random_bits(*coordinates) % np.uint64(bound)).astype(np.int64)


def fold(rows: NDArray[np.int64]) -> NDArray[np.uint64]:
    """One 64-bit hash of each row, the sum of hashes of its places and values: `[count, length]` to `[count]`."""
    return random_bits(np.arange(rows.shape[1]), rows).sum(axis=1, dtype=np.uint64)


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
