"""A network over the tokens of each channel."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from zoo.component import Activation, Child, Complaint, Component, Linear, Scope, Size, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost
from zoo.errors import ZooError
from zoo.parameter import Axis
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "token_mlp",
    role=Role.MIXER,
    traits=Traits(causal="never", streaming=False, packed=False, any_length=False, elastic=("hidden",)),
    sources=["Tolstikhin et al. 2021, MLP-Mixer: An all-MLP Architecture for Vision, eq. 1"],
)
class TokenMLP(Component):
    r"""Two maps along the tokens, the same for each channel: $Y = W_2\, \phi(W_1 X)$ with $X$ `[tokens, width]`.

    $W_1$ is `[hidden, tokens]` and $W_2$ `[tokens, hidden]`, so that it serves the length only for which it was built,
    extra tokens in front of a grid included. `[batch, tokens, width]` to the same.
    $O(\mathrm{tokens} \cdot \mathrm{hidden} \cdot \mathrm{width})$.
    """

    hidden: Size | None = None
    """What the tokens of a channel are mapped to in between; by default half the width."""
    bias: bool = True
    """Whether both maps have learned offsets."""
    activation: Activation | None = None
    linear: Linear | None = None

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {"hidden": max(1, scope.width // 2)}

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if scope.causal:
            yield Complaint(
                "",
                "token_mlp lets every token see all others, which a causal model must not; `attention`, "
                "`linear_attention` and `pooling` can be causal",
            )

    def children(self, scope: Scope) -> Mapping[str, Child]:
        scope = self.inner(scope)
        tokens, hidden = Axis("tokens", scope.tokens), Axis("hidden", self.hidden or 1)
        return {
            "up": self.project(scope, tokens, hidden, bias=self.bias),
            "activation": Child(scope.activation, scope.at(width=hidden.size)),
            "down": self.project(scope, hidden, tokens, bias=self.bias, residual=True),
        }

    def cost(self, scope: Scope, call: Call) -> Cost:
        # The maps run once for each channel, not for each token.
        rows = call.with_tokens(scope.width)
        return self.children_cost(scope, rows).holding(float(rows.rows * (self.hidden or 1) * call.element_bytes))

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        if x.shape[1] != module.scope.tokens:
            raise ZooError(f"token_mlp was built for {module.scope.tokens} tokens; got {x.shape[1]}")
        y = module.down(module.activation(module.up(x.transpose(1, 2))))
        return y.transpose(1, 2), None
