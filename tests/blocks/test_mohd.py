"""`mohd` against the dense block, a plain formula with masks, and its counts."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from flops import counted_flops
from hypothesis import given
from hypothesis import strategies as st
from places import Built, built, complaints, context, draw, place
from tolerance import assert_close
from torch import Tensor

from zoo.blocks.activations import GELU, NoActivation, SiLU
from zoo.blocks.linear import Dense
from zoo.blocks.mlp import GLU, MLP
from zoo.blocks.mohd import MixtureOfHiddenDimensions
from zoo.component import Component
from zoo.cost import Call
from zoo.hardware.memory import cold_peak_bytes
from zoo.registry import Role


class Factored(Component):
    """A linear map that is not dense; it is never built."""

    type: ClassVar[str] = "factored"
    role: ClassVar[Role] = Role.LINEAR


def whole_matrix(mohd: Built, name: str) -> Tensor:
    """A map over the full width, `[hidden, width]` or for `down` `[width, hidden]`."""
    whole = mohd.weights[name].flatten(0, 1)
    return whole if name == "down" else whole.T


def masked(mohd: Built, x: Tensor) -> Tensor:
    """Full products, with zeros for what is not active."""
    c, w = mohd.component, mohd.weights
    logits = x @ w["router"].T
    scores = logits.softmax(-1) if c.scores == "softmax" else logits.sigmoid()
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(c.top_k, dim=-1).indices, 1.0)
    weights = scores * mask
    if c.renormalize:
        weights = c.top_k * weights / weights.sum(-1, keepdim=True)
    ones = torch.ones(*x.shape[:-1], c.shared, dtype=x.dtype)
    subdim = x.shape[-1] // c.subdims
    g, active = (torch.cat([ones, each], -1).repeat_interleave(subdim, -1) for each in (weights, mask))
    x = c.scale * g * x
    h = x @ whole_matrix(mohd, "up").T
    h = F.silu(x @ whole_matrix(mohd, "gate").T) * h if c.gated else F.silu(h)
    y = active * (h @ whole_matrix(mohd, "down").T)
    if c.fusion:
        parts = y.unflatten(-1, (c.subdims, subdim))
        y = torch.einsum("btij,joi->btoj", parts, w["fusion"]).flatten(-2)
    return y


@given(
    shared=st.integers(0, 3),
    top_k=st.integers(1, 4),
    spare=st.integers(0, 2),
    gated=st.booleans(),
    sigmoid=st.booleans(),
    renormalize=st.booleans(),
    fusion=st.booleans(),
)
def test_is_the_masked_product(
    shared: int, top_k: int, spare: int, gated: bool, sigmoid: bool, renormalize: bool, fusion: bool
) -> None:
    subdims = shared + top_k + spare
    mohd = built(
        MixtureOfHiddenDimensions(
            hidden=6,
            subdims=subdims,
            shared=shared,
            top_k=top_k,
            gated=gated,
            scores="sigmoid" if sigmoid else "softmax",
            renormalize=renormalize,
            fusion=fusion,
        ),
        place(width=3 * subdims),
    )
    if fusion:
        with torch.no_grad():
            mohd.weights["fusion"].add_(draw(3, subdims, subdims, seed=2))
    inputs = [draw(2, 4, 3 * subdims).requires_grad_(), *mohd.weights.values()]
    ours, exact = mohd(inputs[0]), masked(mohd, inputs[0])
    assert_close(ours, exact)
    pull = draw(*ours.shape, seed=1)
    # Together, as the router's alone is nothing but rounding where its only choice weighs one by normalisation.
    assert_close(gradients(ours, inputs, pull), gradients(exact, inputs, pull), what="gradients")


def gradients(y: Tensor, inputs: list[Tensor], pull: Tensor) -> Tensor:
    """Of all inputs, end to end."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, inputs, pull, materialize_grads=True)])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [0, 3])
def test_with_everything_active_is_dense(gated: bool, shared: int) -> None:
    component = MixtureOfHiddenDimensions(hidden=24, subdims=4, shared=shared, top_k=4 - shared, gated=gated)
    mohd = built(component.model_copy(update={"renormalize": True}))
    assert mohd.component.scale == 1.0
    dense = built((GLU if gated else MLP)(hidden=24))
    with torch.no_grad():
        mohd.weights["router"].zero_()
        for name in (*mohd.component.widening, "down"):
            dense.weights[f"{name}.weight"].copy_(whole_matrix(mohd, name))
    x = draw(2, 5, 16)
    assert_close(mohd(x), dense(x))


def test_unselected_subdims_get_no_gradient() -> None:
    mohd = built(MixtureOfHiddenDimensions(hidden=8, subdims=8, shared=2, top_k=2, fusion=False))
    x = draw(1, 1, 16)
    y = mohd(x)
    chosen = (x @ mohd.weights["router"].T).topk(2).indices.flatten()
    others = torch.tensor([i for i in range(6) if i not in chosen])
    y.square().sum().backward()
    for name in ("gate", "up", "down"):
        gradient = mohd.weights[name].grad
        assert gradient is not None
        assert (gradient[torch.cat([torch.arange(2), 2 + chosen])].flatten(1).norm(dim=1) > 0).all()
        assert gradient[2 + others].abs().max() == 0
    assert y.unflatten(-1, (8, 2))[0, 0, 2 + others].abs().max() == 0


