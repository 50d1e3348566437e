"""Where tokens stand: positions added at the stem, turned into queries and keys, or added to attention's scores.

A position component is set once for a model and inherited. What is `absolute` acts at the stem and nowhere else; the
rest acts inside attention, through `rotate` and `slopes`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from zoo import kernels
from zoo.component import Complaint, Component, Positive, Scope, Traits
from zoo.context import Context
from zoo.cost import FREE, Call, Cost, elementwise
from zoo.errors import ZooError
from zoo.parameter import Axis, Parameter, normal
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


class PositionBase(Component):
    """What attention and stems ask of a position component; the defaults do nothing."""

    absolute: ClassVar[bool] = False

    def cost(self, scope: Scope, call: Call) -> Cost:
        return FREE

    def forward(self, module: Any, x: Tensor, ctx: Context) -> Tensor:
        """The stream `[batch, tokens, width]` with positions added; only asked of absolute components."""
        return x

    def rotate(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Queries and keys `[batch, tokens, heads, head_dim]` with positions turned in."""
        return q, k

    def slopes(self, heads: int) -> list[float] | None:
        """What each head subtracts from its scores per token of distance, or None."""
        return None


@register("none", role=Role.POSITION)
class NoPosition(PositionBase):
    """No positions; causal attention still tells order from the growing number of visible tokens."""


@register("rotary", role=Role.POSITION, sources=["Su et al. 2021, RoFormer, eq. 15"], catalogue=["roformer-rope"])
class Rotary(PositionBase):
    r"""Rotary embedding: channel pairs of queries and keys turn by $p\,\theta_i$ at position $p$.

    $\theta_i = \mathrm{base}^{-2i/d}$ with $d$ the number of rotated channels, so that a score depends on the distance
    only. Half-split pairing `(i, i + d/2)` as in Llama, or neighbouring pairs.
    """

    base: Positive = 10000.0
    """The wavelengths run from 2 pi to 2 pi times this."""
    fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The share of each head's channels that is rotated, rounded down to an even number."""
    interleaved: bool = False
    """Pair neighbouring channels, as GPT-J does, in place of the two halves."""

    def dim(self, head_dim: int) -> int:
        """How many of `head_dim` channels are rotated."""
        return int(head_dim * self.fraction) // 2 * 2

    def cost(self, scope: Scope, call: Call) -> Cost:
        turned = elementwise(2 * call.rows * scope.width, call.element_bytes, operations=3, saved=0, kind="rotary")
        # The halves of the pairs of the last that is turned, before they are laid side by side.
        return turned.holding(turned.peak / 2)

    def rotate(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        dim = self.dim(q.shape[-1])
        if dim == 0:
            return q, k
        return kernels.rotary_pair(q, k, ctx.positions, base=self.base, dim=dim, interleaved=self.interleaved)


@register("alibi", role=Role.POSITION, sources=["Press, Smith and Lewis 2021, section 3"], catalogue=["alibi"])
class ALiBi(PositionBase):
    r"""Attention with linear biases: head $h$ of $n$ subtracts $2^{-8h/n}$ per token of distance from its scores.

    Where $n$ is no power of two, the slopes of the next lower power are followed by every other one of the next higher.
    """

    def slopes(self, heads: int) -> list[float]:
        lower = 2 ** int(math.log2(heads))
        first = [2.0 ** (-8.0 * (index + 1) / lower) for index in range(lower)]
        rest = [2.0 ** (-4.0 * (index + 1) / lower) for index in range(0, 2 * (heads - lower), 2)]
        return first + rest


@register(
    "learned",
    role=Role.POSITION,
    traits=Traits(any_length=False),
    sources=["Gehring et al. 2017", "Dosovitskiy et al. 2020, section 3.1"],
)
class LearnedPosition(PositionBase):
    """A learned vector for each position up to the context, added at the stem."""

    absolute: ClassVar[bool] = True

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        axes = (Axis("tokens", scope.tokens), Axis("width", scope.width))
        return {"weight": Parameter(axes, normal(scope.init_std), decay=False, embedding=True)}

    def cost(self, scope: Scope, call: Call) -> Cost:
        return elementwise(call.rows * scope.width, call.element_bytes, operands=3, saved=0)

    def forward(self, module: Any, x: Tensor, ctx: Context) -> Tensor:
        known, tokens = module.weight.shape[0], ctx.past + x.shape[1]
        if ctx.segments is None and tokens > known:
            raise ZooError(f"learned positions end with the context of {known} tokens; got {tokens}")
        return x + module.weight[ctx.positions]


@register("sinusoidal", role=Role.POSITION, sources=["Vaswani et al. 2017, section 3.5"])
class Sinusoidal(PositionBase):
    r"""Fixed waves added at the stem: $\sin(p\,\omega_i)$ and $\cos(p\,\omega_i)$ with $\omega_i = 10000^{-2i/d}$."""

    absolute: ClassVar[bool] = True
    base: Positive = 10000.0
    """The wavelengths run from 2 pi to 2 pi times this."""

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if scope.width % 2:
            yield Complaint("", f"sinusoidal positions need an even width; got {scope.width}")

    def cost(self, scope: Scope, call: Call) -> Cost:
        return elementwise(call.rows * scope.width, call.element_bytes, operands=3, saved=0)

    def forward(self, module: Any, x: Tensor, ctx: Context) -> Tensor:
        import torch

        width = x.shape[-1]
        rate = self.base ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
        angle = ctx.positions[..., None] * rate
        return x + torch.cat((angle.sin(), angle.cos()), dim=-1).to(x.dtype)
