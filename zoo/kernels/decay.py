"""Logarithms of decays as every implementation reads them, and the bounds between which they are computed with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def lowest(dtype: torch.dtype) -> float:
    """The logarithm of the least normal number: what has decayed below it is taken to have that weight.

    It keeps sums of logarithms finite, so that differences of them are never inf - inf, and keeps the exponential off
    the numbers below the normal ones, where it is ten times slower.
    """
    return math.log(torch.finfo(dtype).tiny)


def highest(dtype: torch.dtype) -> float:
    """The logarithm that stands for all above zero, the least normal number: its exponential is one in any dtype.

    A bound at zero itself would stop the gradient of what does not decay from torch 2.14 on, where `clamp` passes none
    at its bounds; up to 2.13 it does.
    """
    return torch.finfo(dtype).tiny


def at_most_one(log_decay: Tensor) -> Tensor:
    """Logarithms of decays of any shape, with decays above one taken as one."""
    return log_decay.clamp(max=highest(log_decay.dtype))


def bounded(log_decay: Tensor) -> Tensor:
    """The same, and with decays below the least normal number taken as that."""
    return log_decay.clamp(lowest(log_decay.dtype), highest(log_decay.dtype))
