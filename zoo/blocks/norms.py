"""Normalisations of one token's channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import kernels
from zoo.component import Component, Positive, Scope
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Axis, Parameter, ones, zeros
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register("rmsnorm", role=Role.NORM, sources=["Zhang and Sennrich 2019, Root Mean Square Layer Normalization, eq. 4"])
class RMSNorm(Component):
    r"""Division by the root mean square: $y = g \odot x / \sqrt{\mathrm{mean}(x^2) + \epsilon}$ over the last axis."""

    eps: Positive = 1e-5
    """Added to the mean square."""

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        return {"weight": Parameter((Axis(scope.axis, scope.width),), ones, decay=False)}

    def cost(self, scope: Scope, call: Call) -> Cost:
        cost = elementwise(call.rows * scope.width, call.element_bytes, operations=4, saved=2, kind="norm")
        # The squares, and then the quotient before it is scaled.
        return cost.holding(cost.peak)

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, module.weight, self.eps)


@register("layernorm", role=Role.NORM, sources=["Ba, Kiros and Hinton 2016, Layer Normalization, eq. 3"])
class LayerNorm(Component):
    r"""Zero mean, unit variance: $y = g \odot (x - \mu) / \sqrt{\sigma^2 + \epsilon} + b$ over the last axis."""

    eps: Positive = 1e-5
    """Added to the variance."""
    bias: bool = True
    """Whether to add a learned offset."""

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        width = Axis(scope.axis, scope.width)
        found = {"weight": Parameter((width,), ones, decay=False)}
        if self.bias:
            found["bias"] = Parameter((width,), zeros, decay=False)
        return found

    def cost(self, scope: Scope, call: Call) -> Cost:
        return elementwise(call.rows * scope.width, call.element_bytes, operations=7, kind="norm")

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return kernels.layer_norm(x, module.weight, getattr(module, "bias", None), self.eps)
