"""Exact work of the PyTorch paths, as functions of shapes, without importing torch.

Matrix products are counted as `torch.utils.flop_counter` counts them: two operations for each multiplication and
addition, in whole products, whatever a mask or causality would let a kernel leave out. The sizes that decide how a
primitive is computed live here too, and the PyTorch paths read them from here, so that count and computation agree.
"""

from __future__ import annotations

from math import log2
from typing import Literal, NamedTuple

CHUNK = 64
"""Tokens that the recurrence computes together, unless the caller says otherwise."""

LEAST_BLOCK = 32
"""The shortest block of queries that windowed attention computes together."""

ATTENTION_KEYS = 512
"""Keys that PyTorch's attention on a CPU computes together; those behind a block of queries are left out."""

SCAN_CHUNK_ELEMENTS = 1 << 18
"""States of a chunk of the selective scan, in numbers."""

LEAST_SCAN_CHUNK = 16
"""Tokens that a chunk of the selective scan has at least, however large its states: only one state in so many is kept
for the backward pass."""

SCAN_PIECE_ELEMENTS = 3 << 15
"""States that the selective scan computes together, in numbers: these and as many decays should fit a second-level
cache of a megabyte with room to spare."""

CROSS_ENTROPY_ELEMENTS = 2**22
"""Logits that linear cross entropy computes together on a CPU: what its caches hold."""

CROSS_ENTROPY_MULTIPLE = 64
"""Its chunks have a multiple of so many rows, which matrix units like."""


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


def causal_spared(tokens: int) -> float:
    """The share of `attention_flops` that plain causal attention over as many tokens does not compute.

    PyTorch takes `ATTENTION_KEYS` keys at a time, up to those that a block of queries may see.
    """
    whole, rest = divmod(tokens, ATTENTION_KEYS)
    computed = ATTENTION_KEYS**2 * whole * (whole + 1) // 2 + rest * tokens
    return 1 - computed / tokens**2


class RecurrentShape(NamedTuple):
    """Sizes of `recurrence` and `delta_rule`: queries and keys are of `groups` heads, values and states of `heads`."""

    batch: int
    tokens: int
    groups: int
    heads: int
    key_dim: int
    value_dim: int


def recurrence_flops(shape: RecurrentShape, *, chunk: int = CHUNK, channels: bool = False) -> int:
    """Matrix products of `recurrence`: for each chunk `q k^T` per group, its product with the values, the chunk's
    update of the state, and the product of the queries with the state that enters. A step has only the last.

    With a decay for each of the `channels` of the keys, `groups` counts what decays differently, and where the decays
    of a chunk are mild, sums of their logarithms are one more product.
    """
    batch, tokens, _, heads, key_dim, value_dim = shape
    if tokens == 0:
        return 0
    if tokens == 1:
        return 2 * batch * heads * key_dim * value_dim
    within, across, sums, chunks = _of_a_chunk(shape, chunk)
    return chunks * (within + 2 * across + channels * sums)


def recurrence_backward_flops(shape: RecurrentShape, *, chunk: int = CHUNK, channels: bool = False) -> int:
    """Matrix products of the backward pass of `recurrence`, whose chunks are computed one after another.

    Two for each product forward, but that nothing asks for the gradient of a state given or returned: the first chunk
    reads a state without one, and the last one's update of the state is not used. Sums of decays have one.
    """
    if shape.tokens <= 1:
        return 2 * recurrence_flops(shape)
    within, across, sums, chunks = _of_a_chunk(shape, chunk)
    return chunks * (2 * within + channels * sums) + (4 * chunks - 3) * across


