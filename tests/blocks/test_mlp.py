"""`mlp` and `glu` against transformers, their formulas, and their counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from places import built, complaints, context, draw, place
from tolerance import assert_close
from torch.utils.flop_counter import FlopCounterMode

from zoo.blocks.activations import GELU, ActivationBase, NoActivation, ReLU, Sigmoid, SiLU, SquaredReLU, gated
from zoo.blocks.mlp import GLU, MLP
from zoo.cost import Call
from zoo.errors import SpecError
from zoo.kernels.dispatch import observed


def test_glu_is_llamas() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    ours = built(GLU(hidden=40, activation=SiLU()))
    theirs = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=40, num_attention_heads=2)).double()
    theirs.load_state_dict({name.replace(".", "_proj."): tensor for name, tensor in ours.weights.items()})
    x = draw(2, 5, 16)
    assert_close(ours(x), theirs(x))


def test_mlp_is_gpt2s() -> None:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP

    ours = built(MLP(bias=True, activation=GELU(approximate="tanh")))
    theirs = GPT2MLP(64, GPT2Config(n_embd=16)).double().eval()
    names = {
        "up.weight": "c_fc.weight",
        "up.bias": "c_fc.bias",
        "down.weight": "c_proj.weight",
        "down.bias": "c_proj.bias",
    }
    with torch.no_grad():
        ours.weights["up.bias"].normal_()
        ours.weights["down.bias"].normal_()
    theirs.load_state_dict({names[name]: tensor.t() for name, tensor in ours.weights.items()})
    x = draw(2, 5, 16)
    assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "activation", [ReLU(), SquaredReLU(), GELU(), GELU(approximate="tanh"), SiLU(), Sigmoid(), NoActivation()]
)
def test_gates_of_every_activation_run_on_the_kernel(activation: ActivationBase) -> None:
    nonlinearity = activation.module(place())
    gate, up = draw(2, 5, 16), draw(2, 5, 16)
    with observed() as notes:
        found = gated(nonlinearity, gate, up)
    assert [primitive.name for primitive, _ in notes] == ["gated_activation"]
    assert_close(found, nonlinearity(gate) * up)


def test_gates_of_what_the_kernel_does_not_know() -> None:
    gate, up = draw(2, 5, 16), draw(2, 5, 16)
    with observed() as notes:
        assert_close(gated(torch.nn.Softplus(), gate, up), torch.nn.functional.softplus(gate) * up)
    assert not notes


def test_activation_and_width_are_inherited() -> None:
    scope = place(activation=GELU())
    mlp, glu = MLP().fill(scope), GLU().fill(scope)
    assert mlp.activation == glu.activation == GELU()
    assert (mlp.hidden, glu.hidden) == (64, 48)
    assert MLP(ratio=1.5).fill(scope) == MLP(hidden=24).fill(scope)
    assert MLP(ratio=0.3).fill(scope).hidden == 5
    assert GLU(ratio=2.0).fill(scope).hidden == 32
    assert GLU(ratio=2.1).fill(scope).hidden == 40
    assert GLU(hidden=35).fill(scope).hidden == 35
    assert MLP().fill(scope).fill(scope) == MLP().fill(scope)


@pytest.mark.parametrize("width", [48, 64, 768, 4096])
def test_a_ratio_that_fits_is_not_rounded(width: int) -> None:
    assert MLP(ratio=8 / 3).fill(place(width=3 * width)).hidden == 8 * width
    assert GLU().fill(place(width=3 * width)).hidden == 8 * width


@pytest.mark.parametrize("component", [MLP(bias=True, hidden=24), GLU(hidden=24)])
def test_counts(component: Any) -> None:
    whole = built(component)
    maps = 3 if isinstance(component, GLU) else 2
    assert sum(p.numel() for p in whole.weights.values()) == maps * 16 * 24 + (40 if maps == 2 else 0)
    with FlopCounterMode(display=False) as counter:
        whole(draw(2, 5, 16))
    cost = whole.component.cost(whole.scope, Call(batch=2, tokens=5))
    assert cost.flops == counter.get_total_flops() == 2 * 10 * maps * 16 * 24
    assert cost.peak == (maps) * 10 * 24 * 4


def test_dropout_only_in_training() -> None:
    whole = built(MLP(dropout=0.5))
    x = draw(2, 5, 16)
    assert torch.equal(whole(x), whole(x))
    torch.manual_seed(0)
    whole.module.train()
    total = sum(whole(x) for _ in range(4000)) / 4000
    assert not torch.equal(whole(x), whole(x))
    exact = whole.module.eval()(x, context(x))[0]
    assert (total - exact).abs().max() < 0.05 * exact.abs().max()


def test_width_and_ratio_together() -> None:
    assert complaints(MLP(hidden=24)) == complaints(MLP(ratio=3.0)) == []
    assert complaints(MLP(hidden=24, ratio=3.0)) == [
        "ratio: hidden 24 and ratio 3, which gives 48 at width 16, are both set; remove one"
    ]


@pytest.mark.parametrize("field", [{"ratio": 0.0}, {"ratio": float("nan")}, {"ratio": 1e9}, {"hidden": 0}])
def test_sizes_out_of_range(field: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match=next(iter(field))):
        GLU(**field)
