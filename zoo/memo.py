"""Remembering results of pure functions of frozen values."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SIZE = 8192
"""Results that are kept; layers of a search space rarely take more forms."""


def memoized(function: Callable[P, R]) -> Callable[P, R]:
    """The same function, which computes the result of the same arguments once while it is among the last `SIZE`.

    Arguments that cannot be hashed, such as a component of a third party with a dictionary in it, are computed anew.
    """
    remembered = lru_cache(maxsize=SIZE)(function)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            hash(args)
        except TypeError:
            return function(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return update_wrapper(call, function)
