"""Attention without a softmax, in time linear in the tokens and with a state of fixed size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from zoo import kernels
from zoo.blocks.attention import HeadMixer, usual_heads
from zoo.component import Child, Complaint, Norm, Scope, Size, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise, of_one_input
from zoo.kernels import work
from zoo.parameter import Axis, Parameter, StateTensor
from zoo.registry import Role, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FEATURES_SAVED = {"elu1": 3, "relu": 1, "silu": 1, "identity": 0}
"""Tensors of queries or keys that the backward pass of each feature map needs."""
DECAYS: dict[str | None, Literal["none", "fixed", "learned"]] = {None: "none", "fixed": "fixed", "data": "learned"}
"""What each decay is to the recurrence."""
LEAST_SUM = 1e-6
"""Keeps the division by the sum of the weights finite; weights are of the order of one."""


def first_decays(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Offsets at which the heads' decays are from 1 - 1/32 to 1 - 1/512, evenly spaced in the logarithm."""
    import torch

    forgotten = torch.linspace(math.log(1 / 32), math.log(1 / 512), tensor.shape[0], dtype=torch.float64).exp()
    tensor.copy_(((1 - forgotten) / forgotten).log())


@register(
    "linear_attention",
    role=Role.MIXER,
    traits=Traits(causal="scope"),
    sources=[
        "Katharopoulos et al. 2020, Transformers are RNNs (`normaliser: sum`)",
        "Qin et al. 2022, The Devil in Linear Transformer (`normaliser: head`)",
        "Sun et al. 2023, Retentive Network (`decay: fixed`, `gate`)",
        "Sun et al. 2024, You Only Cache Once, gated retention (`decay: data`)",
        "Su et al. 2021, RoFormer, eq. 19 (rotary positions)",
    ],
    catalogue=["transnormer"],
)
class LinearAttention(HeadMixer):
    r"""Each token reads from the tokens it sees, weighted by products of features of its query and of their keys.

    For head $h$ with $q = \phi(W_q x)$, $k = \phi(W_k x)$, $v = W_v x$ and the `decay` $\lambda$ in $(0, 1]$,

    $$o_i = \frac{1}{\sqrt{\mathrm{key\_dim}}} \sum_{j \le i} \Big(\prod_{l=j+1}^{i} \lambda_l\Big)
      (q_i^\top k_j)\, v_j, \qquad y = W_o\,\big(\mathrm{silu}(W_g x) \odot \mathrm{norm}(o)\big)$$

    with the gate where it is set. In place of the norm, `normaliser: sum` divides by the sum of the same weights, with
    queries and keys as they are before a rotary position turns them. It is computed as a recurrence over a matrix of
    `[key_dim, value_dim]` per head, in chunks. Where it is not causal, a token sees later ones in the same way. Of
    the positions only rotary ones act here.

    `[batch, tokens, width]` to the same. $O(\mathrm{heads} \cdot \mathrm{key\_dim} \cdot \mathrm{value\_dim})$ for each
    token, and as many numbers of state, whatever the length.
    """

    key_dim: Size | None = None
    """Features of each head's queries and keys; by default `width / heads`."""
    value_dim: Size | None = None
    """Channels of each head's values; by default `width / heads`."""
    feature_map: Literal["elu1", "relu", "silu", "identity"] = "elu1"
    """What makes queries and keys features: `elu(x) + 1`, `relu`, `silu`, or nothing."""
    decay: Literal["fixed", "data"] | None = None
    """How heads forget with each token: not at all; by the `fixed` factor `1 - 2 ** (-5 - h)`, as RetNet; or by a
    sigmoid of a linear map of the token, the `data`."""
    normaliser: Literal["head", "sum"] | None = "head"
    """What keeps outputs in range: a norm over the channels of each `head`, division by the `sum` of the weights, or
    nothing."""
    gate: bool = False
    """Multiply what the heads give by silu of a linear map of the token."""
    bias: bool = False
    """Whether the projections have learned offsets."""
    norm: Norm | None = None

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        heads = self.heads or usual_heads(scope.width, None)
        # Left open where the heads do not divide the width, for `check` to see that it was not given.
        head_dim = None if scope.width % heads else scope.width // heads
        return {"heads": heads, "key_dim": head_dim, "value_dim": head_dim, "causal": scope.causal}

    def check(self, scope: Scope) -> Iterator[Complaint]:
        yield from super().check(scope)
        yield from self.check_division(scope, "key_dim", "value_dim")
        yield from self.check_rotation("key_dim")
        if self.normaliser == "sum" and self.feature_map in ("silu", "identity"):
            yield Complaint(
                "normaliser",
                f"weights from `feature_map: {self.feature_map}` may be negative and their sum zero; use `elu1` or "
                "`relu`, or `normaliser: head`",
            )

    @property
    def sizes(self) -> tuple[int, int, int]:
        """`heads`, `key_dim` and `value_dim`, once filled in."""
        return self.heads or 1, self.key_dim or 1, self.value_dim or 1

    def children(self, scope: Scope) -> Mapping[str, Child]:
        scope = self.inner(scope)
        heads, key_dim, value_dim = self.sizes
        width, keys, values = (
            Axis("width", scope.width),
            Axis("keys", heads * key_dim),
            Axis("values", heads * value_dim),
        )
        found = {
            "query": self.project(scope, width, keys, bias=self.bias),
            "key": self.project(scope, width, keys, bias=self.bias),
            "value": self.project(scope, width, values, bias=self.bias),
            "out": self.project(scope, values, width, bias=self.bias, residual=True),
        }
        if self.decay == "data":
            found["decay"] = self.project(scope, width, Axis("heads", heads))
        if self.normaliser == "head":
            found["head_norm"] = Child(scope.norm, scope.at(width=value_dim, axis="value_dim"))
        if self.gate:
            found["gate"] = self.project(scope, width, values, bias=self.bias)
        return found | self.position_child(scope, 2 * heads * key_dim)

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        if self.decay != "data":
            return {}
        return {"decay_bias": Parameter((Axis("heads", self.sizes[0]),), first_decays, decay=False)}

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        if not self.causal:
            return {}
        heads, key_dim, value_dim = self.sizes
        found = {"memory": StateTensor((heads, key_dim, value_dim), "float32")}
        if self.normaliser == "sum":
            found["sums"] = StateTensor((heads, key_dim, 1), "float32")
        return found

    def cost(self, scope: Scope, call: Call) -> Cost:
        heads, key_dim, value_dim = self.sizes
        children, size = dict(self.children(scope)), call.element_bytes
        norm, position, out = (children.pop(name, None) for name in ("head_norm", "position", "out"))
        assert out is not None
        keys, values = call.rows * heads * key_dim, call.rows * heads * value_dim
        total = of_one_input((child.cost(call) for child in children.values()), call.rows * scope.width * size)
        total += elementwise(2 * keys, size, operations=2, saved=FEATURES_SAVED[self.feature_map])
        held = 2.0 * keys + values
        if position is not None:
            # Queries and keys stay as they were before they are turned.
            total += position.cost(call)
            held += 2 * keys
        total += self.reading(call, value_dim)
        if self.normaliser == "sum":
            sums = self.reading(call, 1)
            # The values are ones, whose gradient would have needed the scores.
            sums = replace(sums, saved=sums.saved - self.scores(call))
            total += sums + elementwise(values, size, operations=2, operands=3)
        elif norm is not None:
            total += norm.cost(call.with_tokens(call.tokens * heads)).holding(values * size)
        if self.gate:
            total += elementwise(values, size, operations=5, operands=3, saved=3).holding(2 * values * size)
        total = (total + out.cost(call).holding(values * size)).holding(held * size)
        # Copies are saved of what is read; itself it is there until the end.
        return replace(total, forward_extra=held * size + call.rows * scope.width * size)

    def scores(self, call: Call) -> float:
        """Bytes of the scores that a recurrence keeps."""
        if not self.causal and self.decay is None and not call.packed:
            return 0.0
        pairs = call.rows * min(work.CHUNK, call.tokens)
        return float(pairs * self.sizes[0] * max(4, call.element_bytes))

    def reading(self, call: Call, value_dim: int) -> Cost:
        """What one pass over values of `value_dim` channels takes."""
        heads, key_dim, _ = self.sizes
        # The kernel computes in float32 or wider.
        wide = max(4, call.element_bytes)
        moved = float(call.rows * heads * (2 * key_dim + 2 * value_dim) * wide)
        memory = float(call.batch * heads * key_dim * value_dim * wide)
        keys, values = (float(call.rows * heads * dim * wide) for dim in (key_dim, value_dim))
        scores = self.scores(call)
        if not scores:
            return Cost(
                flops=4.0 * call.rows * heads * key_dim * value_dim,
                traffic=moved + 2 * memory,
                saved=2 * keys + values + memory,
                peak=memory + 2 * values,
                backward_extra=2 * keys + 2 * values,
                kind="whole_attention",
            )
        chunk = min(work.CHUNK, call.tokens)
        memories = memory * -(-call.tokens // chunk)
        shape = work.RecurrentShape(call.batch, call.tokens, heads, heads, key_dim, value_dim)
        one = Cost(
            flops=work.recurrence_flops(shape),
            backward=work.recurrence_backward_flops(shape),
            pointwise=call.rows * chunk * heads * (1.0 if self.decay is None else 4.0) + memories / wide,
            traffic=moved + 2 * scores + 3 * memories,
            saved=wide * work.recurrence_saved(shape, decays=DECAYS[self.decay]) + (self.decay == "data") * values,
            peak=values + wide * work.recurrence_working(shape),
            # The outputs of chunks, and all of them joined; going back, gradients of these and of what entered.
            forward_extra=2 * values,
            backward_extra=2 * keys + 2 * values,
            kind="recurrence" if self.decay is None else "decayed_recurrence",
            steps=-(-call.tokens // chunk),
        )
        if self.causal:
            return one
        # Backwards on turned copies, beside what a token weighs itself.
        own = elementwise(call.rows * heads * value_dim, wide, operations=2, operands=3)
        own = replace(own, saved=2 * keys + values)
        return (one * 2).holding(2 * keys + values) + own

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        import torch.nn.functional as F

        heads, key_dim, value_dim = self.sizes
        q = self.features(module.query(x)).unflatten(-1, (heads, key_dim))
        k = self.features(module.key(x)).unflatten(-1, (heads, key_dim))
        v = module.value(x).unflatten(-1, (heads, value_dim))
        log_decay = self.log_decay(module, x)
        turned_q, turned_k = (q, k) if self.absolute else module.position.component.rotate(q, k, ctx)
        memory, sums = (None, None) if state is None else (state["memory"], state.get("sums"))
        o, memory = self.read(turned_q, turned_k, v, log_decay, ctx, memory)
        after = {"memory": memory}
        if self.normaliser == "sum":
            total, after["sums"] = self.read(q, k, v.new_ones(*v.shape[:-1], 1), log_decay, ctx, sums)
            o = o / (total + LEAST_SUM)
        elif self.normaliser == "head":
            o = module.head_norm(o)
        y = o.flatten(-2)
        if self.gate:
            y = y * F.silu(module.gate(x))
        return module.out(y), None if state is None else after

    def features(self, x: Tensor) -> Tensor:
        """The features that queries and keys become, element by element."""
        import torch.nn.functional as F

        match self.feature_map:
            case "elu1":
                # `elu(x) + 1`, whose own backward leaves strides that a compiled graph does not expect.
                return F.relu(x) + x.clamp(max=0).exp()
            case "relu":
                return F.relu(x)
            case "silu":
                return F.silu(x)
            case "identity":
                return x

    def log_decay(self, module: Any, x: Tensor) -> Tensor | None:
        """Logarithms of the decays, `[heads]` or `[batch, tokens, heads]`, in float32 or wider."""
        import torch
        import torch.nn.functional as F

        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.decay == "fixed":
            logs = [math.log1p(-(2.0 ** (-5 - head))) for head in range(self.sizes[0])]
            return torch.tensor(logs, dtype=dtype, device=x.device)
        if self.decay == "data":
            return F.logsigmoid(module.decay(x).to(dtype) + module.decay_bias.to(dtype))
        return None

    def read(
        self, q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, ctx: Context, memory: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The weighted sums of values that each token sees, `[batch, tokens, heads, value_dim]`, and the memory."""
        import torch

        scale = q.shape[-1] ** -0.5
        if self.causal:
            return kernels.recurrence(q, k, v, log_decay=log_decay, state=memory, segments=ctx.segments, scale=scale)
        if log_decay is None and ctx.segments is None:
            dtype = torch.promote_types(v.dtype, torch.float32)
            q, k, v_wide = q.to(dtype).transpose(1, 2), k.to(dtype).permute(0, 2, 3, 1), v.to(dtype).transpose(1, 2)
            return (q @ (k @ v_wide) * scale).transpose(1, 2).to(v.dtype), None
        # Forwards and backwards, which count a token's own value twice.
        forwards, _ = kernels.recurrence(q, k, v, log_decay=log_decay, segments=ctx.segments, scale=scale)
        flipped = None if ctx.segments is None else ctx.segments.flip(1)
        if log_decay is not None and log_decay.dim() == 3:
            log_decay = log_decay.flip(1)
        backwards, _ = kernels.recurrence(
            q.flip(1), k.flip(1), v.flip(1), log_decay=log_decay, segments=flipped, scale=scale
        )
        own = (q * k).sum(-1, keepdim=True) * scale * v
        return forwards + backwards.flip(1) - own, None
