"""Element-wise nonlinearities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from zoo import kernels
from zoo.component import Child, Component, Scope
from zoo.cost import FREE, Call, Cost, elementwise
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


class ActivationBase(Component):
    """What activations share: one pass over the elements."""

    operations: ClassVar[int]
    """Floating point operations for an element, an exponential as four."""

    def cost(self, scope: Scope, call: Call) -> Cost:
        elements = call.rows * scope.width
        return elementwise(elements, call.element_bytes, operations=self.operations, kind=f"activation_{self.type}")

    def kernel(self) -> str | None:
        """What `gated_activation` calls it; None where it does not know it."""
        return None


def kernel_of(activation: Any) -> str | None:
    """What `gated_activation` calls the component `activation`; None where it does not know it."""
    return activation.kernel() if isinstance(activation, ActivationBase) else None


def gated_cost(activation: Child, hidden: int, call: Call) -> Cost:
    """What `gated` takes for `hidden` channels of each token. In one pass only what enters is kept for the backward."""
    saved = 2 if kernel_of(activation.component) is None else 1
    return activation.cost(call) + elementwise(call.rows * hidden, call.element_bytes, operands=3, saved=saved)


def gated(activation: Any, gate: Tensor, up: Tensor) -> Tensor:
    """`activation(gate) * up` with the built `activation`, in one pass where a kernel knows it."""
    kind = kernel_of(getattr(activation, "component", None))
    return activation(gate) * up if kind is None else kernels.gated_activation(gate, up, kind=kind)


@register("relu", role=Role.ACTIVATION)
class ReLU(ActivationBase):
    r"""$\max(x, 0)$."""

    operations: ClassVar[int] = 1

    def kernel(self) -> str:
        return "relu"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x.relu()


@register("relu2", role=Role.ACTIVATION, sources=["So et al. 2021, Primer"])
class SquaredReLU(ActivationBase):
    r"""$\max(x, 0)^2$."""

    operations: ClassVar[int] = 2

    def kernel(self) -> str:
        return "relu2"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x.relu().square()


@register("gelu", role=Role.ACTIVATION, sources=["Hendrycks and Gimpel 2016, Gaussian Error Linear Units"])
class GELU(ActivationBase):
    r"""$x \Phi(x)$ with the normal distribution function $\Phi$, or its approximation by a hyperbolic tangent."""

    operations: ClassVar[int] = 8

    approximate: Literal["none", "tanh"] = "none"
    """`tanh` for the approximation that GPT-2 and Gemma use."""

    def kernel(self) -> str:
        return "gelu" if self.approximate == "none" else "gelu_tanh"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.gelu(x, approximate=self.approximate)


@register("silu", role=Role.ACTIVATION, sources=["Elfwing, Uchibe and Doya 2017"])
class SiLU(ActivationBase):
    r"""$x \sigma(x)$, also called swish."""

    operations: ClassVar[int] = 6

    def kernel(self) -> str:
        return "silu"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.silu(x)


@register("sigmoid", role=Role.ACTIVATION)
class Sigmoid(ActivationBase):
    r"""$1 / (1 + e^{-x})$."""

    operations: ClassVar[int] = 5

    def kernel(self) -> str:
        return "sigmoid"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x.sigmoid()


@register("linear", role=Role.ACTIVATION)
class NoActivation(ActivationBase):
    """The identity, which makes a gated unit bilinear."""

    def cost(self, scope: Scope, call: Call) -> Cost:
        return FREE

    def kernel(self) -> str:
        return "linear"

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x
