"""Calls that together use every flag of the pointwise kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from zoo.kernels.case import Case, Draw
from zoo.kernels.pointwise import (
    KINDS,
    gated_activation,
    layer_norm,
    polynomial_activation,
    rms_norm,
    rotary,
    rotary_pair,
)

_NORM = ("norm_forward", "norm_backward")
# The other configurations of the forward kernel are not for such rows.
_WIDE_NORM = ("norm_backward_wide",)


def _rows(
    *parameters: str, small: int, large: int, rows: int = 3, residual: bool = False, **flags: Any
) -> Callable[[Draw], Mapping[str, Any]]:
    """Three times `rows` rows, `small` or `large` wide, and what else a norm takes."""

    def inputs(draw: Draw) -> Mapping[str, Any]:
        shape = 3, draw.pick(rows, 2**23 // large), draw.pick(small, large)
        given = {"x": draw.normal(*shape)} | {name: draw.normal(shape[-1]) for name in parameters}
        return given | ({"residual": draw.normal(*shape)} if residual else {}) | flags

    return inputs


def _heads(draw: Draw) -> Mapping[str, Any]:
    """Grouped heads in halves, two sequences at positions of their own; queries and keys are parts of one tensor."""
    batch, tokens, heads, kv_heads = 2, draw.pick(5, 2048), draw.pick(6, 32), draw.pick(2, 8)
    fused = draw.normal(batch, tokens, heads + kv_heads, draw.pick(10, 128))
    q, k = fused.split([heads, kv_heads], 2)
    starts = torch.tensor([[0], [100_000]], device=draw.device)
    return {"q": q, "k": k, "positions": starts + torch.arange(tokens, device=draw.device), "base": 500_000.0}


def _part_of_heads(draw: Draw) -> Mapping[str, Any]:
    """Neighbouring features, some of which pass, at positions that the sequences share."""
    tokens = draw.pick(7, 2048)
    x = draw.normal(2, tokens, draw.pick(5, 40), draw.pick(9, 80))
    return {"x": x, "positions": torch.arange(tokens, device=draw.device), "dim": draw.pick(6, 32), "interleaved": True}


def _gated(kind: str, *, fused: bool = False) -> Callable[[Draw], Mapping[str, Any]]:
    def inputs(draw: Draw) -> Mapping[str, Any]:
        rows, width = draw.pick(5, 2048), draw.pick(33, 11008)
        both = draw.normal(2, rows, 2 * width) if fused else draw.normal(2, 2, rows, width)
        gate, up = both.chunk(2, -1) if fused else both
        return {"gate": gate, "up": up, "kind": kind}

    return inputs


def _polynomial(*, normalized: bool, small: int, large: int, rows: int) -> Callable[[Draw], Mapping[str, Any]]:
    def inputs(draw: Draw) -> Mapping[str, Any]:
        x = draw.normal(3, draw.pick(rows, 2**23 // large), draw.pick(small, large))
        return {"x": x, "coefficients": draw.normal(4), "normalized": normalized}

    return inputs


_ROTARY = ("rotary_turn",)
_GATED = ("gated_forward", "gated_backward")
_POLYNOMIAL = ("polynomial_forward", "polynomial_backward")

CASES = (
    Case("rms_norm", "weight", rms_norm, _rows("weight", small=50, large=4096), _NORM),
    Case("rms_norm", "narrow", rms_norm, _rows("weight", small=7, large=128, weight_offset=1.0), _NORM),
    Case("rms_norm", "residual", rms_norm, _rows(small=130, large=8192, residual=True), _NORM),
    Case("rms_norm", "wide", rms_norm, _rows("weight", small=8200, large=32768, rows=1), _WIDE_NORM),
    Case("layer_norm", "plain", layer_norm, _rows(small=20, large=1024), _NORM),
    Case("layer_norm", "bias", layer_norm, _rows("bias", small=50, large=2048), _NORM),
    Case("layer_norm", "affine", layer_norm, _rows("weight", "bias", small=33, large=8192, residual=True), _NORM),
    Case(
        "layer_norm",
        "affine-wide",
        layer_norm,
        _rows("weight", "bias", small=8200, large=16384, rows=6, residual=True),
        _WIDE_NORM,
    ),
    Case("rotary_pair", "grouped", rotary_pair, _heads, _ROTARY),
    Case("rotary", "interleaved", rotary, _part_of_heads, _ROTARY),
    Case("gated_activation", "fused", gated_activation, _gated("silu", fused=True), _GATED),
    *(Case("gated_activation", kind, gated_activation, _gated(kind), _GATED) for kind in KINDS[1:]),
    Case(
        "polynomial_activation",
        "relu",
        polynomial_activation,
        _polynomial(normalized=False, small=130, large=11008, rows=11),
        _POLYNOMIAL,
    ),
    Case(
        "polynomial_activation",
        "normalized",
        polynomial_activation,
        _polynomial(normalized=True, small=33, large=11008, rows=1),
        _POLYNOMIAL,
    ),
    Case(
        "polynomial_activation",
        "narrow",
        polynomial_activation,
        _polynomial(normalized=True, small=5, large=1024, rows=6),
        _POLYNOMIAL,
    ),
)
