"""Calls that together use every flag of the delta rule's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels.case import Case, Draw
from zoo.kernels.delta import delta_rule

_KERNELS = (
    "delta_inverse",
    "delta_states",
    "delta_output",
    "delta_states_backward",
    "delta_pairs_backward",
    "delta_keys_backward",
)


def _call(v: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """The state rounded as the output is: of inputs in half precision no more can be asked than of the output."""
    out, state = delta_rule(v=v, **given)
    return out, state.to(v.dtype)


def _inputs(
    draw: Draw,
    *,
    tokens: int,
    heads: int = 1,
    groups: int = 1,
    steps: int = 1,
    key_dim: int = 16,
    value_dim: int = 16,
    decay: bool = False,
    state: bool = False,
    segments: bool = False,
) -> Mapping[str, Any]:
    tokens = draw.pick(tokens, 2048 // steps)
    heads, groups = draw.pick(heads, 8 * heads), draw.pick(groups, 8 * groups)
    key_dim, value_dim = draw.pick(key_dim, 128 if draw.dtype.itemsize == 2 else 64), draw.pick(value_dim, 128)
    inputs: dict[str, Any] = {
        "q": F.normalize(draw.normal(1, tokens, groups, key_dim).float(), dim=-1).to(draw.dtype),
        "k": F.normalize(draw.normal(1, tokens * steps, groups, key_dim).float(), dim=-1).to(draw.dtype),
        "v": draw.normal(1, tokens * steps, heads, value_dim),
        "beta": draw.uniform(0, 2, 1, tokens * steps, heads),
    }
    if decay:
        inputs["log_decay"] = draw.uniform(-1, 0, 1, tokens, heads)
    if state:
        inputs["state"] = draw.normal(1, heads, key_dim, value_dim)
    if segments:
        inputs["segments"] = draw.segments(1, tokens)
    return inputs


CASES = (
    Case("delta_rule", "plain", partial(_call, scale=0.5), partial(_inputs, tokens=69, key_dim=20), _KERNELS),
    Case(
        "delta_rule",
        "gated",
        _call,
        partial(_inputs, tokens=70, heads=2, value_dim=35, decay=True, state=True),
        _KERNELS,
    ),
    Case(
        "delta_rule",
        "product-packed",
        partial(_call, steps=2),
        partial(_inputs, tokens=34, steps=2, segments=True),
        _KERNELS,
    ),
    Case(
        "delta_rule",
        "gated-product-packed",
        partial(_call, steps=3),
        partial(_inputs, tokens=25, steps=3, decay=True, state=True, segments=True),
        _KERNELS,
    ),
)
