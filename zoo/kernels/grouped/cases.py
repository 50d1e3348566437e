"""Calls that together use every flag of the kernels: rows by index, weights shared or not, in either layout, widths,
subsets of blocks, interleaved blocks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.case import Case, Draw
from zoo.kernels.grouped import block_diagonal_matmul, grouped_matmul, route, subset_matmul

_KERNELS = ("grouped_product", "grouped_outer")
_SMALL = (5, 0, 70, 1)
"""Rows of groups: fewer than a tile, none, more than a tile of the smallest, one."""


def _offsets(draw: Draw) -> Tensor:
    sizes = _SMALL if draw.size == "small" else (1024, 0, 2047, 1025)
    return torch.tensor([0, *sizes], device=draw.device).cumsum(0)


def _widths(draw: Draw, *shares: int) -> Tensor:
    """Hundredths of the small width 150, or of the large one, 2048."""
    return torch.tensor([share * draw.pick(150, 2048) // 100 for share in shares], device=draw.device)


def _experts(draw: Draw) -> Mapping[str, Any]:
    inputs, outputs, offsets = draw.pick(72, 1024), draw.pick(150, 2048), _offsets(draw)
    x = draw.normal(draw.pick(sum(_SMALL), 4096), inputs)
    return {"x": x, "weight": draw.normal(4, outputs, inputs, std=inputs**-0.5), "offsets": offsets}


def _routed(draw: Draw) -> Mapping[str, Any]:
    """Every token goes to two groups."""
    given = _experts(draw)
    pairs = given["x"].shape[0]
    source = torch.arange(pairs, device=draw.device) * 7 % (pairs // 2)
    return {**given, "x": given["x"][: pairs // 2].contiguous(), "source": source}


def _nested_outputs(draw: Draw) -> Mapping[str, Any]:
    given = _experts(draw)
    return {**given, "weight": given["weight"][0], "output_widths": _widths(draw, 30, 50, 66, 100)}


def _nested_inputs(draw: Draw) -> Mapping[str, Any]:
    outputs, inputs = draw.pick(20, 1024), draw.pick(150, 2048)
    x = draw.normal(draw.pick(sum(_SMALL), 4096), inputs)
    weight = draw.normal(inputs, outputs, std=inputs**-0.5)
    return {"x": x, "weight": weight, "offsets": _offsets(draw), "input_widths": _widths(draw, 30, 50, 66, 100)}


def _nested_experts(draw: Draw) -> Mapping[str, Any]:
    given = _nested_inputs(draw)
    wide = torch.tensor([7, 20, 0, 13], device=draw.device)
    return {**given, "weight": draw.normal(4, *given["weight"].shape, std=0.1), "output_widths": wide}


def _transposed(x: Tensor, weight: Tensor, offsets: Tensor, **widths: Tensor) -> Tensor:
    return grouped_matmul(x, weight.mT, offsets, **widths)


def _scores(draw: Draw) -> Mapping[str, Any]:
    # More rows than one block has, with 5 or 60 choices.
    scores = draw.normal(draw.pick(530, 16384), draw.pick(5, 60))
    return {"scores": scores, "top_k": 3}


def _routed_numbers(scores: Tensor, top_k: int) -> tuple[Tensor, ...]:
    return tuple(found.double() for found in route(scores, top_k))


def _subsets(draw: Draw) -> Mapping[str, Any]:
    """Three of five blocks for each row, one of which none takes, and one twice."""
    rows, inputs, outputs = draw.pick(76, 4096), draw.pick(24, 64), draw.pick(150, 2048)
    first = torch.arange(rows, device=draw.device) // draw.pick(9, 256) % 2
    subsets = torch.stack([first, torch.full_like(first, 2), 4 - 2 * first], dim=1)
    weight = draw.normal(5, outputs, inputs, std=inputs**-0.5)
    return {"x": draw.normal(rows, 3, inputs), "weight": weight, "subsets": subsets}


def _subsets_spread(draw: Draw) -> Mapping[str, Any]:
    given = _subsets(draw)
    rows, outputs = given["subsets"].shape[0], given["weight"].shape[1]
    return {**given, "x": draw.normal(rows, outputs)}


def _spread(x: Tensor, weight: Tensor, subsets: Tensor) -> Tensor:
    return subset_matmul(x, weight, subsets, transposed=True)


def _interleaved(draw: Draw) -> Mapping[str, Any]:
    rows, blocks, inputs, outputs = (draw.pick(*sizes) for sizes in ((70, 16384), (37, 64), (5, 8), (3, 8)))
    weight = draw.normal(blocks, inputs, outputs, std=inputs**-0.5)
    return {"x": draw.normal(rows, blocks * inputs), "weight": weight, "interleaved": True}


def _interleaved_wide(draw: Draw) -> Mapping[str, Any]:
    """Weights that lie the other way round."""
    rows, blocks = draw.pick(9, 16384), draw.pick(5, 32)
    weight = draw.normal(blocks, 17, 32, std=17**-0.5).mT
    return {"x": draw.normal(rows, blocks * 32), "weight": weight, "interleaved": True}


_INTERLEAVED = ("interleaved_product", "interleaved_outer")
_ROUTE = ("route_choose", "route_scan", "route_place")

CASES = (
    Case("grouped_matmul", "experts", grouped_matmul, _experts, _KERNELS),
    Case("grouped_matmul", "routed", grouped_matmul, _routed, _KERNELS),
    Case("grouped_matmul", "nested-outputs", grouped_matmul, _nested_outputs, _KERNELS),
    Case("grouped_matmul", "nested-inputs", _transposed, _nested_inputs, _KERNELS),
    Case("grouped_matmul", "nested-experts", _transposed, _nested_experts, _KERNELS, dtypes=(torch.bfloat16,)),
    Case("subset_matmul", "sums", subset_matmul, _subsets, _KERNELS),
    Case("subset_matmul", "parts", _spread, _subsets_spread, _KERNELS),
    Case("block_diagonal_matmul", "interleaved", block_diagonal_matmul, _interleaved, _INTERLEAVED),
    Case("block_diagonal_matmul", "interleaved-wide", block_diagonal_matmul, _interleaved_wide, _INTERLEAVED),
    Case("route", "top-3", _routed_numbers, _scores, _ROUTE, gradients=False),
)
