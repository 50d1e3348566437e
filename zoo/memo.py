"""Remembering results of pure functions of frozen values."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

SIZE = 8192
"""Results that are kept; layers of a search space rarely take more forms."""


def memoized(size: int = SIZE) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function compute the result of the same arguments once while it is among the last `size`.

    Arguments that cannot be hashed, such as a component of a third party with a dictionary in it, are computed anew.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        remembered = lru_cache(maxsize=size)(function)

        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return remembered(*args, **kwargs)  # type: ignore[arg-type]
            except TypeError:
                # Nothing to remember it by; if the function itself raised, it does so again.
                return function(*args, **kwargs)

        return update_wrapper(call, function)

    return decorate
