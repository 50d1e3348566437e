"""Calls that together use every flag of attention's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zoo.kernels.case import Case, Draw
from zoo.kernels.softmax_attention import attention

_KERNELS = tuple(
    f"attention_{name}{dtype}"
    for name in ("forward", "backward_queries", "backward_keys")
    for dtype in ("", "_float32")
)


_DECODING = ("attention_decode", "attention_decode_float32", "attention_merge")


def _heads(draw: Draw, tokens: int, keys: int = 0, *, batch: int = 1, head_dim: int = 64) -> dict[str, Tensor]:
    """Queries of two heads and keys of one, or more of both; small ones have odd sizes."""
    tokens, keys = draw.pick(tokens, 2048), draw.pick(keys or tokens, 2048)
    heads, kv_heads = draw.pick(2, 16), draw.pick(1, 4)
    return {
        "q": draw.normal(batch, tokens, heads, draw.pick(24, head_dim)),
        "k": draw.normal(batch, keys, kv_heads, draw.pick(24, head_dim)),
        "v": draw.normal(batch, keys, kv_heads, draw.pick(32, head_dim)),
    }


def _all(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 90)
    heads, tokens = inputs["q"].shape[2], inputs["k"].shape[1]
    return {
        **inputs,
        "alibi_slopes": draw.uniform(0.01, 0.2, heads),
        "log_forget": -draw.uniform(0.0, 0.2, 1, tokens, heads),
        "sink": draw.normal(heads),
        "segments": draw.segments(1, tokens),
    }


def _prefixed(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 50, 110, batch=2)
    most = inputs["k"].shape[1]
    return {
        **inputs,
        "past": most - inputs["q"].shape[1],
        "prefix": torch.tensor([37, 0], device=draw.device),
        "key_length": torch.tensor([most, most - 33], device=draw.device),
    }


def _biased(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 90)
    return {**inputs, "bias": draw.normal(inputs["q"].shape[2], 51)}


def _dilated(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 90, 111)
    heads, keys = inputs["q"].shape[2], inputs["k"].shape[1]
    return {
        **inputs,
        "past": keys - inputs["q"].shape[1],
        "alibi_slopes": draw.uniform(0.01, 0.2, heads),
        "bias": draw.normal(heads, 20),
        "segments": draw.segments(1, keys),
    }


def _gated_classes(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 90)
    heads, tokens = inputs["q"].shape[2], inputs["k"].shape[1]
    return {**inputs, "log_forget": -draw.uniform(0.0, 0.2, 1, tokens, heads)}


def _sparse(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 150)
    count = -(-inputs["k"].shape[1] // 128)
    kept = torch.rand((inputs["q"].shape[2], count, count), generator=torch.Generator().manual_seed(1)) < 0.5
    return {**inputs, "blocks": kept.to(draw.device)}


def _decoded(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 2, 200, batch=2)
    heads, keys = inputs["q"].shape[2], inputs["k"].shape[1]
    return {
        **inputs,
        "q": inputs["q"][:, :2],
        "past": keys - 2,
        "alibi_slopes": draw.uniform(0.01, 0.2, heads),
        "bias": draw.normal(heads, 20),
        "log_forget": -draw.uniform(0.0, 0.2, 2, keys, heads),
        "sink": draw.normal(heads),
        "segments": draw.segments(2, keys),
        "key_length": torch.tensor([keys, keys - 70], device=draw.device),
    }


def _stepped(draw: Draw) -> Mapping[str, Any]:
    inputs = _heads(draw, 1, 200)
    keys = inputs["k"].shape[1]
    return {**inputs, "q": inputs["q"][:, :1], "past": keys - 1, "prefix": 20}


def _plain(draw: Draw) -> Mapping[str, Any]:
    return _heads(draw, 150, head_dim=128)


def _wide(draw: Draw) -> Mapping[str, Any]:
    return _heads(draw, 40, head_dim=256)


# One case goes through the configurations, the others take the one for their size.
CASES = (
    Case("attention", "prefix", partial(attention, window=30), _prefixed, _KERNELS),
    Case("attention", "all", partial(attention, window=50, softcap=3.0, return_lse=True), _all, ()),
    Case("attention", "bias", partial(attention, causal=False, window=60, clip=(1.03, -0.01)), _biased, ()),
    Case("attention", "dilation", partial(attention, dilation=3, window=100), _dilated, ()),
    Case("attention", "dilation-gates", partial(attention, dilation=3), _gated_classes, ()),
    Case("attention", "blocks", partial(attention, block=128), _sparse, ()),
    Case("attention", "lse", partial(attention, return_lse=True), _plain, ()),
    Case("attention", "wide", partial(attention, window=30), _wide, (), dtypes=(torch.bfloat16,)),
    Case("attention", "decode", partial(attention, softcap=5.0), _decoded, (), gradients=False),
    Case("attention", "step", partial(attention, window=60, return_lse=True), _stepped, _DECODING, gradients=False),
)
