"""Components at a place where they can be called: what the contract is checked on."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from zoo.blocks.activations import SiLU
from zoo.blocks.heads import HeadBase
from zoo.blocks.linear import Dense
from zoo.blocks.model import Spec
from zoo.blocks.norms import RMSNorm
from zoo.blocks.positions import Rotary
from zoo.builder import declared, empty_state, initialize
from zoo.component import Axis, Component, Projection, Role, Scope
from zoo.context import Context
from zoo.model import Model, State
from zoo.spec.construct import complaints
from zoo.spec.document import brief

INIT_STD = 0.3
"""Large enough that every part of a small model matters."""
VOCAB = 11
LONGEST_NAME = 100
LAYER = {"mixer": {"type": "attention", "heads": 2}, "channel": "mlp"}
"""The company of components that are nothing without others."""
IN_MODELS = (Role.POSITION, Role.STEM, Role.REDUCE, Role.STAGE, Role.BODY, Role.HEAD, Role.MODEL)
"""Roles that are tried inside a whole model; all others are tried by themselves."""


@dataclass(frozen=True)
class Example:
    """A component with settings, and the place where it is tried.

    A `width`-wide stream of tokens on `grid`, behind `prefix` extra tokens; `causal` as the model around it. `idle`
    names parameters that rightly have no influence. Components that need a model around them get a small one, or the
    one that `host` is.
    """

    component: Component
    width: int = 32
    grid: tuple[int, ...] = (12,)
    prefix: int = 0
    causal: bool = True
    idle: tuple[str, ...] = ()
    host: Spec | None = None

    def __str__(self) -> str:
        settings = brief(self.component)
        fields = dict(settings) if isinstance(settings, Mapping) else {}
        place: dict[str, Any] = {} if self.causal else {"causal": False}
        if self.grid != (12,):
            place["grid"] = "x".join(map(str, self.grid))
        given = ",".join(f"{name}={_short(value)}" for name, value in {**fields, **place}.items() if name != "type")
        text = f"{self.component.role}-{self.component.type}" + (f"({given})" if given else "")
        return text if len(text) <= LONGEST_NAME else f"{text[:LONGEST_NAME]}..."

    @cached_property
    def spec(self) -> Spec | None:
        """The model that the component is tried in, if it needs one."""
        if self.host is not None:
            return self.host
        component, role = self.component, self.component.role
        if isinstance(component, Spec):
            return component
        images = len(self.grid) > 1 or getattr(component, "inputs", "tokens") == "images" or role in _ON_GRIDS
        stem: Any = {"type": "token", "vocab": VOCAB}
        if images:
            height, width = self.grid if len(self.grid) == 2 else (4, 4)
            stem = {"type": "patch", "image": [2 * height, 2 * width], "size": 2}
        body: Any = {"type": "stack", "layers": [LAYER]}
        head: Any = {"type": "classifier", "classes": 3} if images or not self.causal else "language_model"
        match role:
            case Role.STEM:
                stem = component
            case Role.BODY:
                body = component
            case Role.STAGE:
                body = {"type": "stages", "stages": [component]}
            case Role.REDUCE:
                first, second = {"width": self.width, "layers": [LAYER]}, {"width": 48, "layers": [LAYER]}
                body = {"type": "stages", "stages": [first, {**second, "reduce": component}]}
            case Role.HEAD:
                head = component
            case Role.POSITION:
                pass
            case _:
                return None
        position = component if role is Role.POSITION else None
        return Spec(
            width=self.width,
            context=math.prod(self.grid),
            init_std=INIT_STD,
            causal=None if self.causal else False,
            position=position,
            stem=stem,
            body=body,
            head=head,
        )

    @cached_property
    def scope(self) -> Scope:
        """Where `root` stands."""
        if self.spec is not None:
            return self.spec.root()
        scope = Scope(
            width=self.width,
            grid=self.grid,
            prefix=self.prefix,
            causal=self.causal,
            norm=RMSNorm(),
            activation=SiLU(),
            linear=Dense(),
            position=Rotary(),
            init_std=INIT_STD,
        )
        if self.component.role is Role.LINEAR:
            return scope.at(projection=Projection(Axis("width", self.width), Axis("hidden", self.width - 5), bias=True))
        return scope

    @cached_property
    def root(self) -> Component:
        """What is built, filled in: the component, or what stands around it."""
        if self.spec is not None:
            return self.spec.fill()
        if self.component.role is Role.RESIDUAL:
            from zoo.blocks.stack import Layer

            return Layer(**LAYER, residual=self.component).fill(self.scope)
        return self.component.fill(self.scope)

    @property
    def complaints(self) -> list[str]:
        """What is wrong with the settings at this place."""
        return [f"{path}: {message}" for path, message in complaints(self.root, "", self.scope)]

    @cached_property
    def parts(self) -> list[tuple[str, Component, Scope]]:
        """Everything in `root`, itself included, with paths and scopes."""
        return list(self.root.walk(self.scope))

    @property
    def stream(self) -> Scope:
        """The scope of the tokens that go in."""
        return self.scope if self.spec is None else self.spec.stem.out(self.scope)

    @property
    def tokens(self) -> int:
        return self.stream.tokens

    @property
    def on_line(self) -> bool:
        """Whether the tokens are a sequence, and nothing else."""
        return len(self.stream.grid) == 1 and not self.stream.prefix

    @property
    def lengths(self) -> tuple[int, ...]:
        """Numbers of tokens that it takes."""
        if not self.on_line or not all(part.traits.any_length or _is_table(part) for _, part, _ in self.parts):
            return (self.tokens,)
        return tuple(sorted({1, 2, self.tokens // 2 + 1, self.tokens}))

    @property
    def per_token(self) -> bool:
        """Whether something comes out for each token."""
        head = None if self.spec is None else self.spec.head
        return self.spec is None or (isinstance(head, HeadBase) and head.kind == "language_model")

    @property
    def is_causal(self) -> bool:
        """Whether no token may see later ones."""
        if self.spec is None and self.component.traits.causal == "always":
            return True
        return self.stream.causal and self.component.traits.causal != "never"

    @property
    def streams(self) -> bool:
        """Whether it goes on from a state."""
        able = all(part.traits.streaming for _, part, _ in self.parts)
        return able and self.is_causal and self.stream.causal and self.on_line and self.per_token

    @property
    def packs(self) -> bool:
        """Whether several sequences may be laid end to end."""
        return self.on_line and self.per_token and all(part.traits.packed for _, part, _ in self.parts)

    def at(self, **changes: Any) -> Example:
        return replace(self, **changes)


_ON_GRIDS = (Role.REDUCE, Role.STAGE)


def _is_table(part: Component) -> bool:
    """Whether the number of tokens is only the longest that it takes: positions."""
    return part.role is Role.POSITION


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_short(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_short(item) for item in value) + "]"
    return str(value)


class Subject:
    """The module of an example, in eval mode, with weights that all matter, and how it is called.

    What goes in is a stream `[batch, tokens, width]`, or what the model's stem takes.
    """

    def __init__(self, example: Example, *, dtype: torch.dtype = torch.float64, seed: int = 0) -> None:
        self.example = example
        self.dtype = dtype
        self.module = module(example)
        self.module.to(torch.float32).to_empty(device="cpu")
        initialize(self.module, dict(declared(example.root, example.scope)), seed)
        disturb(self.module)
        self.module.to(dtype).eval()

    def inputs(self, batch: int = 2, tokens: int | None = None, seed: int = 0) -> Tensor:
        """Random inputs."""
        example, generator = self.example, torch.Generator().manual_seed(seed)
        tokens = example.tokens if tokens is None else tokens
        if example.spec is None:
            shape = (batch, tokens, example.scope.width)
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(self.dtype)
        stem: Any = example.spec.stem
        if getattr(stem, "inputs", "tokens") == "images":
            return torch.randn(batch, stem.channels, *stem.image, generator=generator, dtype=torch.float64).to(
                self.dtype
            )
        return torch.randint(0, stem.vocab, (batch, tokens), generator=generator)

    def __call__(self, x: Tensor, **options: Any) -> Tensor:
        return self.run(x, **options)[0]

    def run(
        self,
        x: Tensor,
        *,
        state: State | None = None,
        segments: Tensor | None = None,
        weights: Mapping[str, Tensor] | None = None,
        losses: dict[str, list[Tensor]] | None = None,
    ) -> tuple[Tensor, State | None]:
        """The output and the state after it."""
        example = self.example
        call: Any = self.module if weights is None else partial(_called, self.module, weights)
        if example.spec is not None:
            output = call(x, state=state, segments=segments)
            if losses is not None:
                losses |= {name: [value] for name, value in output.losses.items()}
            return output.logits, output.state
        if example.component.role in (Role.NORM, Role.ACTIVATION, Role.LINEAR):
            return call(x), state
        past = 0 if state is None else state.past
        tokens = x.shape[1]
        ctx = Context(
            positions=positions(tokens, past, segments, x.device),
            past=past,
            grid=(tokens,) if example.on_line else example.scope.grid,
            prefix=example.scope.prefix,
            segments=segments,
            losses={} if losses is None else losses,
        )
        y, tree = call(x, ctx, None if state is None else state.tree or None)
        return y, None if state is None else State(past + tokens, state.capacity, tree or {})

    def start(self, batch: int, capacity: int) -> State:
        """The state before the first token."""
        like = torch.empty((), dtype=self.dtype)
        return State(0, capacity, empty_state(self.example.root, self.example.scope, batch, capacity, like))

    def changed(self, x: Tensor, token: int) -> Tensor:
        """The same inputs with another token in place of one."""
        x = x.clone()
        x[:, token] = (x[:, token] + 1) % VOCAB if not x.dtype.is_floating_point else -2 * x[:, token] + 1
        return x


def module(example: Example) -> Any:
    """What is built from an example, on `meta`."""
    with torch.device("meta"):
        return Model(example.spec) if example.spec is not None else example.root.module(example.scope)


def disturb(module: torch.nn.Module) -> None:
    """Move all parameters a little, so that none is zero, one or the identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)


def positions(tokens: int, past: int, segments: Tensor | None, device: torch.device) -> Tensor:
    """Where each token stands in its sequence."""
    if segments is None:
        return torch.arange(past, past + tokens, device=device)
    same = (segments[:, :, None] == segments[:, None, :]).tril(-1)
    return same.sum(dim=-1)


def tensors(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a state by their paths."""
    for name, item in tree.items():
        if isinstance(item, Tensor):
            yield f"{path}{name}", item
        else:
            yield from tensors(item, f"{path}{name}.")


def _called(module: torch.nn.Module, weights: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    return functional_call(module, dict(weights), args, kwargs)
