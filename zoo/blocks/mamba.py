"""Mamba's selective state space, and what Mamba and Mamba-2 share around theirs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Self

from pydantic import Field

from zoo import kernels
from zoo.component import Child, Complaint, Component, Linear, Positive, Scope, Size, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, of_one_input
from zoo.kernels import work
from zoo.parameter import Axis, Initializer, Parameter, StateTensor, ones, uniform
from zoo.registry import Role, register

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class StateSpace(Component):
    """What selective state spaces share: an inner width, a short causal convolution, and step sizes.

    The inner width is given as it is or as a multiple of the stream's; filled in, only `hidden` is left.
    """

    hidden: Size | None = None
    """Inner channels; by default what `expand` gives."""
    expand: Annotated[float, Field(gt=0.0, le=256.0)] | None = None
    """Inner channels for each channel of the stream, in place of `hidden`; 2 if neither is set."""
    conv_kernel: Annotated[int, Field(ge=1, le=64)] = 4
    """Tokens that the short convolution sees, the current one included; 1 leaves a scale for each channel."""
    bias: bool = False
    """Whether the projections from and to the stream add learned offsets."""
    conv_bias: bool = True
    """Whether the short convolution adds a learned offset."""
    dt_min: Positive = 1e-3
    """The smallest step size that a channel or head may start from."""
    dt_max: Positive = 0.1
    """The largest step size that a channel or head may start from."""
    dt_floor: Positive = 1e-4
    """Step sizes drawn below this are raised to it."""
    linear: Linear | None = None

    def widened(self, width: int) -> int:
        """The inner width that `expand` gives."""
        return max(1, round((2.0 if self.expand is None else self.expand) * width))

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {"hidden": self.widened(scope.width)}

    def fill(self, scope: Scope) -> Self:
        filled = super().fill(scope)
        return filled.model_copy(update={"expand": None}) if self.hidden is None else filled

    def check(self, scope: Scope) -> Iterator[Complaint]:
        if self.expand is not None:
            gives = self.widened(scope.width)
            yield Complaint(
                "expand",
                f"hidden {self.hidden} and expand {self.expand:g}, which gives {gives} at width {scope.width}, are "
                "both set; remove one",
            )
        if self.dt_min > self.dt_max:
            yield Complaint("dt_min", f"dt_min {self.dt_min:g} is above dt_max {self.dt_max:g}; swap them")

    @property
    def hidden_axis(self) -> Axis:
        assert self.hidden is not None, "filled in"
        return Axis("hidden", self.hidden)

    def convolution(self, name: str, channels: Axis) -> dict[str, Parameter]:
        """The taps `name` and the offset `name_bias` of a short convolution, started as PyTorch starts its own."""
        start = uniform(-(self.conv_kernel**-0.5), self.conv_kernel**-0.5)
        found = {name: Parameter((channels, Axis("conv_kernel", self.conv_kernel)), start)}
        if self.conv_bias:
            found[f"{name}_bias"] = Parameter((channels,), start, decay=False)
        return found

    def steps(self, axis: Axis) -> Parameter:
        """The offset inside the softplus that makes step sizes."""
        return Parameter((axis,), first_steps(self.dt_min, self.dt_max, self.dt_floor), decay=False)


def first_steps(low: float, high: float, floor: float) -> Initializer:
    r"""Inverse softplus, $\Delta + \log(1 - e^{-\Delta})$, of step sizes drawn log-uniformly from `[low, high)`."""

    def fill(tensor: torch.Tensor, generator: torch.Generator) -> None:
        steps = tensor.uniform_(math.log(low), math.log(high), generator=generator).exp_().clamp_(min=floor)
        tensor.add_(steps.neg().expm1().neg().log())

    return fill


def first_decays(tensor: torch.Tensor, generator: torch.Generator) -> None:
    """S4D-real (Gu et al. 2022): rates 1, 2, ..., state_dim for every channel, as logarithms."""
    tensor.fill_(1.0).cumsum_(-1).log_()


@register(
    "mamba",
    role=Role.MIXER,
    traits=Traits(causal="always"),
    sources=["Gu and Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces, section 3"],
    catalogue=["mamba"],
)
class Mamba(StateSpace):
    r"""A state space whose steps, inputs and outputs depend on the token.

    $x, z = W_x u, W_z u$ from the stream $u$; $x \leftarrow \mathrm{silu}(\mathrm{conv}(x))$, causal, channel by
    channel. From it $\Delta = \mathrm{softplus}(W_\Delta W_\mathrm{low} x + b)$ for each channel and $B, C$, shared by
    all. Each channel $c$ keeps a state $h_c$ of `state_dim` numbers, with $A = -e^{A_\mathrm{log}}$:

    $$h_{c,t} = e^{\Delta_{c,t} A_c} \odot h_{c,t-1} + \Delta_{c,t}\, x_{c,t}\, B_t, \qquad
      y_{c,t} = C_t \cdot h_{c,t} + D_c x_{c,t}, \qquad o = W_\mathrm{out}(y \odot \mathrm{silu}(z)).$$

    `[batch, tokens, width]` to the same. $O(\mathrm{width} \cdot \mathrm{hidden} + \mathrm{hidden} \cdot
    \mathrm{state\_dim})$ for each token, and a state of `hidden * (state_dim + conv_kernel - 1)` numbers, whatever the
    length. Causal wherever it stands.
    """

    state_dim: Size = 16
    """Numbers that each inner channel remembers."""
    dt_rank: Size | None = None
    """Rank of the map that gives the step sizes; by default a sixteenth of the width, rounded up."""
    normalize_inputs: bool = False
    """Divide the low-rank steps, B and C by their root mean squares, without weights, as Falcon Mamba does."""

    def derive(self, scope: Scope) -> Mapping[str, Any]:
        return {**super().derive(scope), "dt_rank": math.ceil(scope.width / 16)}

    @property
    def rank_axis(self) -> Axis:
        assert self.dt_rank is not None, "filled in"
        return Axis("dt_rank", self.dt_rank)

    def children(self, scope: Scope) -> Mapping[str, Child]:
        width, hidden, rank = Axis("width", scope.width), self.hidden_axis, self.rank_axis
        state = Axis("state_dim", self.state_dim)
        # The variance of the published uniform distribution on +-rank^-1/2.
        steps = scope.at(init_std=(3 * rank.size) ** -0.5)
        return {
            "x": self.project(scope, width, hidden, bias=self.bias),
            "z": self.project(scope, width, hidden, bias=self.bias),
            "dt_low": self.project(scope, hidden, rank),
            "B": self.project(scope, hidden, state),
            "C": self.project(scope, hidden, state),
            "dt": self.project(steps, rank, hidden),
            "out": self.project(scope, hidden, width, bias=self.bias, residual=True),
        }

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        hidden = self.hidden_axis
        return {
            **self.convolution("conv", hidden),
            "dt_bias": self.steps(hidden),
            "A_log": Parameter((hidden, Axis("state_dim", self.state_dim)), first_decays, decay=False),
            "D": Parameter((hidden,), ones, decay=False),
        }

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        hidden = self.hidden_axis.size
        return {
            "tail": StateTensor((self.conv_kernel - 1, hidden)),
            "memory": StateTensor((hidden, self.state_dim), "float32"),
        }

    def cost(self, scope: Scope, call: Call) -> Cost:
        hidden, batch, tokens = self.hidden_axis.size, call.batch, call.tokens
        channels, wide = call.rows * hidden, max(4, call.element_bytes)
        memory = batch * hidden * self.state_dim * wide
        convolution = work.causal_convolution_pointwise(batch, tokens, hidden, self.conv_kernel)
        scan = work.selective_scan_pointwise(batch, tokens, hidden, self.state_dim)
        chunk, piece = work.selective_scan_chunks(batch, tokens, hidden, self.state_dim)
        kept = -(-tokens // chunk) * memory
        small, long = channels * call.element_bytes, channels * wide
        own = Cost(
            flops=work.selective_scan_flops(batch, tokens, hidden, self.state_dim),
            # Behind the convolution: its nonlinearity, offset and softplus of the steps, skip and gate.
            pointwise=convolution + scan + 9 * channels,
            # Convolution and its tail, step sizes, x, z and the output of the scan, and the memory in and out.
            traffic=(8 * channels + 2 * batch * (self.conv_kernel - 1) * hidden) * call.element_bytes + 2 * memory,
            # The convolution's input, twice, and output before its nonlinearity; steps before and behind softplus; z,
            # silu(z) and what that multiplies; and a state for each chunk of the scan.
            saved=6 * small + 2 * long + kept,
            # At the scan: x, z and steps, copies of both with time first, the output twice, decays and states.
            peak=2 * small + 5 * long + (2 * piece + 2) * memory,
            forward_extra=3 * long + 2 * piece * memory,
            # At the scan's backward pass, which finds the gradient of the skip: x, steps and the gradient with time
            # first, the gradients of x and steps twice; decays and states of a chunk, what enters its pieces, and the
            # gradients of a piece's states. The gate's are gone.
            backward_extra=small + 7 * long + (2 * chunk + chunk // piece + piece) * memory,
            kind="selective_scan",
            steps=tokens,
        )
        children = {name: child.cost(call) for name, child in self.children(scope).items()}
        out, stream = children.pop("out"), call.rows * scope.width * call.element_bytes
        of_stream = of_one_input([children.pop(name) for name in ("x", "z")], stream)
        steps = children.pop("dt")
        return of_stream + of_one_input(children.values(), small) + steps + own + out

    def forward(
        self, module: Any, u: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        import torch.nn.functional as F

        from zoo.kernels.checks import at_least_float32

        old = state or {}
        x, tail = kernels.causal_convolution(
            module.x(u),
            module.conv,
            getattr(module, "conv_bias", None),
            state=old.get("tail"),
            segments=ctx.segments,
            activation="silu",
        )
        low, B, C = (self.normalized(part) for part in (module.dt_low(x), module.B(x), module.C(x)))
        accumulator = at_least_float32(x.dtype)
        y, memory = kernels.selective_scan(
            x,
            F.softplus(module.dt(low).to(accumulator) + module.dt_bias.to(accumulator)),
            -module.A_log.to(accumulator).exp(),
            B,
            C,
            D=module.D,
            z=module.z(u),
            state=old.get("memory"),
            segments=ctx.segments,
        )
        return module.out(y), None if state is None else {"tail": tail, "memory": memory}

    def normalized(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, None, 1e-6) if self.normalize_inputs else x
