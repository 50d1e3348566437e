"""Stems: from what a data set delivers to a stream of tokens `[batch, tokens, width]`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from zoo.blocks.positions import PositionBase
from zoo.component import Child, Complaint, Component, Length, Linear, Position, Scope, Share, Size
from zoo.context import Context
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Axis, Parameter, normal
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor


class StemBase(Component):
    """What stems share: absolute positions, where the model has them, and dropout."""

    inputs: ClassVar[str]
    """What it takes: `tokens` or `images`."""
    position: Position | None = None
    dropout: Share = 0.0
    """The chance that an element of the stream is zeroed, in training."""

    def position_children(self, scope: Scope) -> dict[str, Child]:
        position = self.position or scope.position
        absolute = isinstance(position, PositionBase) and position.absolute
        return {"position": Child(position, scope)} if absolute else {}

    def finish(self, module: Any, x: Tensor, ctx: Context) -> Tensor:
        """The stream with positions added, and dropout."""
        import torch.nn.functional as F

        if "position" in module._modules:
            x = module.position(x, ctx)
        return F.dropout(x, self.dropout) if module.training and self.dropout else x


@register("token", role=Role.STEM)
class TokenStem(StemBase):
    r"""A table of vectors: token $t$ becomes row $t$, times `scale`; `[batch, tokens]` integers to the stream."""

    inputs: ClassVar[str] = "tokens"
    vocab: Size
    """How many different tokens there are."""
    scale: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """What rows are multiplied by; Gemma takes the square root of the width."""

    def out(self, scope: Scope) -> Scope:
        return scope.at(vocab=self.vocab)

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        axes = (Axis("vocab", self.vocab), Axis("width", scope.width))
        return {"weight": Parameter(axes, normal(scope.init_std), decay=False, embedding=True)}

    def children(self, scope: Scope) -> Mapping[str, Child]:
        return self.position_children(scope)

    def cost(self, scope: Scope, call: Call) -> Cost:
        scaled = int(self.scale is not None)
        rows = elementwise(call.rows * scope.width, call.element_bytes, operations=scaled, saved=0, kind="embedding")
        return self.children_cost(scope, call) + rows

    def forward(self, module: Any, tokens: Tensor, ctx: Context) -> Tensor:
        import torch.nn.functional as F

        x = F.embedding(tokens, module.weight)
        return self.finish(module, x if self.scale is None else x * self.scale, ctx)


@register("patch", role=Role.STEM, sources=["Dosovitskiy et al. 2020, An Image is Worth 16x16 Words, eq. 1"])
class PatchStem(StemBase):
    """Patches of an image, each mapped to one token by one matrix.

    `[batch, channels, height, width]` images become `height / size * width / size` tokens in rows, behind a learned
    class token if there is one.
    """

    inputs: ClassVar[str] = "images"
    image: tuple[Length, Length]
    """Height and width of the images."""
    size: Size
    """Height and width of a patch."""
    channels: Size = 3
    """Channels of the images."""
    class_token: bool = False
    """Put a learned token in front, from which a classifier may read."""
    linear: Linear | None = None

    def patch(self) -> Axis:
        return Axis("patch", self.channels * self.size**2)

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if any(extent % self.size for extent in self.image):
            height, width = self.image
            yield Complaint("size", f"images of {height}x{width} do not divide into {self.size}x{self.size} patches")

    def out(self, scope: Scope) -> Scope:
        grid = (self.image[0] // self.size, self.image[1] // self.size)
        return scope.at(grid=grid, prefix=int(self.class_token))

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        if not self.class_token:
            return {}
        return {"class_token": Parameter((Axis("width", scope.width),), normal(scope.init_std), decay=False)}

    def children(self, scope: Scope) -> Mapping[str, Child]:
        project = self.project(scope, self.patch(), Axis("width", scope.width), bias=True)
        return {"project": project, **self.position_children(self.out(scope))}

    def cost(self, scope: Scope, call: Call) -> Cost:
        children = dict(self.children(scope))
        patches = call.with_tokens(math.prod(self.out(scope).grid))
        project = children.pop("project").cost(patches)
        # Nobody asks for the gradient of an image.
        project = replace(project, backward=project.flops)
        return project + sum((child.cost(call) for child in children.values()), Cost())

    def forward(self, module: Any, images: Tensor, ctx: Context) -> Tensor:
        import torch
        import torch.nn.functional as F

        patches = F.pixel_unshuffle(images, self.size).flatten(2).transpose(1, 2)
        x = module.project(patches)
        if self.class_token:
            x = torch.cat((module.class_token.expand(x.shape[0], 1, -1), x), dim=1)
        return self.finish(module, x, ctx)
