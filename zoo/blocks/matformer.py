"""Nested feed-forward networks: narrower ones that are prefixes of the widest."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from zoo.blocks.activations import gated, gated_cost
from zoo.blocks.linear import Dense
from zoo.blocks.mlp import GLU, MLP, Ratio
from zoo.component import Activation, Child, Complaint, Component, Scope, Size, Traits, slots
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost
from zoo.errors import ZooError
from zoo.parameter import Axis, Parameter, normal
from zoo.registry import Role, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from zoo.blocks.model import Spec

_DRAWN = "granularity"


@register(
    "matformer",
    role=Role.CHANNEL,
    traits=Traits(causal="always", elastic=("hidden",)),
    sources=["Devvrit et al. 2023, MatFormer: Nested Transformer for Elastic Inference"],
    catalogue=["matformer"],
)
class MatFormer(Component):
    r"""An `mlp` or `glu` of which every width $m$ of `hidden` is a network: $y = \phi(W^\mathrm{up}_{:m} x)^\top
    W^\mathrm{down}_{:m}$, and if `gated` $y = (\phi(W^\mathrm{gate}_{:m} x) \odot W^\mathrm{up}_{:m} x)^\top
    W^\mathrm{down}_{:m}$.

    All matrices are stored as `[hidden, width]`, so that each narrower network is a contiguous view of the widest and
    takes $O(\mathrm{width} \cdot m)$ for a token. They have no biases and are dense whatever `linear` is set to.

    In evaluation the network `active` runs. In training each forward pass of the model draws one for all its layers,
    from torch's generator on the CPU. `set_granularity` fixes the choice, of all layers or each by itself, in training
    and evaluation. A compiled graph cannot change its shapes with what it draws: compiled training without a fixed
    choice draws on the device, runs the widest network, and sets the channels beyond the drawn width to zero.

    `extract` cuts out a network of ordinary `glu` or `mlp` components.
    """

    hidden: Annotated[tuple[Size, ...], Field(min_length=1)] | None = None
    """Hidden channels of the networks, increasing; by default what `ratios` gives."""
    ratios: Annotated[tuple[Ratio, ...], Field(min_length=1)] | None = None
    """Hidden channels for each channel of the stream, in place of `hidden`; `[0.5, 1, 2, 4]` unless either is set."""
    active: Annotated[int, Field(ge=0)] | None = None
    """Which network runs in evaluation and is counted, from 0 for the narrowest; the widest by default."""
    probabilities: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] | None = None
    """The chance of each network to be drawn in training; the same for all by default."""
    gated: bool = True
    """Whether they are gated units (`glu`) rather than `mlp`."""
    activation: Activation | None = None

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        ratios = (0.5, 1.0, 2.0, 4.0) if self.ratios is None else self.ratios
        hidden = self.hidden or tuple(max(1, math.ceil(round(ratio * scope.width, 6))) for ratio in ratios)
        count = len(hidden)
        return {"hidden": hidden, "active": count - 1, "probabilities": (1 / count,) * count}

    def fill(self, scope: Scope) -> Self:
        filled = super().fill(scope)
        return filled.model_copy(update={"ratios": None}) if self.hidden is None else filled

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if self.ratios is not None:
            yield Complaint("ratios", "`hidden` and `ratios` are both set; remove one")
        if any(narrow >= wide for narrow, wide in pairwise(self.widths)):
            yield Complaint("hidden", f"widths must increase; got {list(self.widths)}")
        if self.active is not None and self.active >= len(self.widths):
            yield Complaint("active", f"there is no network {self.active}; 0 to {len(self.widths) - 1} would do")
        given = self.probabilities or ()
        if len(given) != len(self.widths) or not math.isclose(sum(given), 1.0, abs_tol=1e-6):
            yield Complaint(
                "probabilities",
                f"expected {len(self.widths)} numbers that add up to 1, one for each width; got {given}",
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """The hidden widths of the networks."""
        assert self.hidden is not None, "filled in"
        return self.hidden

    @property
    def running(self) -> int:
        """The hidden width of the network that runs in evaluation."""
        return self.widths[-1 if self.active is None else self.active]

    def children(self, scope: Scope) -> Mapping[str, Child]:
        inner = self.inner(scope)
        return {"activation": Child(inner.activation, inner.at(width=self.running))}

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        axes = Axis("hidden", self.widths[-1]), Axis("width", scope.width)
        active = Fraction(self.running, self.widths[-1])
        entry = Parameter(axes, normal(scope.init_std), active=active)
        down = Parameter(axes, normal(scope.init_std / math.sqrt(scope.depth)), active=active)
        return {**({"gate": entry} if self.gated else {}), "up": entry, "down": down}

    def cost(self, scope: Scope, call: Call) -> Cost:
        width, size, matrices = scope.width, call.element_bytes, 3 if self.gated else 2
        hidden = call.rows * self.running
        products = Cost(
            flops=2.0 * hidden * width * matrices,
            traffic=float((width * self.running + call.rows * width + hidden) * matrices * size),
            saved=float((call.rows * width + hidden) * size),
            peak=float(call.rows * width * size),
            backward_extra=float((call.rows * width + hidden) * size),
            kind="nested",
            weights=float(width * self.running * matrices * size),
        )
        activation = self.children(scope)["activation"]
        bent = gated_cost(activation, self.running, call) if self.gated else activation.cost(call)
        return (bent + products.holding(float(hidden * size))).holding(float(hidden * (matrices - 1) * size))

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        import torch.nn.functional as F

        index, drawn = self._choice(module, x, ctx)
        width = self.widths[index]
        up = F.linear(x, module.up[:width])
        h = gated(module.activation, F.linear(x, module.gate[:width]), up) if self.gated else module.activation(up)
        if drawn is not None:
            h = h * self._within(drawn, h)
        return h @ module.down[:width], None

    def _choice(self, module: Any, x: Tensor, ctx: Context) -> tuple[int, Tensor | None]:
        """Which network runs, and a number from [0, 1) where one was drawn inside a compiled graph."""
        import torch

        fixed = getattr(module, "granularity", None)
        if fixed is not None:
            return fixed, None
        if not module.training:
            return self.widths.index(self.running), None
        owner, drawn = ctx.shared.get(_DRAWN, (module, None))
        if owner is module:
            # When its activations are recomputed for the backward pass, the layer that drew draws again, and ignores
            # the number: so the generator, rewound for the recomputation, is where it was for what follows.
            device = x.device if torch.compiler.is_compiling() else "cpu"
            fresh = torch.rand((), device=device)
            drawn = fresh if drawn is None else drawn
            ctx.shared[_DRAWN] = (module, drawn)
        if torch.compiler.is_compiling():
            return len(self.widths) - 1, drawn
        return bisect_right(self._bounds(), drawn.item()), None

    def _bounds(self) -> list[float]:
        """What separates the networks' parts of [0, 1)."""
        return list(accumulate(self.probabilities or ()))[:-1]

    def _within(self, drawn: Tensor, h: Tensor) -> Tensor:
        """1 for the channels of `h` `[..., hidden]` that belong to the drawn network, else 0."""
        import torch

        index = (drawn >= torch.tensor(self._bounds(), device=h.device, dtype=drawn.dtype)).sum()
        width = torch.tensor(self.widths, device=h.device).take(index)
        return (torch.arange(h.shape[-1], device=h.device) < width).to(h.dtype)


