"""Counting the matrix products that a function really runs."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

Shape = tuple[int, ...]


def _attention(q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    batch, heads, tokens, head_dim = q
    return 2 * batch * heads * tokens * k[2] * (head_dim + v[3])


def _attention_backward(_grad: Shape, q: Shape, k: Shape, v: Shape, *_: Any, **__: Any) -> int:
    batch, heads, tokens, head_dim = q
    return 2 * batch * heads * tokens * k[2] * (3 * head_dim + 2 * v[3])


# The counter knows the GPU's fused attention, but not the CPU's. Counted like its others: whole products, no discount
# for causality, and in the backward the scores once more.
_UNKNOWN_TO_TORCH = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counted_flops(function: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Floating point operations of all matrix products while `function(*args, **kwargs)` runs."""
    # The counter copies what formulas there are when it starts, and these modules bring those of their operators.
    import_module("zoo.kernels.cross_entropy")
    import_module("zoo.kernels.grouped")
    with FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as counter:
        function(*args, **kwargs)
    return counter.get_total_flops()
