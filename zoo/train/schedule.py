"""Learning rate schedules as pure functions of the step: the factor by which the highest learning rate is multiplied.

Steps count from zero. With a warm-up of `warmup` steps the factor of step `t < warmup` is `(t + 1) / warmup`, so that
no step is lost at a learning rate of zero. What follows depends on `x`, which runs from 0 to 1 and is 1 at `t = steps`.
"""

from __future__ import annotations

import math
from typing import Literal


def cosine(step: int, steps: int, *, warmup: int = 0, minimum: float = 0.0) -> float:
    """`minimum + (1 - minimum) (1 + cos(pi x)) / 2` with `x = (step - warmup) / (steps - warmup)`.

    Loshchilov and Hutter 2017 (SGDR), equation 5, one cycle. Past the end the factor stays at `minimum`.
    """
    if step < warmup:
        return (step + 1) / warmup
    x = _progress(step - warmup, steps - warmup)
    return minimum + (1 - minimum) * (1 + math.cos(math.pi * x)) / 2


def warmup_stable_decay(
    step: int,
    steps: int,
    *,
    warmup: int = 0,
    decay: int = 0,
    minimum: float = 0.0,
    shape: Literal["linear", "sqrt"] = "sqrt",
) -> float:
    """1 until `decay` steps before the end, then `minimum + (1 - minimum) (1 - f(x))`, `f(x) = x` or `sqrt(x)`.

    `x = (step - (steps - decay)) / decay`; `decay = 0` is a constant learning rate. Hu et al. 2024 (MiniCPM), section
    4, for the three phases; Hägele et al. 2024 (arXiv 2405.18392) for the square root.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = steps - decay
    if step < start or decay == 0:
        return 1.0
    x = _progress(step - start, decay)
    return minimum + (1 - minimum) * (1 - (x if shape == "linear" else math.sqrt(x)))


def _progress(done: int, total: int) -> float:
    return min(1.0, done / total) if total > 0 else 1.0
