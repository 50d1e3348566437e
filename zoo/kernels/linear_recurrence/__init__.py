"""The linear recurrence over outer products; see `recurrence`."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.kernels import checks, launch
from zoo.kernels import segments as packing
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.linear_recurrence import reference, torch_path
from zoo.kernels.work import CHUNK

MOST_STATE = 2**31
"""Largest state of a head, in numbers, within which places fit 32 bits."""


def _kernels_serve(call: Call) -> str | None:
    # A state's sums of products leave the range of float16, so it is no dtype for the kernels.
    if (reason := launch.refusal(call, ("float32", "bfloat16"))) is not None:
        return reason
    facts = call.facts
    if not facts.get("one_dtype", True):
        return "takes q, k and v in one dtype, and a state in no wider one than float32"
    if (state := facts.get("key_dim", 0) * facts.get("value_dim", 0)) > MOST_STATE:
        return f"takes a head's state of up to {MOST_STATE:,} numbers, not {state:,}"
    return None


def _recurrence_kernel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    scale: float | None,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    from zoo.kernels.linear_recurrence import triton_path

    return triton_path.recurrence(q, k, v, log_decay, state, segments, scale, chunk)


_RECURRENCE = Primitive(
    "recurrence",
    (
        Implementation("triton", _recurrence_kernel, _kernels_serve),
        Implementation("torch", torch_path.recurrence),
        Implementation("reference", reference.recurrence),
    ),
)
PRIMITIVES = (_RECURRENCE,)


def recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay: `S_t = exp(log_decay_t) S_(t-1) + k_t^T v_t`, `o_t = scale * q_t S_t`.

    Args:
        q: `[batch, tokens, groups, key_dim]`.
        k: like `q`.
        v: `[batch, tokens, heads, value_dim]`; head `h` uses the queries and keys of group `h // (heads / groups)`.
        log_decay: logarithm of the decay, at most 0: None for no decay, `[heads]` for a constant one, or
            `[batch, tokens, heads]`, or one for each row of the state `[batch, tokens, groups or heads, key_dim]`,
            `S_t = diag(exp(log_decay_t)) S_(t-1) + k_t^T v_t`; above 0 counts as 0, and `-inf` forgets everything
            before the token.
        state: `S` before the first token, `[batch, heads, key_dim, value_dim]`, in float32 or wider; None is zero.
        segments: integer ids `[batch, tokens]`; the state is cleared where the id changes. `state` belongs to the
            segment of the first token.
        scale: factor of the output, 1 if None.
        chunk: tokens that are computed together as matrix products.

    Returns:
        The output `[batch, tokens, heads, value_dim]` in `v`'s dtype, and the state after the last token, in the
        dtype of the computation: float32 for half precision.

    Linear in tokens: `O(tokens (chunk (key_dim / r + value_dim) + key_dim value_dim))` for each head, with `r` heads
    to a group. Source: the SSD algorithm of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 6); without decay,
    linear attention (Katharopoulos et al. 2020, arXiv 2006.16236); constant decay, RetNet (arXiv 2307.08621); a decay
    for each channel, GLA (Yang et al. 2024, arXiv 2312.06635).
    Raises `ZooError` for shapes, dtypes and devices that do not fit.
    """
    name = "recurrence"
    checks.rank(name, "q", q, "batch, tokens, groups, key_dim")
    checks.rank(name, "v", v, "batch, tokens, heads, value_dim")
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    checks.shape(name, "k", k, "batch, tokens, groups, key_dim", (batch, tokens, groups, key_dim))
    checks.shape(name, "v", v, "batch, tokens, heads, value_dim", (batch, tokens, heads, value_dim))
    if groups == 0 or heads % groups:
        checks.fail(name, f"v has {heads} heads and q has {groups} groups; expected heads to be a multiple of groups")
    if log_decay is not None:
        checks.is_tensor(name, "log_decay", log_decay)
    if log_decay is not None and log_decay.shape not in (
        (heads,),
        (batch, tokens, heads),
        (batch, tokens, groups, key_dim),
        (batch, tokens, heads, key_dim),
    ):
        checks.fail(
            name,
            f"log_decay has shape {list(log_decay.shape)}, expected [heads] = [{heads}], [batch, tokens, heads] = "
            f"{[batch, tokens, heads]} or, for each channel of the keys, [batch, tokens, groups or heads, key_dim] = "
            f"{[batch, tokens, groups, key_dim]}",
        )
    if state is not None:
        checks.shape(name, "state", state, "batch, heads, key_dim, value_dim", (batch, heads, key_dim, value_dim))
    packing.check(name, segments, batch, tokens)
    checks.floats(name, q=q, k=k, v=v, log_decay=log_decay, state=state)
    checks.one_device(name, q=q, k=k, v=v, log_decay=log_decay, state=state, segments=segments)
    if log_decay is not None and log_decay.dim() == 4 and log_decay.shape[2] != groups:
        # What decays differently is a group of its own.
        q, k = (x.repeat_interleave(heads // groups, 2) for x in (q, k))
    checks.positive(name, "chunk", chunk)
    one_dtype = q.dtype == k.dtype == v.dtype and (state is None or state.dtype != torch.float64)
    facts = {
        "tokens": tokens,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "features": max(q.shape[2] * key_dim, heads * value_dim),
        "one_dtype": one_dtype,
    }
    call = Call(v.device.type, v.dtype, facts)
    return _RECURRENCE.select(call)(q, k, v, log_decay, state, segments, scale, chunk)
