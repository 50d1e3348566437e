"""The delta rule, gated or not, with one or more steps for each token; see `delta_rule`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zoo.kernels import checks, launch
from zoo.kernels import segments as packing
from zoo.kernels.delta import reference, torch_path
from zoo.kernels.dispatch import Call, Implementation, Primitive
from zoo.kernels.work import CHUNK

WIDEST_KEY = 128
"""Widest key with which a chunk fits the registers of a multiprocessor; half as wide in float32."""


def _serves(call: Call) -> str | None:
    if (reason := launch.refusal(call)) is not None:
        return reason
    width, half = call.facts.get("key_dim", 0), call.dtype.itemsize == 2
    if width > (WIDEST_KEY if half else WIDEST_KEY // 2):
        return f"takes key_dim up to {WIDEST_KEY} in half precision and {WIDEST_KEY // 2} in float32, not {width}"
    return "keeps the state in float32, not float64" if call.facts.get("double_state") else None


def _kernel(*arguments: Any) -> tuple[Tensor, Tensor]:
    from zoo.kernels.delta import triton_path

    return triton_path.delta_rule(*arguments)


_DELTA_RULE = Primitive(
    "delta_rule",
    (
        Implementation("triton", _kernel, _serves),
        Implementation("torch", torch_path.delta_rule),
        Implementation("reference", reference.delta_rule),
    ),
)
PRIMITIVES = (_DELTA_RULE,)


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    *,
    log_decay: Tensor | None = None,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    scale: float | None = None,
    steps: int = 1,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """A state that is corrected instead of added to: `S <- exp(log_decay_t) S`, then for each step of the token
    `S <- S + k^T beta (v - k S)`, and `o_t = scale * q_t S`.

    With keys of norm 1 a step moves what the state holds for `k` towards `v`: `beta` 0 leaves it, 1 replaces it, and
    up to 2 goes beyond, which gives the transition `I - beta k^T k` a negative eigenvalue. Keys are used as they are;
    the rule diverges where `beta |k|^2` stays above 2, so normalise them.

    Args:
        q: `[batch, tokens, groups, key_dim]`.
        k: `[batch, tokens * steps, groups, key_dim]`, the steps of a token next to each other.
        v: `[batch, tokens * steps, heads, value_dim]`; head `h` uses the queries and keys of group
            `h // (heads / groups)`.
        beta: `[batch, tokens * steps, heads]`, from 0 to 2.
        log_decay: logarithm of the decay before a token's first step, at most 0: None for no decay, `[heads]` for a
            constant one, or `[batch, tokens, heads]`; above 0 counts as 0, and `-inf` forgets everything before.
        state: `S` before the first token, `[batch, heads, key_dim, value_dim]`, in float32 or wider; None is zero.
        segments: integer ids `[batch, tokens]`; the state is cleared where the id changes. `state` belongs to the
            segment of the first token.
        scale: factor of the output, 1 if None.
        steps: corrections for each token.
        chunk: steps that are computed together as matrix products, where the implementation lets the caller choose.

    Returns:
        The output `[batch, tokens, heads, value_dim]` in `v`'s dtype, and the state after the last token, in the
        dtype of the computation: float32 for half precision.

    Linear in tokens: `O(tokens steps (chunk (key_dim + value_dim) + key_dim value_dim))` for each head. Sources:
    DeltaNet (Yang et al. 2024, arXiv 2406.06484), with a decay gated DeltaNet (arXiv 2412.06464), with several steps
    DeltaProduct (arXiv 2502.10297), with `beta` above 1 arXiv 2411.12537. Raises `ZooError` for shapes, dtypes
    and devices that do not fit.
    """
    name = "delta_rule"
    checks.rank(name, "q", q, "batch, tokens, groups, key_dim")
    checks.rank(name, "v", v, "batch, tokens * steps, heads, value_dim")
    if not isinstance(steps, int) or steps < 1:
        checks.fail(name, f"steps is {steps!r}, expected an integer of at least 1")
    checks.positive(name, "chunk", chunk)
    batch, tokens, groups, key_dim = q.shape
    heads, value_dim = v.shape[2:]
    rows = tokens * steps
    checks.shape(name, "k", k, "batch, tokens * steps, groups, key_dim", (batch, rows, groups, key_dim))
    checks.shape(name, "v", v, "batch, tokens * steps, heads, value_dim", (batch, rows, heads, value_dim))
    checks.shape(name, "beta", beta, "batch, tokens * steps, heads", (batch, rows, heads))
    if groups == 0 or heads % groups:
        checks.fail(name, f"v has {heads} heads and q has {groups} groups; expected heads to be a multiple of groups")
    if log_decay is not None:
        checks.is_tensor(name, "log_decay", log_decay)
    if log_decay is not None and log_decay.shape not in ((heads,), (batch, tokens, heads)):
        checks.fail(
            name,
            f"log_decay has shape {list(log_decay.shape)}, expected [heads] = [{heads}] "
            f"or [batch, tokens, heads] = {[batch, tokens, heads]}",
        )
    if state is not None:
        checks.shape(name, "state", state, "batch, heads, key_dim, value_dim", (batch, heads, key_dim, value_dim))
    packing.check(name, segments, batch, tokens)
    checks.floats(name, q=q, k=k, v=v, beta=beta, log_decay=log_decay, state=state)
    checks.one_device(name, q=q, k=k, v=v, beta=beta, log_decay=log_decay, state=state, segments=segments)
    facts = {
        "rows": rows,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "features": max(groups * key_dim, heads * value_dim),
        "steps": steps,
        "segments": segments is not None,
        "double_state": state is not None and state.dtype == torch.float64,
    }
    select = _DELTA_RULE.select(Call(v.device.type, v.dtype, facts))
    return select(q, k, v, beta, log_decay, state, segments, scale, steps, chunk)
