"""Depthwise causal convolutions; see `causal_convolution` and `long_convolution`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks, launch
from zoo.kernels import segments as packing
from zoo.kernels.convolution import reference, torch_path
from zoo.kernels.dispatch import Call, Implementation, Primitive

MOST_TAPS = 8
"""Longest kernel whose taps a program holds in registers."""


def _serves_taps(call: Call) -> str | None:
    kernel = call.facts.get("kernel", 2)
    unfit = f"takes kernels of 2 to {MOST_TAPS} taps, not {kernel}" if not 2 <= kernel <= MOST_TAPS else None
    return launch.refusal(call) or unfit


def _convolution_kernel(
    x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor | None, segments: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.convolution import triton_path

    return triton_path.causal_convolution(x, weight, bias, state, segments, silu)


_CONVOLUTION = Primitive(
    "causal_convolution",
    (
        Implementation("triton", _convolution_kernel, _serves_taps),
        Implementation("torch", torch_path.causal_convolution),
        Implementation("reference", reference.causal_convolution),
    ),
)


def _widened(
    convolve: Callable[[Tensor, Tensor, Tensor | None], Tensor], x: Tensor, filters: Tensor, segments: Tensor | None
) -> Tensor:
    dtype = checks.at_least_float32(x.dtype)
    return convolve(x.to(dtype), filters.to(dtype), segments).to(x.dtype)


_LONG = Primitive(
    "long_convolution",
    (
        Implementation("torch", partial(_widened, torch_path.long_convolution)),
        Implementation("reference", partial(_widened, reference.long_convolution)),
    ),
)
PRIMITIVES = (_CONVOLUTION, _LONG)


def causal_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    activation: Literal["silu"] | None = None,
) -> tuple[Tensor, Tensor]:
    """Each channel is filtered over its last few tokens: `o_t = act(bias + sum_k weight_k x_(t - kernel + 1 + k))`.

    Args:
        x: `[batch, tokens, channels]`.
        weight: `[channels, kernel]`; the last tap meets the current token.
        bias: `[channels]`.
        state: the inputs before the first token, `[batch, kernel - 1, channels]`; None is zeros.
        segments: integer ids `[batch, tokens]`; no tap reaches into another segment. `state` belongs to the segment
            of the first token.
        activation: applied to the result.

    Returns:
        The output like `x`, and the state after the last token: the last `kernel - 1` inputs of its segment.

    `O(tokens channels kernel)`. Meant for a handful of taps, as in Mamba (arXiv 2312.00752, section 3.4).
    Raises `ZooError` for shapes, dtypes and devices that do not fit and for an unknown activation.
    """
    name = "causal_convolution"
    checks.rank(name, "x", x, "batch, tokens, channels")
    checks.rank(name, "weight", weight, "channels, kernel")
    batch, tokens, channels = x.shape
    kernel = weight.shape[1]
    checks.shape(name, "weight", weight, "channels, kernel", (channels, kernel))
    if kernel == 0:
        checks.fail(name, "weight has no taps; expected a kernel of at least 1")
    if bias is not None:
        checks.shape(name, "bias", bias, "channels", (channels,))
    if state is not None:
        checks.shape(name, "state", state, "batch, kernel - 1, channels", (batch, kernel - 1, channels))
    packing.check(name, segments, batch, tokens)
    checks.floats(name, x=x, weight=weight, bias=bias, state=state)
    checks.one_device(name, x=x, weight=weight, bias=bias, state=state, segments=segments)
    if activation not in (None, "silu"):
        checks.fail(name, f"activation is {activation!r}, expected None or 'silu'")
    call = Call(x.device.type, x.dtype, {"kernel": kernel, "tokens": tokens, "segments": segments is not None})
    return _CONVOLUTION.select(call)(x, weight, bias, state, segments, activation == "silu")


def long_convolution(
    x: Tensor, filters: Tensor, *, state: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each channel is filtered over all of its past: `o_t = sum_k filters_k x_(t - k)`.

    Args:
        x: `[batch, tokens, channels]`, real.
        filters: `[channels, length]`, real; the first is that of the current token, the opposite of
            `causal_convolution`, as filters are made by state spaces and by functions of the distance.
        state: the inputs before the first token, `[batch, past, channels]` with any `past`; None is none.
        segments: integer ids `[batch, tokens]`; no filter reaches into another segment. `state` belongs to the segment
            of the first token.

    Returns:
        The output like `x`, and the state after the last token: its last inputs, at most `length - 1`, zero where they
        belong to another segment. Differentiable once.

    `O(channels n log n)` with `n = past + tokens + length`, by Fourier transforms in float32 or wider, padded so that
    nothing wraps round; segments are transformed one a row, as long as the longest, whose length is read from the
    device. The error is a few roundings of the largest outputs of a row, not of each. A skip and a gate are left to the
    caller. Source: S4 (Gu et al. 2021, arXiv 2111.00396), Hyena (Poli et al. 2023, arXiv 2302.10866).
    Raises `ZooError` for shapes, dtypes and devices that do not fit, and for complex numbers.
    """
    name = "long_convolution"
    checks.rank(name, "x", x, "batch, tokens, channels")
    checks.rank(name, "filters", filters, "channels, length")
    batch, tokens, channels = x.shape
    length = filters.shape[1]
    checks.shape(name, "filters", filters, "channels, length", (channels, length))
    if length == 0:
        checks.fail(name, "filters have no taps; expected a length of at least 1")
    if x.is_complex() or filters.is_complex():
        checks.fail(
            name, f"x is {x.dtype} and filters are {filters.dtype}, expected real numbers; convolve parts apart"
        )
    if state is None:
        state = x.new_zeros(batch, 0, channels)
    checks.rank(name, "state", state, "batch, past, channels")
    past = state.shape[1]
    checks.shape(name, "state", state, "batch, past, channels", (batch, past, channels))
    packing.check(name, segments, batch, tokens)
    checks.floats(name, x=x, filters=filters, state=state)
    checks.one_device(name, x=x, filters=filters, state=state, segments=segments)

    inputs = torch.cat([state.to(x.dtype), x], 1)
    segments = None if segments is None or tokens == 0 else F.pad(packing.runs(segments), (past, 0))
    call = Call(x.device.type, x.dtype, {"length": length, "tokens": tokens, "segments": segments is not None})
    out = _LONG.select(call)(inputs, filters, segments)[:, past:]
    first = max(0, past + tokens - (length - 1))
    kept = inputs[:, first:]
    if segments is not None:
        kept = kept.masked_fill((segments[:, first:] != segments[:, -1:]).unsqueeze(-1), 0)
    return out, kept
