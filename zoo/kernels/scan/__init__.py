"""Scans with a diagonal transition; see `selective_scan` and `diagonal_scan`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.kernels import checks, launch
from zoo.kernels import segments as packing
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.scan import reference, torch_path

FASTEST = -1e30
"""The most negative A that is told from another."""
WIDEST_STATE = 256
"""Largest state of a channel that a program holds in registers."""
MOST_STATES = 2**30
"""Numbers in the states of all channels, within which places fit 32 bits."""


def _serves_state(call: Call) -> str | None:
    if (reason := launch.refusal(call)) is not None:
        return reason
    state_dim = call.facts.get("state_dim", 1)
    if not 1 <= state_dim <= WIDEST_STATE:
        return f"takes states of 1 to {WIDEST_STATE}, not {state_dim}"
    if (states := call.facts.get("channels", 0) * state_dim) > MOST_STATES:
        return f"takes up to {MOST_STATES:,} numbers in the states of a token, not {states:,}"
    return None


def _selective_scan_kernel(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.scan import triton_path

    return triton_path.selective_scan(x, delta, A, B, C, D, z, state, starts)


def _around(
    scan: Callable[..., tuple[Tensor, Tensor]],
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """A bare scan in the dtype of the computation, with the skip and the gate round it."""
    dtype = checks.at_least_float32(x.dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], *A.shape, dtype=dtype)
    # Minus infinity times a step of zero would be no number.
    A = A.to(dtype).clamp(min=FASTEST)
    x_, *rest = (each.to(dtype) for each in (x, delta, A, B, C, state))
    out, final = scan(x_, *rest, starts)
    if D is not None:
        out = out + x_ * D
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype), final


_SELECTIVE_SCAN = Primitive(
    "selective_scan",
    (
        Implementation("triton", _selective_scan_kernel, _serves_state),
        Implementation("torch", partial(_around, torch_path.selective_scan)),
        Implementation("reference", partial(_around, reference.selective_scan)),
    ),
)


def _diagonal_kernel(x: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
    from zoo.kernels.scan import triton_path

    return triton_path.diagonal_scan(x, decay, state, starts)


def _widened(
    scan: Callable[..., tuple[Tensor, Tensor]], x: Tensor, decay: Tensor, state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A diagonal scan in the dtype of the computation."""
    dtype = checks.at_least_float32(x.dtype)
    if state is None:
        state = x.new_zeros(x.shape[0], x.shape[2], dtype=dtype)
    out, final = scan(x.to(dtype), decay.to(dtype), state.to(dtype), starts)
    return out.to(x.dtype), final


_DIAGONAL_SCAN = Primitive(
    "diagonal_scan",
    (
        Implementation("triton", _diagonal_kernel, launch.refusal),
        Implementation("torch", partial(_widened, torch_path.diagonal_scan)),
        Implementation("reference", partial(_widened, reference.diagonal_scan)),
    ),
)
PRIMITIVES = (_SELECTIVE_SCAN, _DIAGONAL_SCAN)


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
        A: `[channels, state_dim]`, negative; minus infinity forgets everything.
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
    Raises `ZooError` for shapes, dtypes and devices that do not fit.
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
    checks.floats(name, x=x, delta=delta, A=A, B=B, C=C, D=D, z=z, state=state)
    checks.one_device(name, x=x, delta=delta, A=A, B=B, C=C, D=D, z=z, state=state, segments=segments)

    starts = None if segments is None or tokens < 2 else packing.starts(segments)
    facts = {"tokens": tokens, "channels": channels, "state_dim": state_dim, "segments": segments is not None}
    call = Call(x.device.type, x.dtype, facts)
    return _SELECTIVE_SCAN.select(call)(x, delta, A, B, C, D, z, state, starts)


def diagonal_scan(
    x: Tensor, decay: Tensor, *, state: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Element-wise gated recurrence `h_t = decay_t * h_(t-1) + x_t`.

    Args:
        x: `[batch, tokens, channels]`, real or complex; what drives the state, already gated by the caller.
        decay: like `x`, or `[channels]` for one that does not change; real or complex. Zero clears the state.
        state: `h` before the first token, `[batch, channels]`; None is zero.
        segments: integer ids `[batch, tokens]`; the state is cleared where the id changes. `state` belongs to the
            segment of the first token.

    Returns:
        All states `[batch, tokens, channels]` in `x`'s dtype, complex if anything given is complex, and the last one,
        `[batch, channels]`, in the dtype of the computation: float32 for half precision. Differentiable once.

    `O(tokens channels)`. It is what QRNN (Bradbury et al. 2016, arXiv 1611.01576), SRU (arXiv 1709.02755), minGRU
    (arXiv 2410.01201), S4D (arXiv 2206.11893), LRU (arXiv 2303.06349) and a diagonalised LMU have in common.
    Raises `ZooError` for shapes, dtypes and devices that do not fit.
    """
    name = "diagonal_scan"
    checks.rank(name, "x", x, "batch, tokens, channels")
    batch, tokens, channels = x.shape
    checks.is_tensor(name, "decay", decay)
    if decay.shape not in ((channels,), (batch, tokens, channels)):
        checks.fail(
            name,
            f"decay has shape {list(decay.shape)}, expected [channels] = [{channels}] "
            f"or [batch, tokens, channels] = {[batch, tokens, channels]}",
        )
    if state is not None:
        checks.shape(name, "state", state, "batch, channels", (batch, channels))
    packing.check(name, segments, batch, tokens)
    checks.floats_or_complex(name, x=x, decay=decay, state=state)
    checks.one_device(name, x=x, decay=decay, state=state, segments=segments)
    if decay.is_complex() or (state is not None and state.is_complex()):
        x = x.to(torch.promote_types(x.dtype, torch.complex64))
    starts = None if segments is None or tokens < 2 else packing.starts(segments)
    facts = {"tokens": tokens, "constant": decay.dim() == 1, "segments": segments is not None}
    call = Call(x.device.type, x.dtype, facts)
    return _DIAGONAL_SCAN.select(call)(x, decay, state, starts)
