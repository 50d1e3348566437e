"""Where groups of rows begin and end."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from zoo.errors import ZooError


def bounds_of(offsets: Tensor, rows: int) -> list[tuple[int, int]]:
    """First row and end of each group; raises `ZooError` unless offsets ascend from 0 to `rows`."""
    values = offsets.tolist()
    if values[0] != 0 or values[-1] != rows or any(low > high for low, high in pairwise(values)):
        raise ZooError(f"grouped_matmul: offsets are {values}, expected to ascend from 0 to the number of rows, {rows}")
    return list(pairwise(values))
