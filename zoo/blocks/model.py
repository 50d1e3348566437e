"""The root of a spec: a stem, a body and a head, and what holds for all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field

from zoo.blocks.activations import SiLU
from zoo.blocks.heads import HeadBase, LanguageModelHead
from zoo.blocks.linear import Dense
from zoo.blocks.norms import RMSNorm
from zoo.blocks.positions import LearnedPosition, Rotary
from zoo.blocks.stems import StemBase
from zoo.component import (
    Activation,
    Body,
    Child,
    Complaint,
    Component,
    Head,
    Length,
    Linear,
    Norm,
    Position,
    Scope,
    Size,
    Slot,
    Stem,
)
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost
from zoo.errors import did_you_mean
from zoo.kernels.dispatch import HOMES, IMPLEMENTATIONS
from zoo.memo import memoized
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor

S = TypeVar("S", bound="Spec")


@register("published", role=Role.RECORD)
class Published(Component):
    """Figures that a paper or a released checkpoint states for an architecture; `zoo validate` and tests check them."""

    total_parameters: Annotated[int, Field(gt=0)] | None = None
    """All trainable parameters."""
    active_parameters: Annotated[int, Field(gt=0)] | None = None
    """Parameters that one token uses."""
    tolerance: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """By which share the figures may differ, where the source rounds them."""
    source: str | None = None
    """Where the figures stand."""


@register("model", role=Role.MODEL)
class Spec(Component):
    """A whole model: stem, body, head.

    What it sets of `norm`, `activation`, `linear` and `position` holds wherever nothing nearer is set; left out they
    are `rmsnorm`, `silu`, `dense`, and `rotary` for token models or `learned` for images.
    """

    transparent: ClassVar[bool] = True
    zoo: Literal[1] = 1
    """Version of the spec language."""
    name: str | None = None
    """What the architecture is called."""
    summary: str | None = None
    """One sentence about it."""
    sources: tuple[str, ...] = ()
    """Where it was published."""
    catalogue: tuple[str, ...] = ()
    """Entries of the catalogue that it expresses."""
    published: Annotated[Component, Slot(Role.RECORD, default="published")] | None = None
    """Figures that the counts are checked against."""
    kernels: tuple[str, ...] = ()
    """Implementations that primitives run whatever the device, such as `attention=reference`; see `zoo kernels`."""

    width: Size
    """Channels of the stream between stem and body."""
    context: Length = 1024
    """The longest sequence of tokens; a stem that lays a grid sets its own."""
    causal: bool | None = None
    """Whether tokens see only earlier ones; by default what the head needs."""
    init_std: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Standard deviation of weights at the start."""
    norm: Norm | None = None
    activation: Activation | None = None
    linear: Linear | None = None
    position: Position | None = None
    stem: Stem
    """What makes the inputs a stream."""
    body: Body
    """What the stream goes through."""
    head: Head
    """What is asked of the stream."""

    @property
    def kernel_choices(self) -> Mapping[str, str]:
        """`kernels` as a mapping from primitives to implementations."""
        return {name: implementation for name, _, implementation in (each.partition("=") for each in self.kernels)}

    @property
    def hash(self) -> str:
        """The identity of the architecture; see `zoo.spec.document.spec_hash`."""
        from zoo.spec.document import spec_hash

        return spec_hash(self)

    @property
    def computation(self) -> str:
        """The hash, and the implementations that were chosen: what a latency belongs to."""
        return "+".join([self.hash, *sorted(self.kernels)])

    def root(self) -> Scope:
        """The scope in front of the stem."""
        causal = isinstance(self.head, HeadBase) and self.head.causal if self.causal is None else self.causal
        images = isinstance(self.stem, StemBase) and self.stem.inputs == "images"
        return Scope(
            width=self.width,
            grid=(self.context,),
            causal=causal,
            norm=self.norm or RMSNorm(),
            activation=self.activation or SiLU(),
            linear=self.linear or Dense(),
            position=self.position or (LearnedPosition() if images else Rotary()),
            init_std=self.init_std,
        )

    def fill(self, scope: Scope | None = None) -> Self:
        """The same model with every default spelled out."""
        return _filled(self, scope or self.root())

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if isinstance(self.head, HeadBase) and self.head.causal and not scope.causal:
            yield Complaint("causal", "a language model that sees later tokens has nothing to predict; remove `causal`")
        for index, (name, implementation) in enumerate(self.kernel_choices.items()):
            if name not in HOMES:
                message = f"no primitive is called {name!r}{did_you_mean(name, HOMES)}"
            elif implementation not in IMPLEMENTATIONS:
                message = f"expected {name}=IMPLEMENTATION with {', '.join(IMPLEMENTATIONS)}; got {implementation!r}"
            else:
                continue
            yield Complaint(f"kernels[{index}]", message)

    def children(self, scope: Scope) -> Mapping[str, Child]:
        inside = self.stem.out(scope)
        return {
            "stem": Child(self.stem, scope),
            "body": Child(self.body, inside),
            "head": Child(self.head, self.body.out(inside)),
        }

    def cost(self, scope: Scope, call: Call) -> Cost:
        stem = self.stem.out(scope)
        call = call.with_tokens(stem.tokens) if len(stem.grid) > 1 else call
        children = self.children(scope).values()
        return sum((child.cost(self.resized(call, stem, child.scope)) for child in children), Cost())

    def forward(
        self, module: Any, inputs: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree]:
        x = module.stem(inputs, ctx)
        x, inside = module.body(x, ctx, (state or {}).get("body"))
        tied = isinstance(self.head, LanguageModelHead) and self.head.tied
        return module.head(x, ctx, module.stem.weight if tied else None), ({"body": inside} if inside else {})


@memoized(size=16)
def _filled(spec: S, scope: Scope) -> S:
    """`spec.fill(scope)`: checking, hashing and counting a spec follow each other, and each needs it."""
    stem = spec.stem.fill(scope)
    inside = stem.out(scope)
    body = spec.body.fill(inside)
    head = spec.head.fill(body.out(inside))
    return spec.model_copy(
        update={
            "causal": scope.causal,
            "norm": scope.norm,
            "activation": scope.activation,
            "linear": scope.linear,
            "position": scope.position,
            "stem": stem,
            "body": body,
            "head": head,
        }
    )
