"""Element-wise nonlinearities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from zoo.component import Component
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


@register("relu", role=Role.ACTIVATION)
class ReLU(Component):
    r"""$\max(x, 0)$."""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x.relu()


@register("relu2", role=Role.ACTIVATION, sources=["So et al. 2021, Primer"])
class SquaredReLU(Component):
    r"""$\max(x, 0)^2$."""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x.relu().square()


@register("gelu", role=Role.ACTIVATION, sources=["Hendrycks and Gimpel 2016, Gaussian Error Linear Units"])
class GELU(Component):
    r"""$x \Phi(x)$ with the normal distribution function $\Phi$, or its approximation by a hyperbolic tangent."""

    approximate: Literal["none", "tanh"] = "none"
    """`tanh` for the approximation that GPT-2 and Gemma use."""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.gelu(x, approximate=self.approximate)


@register("silu", role=Role.ACTIVATION, sources=["Elfwing, Uchibe and Doya 2017"])
class SiLU(Component):
    r"""$x \sigma(x)$, also called swish."""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        import torch.nn.functional as F

        return F.silu(x)


@register("sigmoid", role=Role.ACTIVATION)
class Sigmoid(Component):
    r"""$1 / (1 + e^{-x})$."""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x.sigmoid()


@register("linear", role=Role.ACTIVATION)
class NoActivation(Component):
    """The identity, which makes a gated unit bilinear."""

    def forward(self, module: Any, x: Tensor) -> Tensor:
        return x
