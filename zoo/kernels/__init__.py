"""Primitives on tensors: attention, recurrence, scan, convolution, norms, rotary and grouped matrix products.

The functions load on first use, so that importing this package does not import torch. `use` chooses an
implementation for a block of code, `explain` lists which would serve and why others would not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.kernels.dispatch import explain, use

if TYPE_CHECKING:
    from zoo.kernels.convolution import causal_convolution, long_convolution
    from zoo.kernels.cross_entropy import linear_cross_entropy
    from zoo.kernels.delta import delta_rule
    from zoo.kernels.grouped import (
        block_diagonal_matmul,
        grouped_matmul,
        route,
        sort_by_group,
        sort_by_subset,
        subset_matmul,
    )
    from zoo.kernels.linear_recurrence import recurrence
    from zoo.kernels.pointwise import (
        gated_activation,
        layer_norm,
        polynomial_activation,
        rms_norm,
        rotary,
        rotary_pair,
    )
    from zoo.kernels.scan import diagonal_scan, selective_scan
    from zoo.kernels.softmax_attention import attention

__all__ = [
    "attention",
    "block_diagonal_matmul",
    "causal_convolution",
    "delta_rule",
    "diagonal_scan",
    "explain",
    "gated_activation",
    "grouped_matmul",
    "layer_norm",
    "linear_cross_entropy",
    "long_convolution",
    "polynomial_activation",
    "recurrence",
    "rms_norm",
    "rotary",
    "rotary_pair",
    "route",
    "selective_scan",
    "sort_by_group",
    "sort_by_subset",
    "subset_matmul",
    "use",
]

_HOMES = {
    "attention": "softmax_attention",
    "block_diagonal_matmul": "grouped",
    "causal_convolution": "convolution",
    "diagonal_scan": "scan",
    "delta_rule": "delta",
    "gated_activation": "pointwise",
    "grouped_matmul": "grouped",
    "layer_norm": "pointwise",
    "long_convolution": "convolution",
    "linear_cross_entropy": "cross_entropy",
    "polynomial_activation": "pointwise",
    "recurrence": "linear_recurrence",
    "rms_norm": "pointwise",
    "rotary": "pointwise",
    "rotary_pair": "pointwise",
    "route": "grouped",
    "selective_scan": "scan",
    "sort_by_group": "grouped",
    "sort_by_subset": "grouped",
    "subset_matmul": "grouped",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return function


def __dir__() -> list[str]:
    return sorted(__all__)
