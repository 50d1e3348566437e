"""Attention on Triton kernels, as operators that `torch.compile` and `torch.export` know."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from zoo.kernels.launch import Launches, processors
from zoo.kernels.softmax_attention import triton_kernels
from zoo.kernels.softmax_attention.terms import Extras, Rules, middle

_LAUNCHES = Launches("softmax_attention")
_LOG2E = math.log2(math.e)
_SHUT = -200.0
"""The logarithm that stands for that of a forget gate of zero: what it lets through is none in float32."""
MOST_SPLITS = 64
DECODED_ROWS = 64
"""Queries times heads for each head of keys, up to which keys are split between programs."""
_EMPTY = -1e29
"""Log-sum-exps below are those of rows without keys."""


def attention(q: Tensor, k: Tensor, v: Tensor, extras: Extras, rules: Rules) -> tuple[Tensor, Tensor | None]:
    decay, bias, prefix = None, extras.bias, extras.prefix
    if extras.log_forget is not None:
        # In float64, so that differences are exact however long the row is.
        decay = (extras.log_forget.double().clamp(min=_SHUT) * _LOG2E).cumsum(1).transpose(1, 2).contiguous()
    if prefix is not None:
        prefix = (prefix - rules.first).clamp(min=0)
    zeta, gamma = (None, None) if rules.clip is None else rules.clip
    out, log_sum = _forward(
        q,
        k,
        v,
        extras.segments,
        extras.key_length,
        prefix,
        extras.blocks,
        extras.alibi_slopes,
        bias,
        decay,
        extras.sink,
        rules.causal,
        rules.window,
        rules.dilation,
        rules.block,
        rules.first,
        0 if bias is None else middle(rules, bias),
        rules.scale,
        rules.softcap,
        zeta,
        gamma,
    )
    if not rules.lse:
        return out, None
    lse = (log_sum / _LOG2E).masked_fill(log_sum < _EMPTY, float("-inf")).transpose(1, 2)
    return out, lse


class _Plan(NamedTuple):
    """A call as the kernels see it."""

    q: Tensor
    k: Tensor
    v: Tensor
    segments: Tensor | None
    key_length: Tensor | None
    prefix: Tensor | None
    blocks: Tensor | None
    slopes: Tensor | None
    bias: Tensor | None
    decay: Tensor | None
    sink: Tensor | None
    causal: bool
    window: int | None
    dilation: int
    block: int
    first: int
    center: int
    scale: float
    softcap: float | None
    zeta: float | None
    gamma: float | None

    @property
    def sizes(self) -> dict[str, int]:
        """What configurations hang on; terms are what each pair's score or visibility takes registers for."""
        terms = self.segments, self.slopes, self.bias, self.decay
        return {
            "head_dim": max(self.q.shape[3], self.v.shape[3]),
            "terms": sum(term is not None for term in terms),
        }

    @property
    def empty(self) -> bool:
        return self.q.shape[0] * self.q.shape[1] * self.q.shape[2] * self.k.shape[1] * self.v.shape[3] == 0

    def configuration(self, kernel: Any) -> dict[str, Any]:
        """Tensor cores do not take float32 as it is: its kernels have tiles of their own."""
        name = kernel.__name__ + ("_float32" if self.q.dtype == torch.float32 else "")
        return _LAUNCHES.configuration(name, self.q.device, self.sizes)

    @property
    def splits(self) -> bool:
        """Whether the call is a step of decoding: all queries that share keys fit a tile, and no pattern skips some."""
        rows = self.q.shape[1] * (self.q.shape[2] // self.k.shape[2])
        patterned = self.dilation > 1 or self.blocks is not None or self.zeta is not None
        return rows <= DECODED_ROWS and self.k.shape[1] > self.q.shape[1] and not patterned

    def terms(self) -> tuple[Tensor | None, ...]:
        return self.segments, self.key_length, self.prefix, self.slopes, self.bias, self.decay

    def strides(self) -> tuple[int, ...]:
        return (*self.q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3])

    def numbers(self) -> tuple[int | None, ...]:
        """Tokens, keys, heads to a key head, dilation, where its classes begin, window, bias entries and middle."""
        tokens, keys = self.q.shape[1], self.k.shape[1]
        # Behind the farthest key a window changes nothing, and 32 bits might not hold its end.
        window = None if self.window is None else -(-min(self.window, tokens + keys) // self.dilation)
        return (
            tokens,
            keys,
            self.q.shape[2] // self.k.shape[2],
            self.dilation,
            (tokens - keys) % self.dilation,
            window,
            1 if self.bias is None else self.bias.shape[1],
            self.center,
        )

    def scales(self) -> tuple[float | None, ...]:
        """Of scores in units of log2: their factor, the soft cap, and the clip's slope and offset."""
        scale, cap = self.scale * _LOG2E, None
        if self.softcap is not None:
            scale, cap = self.scale / self.softcap, self.softcap * _LOG2E
        spread = None if self.zeta is None or self.gamma is None else self.zeta - self.gamma
        return scale, cap, spread, self.gamma

    def constants(self) -> dict[str, Any]:
        head_dim, value_dim = self.q.shape[3], self.v.shape[3]
        return {
            "CAUSAL": self.causal,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
            "BLOCK_V": max(16, triton.next_power_of_2(value_dim)),
        }

    def visits(
        self, rows: int, columns: int, *, by_keys: bool = False
    ) -> tuple[Tensor | None, Tensor | None, int, int, int]:
        """For patterns that no bounds describe: which tiles of keys each tile of queries visits, or the reverse.

        `[batch or 1, heads or 1, tiles, visited]` in the order of the kernels, the numbers of tiles that are wholly
        visible and that are visible at all, and the strides of batch, heads and tiles.
        """
        if self.dilation > 1 or (self.segments is None and self.blocks is None):
            return None, None, 0, 0, 0
        tokens, keys, device = self.q.shape[1], self.k.shape[1], self.q.device
        shift = keys - tokens
        # Coordinates of the first and last of each tile, [query_tiles, 1] and [key_tiles].
        query = torch.arange(shift, keys, rows, device=device)[:, None]
        key = torch.arange(0, keys, columns, device=device)
        query_end, key_end = (query + rows - 1).clamp(max=keys - 1), key + columns - 1
        nearest, farthest = query - key_end, query_end - key
        seen = torch.ones_like(nearest, dtype=torch.bool)[None, None]
        whole = seen
        if self.causal:
            seen, whole = seen & (farthest >= 0), whole & (nearest >= 0)
        if self.window is not None:
            seen, whole = seen & (nearest < self.window), whole & (farthest < self.window)
            if not self.causal:
                seen, whole = seen & (farthest > -self.window), whole & (nearest > -self.window)
        if self.prefix is not None:
            prefix = self.prefix[:, None, None, None]
            seen, whole = seen | (key < prefix), whole | (key_end < prefix)
        limit = keys if self.key_length is None else self.key_length[:, None, None, None].clamp(max=keys)
        seen, whole = seen & (key < limit), whole & (key_end < limit) & (query + rows <= keys)
        if self.blocks is not None:
            row, column = (query + self.first) // self.block, (key + self.first) // self.block
            shown = self.blocks[:, row, column][None]
            seen, whole = seen & shown, whole & shown
        if self.segments is not None:
            low, high = _extremes(self.segments[:, shift:], rows)
            key_low, key_high = _extremes(self.segments, columns)
            low, high = low[:, None, :, None], high[:, None, :, None]
            key_low, key_high = key_low[:, None, None], key_high[:, None, None]
            seen = seen & (low <= key_high) & (key_low <= high)
            whole = whole & (low == high) & (key_low == key_high) & (low == key_low)
        whole = whole & seen
        if by_keys:
            seen, whole = seen.transpose(2, 3), whole.transpose(2, 3)
        rank = seen.to(torch.int8) + whole.to(torch.int8)
        order = rank.argsort(dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
        counts = torch.stack((whole.sum(-1), seen.sum(-1)), -1).to(torch.int32).contiguous()
        batch, heads, tiles, width = order.shape
        return order, counts, tiles * heads if batch > 1 else 0, tiles if heads > 1 else 0, width


def _extremes(segments: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The least and the greatest id of each tile of tokens, `[batch, tiles]`."""
    batch, tokens = segments.shape
    tiles = -(-tokens // size)
    index = torch.arange(tiles * size, device=segments.device).clamp(max=tokens - 1)
    tiled = segments[:, index].view(batch, tiles, size)
    return tiled.amin(-1), tiled.amax(-1)


def _plan(*given: Any) -> _Plan:
    plan = _Plan(*given)

    def rows(x: Tensor) -> Tensor:
        return x if x.stride(3) == 1 else x.contiguous()

    def whole(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.contiguous()

    return plan._replace(
        q=rows(plan.q),
        k=rows(plan.k),
        v=rows(plan.v),
        segments=whole(plan.segments),
        key_length=whole(plan.key_length),
        slopes=whole(plan.slopes),
        bias=whole(plan.bias),
        decay=whole(plan.decay),
        sink=whole(plan.sink),
    )


@torch.library.custom_op("zoo::attention_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    key_length: Tensor | None,
    prefix: Tensor | None,
    blocks: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    decay: Tensor | None,
    sink: Tensor | None,
    causal: bool,
    window: int | None,
    dilation: int,
    block: int,
    first: int,
    center: int,
    scale: float,
    softcap: float | None,
    zeta: float | None,
    gamma: float | None,
) -> tuple[Tensor, Tensor]:
    plan = _plan(
        q, k, v, segments, key_length, prefix, blocks, slopes, bias, decay, sink, causal, window, dilation, block,
        first, center, scale, softcap, zeta, gamma,
    )  # fmt: skip
    batch, tokens, heads, _ = q.shape
    out = torch.empty((batch, tokens, heads, v.shape[3]), dtype=q.dtype, device=q.device)
    log_sum = torch.empty((batch, heads, tokens), dtype=torch.float32, device=q.device)
    if plan.empty:
        logits = q.new_full((heads,), triton_kernels.HIDDEN.value) if sink is None else sink * _LOG2E
        return out.zero_(), log_sum.copy_(logits[:, None].expand(batch, heads, tokens))
    if plan.splits:
        _decode(plan, out, log_sum)
        return out, log_sum
    kernel: Any = triton_kernels.attention_forward
    configuration = plan.configuration(kernel)
    rows, columns = configuration["BLOCK_M"], configuration["BLOCK_N"]
    listed, counts, *steps = plan.visits(rows, columns)
    grid = (_tiles(tokens, dilation, rows), heads, batch)
    kernel[grid](
        plan.q, plan.k, plan.v, out, log_sum, *plan.terms(), plan.sink, listed, counts, *plan.strides(), *steps,
        *plan.numbers(), *plan.scales(), **plan.constants(), **configuration,
    )  # fmt: skip
    return out, log_sum


def _decode(plan: _Plan, out: Tensor, log_sum: Tensor) -> None:
    """A few queries: the keys are split between programs, enough for each processor, and the results merged."""
    q, k, v = plan.q, plan.k, plan.v
    batch, tokens, heads, _ = q.shape
    keys, kv_heads = k.shape[1:3]
    kernel: Any = triton_kernels.attention_decode
    configuration = plan.configuration(kernel)
    size = configuration["BLOCK_N"]
    begin = 0
    if plan.window is not None and plan.prefix is None:
        begin = max(0, keys - tokens - plan.window + 1) // size
    tiles = -(-keys // size) - begin
    wished = min(tiles, MOST_SPLITS, -(-2 * processors(q.device) // (batch * kv_heads)))
    count = -(-tiles // wished)
    splits = -(-tiles // count)
    parts = torch.empty((splits, batch, tokens, heads, v.shape[3]), dtype=torch.float32, device=q.device)
    log_sums = torch.empty((splits, batch, heads, tokens), dtype=torch.float32, device=q.device)
    *_, window, distances, center = plan.numbers()
    constants, (scale, cap, _, _) = plan.constants(), plan.scales()
    kernel[(splits, kv_heads, batch)](
        q, k, v, parts, log_sums, *plan.terms(), *plan.strides(), tokens, keys, heads // kv_heads, window, distances,
        center, scale, cap, begin, count, **constants, **configuration,
    )  # fmt: skip
    kernel = triton_kernels.attention_merge
    constants = {"VALUE_DIM": v.shape[3], "BLOCK_V": constants["BLOCK_V"], "BLOCK_S": triton.next_power_of_2(splits)}
    _LAUNCHES.run(
        kernel, (heads, tokens, batch), q.device, plan.sizes, parts, log_sums, out, log_sum, plan.sink, splits, tokens,
        heads, **constants,
    )  # fmt: skip


def _tiles(tokens: int, dilation: int, size: int) -> int:
    """Programs for the residue classes of `tokens`, of which each has as many tiles as the longest needs."""
    longest = -(-tokens // dilation)
    return -(-longest // size) * dilation


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, tokens, heads, _ = q.shape
    return q.new_empty((batch, tokens, heads, v.shape[3])), q.new_empty((batch, heads, tokens), dtype=torch.float32)


@torch.library.custom_op("zoo::attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    grad_log_sum: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    wanted: list[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    key_length: Tensor | None,
    prefix: Tensor | None,
    blocks: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    decay: Tensor | None,
    sink: Tensor | None,
    causal: bool,
    window: int | None,
    dilation: int,
    block: int,
    first: int,
    center: int,
    scale: float,
    softcap: float | None,
    zeta: float | None,
    gamma: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(
        q, k, v, segments, key_length, prefix, blocks, slopes, bias, decay, sink, causal, window, dilation, block,
        first, center, scale, softcap, zeta, gamma,
    )  # fmt: skip
    grads = _empty_gradients(wanted, q, k, v, slopes, bias, decay, sink)
    if plan.empty:
        return tuple(one.zero_() for one in grads)  # type: ignore[return-value]
    grad_q, grad_k, grad_v, grad_slopes, grad_bias, grad_decay, grad_sink = grads
    want_slopes, want_bias, want_decay, want_sink = wanted
    (batch, tokens, heads, _), keys = q.shape, k.shape[1]
    device = q.device
    grad = grad.contiguous()
    grad_log_sum = None if grad_log_sum is None else grad_log_sum.contiguous()
    scale_, *scales = plan.scales()
    factors = (scale_, plan.scale, *scales)

    gate_dtype = torch.float64 if q.dtype == torch.float32 else torch.float32

    kernel: Any = triton_kernels.attention_backward_queries
    configuration = plan.configuration(kernel)
    rows, columns = configuration["BLOCK_M"], configuration["BLOCK_N"]
    listed, counts, *steps = plan.visits(rows, columns)
    programs = _tiles(tokens, dilation, rows)
    delta = torch.empty((batch, heads, tokens), dtype=torch.float32, device=device)
    slope_rows = gate_rows = gate_columns = bias_shares = None
    if want_slopes:
        slope_rows = torch.empty((batch, heads, tokens), dtype=torch.float32, device=device)
    if want_decay:
        gate_rows = torch.empty((batch, heads, tokens), dtype=gate_dtype, device=device)
        gate_columns = torch.empty((batch, heads, keys), dtype=gate_dtype, device=device)
    if want_bias and bias is not None:
        bias_shares = torch.zeros((batch, heads, programs, bias.shape[1]), dtype=torch.float32, device=device)
    kernel[(programs, heads, batch)](
        plan.q, plan.k, plan.v, out, grad, log_sum, grad_log_sum, delta, grad_q, slope_rows, bias_shares, gate_rows,
        *plan.terms(), listed, counts, *plan.strides(), *steps, *plan.numbers(), *factors, **plan.constants(),
        **configuration,
    )  # fmt: skip

    kernel = triton_kernels.attention_backward_keys
    configuration = plan.configuration(kernel)
    rows, columns = configuration["BLOCK_M"], configuration["BLOCK_N"]
    listed, counts, *steps = plan.visits(rows, columns, by_keys=True)
    kernel[(_tiles(keys, dilation, columns), k.shape[2], batch)](
        plan.q, plan.k, plan.v, grad, log_sum, delta, grad_k, grad_v, gate_columns,
        *plan.terms(), listed, counts, *plan.strides(), *steps, *plan.numbers(), *factors, **plan.constants(),
        **configuration,
    )  # fmt: skip

    if slope_rows is not None:
        grad_slopes.copy_(slope_rows.sum((0, 2)))
    if bias_shares is not None:
        grad_bias.copy_(bias_shares.sum((0, 2)))
    if gate_rows is not None and gate_columns is not None:
        # Scores in units of log2 gain the sums as they are, hence the factor.
        grad_decay.copy_(gate_columns)
        grad_decay[:, :, keys - tokens :] += gate_rows
        grad_decay /= _LOG2E
    if want_sink and sink is not None:
        share = torch.exp2(sink.float()[:, None] * _LOG2E - log_sum)
        grad_sink.copy_(-(share * delta).sum((0, 2)))
    return grad_q, grad_k, grad_v, grad_slopes, grad_bias, grad_decay, grad_sink


def _empty_gradients(
    wanted: list[bool], q: Tensor, k: Tensor, v: Tensor, *terms: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Places for the gradients, contiguous; those of slopes, bias, decay and sink are empty if not wanted."""
    main = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    found = [
        torch.empty((0,), dtype=q.dtype, device=q.device)
        if term is None or not wish
        else torch.empty(term.shape, dtype=term.dtype, device=q.device)
        for wish, term in zip(wanted, terms, strict=True)
    ]
    return (*main, *found)  # type: ignore[return-value]


@_backward.register_fake
def _(
    grad: Tensor,
    grad_log_sum: Tensor | None,
    out: Tensor,
    log_sum: Tensor,
    wanted: list[bool],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Tensor | None,
    key_length: Tensor | None,
    prefix: Tensor | None,
    blocks: Tensor | None,
    slopes: Tensor | None,
    bias: Tensor | None,
    decay: Tensor | None,
    sink: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _empty_gradients(wanted, q, k, v, slopes, bias, decay, sink)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.rest = inputs[11:]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, grad_log_sum: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, out, log_sum = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[7:11])
    if grad is None:
        grad = torch.zeros_like(out)
    grad_q, grad_k, grad_v, *terms = _backward(grad, grad_log_sum, out, log_sum, wanted, *tensors, *ctx.rest)
    found = [term if wish else None for term, wish in zip(terms, wanted, strict=True)]
    return grad_q, grad_k, grad_v, None, None, None, None, *found, *[None] * len(ctx.rest)


_forward.register_autograd(_differentiate, setup_context=_remember)
