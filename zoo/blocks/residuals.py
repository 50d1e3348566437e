r"""How the branches of a layer meet the residual stream.

Every form may scale what a branch writes, channel by channel, by a learned `layer_scale` (Touvron et al. 2021, CaiT,
eq. 3), and drop whole branches of single samples in training (`drop_path`, Huang et al. 2016), survivors divided by
the chance of surviving.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo.component import Child, Component, Positive, Scope, Share
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Axis, Parameter, constant
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


class ResidualBase(Component):
    """The parts that all forms share: one norm for each of `norms`, scaled and dropped branches."""

    layer_scale: Positive | None = None
    """What the learned scale of each channel starts from; none without it."""
    drop_path: Share = 0.0
    """The chance that a branch is left out for a sample, in training."""
    dropout: Share = 0.0
    """The chance that an element of a branch's output is left out, in training."""

    def norms(self, branches: tuple[str, ...]) -> list[str]:
        """Names of the norms that this form needs."""
        return [f"{branch}_norm" for branch in branches]

    def children(self, scope: Scope) -> Mapping[str, Child]:
        return {name: Child(scope.norm, scope) for name in self.norms(scope.branches)}

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        if self.layer_scale is None:
            return {}
        width = Axis("width", scope.width)
        return {f"{b}_scale": Parameter((width,), constant(self.layer_scale), decay=False) for b in scope.branches}

    def cost(self, scope: Scope, call: Call) -> Cost:
        scaled = int(self.layer_scale is not None)
        elements, size = call.rows * scope.width, call.element_bytes
        add = elementwise(elements, size, operations=1 + scaled, operands=3, saved=scaled)
        return self.children_cost(scope, call) + add * len(scope.branches)

    def scaled(self, module: Any, branch: str, y: Tensor) -> Tensor:
        """What a branch writes to the stream, after dropping and scaling."""
        import torch.nn.functional as F

        if module.training and self.dropout:
            y = F.dropout(y, self.dropout)
        if self.layer_scale is not None:
            y = y * getattr(module, f"{branch}_scale")
        if module.training and self.drop_path:
            keep = y.new_empty(y.shape[0], *[1] * (y.dim() - 1)).bernoulli_(1 - self.drop_path)
            y = y * keep / (1 - self.drop_path)
        return y

    def wire(
        self, module: Any, x: Tensor, branch: str, run: Any, ctx: Context, state: StateTree | None
    ) -> tuple[Tensor, StateTree | None]:
        """The stream after one branch, `run(x, ctx, state)`."""
        raise NotImplementedError

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None, branches: Mapping[str, Any]
    ) -> tuple[Tensor, StateTree]:
        new: dict[str, Any] = {}
        for name, run in branches.items():
            x, inside = self.wire(module, x, name, run, ctx, (state or {}).get(name))
            if inside is not None:
                new[name] = inside
        return x, new


@register("pre", role=Role.RESIDUAL, sources=["Xiong et al. 2020, On Layer Normalization in the Transformer"])
class PreNorm(ResidualBase):
    r"""$x \leftarrow x + f(\mathrm{norm}(x))$ for each branch; the stream itself is never normalised."""

    def wire(
        self, module: Any, x: Tensor, branch: str, run: Any, ctx: Context, state: StateTree | None
    ) -> tuple[Tensor, StateTree | None]:
        y, state = run(getattr(module, f"{branch}_norm")(x), ctx, state)
        return x + self.scaled(module, branch, y), state


@register("post", role=Role.RESIDUAL, sources=["Vaswani et al. 2017, section 3.1"])
class PostNorm(ResidualBase):
    r"""$x \leftarrow \mathrm{norm}(x + f(x))$ for each branch."""

    def wire(
        self, module: Any, x: Tensor, branch: str, run: Any, ctx: Context, state: StateTree | None
    ) -> tuple[Tensor, StateTree | None]:
        y, state = run(x, ctx, state)
        return getattr(module, f"{branch}_norm")(x + self.scaled(module, branch, y)), state


@register("sandwich", role=Role.RESIDUAL, sources=["Ding et al. 2021, CogView, section 2.4"])
class SandwichNorm(ResidualBase):
    r"""$x \leftarrow x + \mathrm{norm}_2(f(\mathrm{norm}_1(x)))$ for each branch."""

    def norms(self, branches: tuple[str, ...]) -> list[str]:
        return [name for branch in branches for name in (f"{branch}_norm", f"{branch}_out_norm")]

    def wire(
        self, module: Any, x: Tensor, branch: str, run: Any, ctx: Context, state: StateTree | None
    ) -> tuple[Tensor, StateTree | None]:
        y, state = run(getattr(module, f"{branch}_norm")(x), ctx, state)
        return x + self.scaled(module, branch, getattr(module, f"{branch}_out_norm")(y)), state


@register("parallel", role=Role.RESIDUAL, sources=["Wang and Komatsuzaki 2021, GPT-J", "Chowdhery et al. 2022, PaLM"])
class Parallel(ResidualBase):
    r"""$x \leftarrow x + \sum_b f_b(\mathrm{norm}(x))$: all branches read the same normalised stream."""

    def norms(self, branches: tuple[str, ...]) -> list[str]:
        return ["norm"]

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None, branches: Mapping[str, Any]
    ) -> tuple[Tensor, StateTree]:
        new: dict[str, Any] = {}
        normed, total = module.norm(x), x
        for name, run in branches.items():
            y, inside = run(normed, ctx, (state or {}).get(name))
            total = total + self.scaled(module, name, y)
            if inside is not None:
                new[name] = inside
        return total, new
