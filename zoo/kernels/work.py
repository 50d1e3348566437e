"""Exact work of the PyTorch paths, as functions of shapes, without importing torch.

Matrix products are counted as `torch.utils.flop_counter` counts them: two operations for each multiplication and
addition, in whole products, whatever a mask or causality would let a kernel leave out. The sizes that decide how a
primitive is computed live here too, and the PyTorch paths read them from here, so that count and computation agree.
"""

from __future__ import annotations

CHUNK = 64
"""Tokens that the recurrence computes together, unless the caller says otherwise."""

LEAST_BLOCK = 32
"""The shortest block of queries that windowed attention computes together."""


def attention_block(tokens: int, keys: int, window: int | None, causal: bool) -> tuple[int, int] | None:
    """How causal attention in a window is cut: queries to a block and keys that a block sees; None if it is not cut.

    A quarter of the window to a block was fastest of the fractions tried on CPUs; blocks are not worth their overhead
    where a block would see more than half of the keys.
    """
    if window is None or not causal or tokens < 2 * LEAST_BLOCK or keys < tokens:
        return None
    block = max(LEAST_BLOCK, min(256, window // 4))
    seen = -(-(window - 1) // block) * block + block
    return (block, seen) if 2 * seen <= keys else None


def attention_flops(
    batch: int,
    tokens: int,
    keys: int,
    heads: int,
    head_dim: int,
    value_dim: int | None = None,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> int:
    """Matrix products of `attention`: scores and weighted values, `2 tokens keys (head_dim + value_dim)` for each head.

    A decoding step is `tokens=1` with `keys` the length of the cache and the token. A long causal window is computed
    in blocks, which see only the keys near them; see `attention_block`.
    """
    cut = None if softcap is not None else attention_block(tokens, keys, window, causal)
    if cut is not None:
        block, keys = cut
        tokens = -(-tokens // block) * block
    return 2 * batch * heads * tokens * keys * (head_dim + (head_dim if value_dim is None else value_dim))


def recurrence_flops(
    batch: int, tokens: int, groups: int, heads: int, key_dim: int, value_dim: int, *, chunk: int = CHUNK
) -> int:
    """Matrix products of `recurrence`: for each chunk `q k^T` per group, its product with the values, the chunk's
    update of the state, and the product of the queries with the state that enters. A step has only the last.
    """
    if tokens == 0:
        return 0
    if tokens == 1:
        return 2 * batch * heads * key_dim * value_dim
    chunk = min(chunk, tokens)
    padded = -(-tokens // chunk) * chunk
    return 2 * batch * padded * (chunk * (groups * key_dim + heads * value_dim) + 2 * heads * key_dim * value_dim)


def selective_scan_flops(batch: int, tokens: int, channels: int, state_dim: int) -> int:
    """Matrix products of `selective_scan` that `torch.utils.flop_counter` sees: of a step, the state times C."""
    return 2 * batch * channels * state_dim if tokens == 1 else 0


def selective_scan_pointwise(batch: int, tokens: int, channels: int, state_dim: int) -> int:
    """Element-wise operations of `selective_scan`: for each state element the decay's product and exponential, the
    update's two products, a multiplication and an addition for the state, and two for the output.
    """
    return 8 * batch * tokens * channels * state_dim


def causal_convolution_flops(batch: int, tokens: int, channels: int, kernel: int) -> int:
    """Matrix products of `causal_convolution`: none, its few taps are element-wise products."""
    del batch, tokens, channels, kernel
    return 0


def causal_convolution_pointwise(batch: int, tokens: int, channels: int, kernel: int) -> int:
    """Element-wise operations of `causal_convolution`: a multiplication and an addition for each tap."""
    return 2 * batch * tokens * channels * kernel


def grouped_matmul_flops(rows: int, input_width: int, output_width: int) -> int:
    """Matrix products of `grouped_matmul`: every row meets one group's weight."""
    return 2 * rows * input_width * output_width


def subset_matmul_flops(rows: int, taken: int, output_width: int, input_width: int) -> int:
    """Matrix products of `subset_matmul`: every row meets the blocks that it takes."""
    return 2 * rows * taken * output_width * input_width
