"""The selective scan of Mamba; see `selective_scan`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks
from zoo.kernels import segments as packing
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.scan import reference, torch_path

_SELECTIVE_SCAN = Primitive(
    "selective_scan",
    (
        Implementation("torch", torch_path.selective_scan),
        Implementation("reference", reference.selective_scan),
    ),
)
PRIMITIVES = (_SELECTIVE_SCAN,)


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Diagonal state space with input-dependent step: `h_t = exp(delta_t A) h_(t-1) + delta_t B_t x_t`,
    `o_t = (C_t h_t + D x_t) * silu(z_t)`.

    Args:
        x: `[batch, tokens, channels]`.
        delta: step sizes, positive, like `x`.
        A: `[channels, state_dim]`, negative.
        B: `[batch, tokens, state_dim]`, shared by all channels.
        C: like `B`.
        D: `[channels]`, the skip; None is none.
        z: like `x`, the gate; None is none.
        state: `h` before the first token, `[batch, channels, state_dim]`, in float32 or wider; None is zero.
        segments: integer ids `[batch, tokens]`; the state is cleared where the id changes. `state` belongs to the
            segment of the first token.

    Returns:
        The output `[batch, tokens, channels]` in `x`'s dtype, and the state after the last token, in the dtype of the
        computation: float32 for half precision. Differentiable once.

    `O(tokens channels state_dim)`, one element-wise pass after another; `O(channels state_dim)` memory a token in
    short chunks only, which the backward computes again. Source: Gu and Dao 2023, arXiv 2312.00752, equations 2 and
    4, with the input discretised by Euler's rule as published implementations do.
    Raises `ZooError` for shapes that do not fit.
    """
    name = "selective_scan"
    checks.rank(name, "x", x, "batch, tokens, channels")
    checks.rank(name, "A", A, "channels, state_dim")
    batch, tokens, channels = x.shape
    state_dim = A.shape[1]
    checks.shape(name, "delta", delta, "batch, tokens, channels", (batch, tokens, channels))
    checks.shape(name, "A", A, "channels, state_dim", (channels, state_dim))
    checks.shape(name, "B", B, "batch, tokens, state_dim", (batch, tokens, state_dim))
    checks.shape(name, "C", C, "batch, tokens, state_dim", (batch, tokens, state_dim))
    if D is not None:
        checks.shape(name, "D", D, "channels", (channels,))
    if z is not None:
        checks.shape(name, "z", z, "batch, tokens, channels", (batch, tokens, channels))
    if state is not None:
        checks.shape(name, "state", state, "batch, channels, state_dim", (batch, channels, state_dim))
    packing.check(name, segments, batch, tokens)

    dtype = checks.at_least_float32(x.dtype)
    if state is None:
        state = x.new_zeros(batch, channels, state_dim, dtype=dtype)
    starts = None if segments is None or tokens < 2 else packing.starts(segments)
    call = Call(x.device.type, x.dtype, {"state_dim": state_dim, "segments": segments is not None})
    wide = [each.to(dtype) for each in (x, delta, A, B, C, state)]
    out, final = _SELECTIVE_SCAN.select(call)(*wide, starts)
    if D is not None:
        out = out + wide[0] * D
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype), final
