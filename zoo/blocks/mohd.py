"""A feed-forward network that reads and writes only some of the stream's channels for each token."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from zoo import kernels
from zoo.blocks.activations import gated, gated_cost
from zoo.blocks.linear import Dense
from zoo.blocks.mlp import FeedForward
from zoo.blocks.moe import Coefficient, Scores, imbalance, normalized, scored, taken
from zoo.component import Activation, Child, Complaint, Linear, Positive, Scope, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Axis, Parameter, normal
from zoo.registry import Role, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@register(
    "mohd",
    role=Role.CHANNEL,
    traits=Traits(causal="always", elastic=("hidden",)),
    sources=["Chen et al. 2024, Mixture of Hidden-Dimensions Transformer"],
    catalogue=["mohd"],
)
class MixtureOfHiddenDimensions(FeedForward):
    r"""A feed-forward network on `shared` + `top_k` of the `subdims` equal parts that the stream's channels are cut in.

    The first `shared` sub-dimensions serve every token; of the others each token takes the set $T$ of the `top_k` with
    the highest scores of $W_\mathrm{router} x$, and over its active sub-dimensions $A$

    $$h = \phi\Big(c \sum_{i \in A} g_i W^\mathrm{up}_i x_i\Big), \qquad
    y_i = W^\mathrm{down}_i h \;\text{for}\; i \in A, \qquad y_i = 0 \;\text{else},$$

    with $g_i = 1$ where shared and the score where routed (if `renormalize`, so divided that they average 1 over $T$),
    and $c$ the `scale`. If `gated`, $h = \phi(\cdot) \odot (\cdot)$ as in `glu`. With `fusion` the outputs are mixed at
    last: $y_{ij} \leftarrow \sum_{i'} F_{j i i'} y_{i'j}$ for channel $j$ of each sub-dimension, $F$ starting from the
    identity, so that what a token learns reaches its inactive channels too.

    Tokens are sorted by sub-dimension and multiplied by its blocks alone: with active share
    $a = (\mathrm{shared} + \mathrm{top\_k}) / \mathrm{subdims}$ a token takes
    $O(a \cdot \mathrm{width} \cdot \mathrm{hidden})$. In training the loss `balance` is added, as in `moe`.

    The paper's abstract leaves the exact scale, the place of the weights, and the form of the fusion open; here the
    scale keeps the variance of what enters the nonlinearity, weights act on the input, and the fusion is
    block-diagonal behind a permutation. A stream expanded at constant active work is a larger `width` of the model.
    """

    subdims: Annotated[int, Field(ge=1, le=65536)] = 8
    """How many sub-dimensions the width is cut in."""
    shared: Annotated[int, Field(ge=0, le=65536)] = 2
    """How many of them serve every token."""
    top_k: Annotated[int, Field(ge=1, le=65536)] = 2
    """How many of the others a token takes."""
    gated: bool = True
    """Whether the hidden layer is a gated unit (`glu`) rather than an `mlp`."""
    scores: Scores = "softmax"
    """How the router's output becomes scores: `softmax` over the routed sub-dimensions, or each one's `sigmoid`."""
    renormalize: bool | None = None
    """Whether the weights of the sub-dimensions that a token takes average 1; by default unless `top_k` is 1, where the
    router could not learn from it."""
    scale: Positive | None = None
    """Factor on the active input; by default the square root of `subdims / (shared + top_k)`."""
    fusion: bool = True
    """Whether a learned matrix for each channel of a sub-dimension mixes the outputs of all sub-dimensions."""
    balance: Coefficient = 0.01
    """Weight of the loss for even use of the routed sub-dimensions."""
    activation: Activation | None = None
    linear: Linear | None = None
    """`dense`, which its maps are; where the model sets another, that has to be said here."""

    def is_gated(self) -> bool:
        return self.gated

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {
            **super().derive(scope),
            "renormalize": self.top_k > 1,
            "scale": math.sqrt(self.subdims / (self.shared + self.top_k)),
        }

    def check(self, scope: Scope) -> Iterator[Complaint]:
        yield from super().check(scope)
        linear = self.inner(scope).linear
        if not isinstance(linear, Dense):
            yield Complaint(
                "linear",
                f"{linear.type} cannot take the place of the maps of mohd, whose blocks each token chooses; set "
                "`linear: dense` here to keep it out of this layer",
            )
        if scope.width % self.subdims:
            fits = next(n for n in range(self.subdims, 0, -1) if scope.width % n == 0)
            yield Complaint(
                "subdims", f"width {scope.width} does not divide into {self.subdims} parts; {fits} would do"
            )
        if self.shared + self.top_k > self.subdims:
            yield Complaint(
                "top_k",
                f"shared {self.shared} and top_k {self.top_k} are more than the {self.subdims} subdims; at most "
                f"{self.subdims} together would do",
            )

    @property
    def routed(self) -> Axis:
        """The sub-dimensions that tokens choose from."""
        return Axis("subdims", self.subdims - self.shared)

    def subdim(self, scope: Scope) -> Axis:
        """The channels of a sub-dimension."""
        return Axis("subdim_width", scope.width // self.subdims)

    @property
    def widening(self) -> tuple[str, ...]:
        """Names of the maps from the stream to the hidden channels."""
        return ("gate", "up") if self.gated else ("up",)

    def children(self, scope: Scope) -> Mapping[str, Child]:
        inner = self.inner(scope)
        return {"activation": Child(inner.activation, inner.at(width=self.hidden_axis.size))}

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        routed, subdim, width = self.routed, self.subdim(scope), Axis("width", scope.width)
        subdims, hidden, std = Axis("subdims", self.subdims), self.hidden_axis, scope.init_std
        active = Fraction(self.shared + self.top_k, self.subdims)
        found = {"router": Parameter((routed, width), normal(std))}
        found |= {name: Parameter((subdims, subdim, hidden), normal(std), active=active) for name in self.widening}
        residual = normal(std / math.sqrt(scope.depth))
        found["down"] = Parameter((subdims, subdim, hidden), residual, active=active)
        if self.fusion:
            found["fusion"] = Parameter((subdim, subdims, subdims), _identity, decay=False)
        return found

    def cost(self, scope: Scope, call: Call) -> Cost:
        rows, width, hidden, size = call.rows, scope.width, self.hidden_axis.size, call.element_bytes
        subdim, routed, maps = self.subdim(scope).size, self.routed.size, len(self.widening) + 1
        pairs = rows * (self.shared + self.top_k)
        used = self.shared + routed * (1 - (1 - self.top_k / max(1, routed)) ** rows)
        router = Cost(
            flops=2.0 * rows * width * routed,
            traffic=float((routed * width + rows * (width + routed)) * size),
            saved=float(rows * width * size),
            kind="router",
        ) + elementwise(rows * routed, size, operations=5)
        # What is active, before and after its weights, and the numbers of the pairs, of 64 bits: where each lies, and
        # of which sub-dimension it is.
        gathered = replace(elementwise(pairs * subdim, size, operands=3, saved=2), peak=0.0)
        numbers = Cost(saved=2.0 * pairs * 8)
        blocks = Cost(
            flops=2.0 * pairs * subdim * hidden * maps,
            traffic=float((used * subdim * hidden + pairs * subdim + rows * hidden) * maps * size),
            saved=float(rows * hidden * size),
            kind="subdimensions",
            weights=used * subdim * hidden * maps * size,
            steps=used,
        )
        activation = self.children(scope)["activation"]
        between = gated_cost(activation, hidden, call) if self.gated else activation.cost(call)
        scattered = replace(elementwise(rows * width, size, operands=3), saved=float(pairs * subdim * size))
        fusion = Cost(
            flops=2.0 * rows * width * self.subdims,
            traffic=float((width * self.subdims + 2 * rows * width) * size),
            saved=float(rows * width * size),
            kind="fusion",
        )
        total = between + router + gathered + numbers + blocks + scattered
        # Throughout there are the scores, the choices, and for each pair two numbers and a weight, and what is active.
        # Beside them either both ends of the nonlinearity, or one of its inputs, its output and what is made of that,
        # or the latter with its place in the stream, before and after fusion.
        held = rows * (routed * size + self.top_k * (size + 8)) + pairs * (size + 16 + subdim * size)
        ends = pairs * subdim + rows * width * (2 if self.fusion else 1)
        peak = held + size * max(rows * hidden * maps, 2 * rows * hidden + pairs * subdim, ends)
        return replace(total + fusion if self.fusion else total, peak=float(peak))

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        import torch
        import torch.nn.functional as F

        assert self.scale is not None, "filled in"
        rows = x.reshape(-1, x.shape[-1])
        scores = scored(F.linear(rows, module.router), self.scores)
        weights, chosen = scores.topk(self.top_k, dim=-1)
        if module.training and self.balance:
            ctx.add_loss("balance", self.balance * imbalance(scores, chosen))
        if self.renormalize:
            weights = self.top_k * normalized(weights)

        # Tokens of one set adjoin, with its members in ascending order, and the sub-dimensions of all come first.
        chosen, ascending = chosen.sort(dim=-1)
        order = kernels.sort_by_subset(chosen, self.routed.size)
        common = torch.arange(self.shared, device=x.device).expand(len(order), -1)
        active = torch.cat([common, chosen[order] + self.shared], dim=-1)
        weights = F.pad(weights.gather(1, ascending), (self.shared, 0), value=1.0)
        weights = taken(weights, order) * self.scale
        # Every sub-dimension of every token is a row of its own.
        parts = order[:, None] * self.subdims + active
        subdim = x.shape[-1] // self.subdims
        picked = taken(rows.reshape(-1, subdim), parts) * weights[..., None].to(x.dtype)

        y = self._active(module, picked, active).to(x.dtype)
        y = y.new_zeros(len(rows) * self.subdims, subdim).index_copy_(0, parts.flatten(), y.flatten(0, 1))
        y = y.view_as(rows)
        if self.fusion:
            y = kernels.block_diagonal_matmul(y, module.fusion.mT, interleaved=True)
        return y.reshape(x.shape), None

    def _active(self, module: Any, x: Tensor, active: Tensor) -> Tensor:
        """The network on the sub-dimensions `active` `[rows, taken]`, `[rows, taken, subdim]` to the same shape."""

        def widened(name: str) -> Tensor:
            return kernels.subset_matmul(x, getattr(module, name).mT, active)

        up = widened("up")
        h = gated(module.activation, widened("gate"), up) if self.gated else module.activation(up)
        return kernels.subset_matmul(h, module.down.mT, active, transposed=True)


def _identity(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """The identity along the last two axes."""
    tensor.zero_().diagonal(dim1=-2, dim2=-1).fill_(1.0)
