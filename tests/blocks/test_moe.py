"""`moe` against transformers, its formula, and its counts."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops import counted_flops
from hypothesis import given
from hypothesis import strategies as st
from places import Built, built, complaints, context, draw, place
from tolerance import assert_close
from torch import Tensor

from zoo.blocks.activations import GELU
from zoo.blocks.model import Spec
from zoo.blocks.moe import MixtureOfExperts, imbalance
from zoo.cost import Call
from zoo.model import build


def plainly(moe: Built, x: Tensor) -> Tensor:
    """Every expert on every token, weighted by its score where it is among the best."""
    c, w = moe.component, moe.weights
    logits = x @ w["router"].T
    scores = logits.softmax(-1) if c.scores == "softmax" else logits.sigmoid()
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(c.top_k, dim=-1).indices, 1.0)
    weights = scores * mask
    if c.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    up = torch.einsum("btw,ehw->bteh", x, w["up"])
    h = F.silu(torch.einsum("btw,ehw->bteh", x, w["gate"])) * up if c.gated else F.silu(up)
    y = torch.einsum("bteh,ewh,bte->btw", h, w["down"], weights * c.scale)
    return y + moe.module.shared(x, context(x), None)[0] if c.shared else y


@given(
    experts=st.integers(1, 6),
    top_k=st.integers(1, 6),
    shared=st.integers(0, 2),
    gated=st.booleans(),
    sigmoid=st.booleans(),
    renormalize=st.booleans(),
    tokens=st.integers(1, 7),
)
def test_is_the_weighted_sum(
    experts: int, top_k: int, shared: int, gated: bool, sigmoid: bool, renormalize: bool, tokens: int
) -> None:
    moe = built(
        MixtureOfExperts(
            hidden=6,
            experts=experts,
            top_k=min(top_k, experts),
            shared=shared,
            gated=gated,
            scores="sigmoid" if sigmoid else "softmax",
            renormalize=renormalize,
            scale=1.5,
        ),
        place(width=5),
    )
    inputs = [draw(2, tokens, 5).requires_grad_(), *moe.weights.values()]
    ours, exact = moe(inputs[0]), plainly(moe, inputs[0])
    assert_close(ours, exact)
    pull = draw(*ours.shape, seed=1)
    # Together, as the router's alone is nothing but rounding where one expert's weight is one by normalisation.
    assert_close(gradients(ours, inputs, pull), gradients(exact, inputs, pull), what="gradients")


def gradients(y: Tensor, inputs: list[Tensor], pull: Tensor) -> Tensor:
    """Of all inputs, end to end."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(y, inputs, pull, materialize_grads=True)])


@pytest.mark.parametrize("renormalize", [True, False])
def test_is_mixtrals_or_qwens(renormalize: bool) -> None:
    from transformers import MixtralConfig, Qwen3MoeConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    sizes: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_experts_per_tok": 2}
    theirs: Any
    if renormalize:
        theirs = MixtralSparseMoeBlock(MixtralConfig(**sizes, intermediate_size=24, num_local_experts=6))
    else:
        config = Qwen3MoeConfig(**sizes, moe_intermediate_size=24, num_experts=6, norm_topk_prob=False)
        theirs = Qwen3MoeSparseMoeBlock(config)
    moe = built(MixtureOfExperts(hidden=24, experts=6, renormalize=renormalize), dtype=torch.float32)
    load(theirs, moe)
    x = draw(2, 9, 16, dtype=torch.float32)
    assert (moe(x) - theirs(x)).abs().max() <= 1e-5


def test_is_deepseeks() -> None:
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    config = DeepseekV3Config(
        hidden_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=24,
        n_routed_experts=6,
        n_shared_experts=2,
        num_experts_per_tok=3,
        n_group=1,
        topk_group=1,
        routed_scaling_factor=2.5,
    )
    moe = built(
        MixtureOfExperts(hidden=24, experts=6, top_k=3, shared=2, scores="sigmoid", scale=2.5), dtype=torch.float32
    )
    theirs: Any = DeepseekV3MoE(config)
    load(theirs, moe)
    for name in ("gate", "up", "down"):
        getattr(theirs.shared_experts, f"{name}_proj").weight.data = moe.weights[f"shared.{name}.weight"].data
    x = draw(2, 9, 16, dtype=torch.float32)
    assert (moe(x) - theirs(x)).abs().max() <= 1e-5


def load(theirs: Any, moe: Built) -> None:
    """Our router and experts into a block of transformers."""
    theirs.gate.weight.data = moe.weights["router"].data
    theirs.experts.gate_up_proj.data = torch.cat([moe.weights["gate"], moe.weights["up"]], dim=1).data
    theirs.experts.down_proj.data = moe.weights["down"].data


def test_one_expert_may_take_everything() -> None:
    moe = built(MixtureOfExperts(hidden=8, experts=4, top_k=1))
    with torch.no_grad():
        moe.weights["router"].zero_()[2] = 10.0
    x = draw(2, 6, 16).abs()
    y = moe(x)
    assert_close(y, plainly(moe, x))
    y.sum().backward()
    for name in ("gate", "up", "down"):
        gradient = moe.weights[name].grad
        assert gradient is not None
        assert gradient[2].abs().sum() > 0
        assert gradient[[0, 1, 3]].abs().sum() == 0


