"""Softmax attention, in all the forms that differ by a setting."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from zoo import kernels
from zoo.blocks.positions import PositionBase, Rotary
from zoo.component import (
    Child,
    Complaint,
    Component,
    Length,
    Linear,
    Norm,
    Position,
    Positive,
    Scope,
    Size,
    Traits,
)
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise, of_one_input
from zoo.kernels import work
from zoo.parameter import Axis, StateTensor
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor

USUAL_HEAD_DIM = 64


def usual_heads(width: int, head_dim: int | None) -> int:
    """How many heads of `head_dim` fit the width; left open, the most of at least 64 channels that divide it."""
    if head_dim is not None:
        return max(1, width // head_dim)
    return _largest_divisor(width, max(1, width // USUAL_HEAD_DIM))


@lru_cache(maxsize=4096)
def _largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is at most `most`."""
    pairs = ((part, number // part) for part in range(1, math.isqrt(number) + 1) if number % part == 0)
    return max(part for pair in pairs for part in pair if part <= most)


def divisors_near(number: int, wanted: int) -> str:
    """The divisors of `number` next below and above `wanted`, for a message."""
    below = next((part for part in range(min(wanted - 1, number), 0, -1) if number % part == 0), None)
    above = next((part for part in range(wanted + 1, number + 1) if number % part == 0), None)
    return " or ".join(str(part) for part in (below, above) if part is not None)


class HeadMixer(Component):
    """What mixers with queries, keys and values share: heads, who sees whom, and positions."""

    heads: Size | None = None
    """Query heads; by default one for about every 64 channels of the stream, or what is left open by their size."""
    causal: bool | None = None
    """Whether tokens see only themselves and earlier ones; by default as in the model around it."""
    position: Position | None = None
    linear: Linear | None = None

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if scope.causal and not self.causal:
            yield Complaint("causal", f"{self.type} to later tokens in a causal model; remove `causal: false`")
        if self.absolute and self.position != scope.position:
            yield Complaint(
                "position",
                f"{self.place.type!r} positions are added at the stem; set them for the whole model, or use `rotary`, "
                "`alibi` or `none` here",
            )

    def check_division(self, scope: Scope, *fields: str) -> Iterator[Complaint]:
        """A complaint if the sizes of a head, `fields`, were left out and the heads do not divide the width."""
        missing = [f"`{name}`" for name in fields if getattr(self, name) is None]
        if missing:
            heads = self.heads or 1
            yield Complaint(
                "heads",
                f"heads {heads} does not divide width {scope.width}; heads {divisors_near(scope.width, heads)} would, "
                f"or set {' and '.join(missing)}",
            )

    def check_rotation(self, field: str) -> Iterator[Complaint]:
        """A complaint if heads of `field` channels do not divide into the pairs that a rotary position turns."""
        channels = getattr(self, field)
        if isinstance(self.position, Rotary) and channels is not None and channels % 2:
            near = f"{channels - 1} or {channels + 1}" if channels > 1 else "2"
            yield Complaint(
                field,
                f"rotary positions turn pairs of channels, and {field} {channels} is odd; {field} {near} would do, or "
                "another `position`",
            )

    @property
    def place(self) -> PositionBase:
        """What knows about positions."""
        assert isinstance(self.position, PositionBase), "filled in"
        return self.position

    @property
    def absolute(self) -> bool:
        """Whether the stem has added the positions already."""
        return self.place.absolute

    def position_child(self, scope: Scope, channels: int) -> dict[str, Child]:
        """The position, if it acts here, for queries and keys that have `channels` together."""
        # It counts its work for as many channels of each as the scope is wide.
        return {} if self.absolute else {"position": Child(self.place, scope.at(width=max(1, channels // 2)))}


@register(
    "attention",
    role=Role.MIXER,
    traits=Traits(causal="scope", linear_time=False),
    sources=[
        "Vaswani et al. 2017, Attention Is All You Need, eq. 1",
        "Ainslie et al. 2023, GQA (grouped heads)",
        "Beltagy et al. 2020, Longformer (window)",
        "Henry et al. 2020, Query-Key Normalization for Transformers",
        "Gemma Team 2024, Gemma 2, section 2 (soft cap)",
        "Qiu et al. 2025, Gated Attention for Large Language Models (gate)",
    ],
)
class Attention(HeadMixer):
    r"""Each token reads from the tokens it sees, weighted by a softmax of scores between its query and their keys.

    For head $h$ with $q = W_q x$, $k = W_k x$, $v = W_v x$, over the visible tokens $j$:

    $$o_i = \sum_j \mathrm{softmax}_j\big(\mathrm{cap}(s\, q_i^\top k_j) - m_h |i - j|\big)\, v_j, \qquad
      y = W_o\,(g \odot o)$$

    with $s$ the `scale`, $\mathrm{cap}(z) = c \tanh(z / c)$ for a `softcap` $c$, ALiBi's slopes $m_h$ and the `gate`
    $g = \sigma(W_g x)$ where they are set. Queries and keys are normalised first (`qk_norm`) and rotated then
    (`position`). `[batch, tokens, width]` to the same.

    $O(\mathrm{heads} \cdot \mathrm{head\_dim})$ for each pair of tokens that see each other, and `kv_heads * head_dim`
    numbers of state for each token's key and for its value, of the last `window - 1` tokens where there is a window.
    """

    kv_heads: Size | None = None
    """Key and value heads, each shared by `heads / kv_heads` query heads; by default as many as query heads."""
    head_dim: Size | None = None
    """Channels of a head, which need not multiply up to the width; by default `width / heads`."""
    window: Length | None = None
    """A token sees the `window` tokens that end with itself or, if not causal, those less than `window` away; by
    default all. On a grid tokens are counted in rows."""
    qk_norm: Norm | None = None
    """A norm over the channels of each head's queries and keys, with weights shared by the heads."""
    softcap: Positive | None = None
    """Bounds the scores smoothly to plus and minus this."""
    gate: Literal["channel", "head"] | None = None
    """Multiply what each head gives by a sigmoid of a linear map of the token: one for each `channel` of the head, or
    one for the whole `head`."""
    scale: Positive | None = None
    """What scores are multiplied by; by default `head_dim ** -0.5`."""
    bias: bool = False
    """Whether queries, keys, values and gate have learned offsets."""
    out_bias: bool = False
    """Whether the projection back to the stream has a learned offset."""

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        heads = self.heads or usual_heads(scope.width, self.head_dim)
        # Left open where the heads do not divide the width, for `check` to see that it was not given.
        head_dim = self.head_dim or (None if scope.width % heads else scope.width // heads)
        return {
            "heads": heads,
            "kv_heads": heads,
            "head_dim": head_dim,
            "causal": scope.causal,
            "scale": (head_dim or 1) ** -0.5,
        }

    def check(self, scope: Scope) -> Iterator[Complaint]:
        yield from super().check(scope)
        yield from self.check_division(scope, "head_dim")
        yield from self.check_rotation("head_dim")
        heads, kv_heads, _ = self.sizes
        if heads % kv_heads:
            yield Complaint(
                "kv_heads",
                f"kv_heads {kv_heads} does not divide the {heads} heads; kv_heads {divisors_near(heads, kv_heads)} "
                "would",
            )
        if self.window is not None and self.window > scope.tokens:
            yield Complaint(
                "window",
                f"window {self.window} is longer than the context of {scope.tokens} tokens; use at most "
                f"{scope.tokens}, or leave it out to see all of them",
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`heads`, `kv_heads` and `head_dim`, once filled in."""
        heads = self.heads or 1
        return heads, self.kv_heads or heads, self.head_dim or 1

    def children(self, scope: Scope) -> Mapping[str, Child]:
        scope = self.inner(scope)
        heads, kv_heads, head_dim = self.sizes
        width, inside = Axis("width", scope.width), Axis("heads", heads * head_dim)
        shared = Axis("kv_heads", kv_heads * head_dim)
        found = {
            "query": self.project(scope, width, inside, bias=self.bias),
            "key": self.project(scope, width, shared, bias=self.bias),
            "value": self.project(scope, width, shared, bias=self.bias),
            "out": self.project(scope, inside, width, bias=self.out_bias, residual=True),
        }
        if self.gate is not None:
            gates = inside if self.gate == "channel" else Axis("heads", heads)
            found["gate"] = self.project(scope, width, gates, bias=self.bias)
        if self.qk_norm is not None:
            head = scope.at(width=head_dim, axis="head_dim")
            found |= {"query_norm": Child(self.qk_norm, head), "key_norm": Child(self.qk_norm, head)}
        return found | self.position_child(scope, (heads + kv_heads) * head_dim)

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        if not self.causal:
            return {}
        _, kv_heads, head_dim = self.sizes
        kept = capacity if self.window is None else min(self.window - 1, capacity)
        return {name: StateTensor((kept, kv_heads, head_dim)) for name in ("keys", "values")}

    def cost(self, scope: Scope, call: Call) -> Cost:
        heads, kv_heads, head_dim = self.sizes
        children = dict(self.children(scope))
        norms = [(children.pop(f"{name}_norm"), n) for name, n in self.normed()]
        size = call.element_bytes
        queries = call.rows * heads * head_dim
        last = children.pop("out").cost(call).holding(float(queries * size))
        reading = [children.pop(name).cost(call) for name in ("query", "key", "value", "gate") if name in children]
        total = of_one_input(reading, call.rows * scope.width * size)
        for norm, count in norms:
            total += norm.cost(call.with_tokens(call.tokens * count))
        for child in children.values():
            total += child.cost(call)
        total += self.product(call)
        if self.gate is None:
            # The product keeps its own output, which is what the last projection reads, unless it joins it from blocks.
            last = last if self.cut(call) else replace(last, saved=last.saved - queries * size)
        else:
            gates = float(queries if self.gate == "channel" else call.rows * heads) * size
            multiplied = elementwise(queries, size, operations=2, operands=3, saved=0)
            total += replace(multiplied, saved=gates).holding(queries * size + gates)
            last = last.holding(gates)
        # Those of the past are in the state.
        return (total + last).holding(float((queries + 2 * call.rows * kv_heads * head_dim) * size))

    def normed(self) -> list[tuple[str, int]]:
        """What is normalised, and how many heads it has."""
        heads, kv_heads, _ = self.sizes
        return [] if self.qk_norm is None else [("query", heads), ("key", kv_heads)]

    def keys(self, call: Call) -> int:
        """How many keys the queries of a call meet, hidden ones included."""
        return call.tokens + (call.past if self.window is None else min(call.past, self.window - 1))

    def product(self, call: Call) -> Cost:
        """Scores, softmax and weighted values: everything but the projections."""
        heads, kv_heads, head_dim = self.sizes
        keys, size = self.keys(call), call.element_bytes
        flops = work.attention_flops(
            call.batch,
            call.tokens,
            keys,
            heads,
            head_dim,
            causal=bool(self.causal),
            window=self.window,
            softcap=self.softcap,
        )
        pairs = flops / (4 * head_dim)
        whole = pairs == call.rows * keys * heads
        queries, shared = call.rows * heads * head_dim * size, call.batch * keys * kv_heads * head_dim * size
        moved = 2.0 * (queries + shared)
        # Scores are in memory, in float32 or wider, only where a soft cap keeps them from the fused computation, which
        # in turn computes them once more in its backward pass.
        scores = 0.0 if self.softcap is None else pairs * max(4, size)
        saved, peak = moved + call.rows * heads * max(4, size) + 2 * scores, queries + 3.0 * scores
        if (cut := self.cut(call)) is not None:
            # Keys and values are copied with zeros around them, and outputs of blocks are joined.
            around = 2.0 * call.batch * (cut[1] - cut[0]) * kv_heads * head_dim * size
            saved, peak = saved + around + self.masks(call, *cut), peak + queries + 2 * shared + around
        return Cost(
            flops=flops,
            backward=flops * (2.5 if self.softcap is None else 2.0),
            pointwise=pairs * (5 if self.softcap is None else 8),
            traffic=moved + 4 * scores,
            saved=saved,
            peak=peak,
            forward_extra=peak,
            backward_extra=moved + 2 * scores,
            kind=self.kind(whole),
            spared=work.causal_spared(call.tokens) if self.plain(call) else 0.0,
        )

    def kind(self, whole: bool) -> str:
        """What tells how fast this product is: what is laid on the scores, and whether all of them are there."""
        if self.softcap is not None:
            return "capped_attention"
        if self.place.slopes(self.sizes[0]) is not None:
            return "biased_attention"
        return "attention" if whole else "window_attention"

    def plain(self, call: Call) -> bool:
        """Whether the product is causal with no other rule, which PyTorch computes without most of the hidden keys."""
        if not self.causal or self.softcap is not None or self.place.slopes(self.sizes[0]) is not None:
            return False
        within = self.window is None or self.window >= call.tokens
        return within and call.tokens > 1 and call.past == 0 and not call.packed

    def cut(self, call: Call) -> tuple[int, int] | None:
        """Queries of a block and keys that it sees, where the product is computed in blocks."""
        if self.softcap is not None:
            return None
        return work.attention_block(call.tokens, self.keys(call), self.window, bool(self.causal))

    def masks(self, call: Call, block: int, seen: int) -> float:
        """Bytes of what hides keys of each block from its queries, for each head where slopes differ."""
        slopes = self.place.slopes(self.sizes[0])
        rows = -(-call.tokens // block) * block * (1 if slopes is None else len(slopes))
        return float(call.batch * rows * seen * call.element_bytes)

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        import torch

        heads, kv_heads, head_dim = self.sizes
        q = module.query(x).unflatten(-1, (heads, head_dim))
        k = module.key(x).unflatten(-1, (kv_heads, head_dim))
        v = module.value(x).unflatten(-1, (kv_heads, head_dim))
        if self.qk_norm is not None:
            q, k = module.query_norm(q), module.key_norm(k)
        slopes = None
        if not self.absolute:
            q, k = module.position.component.rotate(q, k, ctx)
            slopes = module.position.component.slopes(heads)
            if slopes is not None:
                slopes = torch.tensor(slopes, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        if state is not None:
            (k, v), state = self.remember(ctx.past, state, k, v)
        o = kernels.attention(
            q,
            k,
            v,
            causal=bool(self.causal),
            window=self.window,
            past=ctx.past,
            segments=ctx.segments,
            alibi_slopes=slopes,
            softcap=self.softcap,
            scale=self.scale,
        )
        if self.gate is not None:
            gates = module.gate(x).sigmoid()
            o = o * gates.unflatten(-1, (heads, -1))
        return module.out(o.flatten(-2)), state

    def remember(self, past: int, state: StateTree, k: Tensor, v: Tensor) -> tuple[tuple[Tensor, Tensor], StateTree]:
        """Keys and values that the new queries may see, and the state behind them."""
        keep = self.append if self.window is None else self.roll
        (keys, kept_keys), (values, kept_values) = keep(past, state["keys"], k), keep(past, state["values"], v)
        return (keys, values), {"keys": kept_keys, "values": kept_values}

    @staticmethod
    def append(past: int, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Write behind the `past` tokens of a buffer `[batch, capacity, kv_heads, head_dim]`."""
        import torch

        end = past + new.shape[1]
        # In place, where no backward pass may still need what stood there.
        kept = kept.clone() if torch.is_grad_enabled() else kept
        kept[:, past:end] = new
        return kept[:, :end], kept

    @staticmethod
    def roll(past: int, kept: Tensor, new: Tensor) -> tuple[Tensor, Tensor]:
        """Push into a buffer `[batch, size, kv_heads, head_dim]` that ends with the newest; the oldest fall out."""
        import torch

        size, tokens = kept.shape[1], new.shape[1]
        joined = torch.cat((kept, new), dim=1)
        rest = joined[:, tokens:]
        # A view would keep the whole piece in memory.
        return joined[:, size - min(past, size) :], rest if tokens == 1 else rest.clone()
