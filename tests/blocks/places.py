"""Components by themselves: a place to stand in and the module that they become there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zoo.blocks.activations import SiLU
from zoo.blocks.linear import Dense
from zoo.blocks.norms import RMSNorm
from zoo.blocks.positions import Rotary
from zoo.builder import declared, initialize
from zoo.component import Component, Scope
from zoo.context import Context


def place(width: int = 16, tokens: int = 12, **changes: Any) -> Scope:
    """The inside of a causal model with the usual settings."""
    usual = Scope(
        width=width,
        grid=(tokens,),
        causal=True,
        norm=RMSNorm(),
        activation=SiLU(),
        linear=Dense(),
        position=Rotary(),
        init_std=0.5,
    )
    return usual.at(**changes)


@dataclass
class Built:
    """A component filled in for its scope, and its module with drawn weights, in eval mode."""

    component: Any
    scope: Scope
    module: Any

    def __call__(self, x: Tensor, ctx: Context | None = None) -> Tensor:
        y, _ = self.module(x, ctx or context(x), None)
        return y

    @property
    def weights(self) -> dict[str, Tensor]:
        return dict(self.module.named_parameters())


def built(
    component: Component, scope: Scope | None = None, *, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Built:
    scope = scope or place()
    component = component.fill(scope)
    module = component.module(scope)
    initialize(module, dict(declared(component, scope)), seed)
    return Built(component, scope, module.to(dtype).eval())


def context(x: Tensor) -> Context:
    """What travels beside `x` `[batch, tokens, width]`."""
    return Context(positions=torch.arange(x.shape[1]), grid=(x.shape[1],))


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers from a normal distribution."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def complaints(component: Component, scope: Scope | None = None) -> list[str]:
    """`field: message` of all that is wrong with a component, filled in."""
    scope = scope or place()
    component = component.fill(scope)
    return [f"{complaint.field}: {complaint.message}" for complaint in component.check(scope)]
