"""Calls that together use every flag of the scans' kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from zoo.kernels.case import Case, Draw
from zoo.kernels.scan import diagonal_scan, selective_scan

_SELECTIVE = ("selective_scan_forward", "selective_scan_backward")


def _inputs(
    draw: Draw,
    state_dim: int,
    *,
    channels: int = 11,
    skip: bool = False,
    gate: bool = False,
    state: bool = False,
    segments: bool = False,
) -> Mapping[str, Any]:
    batch, tokens, channels = 2, draw.pick(11, 2048), draw.pick(channels, 2048)
    inner = (batch, tokens, channels)
    return {
        "x": draw.normal(*inner),
        "delta": draw.uniform(0.001, 0.5, *inner),
        "A": draw.uniform(-8.0, -0.1, channels, state_dim, dtype=torch.float32),
        "B": draw.normal(batch, tokens, state_dim),
        "C": draw.normal(batch, tokens, state_dim),
        "D": draw.normal(channels, dtype=torch.float32) if skip else None,
        "z": draw.normal(*inner) if gate else None,
        "state": draw.normal(batch, channels, state_dim, dtype=torch.float32) if state else None,
        "segments": draw.segments(batch, tokens) if segments else None,
    }


def _case(name: str, state_dim: int, *dtypes: torch.dtype, **flags: Any) -> Case:
    inputs = partial(_inputs, state_dim=state_dim, **flags)
    return Case("selective_scan", name, selective_scan, inputs, _SELECTIVE, dtypes=dtypes)


_DIAGONAL = ("diagonal_scan_forward", "diagonal_scan_backward")


def _diagonal(draw: Draw, *, constant: bool = False, packed: bool = False) -> Mapping[str, Any]:
    batch, tokens, channels = inner = 2, draw.pick(19, 2048), draw.pick(33 if packed else 20, 2048)
    return {
        "x": draw.normal(*inner),
        "decay": draw.uniform(0.1, 1.0, *((channels,) if constant else inner)),
        "state": draw.normal(batch, channels, dtype=torch.float32) if packed else None,
        "segments": draw.segments(batch, tokens) if packed else None,
    }


def _diagonal_case(name: str, *dtypes: torch.dtype, **flags: bool) -> Case:
    inputs = partial(_diagonal, **flags)
    return Case("diagonal_scan", name, diagonal_scan, inputs, _DIAGONAL, dtypes=dtypes)


CASES = (
    _case("mamba", 16, torch.float32, torch.bfloat16, channels=19, skip=True, gate=True),
    _case("packed", 5, torch.float32, state=True, segments=True),
    _diagonal_case("gated", torch.float32, torch.bfloat16),
    _diagonal_case("constant", torch.float32, constant=True, packed=True),
    _diagonal_case("packed", torch.bfloat16, packed=True),
)
