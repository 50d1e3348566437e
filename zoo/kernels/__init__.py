"""Primitives on tensors: attention, recurrence, scan, convolution, norms, rotary and grouped matrix products.

The functions load on first use, so that importing this package does not import torch. `use` chooses an
implementation for a block of code, `explain` lists which would serve and why others would not.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from zoo.kernels.dispatch import explain, use

if TYPE_CHECKING:
    from zoo.kernels.convolution import causal_convolution
    from zoo.kernels.grouped import grouped_matmul, sort_by_group
    from zoo.kernels.linear_recurrence import recurrence
    from zoo.kernels.pointwise import layer_norm, rms_norm, rotary
    from zoo.kernels.scan import selective_scan
    from zoo.kernels.softmax_attention import attention

__all__ = [
    "attention",
    "causal_convolution",
    "explain",
    "grouped_matmul",
    "layer_norm",
    "recurrence",
    "rms_norm",
    "rotary",
    "selective_scan",
    "sort_by_group",
    "use",
]

_HOMES = {
    "attention": "softmax_attention",
    "causal_convolution": "convolution",
    "grouped_matmul": "grouped",
    "layer_norm": "pointwise",
    "recurrence": "linear_recurrence",
    "rms_norm": "pointwise",
    "rotary": "pointwise",
    "selective_scan": "scan",
    "sort_by_group": "grouped",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    function = globals()[name] = getattr(import_module(f"{__name__}.{home}"), name)
    return function


def __dir__() -> list[str]:
    return sorted(__all__)
