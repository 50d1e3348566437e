"""Every test of the contract fails on a mixer that breaks just what it is about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from zoo.component import Axis, Component, Scope, Traits
from zoo.context import Context, StateTree
from zoo.cost import Call, Cost, elementwise
from zoo.parameter import Parameter, StateTensor, normal
from zoo.registry import Entry, Role
from zoo.testing import ComponentContract, Example

PROMISES = Traits(causal="always", elastic=("hidden",))


class Sums(Component):
    """Decaying sums of what came before, mapped by a matrix; nothing is wrong with it."""

    type: ClassVar[str] = "sums"
    role: ClassVar[Role] = Role.MIXER
    traits: ClassVar[Traits] = PROMISES
    entry: ClassVar[Entry] = Entry(sources=("nowhere",))
    decay: float = 0.5
    """What is left of a sum after a token."""

    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        return {"weight": Parameter((Axis("hidden", scope.width), Axis("width", scope.width)), normal())}

    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        return {"total": StateTensor((scope.width,))}

    def cost(self, scope: Scope, call: Call) -> Cost:
        products = Cost(flops=2.0 * call.rows * scope.width**2)
        return products + elementwise(call.rows * scope.width, call.element_bytes, operations=2)

    def forward(
        self, module: Any, x: Tensor, ctx: Context, state: StateTree | None = None
    ) -> tuple[Tensor, StateTree | None]:
        total, sums = x.new_zeros(x[:, 0].shape) if state is None else state["total"], []
        for index, token in enumerate(x.unbind(1)):
            if ctx.segments is not None and index:
                total = total * (ctx.segments[:, index] == ctx.segments[:, index - 1])[:, None]
            total = self.decay * total + token
            sums.append(total)
        return self.mapped(module, torch.stack(sums, dim=1)), None if state is None else {"total": total}

    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return x @ module.weight.T


class TestSums(ComponentContract):
    examples = (Example(Sums(), width=8, grid=(6,)),)


class Leaks(Sums):
    def forward(self, module: Any, x: Tensor, ctx: Context, state: Any = None) -> Any:
        y, state = super().forward(module, x, ctx, state)
        return y + 1e-6 * x.mean(dim=1, keepdim=True), state


class Dead(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, 0 * x)


class Shrinks(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, x)[..., 1:]


class MixesSequences(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, x + x.mean(dim=0))


class Widens(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, x).float()


class RoundsEarly(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, x.to(torch.float16).to(x.dtype) if x.dtype == torch.float32 else x)


class RoundsHalves(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        y = super().mapped(module, x)
        return y if x.dtype != torch.bfloat16 else y.mul(4).round().div(4)


class MixesDtypes(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        tokens = torch.arange(x.shape[1], device=x.device)
        return torch.zeros_like(x).index_add(1, tokens, super().mapped(module, x))


class Forgets(Sums):
    def forward(self, module: Any, x: Tensor, ctx: Context, state: Any = None) -> Any:
        return super().forward(module, x, ctx)[0], state


class Overwrites(Sums):
    def forward(self, module: Any, x: Tensor, ctx: Context, state: Any = None) -> Any:
        y, after = super().forward(module, x, ctx, state)
        return y, None if after is None else {"total": state["total"].copy_(after["total"])}


class CutsGradients(Sums):
    def forward(self, module: Any, x: Tensor, ctx: Context, state: Any = None) -> Any:
        y, after = super().forward(module, x, ctx, state)
        return y, None if after is None else {"total": after["total"].detach()}


class RunsOn(Sums):
    def forward(self, module: Any, x: Tensor, ctx: Context, state: Any = None) -> Any:
        return super().forward(module, x, replace(ctx, segments=None), state)


class Idles(Sums):
    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        return {**super().parameters(scope), "idle": Parameter((Axis("width", scope.width),))}


class Misleads(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        y = super().mapped(module, x)
        return y + (0.1 * y).detach()


class Explodes(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        y = super().mapped(module, x)
        return y + (y - y.detach()).abs().sqrt() if module.training else y


class Smuggles(Sums):
    def module(self, scope: Scope) -> torch.nn.Module:
        module = super().module(scope)
        module.register_parameter("extra", torch.nn.Parameter(torch.empty(3)))
        return module


class Understates(Sums):
    def state(self, scope: Scope, capacity: int) -> Mapping[str, StateTensor]:
        return {"total": StateTensor((scope.width,), "float32")}


class CountsTooLittle(Sums):
    def cost(self, scope: Scope, call: Call) -> Cost:
        return super().cost(scope, call) * 0.98


class CountsDecodingWrong(Sums):
    def cost(self, scope: Scope, call: Call) -> Cost:
        return super().cost(scope, call) * (1 + call.past)


class CostsNothing(Sums):
    def cost(self, scope: Scope, call: Call) -> Cost:
        return Cost(flops=-1)


class Allocates(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, x + torch.ones(x.shape[-1], dtype=x.dtype))


class HidesWeights(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        if not hasattr(module, "hidden"):
            module.hidden = torch.randn(x.shape[-1]).to(x)
        return super().mapped(module, x + module.hidden)


class DrawsElsewhere(Sums):
    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        axes = Axis("hidden", scope.width), Axis("width", scope.width)
        return {"weight": Parameter(axes, lambda tensor, _: tensor.normal_())}


class DrawsNothing(Sums):
    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        axes = Axis("hidden", scope.width), Axis("width", scope.width)
        return {"weight": Parameter(axes, lambda tensor, _: tensor.fill_(1.0))}


class Breaks(Sums):
    def mapped(self, module: Any, x: Tensor) -> Tensor:
        return super().mapped(module, x if float(x.sum()) > -1e9 else 0 * x)


class Quadratic(Sums):
    def cost(self, scope: Scope, call: Call) -> Cost:
        return super().cost(scope, call) + Cost(flops=call.tokens**2)


class KnowsLength(Sums):
    def parameters(self, scope: Scope) -> Mapping[str, Parameter]:
        return {**super().parameters(scope), "by_token": Parameter((Axis("tokens", scope.tokens),))}


class Rigid(Sums):
    traits: ClassVar[Traits] = replace(PROMISES, elastic=("experts",))


class Looks(Sums):
    traits: ClassVar[Traits] = replace(PROMISES, causal="scope")


class OnLines(Sums):
    def forward(self, module: Any, x: Tensor, ctx: Context, state: Any = None) -> Any:
        assert len(ctx.grid) == 1
        return super().forward(module, x, ctx, state)


class Agrees(Sums):
    traits: ClassVar[Traits] = replace(PROMISES, causal="never")


class Complains(Sums):
    def check(self, scope: Scope) -> Any:
        yield "", f"not at width {scope.width}"


class Mute(Sums):
    """It has settings that nobody explains."""

    secret: int = 1


class Unsourced(Sums):
    """It came from nowhere."""

    entry: ClassVar[Entry] = Entry()


NOTICED = {
    "test_settings_are_right": [Complains],
    "test_refuses_a_causal_model": [Agrees],
    "test_keeps_shapes": [Shrinks, MixesSequences],
    "test_takes_the_grids_it_promises": [OnLines],
    "test_float32_agrees_with_float64": [RoundsEarly],
    "test_bfloat16_agrees_with_float64": [Widens, RoundsHalves],
    "test_runs_under_autocast": [MixesDtypes],
    "test_no_token_sees_later_ones": [Leaks, Dead],
    "test_tokens_see_later_ones": [Looks],
    "test_pieces_equal_the_whole": [Forgets],
    "test_a_state_can_be_taken_up_again": [Overwrites],
    "test_gradients_pass_through_a_state": [CutsGradients],
    "test_packed_equals_separate": [RunsOn],
    "test_every_parameter_matters": [Idles, Dead],
    "test_gradients_are_right": [Misleads],
    "test_trains": [Explodes],
    "test_holds_the_parameters_it_declares": [Smuggles],
    "test_holds_the_state_it_declares": [Understates],
    "test_takes_the_flops_it_says": [CountsTooLittle],
    "test_takes_the_flops_it_says_in_decoding": [CountsDecodingWrong],
    "test_cost_is_complete": [CostsNothing],
    "test_runs_on_meta": [Allocates],
    "test_saves_and_loads": [HidesWeights],
    "test_starts_from_its_seed_alone": [DrawsElsewhere, DrawsNothing],
    "test_compiles_without_breaks": [Breaks],
    "test_compiles_from_a_state": [Breaks],
    "test_compiled_gradients_are_right": [Breaks],
    "test_linear_time_is_true": [Quadratic],
    "test_any_length_is_true": [KnowsLength],
    "test_elastic_axes_are_there": [Rigid],
    "test_is_documented": [Mute, Leaks, Unsourced],
}


@pytest.mark.parametrize(
    "test, broken",
    [pytest.param(test, broken, id=f"{test}-{broken.__name__}") for test, found in NOTICED.items() for broken in found],
)
def test_it_is_noticed(test: str, broken: type[Component]) -> None:
    causal = broken not in (Looks, Agrees)
    example = Example(broken(), width=8, grid=(6,), causal=causal)
    contract = ComponentContract()
    method = getattr(contract, test)
    assert getattr(method, "applies", lambda _: True)(example), "the test would not run"
    with pytest.raises(BaseException) as caught:
        method(example)
    assert not isinstance(caught.value, KeyboardInterrupt | SystemExit)


def test_every_test_of_the_contract_is_tried() -> None:
    assert {name for name in dir(ComponentContract) if name.startswith("test_")} == set(NOTICED)