def test_balance_is_one_where_even_and_largest_where_not() -> None:
    even = torch.full((8, 4), 0.25)
    assert imbalance(even, torch.arange(16).reshape(8, 2) % 4).item() == pytest.approx(1.0)
    assert imbalance(torch.eye(4)[[1] * 8], torch.ones(8, 1, dtype=torch.long)).item() == pytest.approx(4.0)
    assert imbalance(torch.full((8, 4), 0.7), torch.arange(8).reshape(8, 1) % 4).item() == pytest.approx(1.0)


def test_losses_only_in_training() -> None:
    moe = built(MixtureOfExperts(hidden=8, experts=4, top_k=2, balance=0.5, z_loss=0.25))
    x = draw(2, 6, 16)
    ctx = context(x)
    moe(x, ctx)
    assert ctx.losses == {}
    moe.module.train()
    moe(x, ctx)
    logits = (x @ moe.weights["router"].T).flatten(0, 1)
    scores = logits.softmax(-1)
    share = torch.bincount(scores.topk(2).indices.flatten(), minlength=4).double() / 24
    assert_close(ctx.losses["balance"][0], 0.5 * 4 * (share * scores.mean(0)).sum())
    assert_close(ctx.losses["router_z"][0], 0.25 * logits.exp().sum(-1).log().square().mean())
    quiet = built(MixtureOfExperts(hidden=8, balance=0.0))
    quiet.module.train()
    ctx = context(x)
    quiet(x, ctx)
    assert ctx.losses == {}


def test_beyond_capacity_is_dropped_in_order() -> None:
    moe = built(MixtureOfExperts(hidden=8, experts=3, top_k=1, capacity=0.75, scale=2.0))
    x = draw(2, 6, 16)
    limit = 3
    chosen = (x @ moe.weights["router"].T).argmax(-1).flatten().tolist()
    seen: dict[int, int] = {}
    kept = []
    for expert in chosen:
        seen[expert] = seen.get(expert, 0) + 1
        kept.append(seen[expert] <= limit)
    assert not all(kept)
    whole = moe(x)
    moe.module.train()
    expected = whole * torch.tensor(kept).view(2, 6, 1)
    assert_close(moe(x), expected)


def test_ample_capacity_drops_nothing() -> None:
    moe = built(MixtureOfExperts(hidden=8, experts=4, top_k=2, capacity=4.0, balance=0.0))
    inputs = [draw(2, 6, 16).requires_grad_(), *moe.weights.values()]
    exact = moe(inputs[0])
    expected = gradients(exact, inputs, draw(2, 6, 16, seed=1))
    moe.module.train()
    limited = moe(inputs[0])
    assert_close(limited, exact)
    assert_close(gradients(limited, inputs, draw(2, 6, 16, seed=1)), expected, what="gradients")


@pytest.mark.parametrize("capacity", [None, 1.25])
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(capacity: float | None, training: bool) -> None:
    torch._dynamo.reset()
    moe = built(MixtureOfExperts(hidden=8, experts=4, shared=1, capacity=capacity, z_loss=0.1))
    moe.module.train(training)
    x = draw(2, 6, 16)
    compiled = torch.compile(moe.module, fullgraph=True, backend="aot_eager")
    ctx, plain = context(x), context(x)
    assert_close(compiled(x, ctx, None)[0], moe(x, plain))
    assert list(ctx.losses) == list(plain.losses)


def test_losses_reach_the_router_through_checkpoints() -> None:
    layer = {"channel": {"type": "moe", "hidden": 8, "balance": 0.5, "z_loss": 0.5}}
    parts: dict[str, Any] = {
        "stem": {"type": "token", "vocab": 10},
        "body": {"layers": [layer] * 2},
        "head": "language_model",
    }
    found = []
    for checkpointing in (False, True):
        model = build(Spec(width=16, context=8, **parts), dtype=torch.float64)
        output = model.train().set_checkpointing(checkpointing)(torch.arange(12).reshape(2, 6) % 10)
        assert set(output.losses) == {"balance", "router_z"}
        torch.stack([*output.losses.values()]).sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert found[0].abs().max() > 0
    assert_close(found[1], found[0])


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shared", [0, 3])
def test_counts(tokens: int, gated: bool, shared: int) -> None:
    moe = built(MixtureOfExperts(hidden=24, experts=5, top_k=2, gated=gated, shared=shared))
    matrices = 3 if gated else 2
    x = draw(2, tokens, 16)
    flops = moe.component.cost(moe.scope, Call(batch=2, tokens=tokens)).flops
    assert flops == counted_flops(lambda: moe(x)) == 4 * tokens * 16 * (5 + matrices * 24 * (2 + shared))
    assert sum(p.numel() for p in moe.weights.values()) == 16 * (5 + matrices * 24 * (5 + shared))
    active = {name: parameter.active for name, parameter in moe.component.parameters(moe.scope).items()}
    assert active.pop("router") == 1
    assert set(active.values()) == {Fraction(2, 5)}


def test_half_precision_and_meta() -> None:
    moe = built(MixtureOfExperts(hidden=8, shared=1, activation=GELU()), dtype=torch.bfloat16)
    x = draw(2, 6, 16, dtype=torch.bfloat16)
    assert moe(x).dtype == torch.bfloat16
    assert moe.module.to("meta")(x.to("meta"), context(x), None)[0].shape == x.shape


def test_more_choices_than_experts() -> None:
    assert complaints(MixtureOfExperts(experts=4, top_k=4)) == []
    assert complaints(MixtureOfExperts(experts=4, top_k=5)) == [
        "top_k: a token cannot take 5 of 4 experts; at most 4 would do"
    ]
