"""Mixtures of experts: many feed-forward networks, of which each token takes a few."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from zoo import kernels
from zoo.blocks.activations import gated, gated_cost
from zoo.blocks.mlp import GLU, MLP, FeedForward
from zoo.component import Activation, Child, Complaint, Linear, Positive, Scope, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Axis, Parameter, normal
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor

    from zoo.kernels.grouped import Routing

Scores = Literal["softmax", "sigmoid"]
Coefficient = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""The weight of an auxiliary loss."""


@register(
    "moe",
    role=Role.CHANNEL,
    traits=Traits(causal="always", elastic=("hidden",)),
    sources=[
        "Shazeer et al. 2017, Outrageously Large Neural Networks",
        "Fedus, Zoph and Shazeer 2021, Switch Transformers, eq. 4",
        "Zoph et al. 2022, ST-MoE, eq. 5",
        "Jiang et al. 2024, Mixtral of Experts",
        "Dai et al. 2024, DeepSeekMoE",
    ],
)
class MixtureOfExperts(FeedForward):
    r"""$y = \sum_{e \in T} w_e f_e(x) + f_\mathrm{shared}(x)$ over the `top_k` experts $T$ with the highest scores.

    Scores $s$ are the softmax, or the sigmoid of each, of $W_\mathrm{router} x$; $w_e$ is $s_e$, divided by their sum
    over $T$ if `renormalize`, times `scale`. Every expert is an `mlp` or, if `gated`, a `glu` of `hidden` channels
    without biases, with matrices of its own whatever `linear` is set to. Tokens `[batch, tokens, width]` are sorted by
    expert, so that a token takes $O(\mathrm{top\_k} \cdot \mathrm{width} \cdot \mathrm{hidden})$ however many experts
    there are.

    In training the loss `balance` is added, `experts` times the sum over experts of the share of choices that fell on
    it and its mean score (1 when both are uniform), and `router_z`, the mean square of the logarithm of the router's
    summed exponentials.
    """

    experts: Annotated[int, Field(ge=1, le=65536)] = 8
    """How many experts there are to choose from."""
    top_k: Annotated[int, Field(ge=1, le=65536)] = 2
    """How many experts a token takes."""
    shared: Annotated[int, Field(ge=0, le=1024)] = 0
    """How many more experts every token takes; they are computed as one, `shared` times as wide."""
    gated: bool = True
    """Whether experts are gated units (`glu`) rather than `mlp`."""
    scores: Scores = "softmax"
    """How the router's output becomes scores: `softmax` over all experts, or each expert's `sigmoid`."""
    renormalize: bool | None = None
    """Whether the weights of the experts that a token takes add up to `scale`; by default unless `top_k` is 1, where
    the router could not learn from it."""
    scale: Positive = 1.0
    """Factor on the weights of the chosen experts."""
    capacity: Positive | None = None
    """In training, the most (token, expert) pairs that an expert takes, as a multiple of an even share; those beyond it
    are dropped, counted in the order of the batch and for each token from its best expert on. Without it, and always
    in evaluation, nothing is dropped."""
    balance: Coefficient = 0.01
    """Weight of the loss for even use of the experts."""
    z_loss: Coefficient = 0.0
    """Weight of the loss that keeps the router's outputs small."""
    activation: Activation | None = None
    linear: Linear | None = None

    def is_gated(self) -> bool:
        return self.gated

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {**super().derive(scope), "renormalize": self.top_k > 1}

    def check(self, scope: Scope) -> Iterator[Complaint]:
        yield from super().check(scope)
        if self.top_k > self.experts:
            yield Complaint(
                "top_k", f"a token cannot take {self.top_k} of {self.experts} experts; at most {self.experts} would do"
            )

    def children(self, scope: Scope) -> Mapping[str, Child]:
        inner, hidden = self.inner(scope), self.hidden_axis.size
        found = {"activation": Child(inner.activation, inner.at(width=hidden))}
        if self.shared:
            found["shared"] = Child((GLU if self.gated else MLP)(hidden=self.shared * hidden), inner)
        return found

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        experts, width, hidden = Axis("experts", self.experts), Axis("width", scope.width), self.hidden_axis
        active = Fraction(self.top_k, self.experts)
        entry = Parameter((experts, hidden, width), normal(scope.init_std), active=active)
        return {
            "router": Parameter((experts, width), normal(scope.init_std)),
            **({"gate": entry} if self.gated else {}),
            "up": entry,
            "down": Parameter((experts, width, hidden), normal(scope.init_std / math.sqrt(scope.depth)), active=active),
        }

    def cost(self, scope: Scope, call: Call) -> Cost:
        width, hidden, size = scope.width, self.hidden_axis.size, call.element_bytes
        taken = call.with_tokens(call.tokens * self.top_k)
        pairs, matrices = taken.rows, 3 if self.gated else 2
        children = self.children(scope)
        used = self.experts * (1 - (1 - self.top_k / self.experts) ** call.rows)
        router = Cost(
            flops=2.0 * call.rows * width * self.experts,
            traffic=float((self.experts * width + call.rows * (width + self.experts)) * size),
            kind="router",
        ) + elementwise(call.rows * self.experts, size, operations=5)
        experts = Cost(
            flops=2.0 * pairs * width * hidden * matrices,
            traffic=(used * width * hidden + pairs * (width + hidden)) * matrices * size,
            saved=float(pairs * (width + hidden) * size),
            kind="experts",
            weights=used * width * hidden * matrices * size,
            steps=used,
        )
        activation = children["activation"]
        between = gated_cost(activation, hidden, taken) if self.gated else activation.cost(taken)
        ends = elementwise(pairs * width, size, operations=2, operands=4)
        routed = router + experts + between
        routed = replace(routed + ends, peak=float(pairs * (width + matrices * hidden) * size))
        if self.shared:
            routed += children["shared"].cost(call).holding(float(call.rows * width * size))
        return routed

    def forward(
        self,
        module: Any,
        x: Tensor,
        ctx: Context,
        state: StateTree | None = None,
    ) -> tuple[Tensor, StateTree | None]:
        import torch.nn.functional as F

        rows = x.reshape(-1, x.shape[-1])
        logits = F.linear(rows, module.router)
        probabilities = scored(logits, self.scores)
        routing = kernels.route(probabilities, self.top_k)
        chosen = routing.chosen
        weights = probabilities.gather(-1, chosen)
        if module.training and self.balance:
            ctx.add_loss("balance", self.balance * imbalance(probabilities, chosen))
        if module.training and self.z_loss:
            ctx.add_loss("router_z", self.z_loss * logits.to(probabilities.dtype).logsumexp(dim=-1).square().mean())
        if self.renormalize:
            weights = normalized(weights)
        run = self._limited if module.training and self.capacity is not None else self._all
        found, where, kept = run(module, rows, routing)
        weights = weights * self.scale if kept is None else weights * self.scale * kept
        y = summed(found, where, weights.to(found.dtype)).view_as(x)
        return (y + module.shared(x, ctx, None)[0] if self.shared else y), None

    def _all(self, module: Any, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the chosen experts make of each token of `x` `[rows, width]`.

        Returns the experts' outputs `[pairs, width]` in their own order, where those of each token are among them
        `[rows, top_k]`, and which of these are kept, None for all.
        """

        def by_expert(rows: Tensor, weight: Tensor) -> Tensor:
            return kernels.grouped_matmul(rows, weight, routing.offsets)

        # Both maps and the backward pass read these rows: taken once that is less work than by each product's `source`.
        return self._experts(module, taken(x, routing.order // self.top_k), by_expert), routing.place, None

    def _limited(self, module: Any, x: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Tensor]:
        """The same within the experts' capacity: each has as many rows as that, whether they are needed or not."""
        import torch

        assert self.capacity is not None
        chosen, pairs = routing.chosen, routing.chosen.numel()
        places = min(x.shape[0], math.ceil(self.capacity * pairs / self.experts))
        filled = routing.offsets[:-1, None] + torch.arange(places, device=x.device)
        token = routing.order[filled.clamp(max=pairs - 1)] // self.top_k
        y = self._experts(module, taken(x, token), lambda rows, weight: rows @ weight.transpose(1, 2))
        place = routing.place - routing.offsets[chosen]
        return y.flatten(0, 1), chosen * places + place.clamp(max=places - 1), place < places

    def _experts(self, module: Any, x: Tensor, by_expert: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The experts' networks, given how rows are multiplied by their expert's weight."""
        up = by_expert(x, module.up)
        h = gated(module.activation, by_expert(x, module.gate), up) if self.gated else module.activation(up)
        return by_expert(h, module.down)


def scored(logits: Tensor, scores: Scores) -> Tensor:
    """Scores of a router's outputs `[rows, choices]`, in float32 at least."""
    import torch

    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.softmax(dim=-1) if scores == "softmax" else logits.sigmoid()


def normalized(weights: Tensor) -> Tensor:
    """Weights `[rows, choices]` divided by their sum; sigmoids that are all zero stay zero."""
    import torch

    return weights / weights.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def imbalance(scores: Tensor, chosen: Tensor) -> Tensor:
    r"""$n \sum_i f_i p_i$ over $n$ choices: $f_i$ the share of `chosen` `[rows, top_k]` that fell on choice $i$, $p_i$
    its mean score (`scores` `[rows, n]`, which are divided by their sum). 1 where all is uniform, at most $n$.
    """
    import torch

    options = scores.shape[-1]
    ones = torch.ones_like(chosen, dtype=scores.dtype).flatten()
    share = scores.new_zeros(options).scatter_add(0, chosen.flatten(), ones) / chosen.numel()
    return options * (share * normalized(scores).mean(dim=0)).sum()


def taken(x: Tensor, rows: Tensor) -> Tensor:
    """Rows of `x` `[rows, width]` by index, as an embedding's look-up: its gradient is summed in a fixed order."""
    import torch.nn.functional as F

    return F.embedding(rows, x)


def summed(x: Tensor, rows: Tensor, weights: Tensor | None = None) -> Tensor:
    """For each line of `rows` `[lines, count]` the (weighted) sum of these rows of `x`, `[lines, width]`."""
    import torch.nn.functional as F

    return F.embedding_bag(rows, x, mode="sum", per_sample_weights=weights)
