"""The mixer that leaves every token alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from zoo.component import Component, Traits
from zoo.context import Context, StateTree
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register("identity", role=Role.MIXER, traits=Traits(causal="always"), sources=["Yu et al. 2022, MetaFormer Baselines"])
class Identity(Component):
    """$y = x$; what a hybrid costs and learns without mixing tokens in a layer."""

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        return x, state
