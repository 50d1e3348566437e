"""Linear maps: what stands wherever a component projects one axis to another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.component import Component, Projection, Scope
from zoo.cost import Call, Cost
from zoo.parameter import Parameter, normal, zeros
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register("dense", role=Role.LINEAR)
class Dense(Component):
    r"""A full matrix: $y = x W^\top + b$, `[..., inputs]` to `[..., outputs]`.

    Weights are drawn from a normal distribution with the model's standard deviation; where the map writes to the
    residual stream that deviation is divided by the square root of the number of branches (GPT-2, section 2.3).
    """

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        projection = projection_of(scope)
        std = scope.init_std / (math.sqrt(scope.depth) if projection.residual else 1.0)
        found = {"weight": Parameter((projection.outputs, projection.inputs), normal(std), active=projection.active)}
        if projection.bias:
            found["bias"] = Parameter((projection.outputs,), zeros, decay=False, active=projection.active)
        return found

    def cost(self, scope: Scope, call: Call) -> Cost:
        projection = projection_of(scope)
        inputs, outputs = projection.inputs.size, projection.outputs.size
        weights = (inputs + int(projection.bias)) * outputs
        return Cost(
            flops=2.0 * call.rows * inputs * outputs,
            pointwise=float(call.rows * outputs * int(projection.bias)),
            traffic=float((weights + call.rows * (inputs + outputs)) * call.element_bytes),
            saved=float(call.rows * inputs * call.element_bytes),
            peak=float(call.rows * outputs * call.element_bytes),
            backward_extra=float(call.rows * (inputs + outputs) * call.element_bytes),
            kind="linear",
            weights=float(weights * call.element_bytes),
        )

    def forward(self, module: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.linear(x, module.weight, getattr(module, "bias", None))


def projection_of(scope: Scope) -> Projection:
    """What the linear map at this place has to do."""
    assert scope.projection is not None, "a linear map stands where Component.project puts it"
    return scope.projection
