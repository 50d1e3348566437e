"""`matformer`: every prefix is a network, in place and cut out."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import pytest
import torch
from flops import counted_flops
from places import Built, built, complaints, context, draw, place
from tolerance import assert_close

from zoo.blocks.activations import GELU, SiLU
from zoo.blocks.matformer import MatFormer, extract, set_granularity
from zoo.blocks.mlp import GLU, MLP
from zoo.blocks.model import Spec
from zoo.cost import Call
from zoo.errors import SpecError, ZooError
from zoo.model import Model, build

WIDTHS = (4, 8, 16, 32)


def nested(**fields: Any) -> Built:
    return built(MatFormer(hidden=WIDTHS, **fields))


def plain(whole: Built, width: int) -> Built:
    """An ordinary network with the first `width` hidden channels."""
    gated = whole.component.gated
    other = built((GLU if gated else MLP)(hidden=width, activation=whole.component.activation))
    with torch.no_grad():
        for name, weight in whole.weights.items():
            rows = weight[:width]
            other.weights[f"{name}.weight"].copy_(rows.T if name == "down" else rows)
    return other


def language_model(layers: list[dict[str, Any]]) -> Model:
    body = {"type": "stack", "layers": layers}
    spec: dict[str, Any] = {"stem": {"type": "token", "vocab": 10}, "body": body, "head": "language_model"}
    return build(Spec(width=16, context=8, init_std=0.5, **spec), dtype=torch.float64).eval()


def elastic(**fields: Any) -> Model:
    """A model with `matformer` in its layers 0, 2 and 3."""
    layer = {"channel": {"type": "matformer", "hidden": WIDTHS, **fields}}
    return language_model([layer, {"channel": "mlp"}, layer, layer])


TOKENS = torch.arange(12).reshape(2, 6) % 10


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("index", range(4))
def test_a_prefix_is_an_ordinary_network(gated: bool, index: int) -> None:
    whole = nested(gated=gated, activation=GELU(), active=index)
    x = draw(2, 5, 16)
    assert_close(whole(x), plain(whole, WIDTHS[index])(x))
    widest = nested(gated=gated, activation=GELU())
    assert torch.equal(whole(x), widest(x)) == (index == 3)
    set_granularity(widest.module, index)
    assert torch.equal(whole(x), widest(x))
    set_granularity(widest.module, None)
    assert widest.component.active == 3
    assert_close(widest(x), plain(widest, 32)(x))


def test_is_gemma3ns() -> None:
    from transformers.models.gemma3n.configuration_gemma3n import Gemma3nTextConfig
    from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP

    config = Gemma3nTextConfig(
        hidden_size=16,
        intermediate_size=list(WIDTHS),
        activation_sparsity_pattern=[0.0] * 4,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        layer_types=["full_attention"] * 4,
    )
    whole = nested(activation=GELU(approximate="tanh"))
    x = draw(2, 5, 16)
    for layer, width in enumerate(WIDTHS):
        theirs = Gemma3nTextMLP(config, layer_idx=layer).double()
        cut = plain(whole, width).weights
        theirs.load_state_dict({name.replace(".", "_proj."): tensor for name, tensor in cut.items()})
        set_granularity(whole.module, layer)
        assert_close(whole(x), theirs(x))


def test_channels_beyond_the_prefix_get_no_gradient() -> None:
    whole = nested()
    set_granularity(whole.module.train(), 1)
    whole(draw(2, 5, 16)).square().sum().backward()
    for name, weight in whole.weights.items():
        assert weight.grad is not None
        assert weight.grad[8:].abs().max() == 0, name
        assert (weight.grad[:8].norm(dim=1) > 0).all(), name


def test_training_draws_one_for_all_layers() -> None:
    model = elastic().train()
    torch.manual_seed(0)
    seen: Counter[tuple[int, ...]] = Counter()
    for _ in range(80):
        model.zero_grad()
        model(TOKENS).logits.sum().backward()
        weights: dict[str, Any] = dict(model.named_parameters())
        moved = [weights[f"body.layers.{layer}.channel.up"].grad.norm(dim=1) > 0 for layer in (0, 2, 3)]
        seen[tuple(int(rows.sum()) for rows in moved)] += 1
    assert set(seen) == {(width,) * 3 for width in WIDTHS}
    assert min(seen.values()) >= 10


def test_probabilities_choose() -> None:
    model = elastic(probabilities=(0.0, 1.0, 0.0, 0.0), active=3)
    widest = model(TOKENS).logits
    drawn = model.train()(TOKENS).logits
    set_granularity(model.eval(), 1)
    assert torch.equal(drawn, model(TOKENS).logits)
    assert not torch.equal(drawn, widest)


def test_checkpointing_recomputes_the_same() -> None:
    layer = {"channel": {"type": "matformer", "hidden": WIDTHS}, "residual": {"type": "pre", "dropout": 0.5}}
    for seed in range(4):
        gradients = []
        for checkpointing in (False, True):
            model = language_model([layer] * 2).train().set_checkpointing(checkpointing)
            torch.manual_seed(seed)
            model(TOKENS).logits.square().sum().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("granularity", [0, [3, 0, 2], [None, 1, 1]])
def test_what_is_cut_out_computes_the_same(gated: bool, granularity: Any) -> None:
    model = elastic(gated=gated, active=2)
    spec, tensors = extract(model.spec, model.state_dict(), granularity)
    cut = build(spec, dtype=torch.float64).eval()
    cut.load_state_dict(tensors)
    set_granularity(model, granularity)
    assert_close(cut(TOKENS).logits, model(TOKENS).logits)
    widths = [WIDTHS[2 if i is None else i] for i in ([0] * 3 if granularity == 0 else granularity)]
    kind = GLU if gated else MLP
    body: Any = cut.spec.body
    channels: list[Any] = [body.layers[layer].channel for layer in (0, 2, 3)]
    assert [type(channel) for channel in channels] == [kind] * 3
    assert [channel.hidden for channel in channels] == widths
    removed = (3 if gated else 2) * 16 * sum(32 - width for width in widths)
    assert sum(p.numel() for p in cut.parameters()) == sum(p.numel() for p in model.parameters()) - removed
    assert all(tensor.untyped_storage().nbytes() <= tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("index", range(4))
def test_counts(gated: bool, index: int) -> None:
    whole = nested(gated=gated, active=index)
    matrices = 3 if gated else 2
    flops = whole.component.cost(whole.scope, Call(batch=2, tokens=5)).flops
    assert flops == counted_flops(lambda: whole(draw(2, 5, 16))) == 20 * 16 * WIDTHS[index] * matrices
    assert sum(p.numel() for p in whole.weights.values()) == 16 * 32 * matrices
    shares = {parameter.active for parameter in whole.component.parameters(whole.scope).values()}
    assert shares == {Fraction(WIDTHS[index], 32)}


def test_compiled_evaluation_and_fixed_training() -> None:
    torch._dynamo.reset()
    whole = nested()
    x = draw(2, 5, 16)
    compiled = torch.compile(whole.module, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, context(x), None)[0], whole(x))
    whole.module.train()
    for index in (0, 2):
        set_granularity(whole.module, index)
        assert_close(compiled(x, context(x), None)[0], plain(whole, WIDTHS[index])(x))


def test_compiled_training_draws_one_for_all_layers() -> None:
    torch._dynamo.reset()
    model = elastic()
    expected = []
    for index in range(4):
        set_granularity(model, index)
        expected.append(model(TOKENS).logits.detach())
    set_granularity(model.train(), None)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    seen = set()
    for _ in range(24):
        logits = compiled(TOKENS).logits
        distances = [(logits - each).abs().max().item() for each in expected]
        assert min(distances) < 1e-12
        seen.add(distances.index(min(distances)))
    assert seen == {0, 1, 2, 3}


def test_widths_follow_the_ratios() -> None:
    assert MatFormer().fill(place(width=16)).hidden == (8, 16, 32, 64)
    assert MatFormer(ratios=(1.0, 2.5)).fill(place(width=10)) == MatFormer(hidden=(10, 25)).fill(place(width=10))
    assert MatFormer().fill(place()).activation == SiLU()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden": (4, 8), "ratios": (1.0, 2.0)}, "ratios: `hidden` and `ratios` are both set; remove one"),
        ({"hidden": (8, 8)}, "hidden: widths must increase; got [8, 8]"),
        ({"ratios": (1.0, 1.0)}, "hidden: widths must increase; got [16, 16]"),
        ({"hidden": (4, 8), "active": 2}, "active: there is no network 2; 0 to 1 would do"),
        ({"hidden": (4, 8), "probabilities": (0.5, 0.4)}, "probabilities: expected 2 numbers that add up to 1"),
        ({"hidden": (4, 8), "probabilities": (1.0,)}, "probabilities: expected 2 numbers that add up to 1"),
    ],
)
def test_what_does_not_fit(fields: dict[str, Any], message: str) -> None:
    found = complaints(MatFormer(**fields))
    assert len(found) == 1
    assert found[0].startswith(message)


def test_no_widths() -> None:
    with pytest.raises(SpecError, match="hidden"):
        MatFormer(hidden=())


def test_granularities_that_are_not_there() -> None:
    model = elastic()
    with pytest.raises(ZooError, match="granularity 4 of `matformer` layer 0: it has 4 widths"):
        set_granularity(model, 4)
    with pytest.raises(ZooError, match="granularity -1 of `matformer` layer 1"):
        set_granularity(model, [0, -1, 0])
    with pytest.raises(ZooError, match="got 2 granularities for 3 `matformer` layers"):
        extract(model.spec, model.state_dict(), [0, 1])
    with pytest.raises(ZooError, match="no `matformer`"):
        set_granularity(built(MLP()).module, 0)
