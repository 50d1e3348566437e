"""Calls that together use every flag of the recurrence's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from zoo.kernels.case import Case, Draw
from zoo.kernels.linear_recurrence import recurrence

_KERNELS = ("recurrence_states", "recurrence_output", "recurrence_backward")


def _qkv(draw: Draw, batch: int, tokens: int, groups: int, heads: int, key_dim: int, value_dim: int) -> dict[str, Any]:
    q, k = (draw.normal(batch, tokens, groups, key_dim) for _ in range(2))
    return {"q": q, "k": k, "v": draw.normal(batch, tokens, heads, value_dim), "scale": key_dim**-0.5}


def _tokens(draw: Draw, large: int) -> int:
    """A few more than a chunk, which is shorter in float32."""
    return draw.pick(39 if draw.dtype == torch.float32 else 71, large)


def _plain(draw: Draw) -> Mapping[str, Any]:
    return _qkv(draw, 1, _tokens(draw, 4096), 2, draw.pick(2, 8), draw.pick(16, 64), draw.pick(20, 64))


def _packed_plain(draw: Draw) -> Mapping[str, Any]:
    inputs = _qkv(draw, 1, _tokens(draw, 4096), 1, 1, draw.pick(16, 64), draw.pick(16, 64))
    return {**inputs, "segments": draw.segments(1, inputs["q"].shape[1])}


def _retention(draw: Draw) -> Mapping[str, Any]:
    """Wide heads, in slices, with the constant decays of RetNet."""
    heads = draw.pick(1, 4)
    inputs = _qkv(draw, 2, _tokens(draw, 2048), heads, heads, draw.pick(72, 256), draw.pick(68, 256))
    decays = torch.log1p(-(2.0 ** -torch.arange(5.0, 5 + heads, device=draw.device)))
    return {**inputs, "log_decay": decays.to(draw.dtype)}


def _ssd(draw: Draw) -> Mapping[str, Any]:
    """Mamba-2: one group for many heads, from a state."""
    heads = draw.pick(3, 16)
    inputs = _qkv(draw, 1, _tokens(draw, 4096), 1, heads, draw.pick(66, 128), draw.pick(16, 64))
    decays = draw.uniform(-1.0, 0.0, 1, inputs["v"].shape[1], heads)
    state = draw.normal(1, heads, inputs["q"].shape[3], inputs["v"].shape[3], dtype=torch.float32)
    return {**inputs, "log_decay": decays, "state": state, "scale": None}


def _packed(draw: Draw) -> Mapping[str, Any]:
    """Packed sequences, tokens that forget everything, and decays above 1, which count as 1."""
    tokens = _tokens(draw, 4096)
    inputs = _qkv(draw, 2, tokens, 1, 2, draw.pick(16, 64), draw.pick(16, 64))
    decays = draw.uniform(-0.5, 0.0, 2, tokens, 2)
    decays[:, 7::29, 0], decays[0, 11::31], decays[1, 30:34] = float("-inf"), 0.5, -60
    state = draw.normal(2, 2, inputs["q"].shape[3], inputs["v"].shape[3], dtype=torch.float32)
    return {**inputs, "log_decay": decays, "segments": draw.segments(2, tokens), "state": state}


def _channels(draw: Draw) -> Mapping[str, Any]:
    """GLA: a decay for each channel, here for two heads together."""
    heads = draw.pick(2, 8)
    inputs = _qkv(draw, 1, _tokens(draw, 4096), heads // 2, heads, draw.pick(34, 128), draw.pick(18, 128))
    return {**inputs, "log_decay": draw.uniform(-0.5, 0.0, *inputs["k"].shape)}


def _packed_channels(draw: Draw) -> Mapping[str, Any]:
    """RWKV and HGRN2 as they are trained, from a state, with channels that forget everything."""
    tokens = _tokens(draw, 4096)
    inputs = _qkv(draw, 1, tokens, 1, 1, draw.pick(16, 64), draw.pick(16, 64))
    decays = draw.uniform(-1.0, 0.0, *inputs["k"].shape)
    decays[:, 7::29, :, ::3], decays[:, 11::31], decays[:, 30:34] = float("-inf"), 0.5, -60
    state = draw.normal(1, 1, inputs["q"].shape[3], inputs["v"].shape[3], dtype=torch.float32)
    return {**inputs, "log_decay": decays, "segments": draw.segments(1, tokens), "state": state}


_CHANNEL_KERNELS = ("recurrence_states", "recurrence_output", "recurrence_scores", "recurrence_channels_backward")
_HALF, _SINGLE = (torch.bfloat16,), (torch.float32,)

CASES = (
    Case("recurrence", "plain", recurrence, _plain, _KERNELS, dtypes=_HALF),
    Case("recurrence", "packed-plain", recurrence, _packed_plain, _KERNELS, dtypes=_SINGLE),
    Case("recurrence", "retention", recurrence, _retention, _KERNELS, dtypes=_HALF),
    Case("recurrence", "ssd", recurrence, _ssd, _KERNELS),
    Case("recurrence", "packed", recurrence, _packed, _KERNELS),
    Case("recurrence", "channels", recurrence, _channels, _CHANNEL_KERNELS, dtypes=_HALF),
    Case("recurrence", "packed-channels", recurrence, _packed_channels, _CHANNEL_KERNELS),
)
