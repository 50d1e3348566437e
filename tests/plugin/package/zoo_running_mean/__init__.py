"""A mixer for zoo that averages what a token has seen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.component import Axis, Component, Scope, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Parameter, StateTensor, ones
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register(
    "running_mean",
    role=Role.MIXER,
    traits=Traits(causal="always", packed=False),
    sources=["Zhang, Xiong and Su 2018, Accelerating Neural Transformer via an Average Attention Network, eq. 1"],
)
class RunningMean(Component):
    r"""$y_i = w \odot \frac{1}{i} \sum_{j \le i} x_j$, `[batch, tokens, width]` to the same."""

    scaled: bool = True
    """Whether channels have learned weights."""

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        return {"weight": Parameter((Axis("width", scope.width),), ones, decay=False)} if self.scaled else {}

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        return {"total": StateTensor((scope.width,), "float32")}

    def cost(self, scope: Scope, call: Call) -> Cost:
        return elementwise(call.rows * scope.width, call.element_bytes, operations=3)

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        import torch

        wide = torch.promote_types(x.dtype, torch.float32)
        total = x.to(wide).cumsum(dim=1)
        if state is not None:
            total = total + state["total"][:, None]
        tokens = torch.arange(ctx.past + 1, ctx.past + x.shape[1] + 1, device=x.device)
        y = (total / tokens[:, None]).to(x.dtype)
        return y * module.weight if self.scaled else y, None if state is None else {"total": total[:, -1]}
