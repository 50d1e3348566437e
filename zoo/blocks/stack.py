"""Layers, and the bodies that hold them: one stack, or stages of a pyramid."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import chain, count
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from zoo.blocks.linear import projection_of
from zoo.blocks.residuals import PostNorm, PreNorm
from zoo.component import (
    Activation,
    Channel,
    Child,
    Complaint,
    Component,
    Linear,
    Mixer,
    Norm,
    Position,
    Projection,
    Reduce,
    Residual,
    Scope,
    Size,
    Slot,
    Traits,
)
from zoo.context import Context, StateTree
from zoo.cost import STREAMS, Call, Cost
from zoo.parameter import Axis
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor

BRANCHES = ("mixer", "channel")


@register("layer", role=Role.LAYER)
class Layer(Component):
    """A token mixer and a channel mixer on the residual stream, each optional.

    What it sets of `norm`, `activation`, `linear` and `position` holds for everything inside it.
    """

    mixer: Mixer | None = None
    """What moves information between tokens."""
    channel: Channel | None = None
    """What works on each token alone."""
    residual: Residual = PreNorm()
    """How both meet the residual stream."""
    norm: Norm | None = None
    activation: Activation | None = None
    linear: Linear | None = None
    position: Position | None = None

    @property
    def branches(self) -> tuple[str, ...]:
        """Names of the branches that are there, in the order in which they run."""
        return tuple(name for name in BRANCHES if getattr(self, name) is not None)

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if not self.branches:
            yield Complaint("", "a layer needs a `mixer`, a `channel`, or both")

    def children(self, scope: Scope) -> Mapping[str, Child]:
        inner = self.inner(scope)
        found = {name: Child(getattr(self, name), inner) for name in self.branches}
        return found | {"residual": Child(self.residual, inner.at(branches=self.branches))}

    def cost(self, scope: Scope, call: Call) -> Cost:
        stream = float(call.rows * scope.width * call.element_bytes)
        total = self.children_cost(scope, call)
        # The gradient of the stream waits beside a branch's backward pass.
        return replace(total.holding(STREAMS * stream), backward_extra=total.falling + stream)

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        branches = {name: getattr(module, name) for name in self.branches}
        y, new = module.residual(x, ctx, state, branches)
        return y, (new or None)


LayerNode = Annotated[Component, Slot(Role.LAYER, default="layer")]


class Layered(Component):
    """What a stack and a stage share: layers one after the other."""

    transparent: ClassVar[bool] = True
    layers: tuple[LayerNode, ...]
    """The layers, from the input to the output; in a file also patterns with `repeat` and `of`."""
    norm: Norm | None = None
    activation: Activation | None = None
    linear: Linear | None = None
    position: Position | None = None

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if not self.layers:
            yield Complaint("layers", "expected at least one layer")

    def writes(self) -> int:
        """How many branches write to the residual stream."""
        return sum(len(getattr(layer, "branches", ("layer",))) for layer in self.layers)

    def run(self, module: Any, x: Tensor, ctx: Context, state: StateTree | None) -> tuple[Tensor, dict[str, Any]]:
        """All layers in turn; their states under `layers.0`, `layers.1`, ..."""
        new: dict[str, Any] = {}
        for index, layer in enumerate(module.layers):
            name = f"layers.{index}"
            if ctx.checkpointing and state is None and module.training:
                from torch.utils.checkpoint import checkpoint

                x, inside = checkpoint(recomputable(layer, ctx), x, use_reentrant=False)
            else:
                x, inside = layer(x, ctx, (state or {}).get(name))
            if inside is not None:
                new[name] = inside
            if ctx.hidden is not None:
                ctx.hidden.append(x)
        return x, new


@register("stack", role=Role.BODY)
class Stack(Layered):
    """Layers of one width, and a norm behind the last.

    `final_norm` defaults to true unless every layer normalises the stream itself (`residual: post`).
    """

    final_norm: bool | None = None
    """Whether to normalise the output of the last layer."""

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {
            "final_norm": not all(
                isinstance(layer, Layer) and isinstance(layer.residual, PostNorm) for layer in self.layers
            )
        }

    def inner(self, scope: Scope) -> Scope:
        return super().inner(scope).at(depth=max(1, self.writes()))

    def children(self, scope: Scope) -> Mapping[str, Child]:
        inner = self.inner(scope)
        found = in_turn("layers", self.layers, inner)
        if self.final_norm:
            found["final_norm"] = Child(inner.norm, self.out(inner))
        return found

    def out(self, scope: Scope) -> Scope:
        return after(self.layers, scope)

    def forward(self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None) -> tuple[Tensor, StateTree]:
        x, new = self.run(module, x, ctx, state)
        return (module.final_norm(x) if self.final_norm else x), new


@register("stage", role=Role.STAGE)
class Stage(Layered):
    """Layers of one width and resolution; `reduce` shrinks the token grid in front of them."""

    width: Size
    """Channels of this stage."""
    reduce: Reduce | None = None
    """What brings the stage before to this width and a smaller grid; needed wherever the width changes."""

    def check(self, scope: Scope) -> Iterator[Complaint]:
        yield from super().check(scope)
        if self.reduce is None and self.width != scope.width:
            yield Complaint("width", f"the stream is {scope.width} wide here; {self.width} needs a `reduce`")

    def reduction(self, scope: Scope) -> Scope:
        """The scope of `reduce`, which maps the width in front to the width of this stage."""
        return scope.at(projection=Projection(Axis("width", scope.width), Axis("width", self.width)))

    def start(self, scope: Scope) -> Scope:
        """The scope in front of the first layer."""
        return scope if self.reduce is None else self.reduce.out(self.reduction(scope))

    def inner(self, scope: Scope) -> Scope:
        return super().inner(self.start(scope))

    def out(self, scope: Scope) -> Scope:
        return after(self.layers, self.start(scope))

    def children(self, scope: Scope) -> Mapping[str, Child]:
        found = {} if self.reduce is None else {"reduce": Child(self.reduce, self.reduction(scope))}
        return found | in_turn("layers", self.layers, self.inner(scope))

    def cost(self, scope: Scope, call: Call) -> Cost:
        children = self.children(scope).values()
        return sum((child.cost(self.resized(call, scope, child.scope)) for child in children), Cost())

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        if self.reduce is not None:
            x, grid = module.reduce(x, ctx)
            ctx = coarser(ctx, x, grid)
        x, new = self.run(module, x, ctx, state)
        return x, (new or None)


StageNode = Annotated[Component, Slot(Role.STAGE, default="stage")]


@register("stages", role=Role.BODY, sources=["Wang et al. 2021, Pyramid Vision Transformer"])
class Stages(Component):
    """A pyramid: stages one after the other, each with its own width, layers and token grid, and a norm at the end."""

    transparent: ClassVar[bool] = True
    stages: tuple[StageNode, ...]
    """The stages, from the finest grid to the coarsest."""
    norm: Norm | None = None
    activation: Activation | None = None
    linear: Linear | None = None
    position: Position | None = None
    final_norm: bool = True
    """Whether to normalise the output of the last stage."""

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if not self.stages:
            yield Complaint("stages", "expected at least one stage")
        if scope.prefix:
            yield Complaint("", "stages work on a grid, without a class token; set `class_token: false` in the stem")

    def inner(self, scope: Scope) -> Scope:
        writes = sum(stage.writes() for stage in self.stages if isinstance(stage, Stage))
        return super().inner(scope).at(depth=max(1, writes))

    def out(self, scope: Scope) -> Scope:
        return after(self.stages, self.inner(scope))

    def children(self, scope: Scope) -> Mapping[str, Child]:
        scope = self.inner(scope)
        found = in_turn("stages", self.stages, scope)
        if self.final_norm:
            found["final_norm"] = Child(scope.norm, after(self.stages, scope))
        return found

    def cost(self, scope: Scope, call: Call) -> Cost:
        children = self.children(scope).values()
        return sum((child.cost(self.resized(call, scope, child.scope)) for child in children), Cost())

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        tokens, new = x.shape[1], {}
        for index, stage in enumerate(module.stages):
            name = f"stages.{index}"
            if x.shape[1] != tokens:
                ctx = coarser(ctx, x, stage.scope.grid)
                tokens = x.shape[1]
            x, inside = stage(x, ctx, (state or {}).get(name))
            if inside is not None:
                new[name] = inside
        return (module.final_norm(x) if self.final_norm else x), new


@register(
    "merge", role=Role.REDUCE, traits=Traits(causal="never"), sources=["Liu et al. 2021, Swin Transformer, section 3.1"]
)
class Merge(Component):
    """Patch merging: each `factor` by `factor` group of tokens is laid end to end, normalised, and mapped to the width.

    `[batch, height * width, channels]` to `[batch, height * width / factor**2, wider]`; on a line of tokens the groups
    are of `factor` neighbours.
    """

    factor: Annotated[int, Field(ge=2, le=64)] = 2
    """How many times fewer tokens remain along each dimension."""
    norm: Norm | None = None
    linear: Linear | None = None

    def grid(self, scope: Scope) -> tuple[int, ...]:
        return tuple(extent // self.factor for extent in scope.grid)

    def merged(self, scope: Scope) -> Axis:
        return Axis("merged", scope.width * self.factor ** len(scope.grid))

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if any(extent % self.factor for extent in scope.grid):
            yield Complaint("factor", f"the token grid {scope.grid} does not divide by {self.factor}")
        if scope.causal:
            yield Complaint("", "merging mixes neighbouring tokens, which a causal model must not")

    def out(self, scope: Scope) -> Scope:
        return scope.at(width=projection_of(scope).outputs.size, grid=self.grid(scope), projection=None)

    def children(self, scope: Scope) -> Mapping[str, Child]:
        merged = self.merged(scope)
        return {
            "norm": Child(self.norm or scope.norm, scope.at(width=merged.size, axis=merged.name)),
            "project": self.project(scope, merged, projection_of(scope).outputs),
        }

    def cost(self, scope: Scope, call: Call) -> Cost:
        return self.children_cost(scope, call.with_tokens(math.prod(self.grid(scope))))

    def forward(self, module: Any, x: Tensor, ctx: Context) -> tuple[Tensor, tuple[int, ...]]:
        batch, _, width = x.shape
        dims = len(ctx.grid)
        coarse = tuple(extent // self.factor for extent in ctx.grid)
        blocks = [size for extent in coarse for size in (extent, self.factor)]
        order = [0, *range(1, 2 * dims, 2), *range(2, 2 * dims + 1, 2), 2 * dims + 1]
        x = x.reshape(batch, *blocks, width).permute(order).reshape(batch, math.prod(coarse), -1)
        return module.project(module.norm(x)), coarse


def coarser(ctx: Context, x: Tensor, grid: tuple[int, ...]) -> Context:
    """The context of a stream `x` that now has fewer tokens, on `grid` if that is more than a line."""
    import torch

    positions = torch.arange(x.shape[1], device=x.device)
    return replace(ctx, grid=grid if len(grid) > 1 else (x.shape[1],), positions=positions)


def recomputable(layer: Any, ctx: Context) -> Callable[[Tensor], tuple[Tensor, StateTree | None]]:
    """A layer's call that adds auxiliary losses the first time only.

    Those of a recomputation are of no use, and would hold on to all that was recomputed.
    """
    import torch

    if torch.compiler.is_compiling():
        # A graph recomputes by itself and runs this once.
        return lambda x: layer(x, ctx, None)
    contexts = chain([ctx], (replace(ctx, losses={}) for _ in count()))
    return lambda x: layer(x, next(contexts), None)


def in_turn(group: str, parts: tuple[Component, ...], scope: Scope) -> dict[str, Child]:
    """Children named `group.0`, `group.1`, ..., each in the scope behind the one before."""
    found: dict[str, Child] = {}
    for index, part in enumerate(parts):
        found[f"{group}.{index}"] = Child(part, scope)
        scope = part.out(scope)
    return found


def after(parts: tuple[Component, ...], scope: Scope) -> Scope:
    """The scope behind components that follow each other."""
    for part in parts:
        scope = part.out(scope)
    return scope
