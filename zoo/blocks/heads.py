"""Heads: from the stream to what is asked of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from zoo import kernels
from zoo.component import Child, Complaint, Component, Linear, Scope, Size
from zoo.context import Context
from zoo.cost import Call, Cost, elementwise
from zoo.kernels import work
from zoo.parameter import Axis
from zoo.registry import Role, register

if TYPE_CHECKING:
    from torch import Tensor

Pool = Literal["mean", "first", "last"]


class HeadBase(Component):
    """What the model asks of its head."""

    kind: ClassVar[str]
    """`language_model`, `classifier` or `regression`: which loss belongs to it."""
    causal: ClassVar[bool] = False
    """Whether a model with this head is causal unless it says otherwise."""


@register("language_model", role=Role.HEAD, sources=["Press and Wolf 2016, Using the Output Embedding"])
class LanguageModelHead(HeadBase):
    r"""Scores for the next token: $E x$ with the stem's table $E$ if tied, else a matrix of its own.

    `[batch, tokens, width]` to `[batch, tokens, vocab]`. Where only the loss is wanted, the scores are computed for
    some tokens at a time and never held for the whole batch, unless `linear` is no full matrix.
    """

    kind: ClassVar[str] = "language_model"
    causal: ClassVar[bool] = True
    tied: bool = True
    """Share the stem's table of token vectors."""
    softcap: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Scores become `softcap * tanh(scores / softcap)`, as in Gemma 2."""
    linear: Linear | None = None

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if scope.vocab is None:
            message = "a language model needs a stem with a vocabulary; use `stem: {type: token, vocab: ...}`"
            yield Complaint("", message)

    def outputs(self, scope: Scope) -> Axis:
        return Axis("vocab", scope.vocab or 1)

    def children(self, scope: Scope) -> Mapping[str, Child]:
        return {} if self.tied else {"project": self.project(scope, Axis("width", scope.width), self.outputs(scope))}

    def cost(self, scope: Scope, call: Call) -> Cost:
        from zoo.blocks.linear import Dense

        inputs, outputs = Axis("width", scope.width), self.outputs(scope)
        linear = Dense() if self.tied else self.linear or scope.linear
        project = Component.project(self, scope.at(linear=linear), inputs, outputs) if self.tied else None
        cost = project.cost(call) if project is not None else self.children_cost(scope, call)
        return self.loss(cost, scope, call, whole=type(linear) is Dense)

    def loss(self, cost: Cost, scope: Scope, call: Call, *, whole: bool) -> Cost:
        """What the head takes in training, where the loss is what is wanted of it.

        With a `whole` matrix the loss computes its gradients, of the stream and of the matrix, chunk by chunk in the
        forward pass, so that there are never more scores than a chunk's. Otherwise all scores stay for the loss.
        """
        size, wide, vocab = call.element_bytes, max(4, call.element_bytes), self.outputs(scope).size
        stream, table = float(call.rows * scope.width * size), float(vocab * scope.width * wide)
        if not whole:
            scores = float(call.rows * vocab * wide)
            return replace(cost, saved=cost.saved + scores, forward_extra=scores, backward_extra=2 * scores)
        rows = min(call.rows, work.linear_cross_entropy_rows(call.rows, scope.width, vocab))
        copies = int(size < wide) + 2 * int(self.softcap is not None)
        return replace(
            cost,
            saved=2 * stream + table,
            forward_extra=float(rows * vocab * (size + copies * wide)),
            backward_extra=stream + table,
        )

    def forward(self, module: Any, x: Tensor, ctx: Context, table: Tensor | None = None) -> Tensor:
        import torch.nn.functional as F

        if ctx.labels is not None and (matrix := self._matrix(module, table)) is not None:
            weight, bias = matrix
            targets = ctx.labels.reshape(-1)
            ctx.loss = kernels.linear_cross_entropy(x.flatten(0, 1), weight, targets, bias=bias, softcap=self.softcap)
            x = x[:, :0]
        scores = F.linear(x, table) if table is not None else module.project(x)
        return scores if self.softcap is None else self.softcap * (scores / self.softcap).tanh()

    def _matrix(self, module: Any, table: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias that give the scores; None where another kind of map does."""
        from zoo.blocks.linear import Dense

        if table is not None:
            return table, None
        dense = type(getattr(module.project, "component", None)) is Dense
        return (module.project.weight, getattr(module.project, "bias", None)) if dense else None


class PooledHead(HeadBase):
    """A head that reads one vector for a whole sample."""

    pool: Pool | None = None
    """What it reads: the mean of the tokens, the first (a class token) or the last; by default the class token where
    there is one, the last token of a causal model, else the mean."""
    bias: bool = True
    """Whether the last projection has a bias."""
    linear: Linear | None = None

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {"pool": "first" if scope.prefix else "last" if scope.causal else "mean"}

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if self.pool == "first" and scope.causal:
            yield Complaint("pool", "the first token of a causal model has seen nothing else; use `last` or `mean`")

    def axis(self) -> Axis:
        """The axis of the outputs."""
        raise NotImplementedError

    def children(self, scope: Scope) -> Mapping[str, Child]:
        return {"project": self.project(scope, Axis("width", scope.width), self.axis(), bias=self.bias)}

    def cost(self, scope: Scope, call: Call) -> Cost:
        pooling = elementwise(call.rows * scope.width, call.element_bytes, operands=1, saved=0, kind="reduction")
        return self.children_cost(scope, call.with_tokens(1)) + pooling

    def pooled(self, x: Tensor, ctx: Context) -> Tensor:
        if self.pool == "mean":
            return x[:, ctx.prefix :].mean(dim=1)
        return x[:, 0 if self.pool == "first" else -1]

    def forward(self, module: Any, x: Tensor, ctx: Context, table: Tensor | None = None) -> Tensor:
        return module.project(self.pooled(x, ctx))


@register("classifier", role=Role.HEAD)
class ClassifierHead(PooledHead):
    """Scores for each class, `[batch, tokens, width]` to `[batch, classes]`."""

    kind: ClassVar[str] = "classifier"
    classes: Size
    """How many classes there are."""

    def axis(self) -> Axis:
        return Axis("classes", self.classes)


@register("regression", role=Role.HEAD)
class RegressionHead(PooledHead):
    """Real numbers, `[batch, tokens, width]` to `[batch, outputs]`."""

    kind: ClassVar[str] = "regression"
    outputs: Size = 1
    """How many numbers there are."""

    def axis(self) -> Axis:
        return Axis("outputs", self.outputs)
