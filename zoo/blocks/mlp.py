"""Channel mixers that widen each token, apply a nonlinearity, and narrow it again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from zoo.blocks.activations import gated, gated_cost
from zoo.component import Activation, Child, Complaint, Component, Linear, Scope, Share, Size, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, of_one_input
from zoo.parameter import Axis
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor

Ratio = Annotated[float, Field(gt=0.0, le=256.0)]
"""A hidden width as a multiple of the stream's."""


class FeedForward(Component):
    """What channel mixers with a hidden layer share: its width, given as it is or as a multiple of the stream's.

    Filled in, only `hidden` is left.
    """

    hidden: Size | None = None
    """Hidden channels; by default what `ratio` gives."""
    ratio: Ratio | None = None
    """Hidden channels for each channel of the stream, in place of `hidden`; by default 4, if gated 8/3. If gated, the
    product is rounded up to a multiple of 8, whether the ratio is given or not."""

    def is_gated(self) -> bool:
        """Whether a second projection gates the hidden channels."""
        return False

    def widened(self, width: int) -> int:
        """The hidden width that the ratio gives."""
        usual, multiple = (8 / 3, 8) if self.is_gated() else (4.0, 1)
        exact = width * (usual if self.ratio is None else self.ratio)
        return multiple * max(1, math.ceil(round(exact / multiple, 6)))

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {"hidden": self.widened(scope.width)}

    def fill(self, scope: Scope) -> Self:
        filled = super().fill(scope)
        return filled.model_copy(update={"ratio": None}) if self.hidden is None else filled

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if self.ratio is not None:
            gives = self.widened(scope.width)
            yield Complaint(
                "ratio",
                f"hidden {self.hidden} and ratio {self.ratio:g}, which gives {gives} at width {scope.width}, are both "
                "set; remove one",
            )

    @property
    def hidden_axis(self) -> Axis:
        assert self.hidden is not None, "filled in"
        return Axis("hidden", self.hidden)


class Plain(FeedForward):
    """What `mlp` and `glu` share beside the width."""

    bias: bool = False
    """Whether the projections add learned offsets."""
    dropout: Share = 0.0
    """The chance that a hidden channel is left out, in training."""
    activation: Activation | None = None
    linear: Linear | None = None

    def maps(self, scope: Scope, *widening: str) -> dict[str, Child]:
        """The projections called `widening`, the activation, and the projection back to the stream."""
        inner = self.inner(scope)
        width, hidden = Axis("width", inner.width), self.hidden_axis
        return {
            **{name: self.project(inner, width, hidden, bias=self.bias) for name in widening},
            "activation": Child(inner.activation, inner.at(width=hidden.size)),
            "down": self.project(inner, hidden, width, bias=self.bias, residual=True),
        }

    def narrowed(self, module: Any, h: Tensor) -> Tensor:
        """From the hidden channels `[..., hidden]` back to the stream `[..., width]`."""
        import torch.nn.functional as F

        return module.down(F.dropout(h, self.dropout) if module.training and self.dropout else h)


@register(
    "mlp",
    role=Role.CHANNEL,
    traits=Traits(causal="always", elastic=("hidden",)),
    sources=["Vaswani et al. 2017, Attention Is All You Need, eq. 2"],
)
class MLP(Plain):
    r"""Two maps with a nonlinearity between: $y = W_\mathrm{down}\, \phi(W_\mathrm{up} x)$, `[batch, tokens, width]`.

    $O(\mathrm{width} \cdot \mathrm{hidden})$ for each token.
    """

    def children(self, scope: Scope) -> Mapping[str, Child]:
        return self.maps(scope, "up")

    def cost(self, scope: Scope, call: Call) -> Cost:
        return self.children_cost(scope, call).holding(float(call.rows * self.hidden_axis.size * call.element_bytes))

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        return self.narrowed(module, module.activation(module.up(x))), None


@register(
    "glu",
    role=Role.CHANNEL,
    traits=Traits(causal="always", elastic=("hidden",)),
    sources=["Shazeer 2020, GLU Variants Improve Transformer, eq. 6"],
)
class GLU(Plain):
    r"""A gated unit: $y = W_\mathrm{down} (\phi(W_\mathrm{gate} x) \odot W_\mathrm{up} x)$, `[batch, tokens, width]`.

    With `silu` it is SwiGLU, with `gelu` GeGLU. By default it has as many parameters as an `mlp`.
    $O(\mathrm{width} \cdot \mathrm{hidden})$ for each token.
    """

    def is_gated(self) -> bool:
        return True

    def children(self, scope: Scope) -> Mapping[str, Child]:
        return self.maps(scope, "gate", "up")

    def cost(self, scope: Scope, call: Call) -> Cost:
        hidden = call.rows * self.hidden_axis.size
        children = self.children(scope)
        widening = [children[name].cost(call) for name in ("gate", "up")]
        total = of_one_input(widening, call.rows * scope.width * call.element_bytes)
        total += gated_cost(children["activation"], self.hidden_axis.size, call) + children["down"].cost(call)
        return total.holding(2.0 * hidden * call.element_bytes)

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        return self.narrowed(module, gated(module.activation, module.gate(x), module.up(x))), None
