"""Calls that together use every flag of the convolution's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from zoo.kernels.case import Case, Draw
from zoo.kernels.convolution import causal_convolution

_KERNELS = ("causal_convolution_forward", "causal_convolution_backward")


def _inputs(
    draw: Draw,
    kernel: int,
    *,
    channels: int = 70,
    bias: bool = False,
    state: bool = False,
    segments: bool = False,
    silu: bool = False,
) -> Mapping[str, Any]:
    batch, tokens, channels = 2, draw.pick(19, 4096), draw.pick(channels, 2048)
    return {
        "x": draw.normal(batch, tokens, channels),
        "weight": draw.normal(channels, kernel, std=kernel**-0.5),
        "bias": draw.normal(channels) if bias else None,
        "state": draw.normal(batch, kernel - 1, channels) if state else None,
        "segments": draw.segments(batch, tokens) if segments else None,
        "activation": "silu" if silu else None,
    }


def _case(name: str, kernel: int, *dtypes: torch.dtype, **flags: Any) -> Case:
    inputs = partial(_inputs, kernel=kernel, **flags)
    return Case("causal_convolution", name, causal_convolution, inputs, _KERNELS, dtypes=dtypes)


CASES = (
    _case("mamba", 4, torch.float32, torch.bfloat16, bias=True, silu=True),
    _case("packed", 4, torch.float32, torch.bfloat16, bias=True, state=True, segments=True, silu=True),
    _case("two-taps", 2, torch.float32, segments=True),
    _case("three-taps", 3, torch.bfloat16, state=True),
    _case("eight-taps", 8, torch.bfloat16, channels=30, state=True, silu=True),
)
