"""Rotary embedding on a Triton kernel, one launch for queries and keys; its backward pass is the same operator."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Launches
from zoo.kernels.pointwise import rotary_kernels

_LAUNCHES = Launches("pointwise")


def rotary(x: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool) -> Tensor:
    return _turn(x, None, positions, base, dim, interleaved, False)[0] if dim else x


def rotary_pair(
    q: Tensor, k: Tensor, positions: Tensor, base: float, dim: int, interleaved: bool
) -> tuple[Tensor, Tensor]:
    return _turn(q, k, positions, base, dim, interleaved, False) if dim else (q, k)


@torch.library.custom_op("zoo::rotary_turn", mutates_args=())
def _turn(
    q: Tensor, k: Tensor | None, positions: Tensor, base: float, dim: int, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    """`q` and `k` turned, or turned back if `inverse`; without `k` the second is empty."""
    out_q, out_k = _results(q, k)
    q = _rowwise(q)
    k = q if k is None else _rowwise(k)
    batch, tokens, heads, head_dim = q.shape
    count, kv_heads = batch * tokens, k.shape[2]
    if out_q.numel() or out_k.numel():
        strides = (*q.stride()[:3], heads, *k.stride()[:3], kv_heads)
        position_batch = positions.stride(0) if positions.dim() == 2 else 0
        if positions.stride(-1) != 1:
            positions = positions.contiguous()
            position_batch = tokens if positions.dim() == 2 else 0
        _LAUNCHES.run(
            rotary_kernels.rotary_turn,
            lambda meta: (triton.cdiv(count, meta["TOKENS"]),),
            q.device,
            {"head_dim": head_dim},
            *(q, k, out_q, out_k, positions, count, tokens, position_batch, *strides),
            RATE=-2 * math.log2(base) / dim,
            INVERSE=inverse,
            HAS_K=out_k.numel() > 0,
            HEAD_DIM=head_dim,
            DIM=dim,
            HALF=triton.next_power_of_2(dim // 2),
            REST=triton.next_power_of_2(head_dim - dim) if dim < head_dim else 0,
            INTERLEAVED=interleaved,
        )
    return out_q, out_k


@_turn.register_fake
def _(
    q: Tensor, k: Tensor | None, positions: Tensor, base: float, dim: int, interleaved: bool, inverse: bool
) -> tuple[Tensor, Tensor]:
    return _results(q, k)


def _results(q: Tensor, k: Tensor | None) -> tuple[Tensor, Tensor]:
    out_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out_q, q.new_empty(0) if k is None else torch.empty(k.shape, dtype=k.dtype, device=k.device)


def _rowwise(x: Tensor) -> Tensor:
    """`x` with neighbouring features next to each other, as it mostly is, even where it is a part of something."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    del output
    _, k, positions, *ctx.settings = inputs
    ctx.has_k = k is not None
    ctx.save_for_backward(positions)


def _differentiate(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    (positions,) = ctx.saved_tensors
    base, dim, interleaved, inverse = ctx.settings
    back_q, back_k = _turn(grad_q, grad_k if ctx.has_k else None, positions, base, dim, interleaved, not inverse)
    return back_q, back_k if ctx.has_k else None, None, None, None, None, None


_turn.register_autograd(_differentiate, setup_context=_remember)
