"""Where groups of rows begin and end, and how much of a weight each uses, as Python numbers."""

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


def widths_of(widths: Tensor | None, groups: int, whole: int) -> list[int]:
    """The width of each group, `whole` where none are given; raises `ZooError` unless they are from 0 to `whole`."""
    if widths is None:
        return [whole] * groups
    values: list[int] = widths.tolist()
    if any(not 0 <= value <= whole for value in values):
        raise ZooError(f"grouped_matmul: widths are {values}, expected numbers from 0 to the weight's, {whole}")
    return values
