"""What a spec costs, counted from the specification alone: no model is built and torch is not imported.

A `Tally` holds what adds up over the parts of a model. A search adds the tallies of layers that it has seen before;
`zoo cost` prints them; `metrics` turns their sum into the figures that budgets speak of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import add
from typing import TYPE_CHECKING, Any, NamedTuple

from zoo.component import Child, Component, Scope
from zoo.cost import Call, Cost, Operator
from zoo.errors import ZooError, did_you_mean
from zoo.registry import Role

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

ELEMENT_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
ALIASES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}

TRAINED_BYTES = 4
"""Bytes of a weight in training, of its gradient and of each of Adam's moments."""
OPTIMIZER_PASSES = 10
"""How often clipping and AdamW pass over all weights: the norm reads gradients, clipping reads and writes them, and an
update reads weights, gradients and two moments and writes weights and moments."""


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model is asked to do: `batch` sequences of `seq` tokens at once, or one more token behind `past` others.

    `seq` and `past` default to the model's context.
    """

    batch: int = 1
    seq: int | None = None
    past: int | None = None
    dtype: str = "float32"

    @property
    def element_bytes(self) -> int:
        name = ALIASES.get(self.dtype, self.dtype)
        if name not in ELEMENT_BYTES:
            raise ZooError(f"unknown dtype {self.dtype!r}{did_you_mean(self.dtype, [*ELEMENT_BYTES, *ALIASES])}")
        return ELEMENT_BYTES[name]

    def at(self, context: int) -> Workload:
        """The same with lengths filled in."""
        seq = context if self.seq is None else self.seq
        return replace(self, seq=seq, past=seq if self.past is None else self.past)

    def forward(self) -> Call:
        """One pass over all tokens."""
        assert self.seq is not None
        return Call(self.batch, self.seq, 0, self.element_bytes)

    def decode(self) -> Call:
        """One token more."""
        assert self.past is not None
        return Call(self.batch, 1, self.past, self.element_bytes)


class Tally(NamedTuple):
    """What a part of a model holds and takes under one workload; tallies of parts that follow each other add up.

    `depth` counts layers and `params` parameters; everything from `flops` on is in FLOPs or bytes as in
    `zoo.cost.Cost`.
    `state` is the state of the whole batch behind the last token, `state_token` what one more token of one sequence
    adds. `kept` is what a training step with checkpointing keeps until the backward pass: the inputs of layers, and
    what other parts save; `passing` is what it holds on top while a part runs forward, `recomputed` what a layer needs
    at once when it is recomputed. Everything adds up but from `peak` on, where the largest count.
    """

    depth: int = 0
    params: int = 0
    active_params: float = 0
    embedding_params: int = 0
    flops: float = 0.0
    backward_flops: float = 0.0
    pointwise: float = 0.0
    traffic: float = 0.0
    saved: float = 0.0
    decode_flops: float = 0.0
    decode_traffic: float = 0.0
    state: int = 0
    state_token: int = 0
    kept: float = 0.0
    peak: float = 0.0
    forward_extra: float = 0.0
    backward_extra: float = 0.0
    passing: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: Tally) -> Tally:  # type: ignore[override]
        """What both hold and take; of the peaks the larger counts."""
        return Tally._make([*map(add, self[:MAXIMA], other[:MAXIMA]), *map(max, self[MAXIMA:], other[MAXIMA:])])


MAXIMA = Tally._fields.index("peak")
"""From this field of a tally on the largest counts, in front of it everything adds up."""


def tally(component: Component, scope: Scope, work: Workload, tokens: Call, token: Call) -> Tally:
    """What one part holds and takes: `tokens` is its call in a forward pass, `token` in decoding."""
    params, active, embedding = 0, 0.0, 0
    state = before = 0
    behind = (work.past or 0) + 1
    for _, part, place in component.walk(scope):
        for parameter in part.parameters(place).values():
            params += parameter.count
            active += parameter.count * parameter.active
            embedding += parameter.count * parameter.embedding
        if scope.causal:
            state += sum(item.bytes(work.element_bytes) for item in part.state(place, behind).values())
            before += sum(item.bytes(work.element_bytes) for item in part.state(place, behind - 1).values())
    cost = component.cost(scope, tokens)
    step = component.cost(scope, token)
    is_layer = component.role is Role.LAYER
    stream = float(tokens.rows * scope.width * tokens.element_bytes)
    return Tally(
        depth=int(is_layer),
        params=params,
        active_params=float(active),
        embedding_params=embedding,
        flops=cost.flops,
        backward_flops=cost.backward_flops,
        pointwise=cost.pointwise,
        traffic=cost.traffic,
        saved=cost.saved,
        decode_flops=step.flops,
        decode_traffic=step.traffic,
        state=state * work.batch,
        state_token=state - before,
        kept=stream if is_layer else cost.saved,
        peak=cost.peak,
        forward_extra=cost.rising,
        backward_extra=cost.falling,
        # Of the copies of the stream that a layer finds, its input is kept.
        passing=cost.peak - stream if is_layer else cost.rising,
        recomputed=cost.saved + max(cost.rising, cost.falling) if is_layer else 0.0,
    )


class Piece(NamedTuple):
    """What one component does by itself: the path of its module, its type, the operators of none inside it."""

    path: str
    type: str
    operators: tuple[Operator, ...]


class Place(NamedTuple):
    """A part of a filled spec: its module path, its scope, and its calls in a forward pass and in decoding."""

    path: str
    component: Component
    scope: Scope
    tokens: Call
    token: Call

    def call(self, decoding: bool = False) -> Call:
        """Its call in a forward pass or in decoding."""
        return self.token if decoding else self.tokens

    def cost(self, decoding: bool = False) -> Cost:
        """What its call takes in a forward pass or in decoding."""
        return self.component.cost(self.scope, self.call(decoding))

    def pieces(self, decoding: bool = False) -> tuple[Piece, ...]:
        """Its component and those inside it, whose operators together are those of its cost.

        A component whose cost is not that of what is inside it and more, as where its children get another call than
        itself, is one piece with all of them.
        """
        return tuple(_pieces(self.path, self.component, self.scope, self.call(decoding)))

    def tally(self, work: Workload) -> Tally:
        return tally(self.component, self.scope, work, self.tokens, self.token)


def places(spec: Spec, work: Workload) -> Iterator[Place]:
    """The parts of a filled spec in order: the stem, every layer, what stands between, the head."""
    scope = spec.root()
    stem = spec.stem.out(scope)
    work = work.at(spec.context)
    tokens = work.forward().with_tokens(stem.tokens) if len(stem.grid) > 1 else work.forward()
    yield from _places(Child(spec, scope), "", stem, tokens, work.decode())


def _places(child: Child, path: str, start: Scope, tokens: Call, token: Call) -> Iterator[Place]:
    component, scope = child
    if not component.transparent:
        resized = component.resized(tokens, start, scope) if path != "stem" else tokens
        yield Place(path, component, scope, resized, token)
        return
    for name, inside in component.children(scope).items():
        yield from _places(inside, f"{path}.{name}" if path else name, start, tokens, token)


def _pieces(path: str, component: Component, scope: Scope, call: Call) -> Iterator[Piece]:
    own = Counter(component.cost(scope, call).operators)
    children = component.children(scope)
    inside = Counter(piece for child, place in children.values() for piece in child.cost(place, call).operators)
    apart = inside <= own
    yield Piece(path, component.type, tuple((own - inside if apart else own).elements()))
    if apart:
        for name, (child, place) in children.items():
            yield from _pieces(f"{path}.{name}", child, place, call)


def parts(spec: Spec, work: Workload) -> Iterator[tuple[str, Component, Tally]]:
    """The parts of a filled spec in order, with module paths and tallies."""
    work = work.at(spec.context)
    for place in places(spec, work):
        yield place.path, place.component, place.tally(work)


def total(spec: Spec, work: Workload | None = None) -> Tally:
    """What the whole model holds and takes."""
    return sum((found for _, _, found in parts(spec.fill(), work or Workload())), Tally())


def figures(sum_of_parts: Tally, work: Workload) -> dict[str, Any]:
    """The figures that budgets speak of, by name.

    `train_traffic` is the bytes of a training step: those of a forward pass; twice as many of the backward pass, which
    for each operand of an operator reads what the forward pass read and the gradient of its result, and writes a
    gradient; and those of clipping and AdamW (`OPTIMIZER_PASSES`), in float32.

    `memory` is what inference holds at once: weights, the state, and the largest set of intermediate results.
    `train_memory` is weights, Adam's two moments and gradients in float32, with all activations saved for the backward
    pass: the larger of what is there at the end of the forward pass, together with the gradients of the step before,
    and at the beginning of the backward pass, which has no gradients yet. `train_memory_checkpointed` is the same if
    each layer is recomputed in the backward pass, whose end, with all gradients, then counts too.
    """
    depth, params, active, embedding, flops, backward, pointwise, traffic, saved, *rest = sum_of_parts
    decode_flops, decode_traffic, state, state_token, kept, peak, forward, behind, passing, recomputed = rest
    # Sums that come out of an array are floats.
    params, state = int(params), int(state)
    weights = params * work.element_bytes
    trained = TRAINED_BYTES * params
    return {
        "depth": int(depth),
        "params": params,
        "active_params": round(active),
        "embedding_params": int(embedding),
        "weights": weights,
        "flops": flops,
        "train_flops": flops + backward,
        "decode_flops": decode_flops,
        "pointwise": pointwise,
        "traffic": traffic,
        "train_traffic": 3 * traffic + OPTIMIZER_PASSES * trained,
        "decode_traffic": decode_traffic,
        "state": state,
        "state_token": int(state_token),
        "activations": peak,
        "memory": weights + state + peak,
        "train_memory": saved + max(4 * trained + forward, 3 * trained + behind),
        "train_memory_checkpointed": max(
            4 * trained + max(kept + passing, recomputed), 3 * trained + kept + recomputed
        ),
    }


def metrics(spec: Spec, work: Workload | None = None) -> dict[str, Any]:
    """All analytic figures of a spec under a workload; counts are exact."""
    work = (work or Workload()).at(spec.context)
    return figures(total(spec, work), work)