def recurrence_saved(
    shape: RecurrentShape, *, chunk: int = CHUNK, decays: Literal["none", "fixed", "learned"] = "none"
) -> int:
    """Numbers that `recurrence` keeps for its backward pass, beside the values and decays that it was given, with one
    mild decay for each head; its output is not among them.

    Each chunk keeps the scores of its pairs and the memory that enters it, and copies of queries, keys and values
    wherever several groups have to be laid apart. Decays scale a copy of the values; where they are `learned`, outputs
    and memories are kept before they are scaled too.
    """
    batch, tokens, groups, heads, key_dim, value_dim = shape
    if tokens <= 1:
        return batch * tokens * (2 * groups * key_dim + heads * value_dim)
    chunk = min(chunk, tokens)
    chunks = -(-tokens // chunk)
    rows = batch * chunks * chunk
    memories = batch * chunks * heads * key_dim * value_dim
    values = rows * heads * value_dim
    kept = rows * groups * chunk + memories
    kept += 2 * rows * groups * key_dim if groups > 1 else 0
    kept += values if groups > 1 or decays != "none" else 0
    return kept + (values + memories if decays == "learned" else 0)


def recurrence_working(shape: RecurrentShape, *, chunk: int = CHUNK) -> int:
    """Numbers that `recurrence` holds at once while it computes a chunk without gradients, beside its whole output:
    copies of what enters the chunk, its scores, its output twice and two memories.
    """
    batch, tokens, groups, heads, key_dim, value_dim = shape
    chunk = min(chunk, tokens)
    entering = 2 * groups * key_dim + heads * value_dim
    return batch * (chunk * (entering + groups * chunk + 2 * heads * value_dim) + 2 * heads * key_dim * value_dim)


def _of_a_chunk(shape: RecurrentShape, chunk: int) -> tuple[int, int, int, int]:
    """Of a recurrence: products between a chunk's tokens, of its tokens with a state, and for sums; and the chunks."""
    batch, tokens, groups, heads, key_dim, value_dim = shape
    chunk = min(chunk, tokens)
    keys = 2 * batch * chunk * chunk * groups * key_dim
    values = 2 * batch * chunk * chunk * heads * value_dim
    return keys + values, 2 * batch * chunk * heads * key_dim * value_dim, keys, -(-tokens // chunk)


def delta_rule_flops(shape: RecurrentShape, *, steps: int = 1, chunk: int = CHUNK) -> int:
    """Matrix products of `delta_rule`: for each chunk keys and queries with keys per group, and for each head what the
    keys and the queries read from the state, the product with the updates, and the state's update.

    The triangular system of a chunk is none of them, as `torch.utils.flop_counter` counts no solutions of systems;
    see `delta_rule_solve`. A token alone reads the state once for each of its `steps` and once for its output.
    """
    batch, tokens, groups, heads, key_dim, value_dim = shape
    if tokens == 0:
        return 0
    if tokens == 1:
        return 2 * batch * heads * (steps + 1) * key_dim * value_dim
    chunk, rows, chunks = _delta_chunk(tokens, steps, chunk)
    scores = groups * (rows + chunk) * rows * key_dim
    of_state = (2 * rows + chunk) * key_dim * value_dim
    return 2 * batch * chunks * (scores + heads * (of_state + chunk * rows * value_dim))


def delta_rule_solve(shape: RecurrentShape, *, steps: int = 1, chunk: int = CHUNK) -> int:
    """Operations of the triangular systems of `delta_rule`, a multiplication and an addition for each entry below the
    diagonal and column.
    """
    if shape.tokens <= 1:
        return 0
    _, rows, chunks = _delta_chunk(shape.tokens, steps, chunk)
    return shape.batch * shape.heads * chunks * rows * (rows - 1) * shape.value_dim


def _delta_chunk(tokens: int, steps: int, chunk: int) -> tuple[int, int, int]:
    """Tokens of a chunk, its steps, and how many chunks there are."""
    chunk = min(max(1, chunk // steps), tokens)
    return chunk, chunk * steps, -(-tokens // chunk)


def selective_scan_flops(batch: int, tokens: int, channels: int, state_dim: int) -> int:
    """Matrix products of `selective_scan` that `torch.utils.flop_counter` sees: of a step, the state times C."""
    return 2 * batch * channels * state_dim if tokens == 1 else 0


def selective_scan_chunks(batch: int, tokens: int, channels: int, state_dim: int) -> tuple[int, int]:
    """Tokens of a chunk of `selective_scan`, of which one state is kept for the backward pass, and tokens of a piece,
    which are computed at once; a chunk is a whole number of pieces.
    """
    state = max(1, batch * channels * state_dim)
    chunk = max(1, min(tokens, max(LEAST_SCAN_CHUNK, SCAN_CHUNK_ELEMENTS // state)))
    piece = max(1, min(chunk, SCAN_PIECE_ELEMENTS // state))
    return -(-chunk // piece) * piece, piece


def selective_scan_pointwise(batch: int, tokens: int, channels: int, state_dim: int) -> int:
    """Element-wise operations of `selective_scan`: for each state element the decay's product and exponential, the
    update's two products, a multiplication and an addition for the state, and two for the output.
    """
    return 8 * batch * tokens * channels * state_dim


def diagonal_scan_flops(batch: int, tokens: int, channels: int) -> int:
    """Matrix products of `diagonal_scan`: none."""
    del batch, tokens, channels
    return 0


def diagonal_scan_pointwise(batch: int, tokens: int, channels: int) -> int:
    """Element-wise operations of `diagonal_scan`: a multiplication and an addition for each token and channel."""
    return 2 * batch * tokens * channels


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


def block_diagonal_matmul_flops(rows: int, blocks: int, input_width: int, output_width: int) -> int:
    """Matrix products of `block_diagonal_matmul`, the widths being a block's."""
    return 2 * rows * blocks * input_width * output_width


def linear_cross_entropy_flops(rows: int, width: int, vocab: int, *, gradients: int = 0) -> int:
    """Matrix products of `linear_cross_entropy`: the logits, and along with them those of the `gradients` of `x` and
    `weight` that are asked for. The backward pass of a sum or a mean has none.
    """
    return 2 * (1 + gradients) * rows * width * vocab


def linear_cross_entropy_rows(rows: int, width: int, vocab: int, elements: int = CROSS_ENTROPY_ELEMENTS) -> int:
    """Rows to a chunk, such that its logits are no larger than `x` is or than `elements`, and chunks are alike."""
    most = -(-max(rows * width, elements) // vocab)
    chunks = max(1, -(-rows // max(most, CROSS_ENTROPY_MULTIPLE)))
    return -(-rows // chunks // CROSS_ENTROPY_MULTIPLE) * CROSS_ENTROPY_MULTIPLE or CROSS_ENTROPY_MULTIPLE


def transform_length(least: int) -> int:
    """The next length from `least` on that has no prime factor above 5, which Fourier transforms are fast for."""
    best = 1 << (least - 1).bit_length()
    fives = 1
    while fives < best:
        threes = fives
        while threes < best:
            best = min(best, threes << max(0, (-(-least // threes) - 1).bit_length()))
            threes *= 3
        fives *= 5
    return best


def long_convolution_flops(batch: int, tokens: int, channels: int, length: int) -> int:
    """Matrix products of `long_convolution`: none, it multiplies spectra."""
    del batch, tokens, channels, length
    return 0


def long_convolution_pointwise(batch: int, tokens: int, channels: int, length: int) -> int:
    """Operations of `long_convolution` with filters of `length`: the usual `2.5 n log2 n` for each real transform of
    `n` numbers, of inputs, filters and outputs, and six for each product of two complex numbers.
    """
    if not batch * tokens * channels:
        return 0
    size = transform_length(tokens + min(length, tokens) - 1)
    transforms = (2 * batch + 1) * channels
    return round(transforms * 2.5 * size * log2(size)) + 6 * batch * channels * (size // 2 + 1)