def set_granularity(model: torch.nn.Module, granularity: int | Sequence[int | None] | None) -> None:
    """Fix which of its nested networks each `matformer` in `model` runs, in training and in evaluation.

    `granularity` is an index from 0 for the narrowest, for all layers, or one for each, in their order; None gives the
    choice back: drawn in training, what the spec says in evaluation. Raises `ZooError` for an index or a number of
    layers that is not there.
    """
    found: list[Any] = [m for m in model.modules() if isinstance(getattr(m, "component", None), MatFormer)]
    for module, choice in zip(found, _for_each(granularity, [module.component for module in found])):
        module.granularity = choice


def extract(
    spec: Spec, tensors: Mapping[str, Tensor], granularity: int | Sequence[int | None] | None = None
) -> tuple[Spec, dict[str, Tensor]]:
    """The network that a model runs at this granularity: a spec without `matformer`, and the weights.

    `tensors` is the state dictionary of a model of `spec`. `granularity` is an index for all layers or one for each, in
    their order, whether they were ever trained together or not (Mix'n'Match); None stands for `active`. Each
    `matformer` becomes a `glu` or `mlp` with copies of the first rows of its matrices; all else stays as it is, but for
    published figures, which no longer hold. Raises `ZooError` for an index or a number of layers that is not there.
    """
    spec = spec.fill()
    found = [(path, part) for path, part, _ in spec.walk(spec.root()) if isinstance(part, MatFormer)]
    chosen = _for_each(granularity, [part for _, part in found])
    smaller: list[Component] = []
    weights = dict(tensors)
    for (path, part), choice in zip(found, chosen):
        width = part.widths[part.widths.index(part.running) if choice is None else choice]
        plain = GLU if part.gated else MLP
        smaller.append(plain(hidden=width, activation=part.activation, linear=Dense()))
        for name in ("gate", "up") if part.gated else ("up",):
            weights[f"{path}.{name}.weight"] = weights.pop(f"{path}.{name}")[:width].clone()
        weights[f"{path}.down.weight"] = weights.pop(f"{path}.down")[:width].t().contiguous()
    return _swapped(spec, iter(smaller)).model_copy(update={"published": None}), weights


def _swapped(component: Any, replacements: Iterator[Component]) -> Any:
    """The same tree with its `matformer` nodes, in their order, replaced by the next of `replacements`."""
    if isinstance(component, MatFormer):
        return next(replacements)
    updates: dict[str, Any] = {}
    for name, slot in slots(type(component)).items():
        value = getattr(component, name)
        if isinstance(value, Component):
            updates[name] = _swapped(value, replacements)
        elif slot.many and value is not None:
            updates[name] = tuple(_swapped(item, replacements) for item in value)
    return component.model_copy(update=updates)


def _for_each(granularity: int | Sequence[int | None] | None, parts: Sequence[MatFormer]) -> list[int | None]:
    """A choice for each of the nested networks of a model."""
    if granularity is None or isinstance(granularity, int):
        granularity = [granularity] * len(parts)
    if not parts:
        raise ZooError("the model has no `matformer`, whose width could be chosen")
    if len(granularity) != len(parts):
        raise ZooError(f"got {len(granularity)} granularities for {len(parts)} `matformer` layers; give one for each")
    for layer, (choice, part) in enumerate(zip(granularity, parts)):
        if choice is not None and not 0 <= choice < len(part.widths):
            raise ZooError(
                f"granularity {choice} of `matformer` layer {layer}: it has {len(part.widths)} widths, "
                f"{list(part.widths)}; 0 to {len(part.widths) - 1} would do"
            )
    return list(granularity)
