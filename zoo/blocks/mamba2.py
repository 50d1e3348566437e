"""Mamba-2: a state space with one decay for each head, computed as matrix products."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from zoo import kernels
from zoo.blocks.mamba import StateSpace
from zoo.component import Child, Complaint, Positive, Scope, Size, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, of_one_input
from zoo.kernels import work
from zoo.parameter import Axis, Parameter, StateTensor, ones
from zoo.registry import Role, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CONVOLVED = ("x", "B", "C")
"""What the short convolution runs over, in the order in which its channels lie."""


def first_decays(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Logarithms of rates drawn uniformly from `[1, 16)`."""
    tensor.uniform_(1.0, 16.0, generator=generator).log_()


@register(
    "mamba2",
    role=Role.MIXER,
    traits=Traits(causal="always"),
    sources=["Dao and Gu 2024, Transformers are SSMs, sections 6 and 7"],
)
class Mamba2(StateSpace):
    r"""The state space dual layer: per head, linear attention with a decay that depends on the token.

    $z, x, B, C, \delta = W u$ from the stream $u$; $x, B, C \leftarrow \mathrm{silu}(\mathrm{conv}(x, B, C))$, causal,
    channel by channel. The `hidden` channels of $x$ are heads of `head_dim`; $B$ and $C$ are `groups` vectors of
    `state_dim`, each shared by the heads of its group. With $\Delta = \mathrm{softplus}(\delta + b)$ and
    $A = -e^{A_\mathrm{log}}$ each head $h$ keeps a matrix $S_h$, `[state_dim, head_dim]`:

    $$S_{h,t} = e^{\Delta_{h,t} A_h} S_{h,t-1} + \Delta_{h,t} B_t x_{h,t}^\top, \qquad
      y_{h,t} = S_{h,t}^\top C_t + D_h x_{h,t}, \qquad
      o = W_\mathrm{out}\, \mathrm{rmsnorm}(y \odot \mathrm{silu}(z)),$$

    where the norm is over the channels of each group. `[batch, tokens, width]` to the same. In chunks of $c$ tokens
    $O(\mathrm{width} \cdot \mathrm{hidden} + \mathrm{hidden} \cdot (c + \mathrm{state\_dim}))$ for each token, and a
    state of about `hidden * state_dim` numbers, whatever the length. Causal wherever it stands.
    """

    head_dim: Size = 64
    """Channels of a head; there are `hidden / head_dim` heads."""
    state_dim: Size = 128
    """Rows of each head's memory: the length of B and C."""
    groups: Size = 1
    """How many B and C there are; each serves `heads / groups` heads."""
    chunk: Annotated[int, Field(ge=1, le=4096)] = work.CHUNK
    """Tokens that are computed together as matrix products; changes the speed, not the result."""
    norm_before_gate: bool = False
    """Normalise first and gate then, $\\mathrm{rmsnorm}(y) \\odot \\mathrm{silu}(z)$."""
    eps: Positive = 1e-5
    """Added to the mean square in the norm."""

    def check(self, scope: Scope) -> Iterator[Complaint]:
        yield from super().check(scope)
        hidden = self.hidden_axis.size
        if hidden % self.head_dim:
            below = hidden // self.head_dim * self.head_dim
            nearest = " or ".join(f"{size}" for size in (below, below + self.head_dim) if size)
            yield Complaint(
                "head_dim",
                f"the {hidden} hidden channels do not divide into heads of {self.head_dim}; head_dim "
                f"{math.gcd(hidden, self.head_dim)} would, or hidden {nearest}",
            )
        elif self.heads % self.groups:
            yield Complaint(
                "groups",
                f"groups {self.groups} does not divide the {self.heads} heads (hidden {hidden} / head_dim "
                f"{self.head_dim}); groups {math.gcd(self.heads, self.groups)} would",
            )

    @property
    def heads(self) -> int:
        return self.hidden_axis.size // self.head_dim

    def axes(self) -> dict[str, Axis]:
        """What each of the projections from the stream gives."""
        states = Axis("group_states", self.groups * self.state_dim)
        return {"z": self.hidden_axis, "x": self.hidden_axis, "B": states, "C": states, "dt": Axis("heads", self.heads)}

    def children(self, scope: Scope) -> Mapping[str, Child]:
        width = Axis("width", scope.width)
        return {
            **{name: self.project(scope, width, axis, bias=self.bias) for name, axis in self.axes().items()},
            "out": self.project(scope, self.hidden_axis, width, bias=self.bias, residual=True),
        }

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        axes, heads = self.axes(), Axis("heads", self.heads)
        found: dict[str, Parameter] = {}
        for name in CONVOLVED:
            found |= self.convolution(f"{name}_conv", axes[name])
        return found | {
            "dt_bias": self.steps(heads),
            "A_log": Parameter((heads,), first_decays, decay=False),
            "D": Parameter((heads,), ones, decay=False),
            "norm_weight": Parameter((self.hidden_axis,), ones, decay=False),
        }

    def convolved(self) -> list[int]:
        """How many channels each of `CONVOLVED` has."""
        axes = self.axes()
        return [axes[name].size for name in CONVOLVED]

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        return {
            "tail": StateTensor((self.conv_kernel - 1, sum(self.convolved()))),
            "memory": StateTensor((self.heads, self.state_dim, self.head_dim), "float32"),
        }

    def cost(self, scope: Scope, call: Call) -> Cost:
        hidden, convolved, batch, tokens = self.hidden_axis.size, sum(self.convolved()), call.batch, call.tokens
        wide, chunk = max(4, call.element_bytes), min(self.chunk, call.tokens)
        chunked: dict[str, Any] = {"chunk": self.chunk, "decays": "learned"}
        memory = batch * hidden * self.state_dim * wide
        rows_of_hidden, mixed = call.rows * hidden * call.element_bytes, call.rows * convolved * call.element_bytes
        wide_mixed = call.rows * convolved * wide
        convolution = work.causal_convolution_pointwise(batch, tokens, convolved, self.conv_kernel)
        shape = work.RecurrentShape(batch, tokens, self.groups, self.heads, self.state_dim, self.head_dim)
        own = Cost(
            flops=work.recurrence_flops(shape, chunk=self.chunk),
            backward=work.recurrence_backward_flops(shape, chunk=self.chunk),
            # Nonlinearity of the convolution; step, skip, gate and norm of each channel; decays of each pair.
            pointwise=convolution + call.rows * (2 * convolved + 11 * hidden + (4 + 3 * chunk) * self.heads),
            traffic=(call.rows * (3 * convolved + 7 * hidden) + 2 * batch * (self.conv_kernel - 1) * convolved)
            * call.element_bytes
            + 2 * memory,
            # The convolution's input, twice, its output before the nonlinearity and behind it; values; z, silu(z) and
            # what it multiplies, and the product before and behind the norm.
            saved=3 * mixed + wide_mixed + 6 * rows_of_hidden + wide * work.recurrence_saved(shape, **chunked),
            # Of the convolution two sums of taps beside both inputs; or x, B and C beside the gate and the norm.
            peak=max(2 * mixed + 2 * wide_mixed, mixed + 6 * rows_of_hidden) + memory,
            forward_extra=rows_of_hidden,
            backward_extra=4 * rows_of_hidden,
            kind="ssd",
            steps=-(-tokens // chunk),
        )
        children = {name: child.cost(call) for name, child in self.children(scope).items()}
        out = children.pop("out")
        return of_one_input(children.values(), call.rows * scope.width * call.element_bytes) + own + out

    def forward(
        self, module: Any, u: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        import torch
        import torch.nn.functional as F

        from zoo.kernels.checks import at_least_float32

        batch, tokens, _ = u.shape
        old = state or {}
        mixed, tail = kernels.causal_convolution(
            torch.cat([getattr(module, name)(u) for name in CONVOLVED], dim=-1),
            torch.cat([getattr(module, f"{name}_conv") for name in CONVOLVED]),
            torch.cat([getattr(module, f"{name}_conv_bias") for name in CONVOLVED]) if self.conv_bias else None,
            state=old.get("tail"),
            segments=ctx.segments,
            activation="silu",
        )
        x, B, C = mixed.split(self.convolved(), dim=-1)
        x = x.view(batch, tokens, self.heads, self.head_dim)
        B, C = (part.view(batch, tokens, self.groups, self.state_dim) for part in (B, C))
        accumulator = at_least_float32(u.dtype)
        dt = F.softplus(module.dt(u).to(accumulator) + module.dt_bias.to(accumulator))
        y, memory = kernels.recurrence(
            C,
            B,
            (x * dt.unsqueeze(-1)).to(x.dtype),
            log_decay=-dt * module.A_log.to(accumulator).exp(),
            state=old.get("memory"),
            segments=ctx.segments,
            chunk=self.chunk,
        )
        y = torch.addcmul(y, x, module.D.unsqueeze(-1)).flatten(2)
        return module.out(self.gated(module, y, module.z(u))), None if state is None else {
            "tail": tail,
            "memory": memory,
        }

    def gated(self, module: Any, y: Tensor, z: Tensor) -> Tensor:
        """The scan's output `[batch, tokens, hidden]`, gated by `z` and normalised over the channels of each group."""
        import torch.nn.functional as F

        gate = F.silu(z)
        if not self.norm_before_gate:
            y = y * gate
        y = kernels.rms_norm(y.unflatten(-1, (self.groups, -1)), None, self.eps).flatten(-2) * module.norm_weight
        return y * gate if self.norm_before_gate else y
