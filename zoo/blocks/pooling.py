"""Averages of neighbouring tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from zoo import kernels
from zoo.component import Complaint, Component, Scope, Size, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import StateTensor
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "pooling",
    role=Role.MIXER,
    traits=Traits(causal="scope"),
    sources=["Yu et al. 2022, MetaFormer Is Actually What You Need for Vision, eq. 4"],
    catalogue=["metaformer-poolformer"],
)
class Pooling(Component):
    r"""The average of a token's neighbours, without the token itself: $y_i = \mathrm{mean}_{j \in N(i)}\, x_j - x_i$.

    $N(i)$ is the square (interval, cube) of `size` tokens on a side around $i$, as much of it as lies on the grid;
    extra tokens in front of a grid are left alone, $y = 0$. In a causal model it is the `size` tokens that end with
    $i$, in rows. The residual stream adds $x_i$ back. `[batch, tokens, width]` to the same; no parameters;
    $O(\mathrm{size}^d \cdot \mathrm{width})$ for each token of a grid of $d$ dimensions.
    """

    size: Size = 3
    """Tokens along each side of the neighbourhood."""

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if not scope.causal and self.size % 2 == 0:
            yield Complaint(
                "size",
                f"a neighbourhood of {self.size} tokens has no middle; use size {self.size - 1} or {self.size + 1}",
            )
        reach = scope.tokens if scope.causal else 2 * max(scope.grid) - 1
        if self.size > reach:
            yield Complaint("size", f"size {self.size} reaches beyond all {scope.tokens} tokens; use at most {reach}")

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        return {"tail": StateTensor((self.size - 1, scope.width))} if scope.causal else {}

    def cost(self, scope: Scope, call: Call) -> Cost:
        dimensions = 1 if scope.causal else len(scope.grid)
        operations = self.size**dimensions + 2
        elements = call.rows * scope.width
        cost = elementwise(elements, call.element_bytes, operations=operations, operands=3, saved=0, kind="pooling")
        # Padded inputs, and one sum while the next is made; going back, the gradients of all of these.
        return replace(cost.holding(2 * cost.peak), backward_extra=5 * cost.peak)

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        import torch

        if module.scope.causal:
            total, tail = self.trailing(x, self.size, ctx.segments, None if state is None else state["tail"])
            seen = (ctx.positions + 1).clamp(max=self.size).unsqueeze(-1)
            return total / seen - x, None if state is None else {"tail": tail}
        extra, tokens = x[:, : ctx.prefix], x[:, ctx.prefix :]
        mean = self.on_line(tokens, ctx) if len(ctx.grid) == 1 else self.on_grid(tokens, ctx)
        return torch.cat((torch.zeros_like(extra), mean - tokens), dim=1), None

    @staticmethod
    def trailing(x: Tensor, size: int, segments: Tensor | None, tail: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Sums over the `size` tokens that end with each, and the tail that the next tokens need."""
        return kernels.causal_convolution(x, x.new_ones(x.shape[-1], size), state=tail, segments=segments)

    def on_line(self, x: Tensor, ctx: Context) -> Tensor:
        """Means over a line of tokens, each segment by itself."""
        flipped = None if ctx.segments is None else ctx.segments.flip(1)

        def around(x: Tensor) -> Tensor:
            half = self.size // 2 + 1
            before, _ = self.trailing(x, half, ctx.segments)
            behind, _ = self.trailing(x.flip(1), half, flipped)
            return before + behind.flip(1) - x

        return around(x) / around(x.new_ones(x.shape[0], x.shape[1], 1))

    def on_grid(self, x: Tensor, ctx: Context) -> Tensor:
        """Means over a grid of two or three dimensions."""
        import torch
        import torch.nn.functional as F

        pool = F.avg_pool2d if len(ctx.grid) == 2 else F.avg_pool3d
        borders = (self.size // 2,) * (2 * len(ctx.grid))
        grid = x.transpose(1, 2).unflatten(2, ctx.grid)
        total, seen = (
            pool(F.pad(each, borders), self.size, stride=1) for each in (grid, torch.ones_like(grid[:1, :1]))
        )
        return (total / seen).flatten(2).transpose(1, 2)
