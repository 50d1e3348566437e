"""From declarations to modules: `Block` holds what a component declares and calls its `forward`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from zoo.component import Component, Scope
from zoo.parameter import Parameter


class Block(nn.Module):
    """The module of a component: its tensors as parameters, its children as modules, under the declared names.

    A child named `layers.3` becomes item 3 of a list `layers`.
    """

    def __init__(self, component: Component, scope: Scope) -> None:
        super().__init__()
        self.component = component
        self.scope = scope
        for name, parameter in component.parameters(scope).items():
            self.register_parameter(name, nn.Parameter(torch.empty(parameter.shape)))
        for name, child in component.children(scope).items():
            self._adopt(name, child.component.module(child.scope))

    def _adopt(self, name: str, module: nn.Module) -> None:
        group, dot, index = name.partition(".")
        if not dot:
            self.add_module(name, module)
            return
        members = self._modules.setdefault(group, nn.ModuleList())
        assert isinstance(members, nn.ModuleList) and len(members) == int(index), name
        members.append(module)

    def __getattr__(self, name: str) -> Any:
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.component.forward(self, *args, **kwargs)

    def extra_repr(self) -> str:
        return self.component.type


def declared(component: Component, scope: Scope) -> Iterator[tuple[str, Parameter]]:
    """All parameters of a component and what stands inside it, by the names of the built module."""
    for path, part, place in component.walk(scope):
        for name, parameter in part.parameters(place).items():
            yield (f"{path}.{name}" if path else name), parameter


def initialize(module: nn.Module, declarations: Mapping[str, Parameter], seed: int) -> None:
    """Fill every declared parameter as its declaration says.

    Each tensor draws from a generator of its own, seeded by `seed` and its name, on the CPU and in float32: the same
    name gets the same values on any device, in any dtype, and whatever else the model holds.
    """
    parameters = dict(module.named_parameters())
    with torch.no_grad():
        for name, declaration in declarations.items():
            target = parameters[name]
            if target.is_meta:
                continue
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            values = torch.empty(declaration.shape, dtype=torch.float32)
            declaration.init(values, generator)
            target.copy_(values)


def empty_state(component: Component, scope: Scope, batch: int, capacity: int, like: Tensor) -> dict[str, Any]:
    """The state before the first token, zeros for everything declared, on the device and in the dtype of `like`."""
    accumulator = torch.float64 if like.dtype == torch.float64 else torch.float32
    tree: dict[str, Any] = {
        name: torch.zeros(
            (batch, *tensor.shape),
            dtype=like.dtype if tensor.dtype == "model" else accumulator,
            device=like.device,
        )
        for name, tensor in component.state(scope, capacity).items()
    }
    for name, child in component.children(scope).items():
        inside = empty_state(child.component, child.scope, batch, capacity, like)
        if inside:
            tree[name] = inside
    return tree