@pytest.mark.parametrize("top_k", [2, 6])
def test_scale_keeps_the_variance(top_k: int) -> None:
    component = MixtureOfHiddenDimensions(
        hidden=256, subdims=16, shared=2, top_k=top_k, gated=False, fusion=False, activation=NoActivation()
    )
    assert component.fill(place(width=64)).scale == pytest.approx(math.sqrt(16 / (2 + top_k)))
    mohd = built(component, place(width=64))
    with torch.no_grad():
        mohd.weights["router"].zero_()
    x = draw(1, 512, 64)
    y = mohd(x)
    dense = x @ whole_matrix(mohd, "up").T @ whole_matrix(mohd, "down").T
    active = y[y != 0]
    assert active.numel() == 512 * 4 * (2 + top_k)
    assert active.var().item() == pytest.approx(dense.var().item(), rel=0.1)


def test_balance_in_training_only() -> None:
    component = MixtureOfHiddenDimensions(hidden=8, subdims=6, shared=2, top_k=4, balance=0.5)
    mohd, x = built(component, place(width=18)), draw(2, 5, 18)
    ctx = context(x)
    mohd(x, ctx)
    assert ctx.losses == {}
    mohd.module.train()
    mohd(x, ctx)
    assert ctx.losses["balance"][0].item() == pytest.approx(0.5)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("tokens", [1, 7])
def test_counts(gated: bool, fusion: bool, tokens: int) -> None:
    mohd = built(MixtureOfHiddenDimensions(hidden=24, subdims=8, shared=3, top_k=2, gated=gated, fusion=fusion))
    matrices = 3 if gated else 2
    x = draw(2, tokens, 16)
    flops = mohd.component.cost(mohd.scope, Call(batch=2, tokens=tokens)).flops
    mixing = 16 * 8 if fusion else 0
    assert flops == counted_flops(lambda: mohd(x)) == 4 * tokens * (16 * 5 + matrices * 24 * 2 * (3 + 2) + mixing)
    assert sum(p.numel() for p in mohd.weights.values()) == 16 * 5 + matrices * 24 * 16 + mixing
    active = {name: parameter.active for name, parameter in mohd.component.parameters(mohd.scope).items()}
    assert {active[name] for name in (*mohd.component.widening, "down")} == {Fraction(3 + 2, 8)}
    assert active["router"] == 1


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("activation", [SiLU(), GELU()])
def test_counts_of_training(gated: bool, fusion: bool, activation: Any) -> None:
    component = MixtureOfHiddenDimensions(hidden=96, gated=gated, fusion=fusion, activation=activation)
    mohd = built(component, place(width=64))
    cost = mohd.component.cost(mohd.scope, Call(batch=2, tokens=40, element_bytes=8))
    x = draw(2, 40, 64).requires_grad_()
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    parameters = {weight.untyped_storage().data_ptr() for weight in mohd.weights.values()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = mohd(x)
    saved = sum(size for place, size in kept.items() if place not in parameters)
    assert saved == pytest.approx(cost.saved, rel=0.05)
    backward = counted_flops(lambda: torch.autograd.grad(y.sum(), [x, *mohd.weights.values()]))
    assert backward == pytest.approx(cost.backward_flops, rel=0.005)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("fusion", [True, False])
@pytest.mark.parametrize("hidden", [48, 256])
def test_peak_is_what_the_allocator_records(gated: bool, fusion: bool, hidden: int) -> None:
    mohd = built(MixtureOfHiddenDimensions(hidden=hidden, gated=gated, fusion=fusion), place(width=64))
    x = draw(2, 600, 64)
    with torch.inference_mode():
        mohd(x)
        found = cold_peak_bytes(lambda: mohd(x))
    cost = mohd.component.cost(mohd.scope, Call(batch=2, tokens=600, element_bytes=8))
    assert found == pytest.approx(cost.peak, rel=0.1)


@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(training: bool) -> None:
    torch._dynamo.reset()
    mohd = built(MixtureOfHiddenDimensions(hidden=8))
    mohd.module.train(training)
    x = draw(2, 6, 16)
    ctx = context(x)
    compiled = torch.compile(mohd.module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, ctx, None)[0], mohd(x))
    assert list(ctx.losses) == (["balance"] if training else [])


def test_half_precision_and_meta() -> None:
    mohd = built(MixtureOfHiddenDimensions(hidden=8), dtype=torch.bfloat16)
    x = draw(2, 6, 16, dtype=torch.bfloat16)
    assert mohd(x).dtype == torch.bfloat16
    assert mohd.module.to("meta")(x.to("meta"), context(x), None)[0].shape == x.shape


def test_other_linear_maps_must_be_kept_out() -> None:
    scope = place(linear=Factored())
    [complaint] = complaints(MixtureOfHiddenDimensions(), scope)
    assert complaint.startswith("linear: factored cannot take the place") and "`linear: dense`" in complaint
    assert complaints(MixtureOfHiddenDimensions(linear=Dense()), scope) == []


def test_what_does_not_fit() -> None:
    assert complaints(MixtureOfHiddenDimensions(subdims=4, shared=2, top_k=2)) == []
    assert complaints(MixtureOfHiddenDimensions(subdims=4, shared=3, top_k=2)) == [
        "top_k: shared 3 and top_k 2 are more than the 4 subdims; at most 4 together would do"
    ]
    assert complaints(MixtureOfHiddenDimensions(subdims=7)) == [
        "subdims: width 16 does not divide into 7 parts; 4 would do"
    ]
