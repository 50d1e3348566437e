"""Whole small models against the classes of transformers, given the same weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from parity import MAMBA, MAMBA2, Rule, carry_over, parameter_count, perturbed, rules, within

import zoo.model
from zoo.model import Model

VOCAB, WIDTH, CONTEXT, LAYERS = 61, 32, 64, 3


@dataclass(frozen=True)
class Family:
    """An architecture as transformers has it, as we write it down, and how the names of the weights go together.

    `spec` has one `layer` in place of the body.
    """

    theirs: Callable[[], Any]
    spec: dict[str, Any]
    table: list[Rule]

    def ours(self) -> Model:
        layers = {"type": "stack", "layers": [self.spec["layer"]] * LAYERS}
        rest = {name: value for name, value in self.spec.items() if name != "layer"}
        stem = {"type": "token", "vocab": VOCAB}
        return zoo.model.build({"width": WIDTH, "context": CONTEXT, "stem": stem, "body": layers, **rest}).eval()


NO_SPECIAL_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
UNTIED = {"type": "language_model", "tied": False}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=48,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=CONTEXT,
            rms_norm_eps=1e-6,
            tie_word_embeddings=False,
            **NO_SPECIAL_TOKENS,
        )
    )


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            intermediate_size=24,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            sliding_window=7,
            max_position_embeddings=CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 1000.0},
            tie_word_embeddings=False,
            **NO_SPECIAL_TOKENS,
        )
    )


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=4, n_positions=CONTEXT, **NO_SPECIAL_TOKENS)
    )


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    return MambaForCausalLM(
        MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, state_size=8, num_hidden_layers=LAYERS, **NO_SPECIAL_TOKENS)
    )


def mamba2() -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_heads=8,
            head_dim=8,
            state_size=8,
            n_groups=2,
            chunk_size=8,
            num_hidden_layers=LAYERS,
            tie_word_embeddings=False,
            **NO_SPECIAL_TOKENS,
        )
    )


LLAMA_LAYERS = rules(
    "input_layernorm.* -> residual.mixer_norm.*",
    "post_attention_layernorm.* -> residual.channel_norm.*",
    "self_attn.q_proj.* -> mixer.query.*",
    "self_attn.k_proj.* -> mixer.key.*",
    "self_attn.v_proj.* -> mixer.value.*",
    "self_attn.o_proj.* -> mixer.out.*",
    "mlp.*_proj.weight -> channel.*.weight",
)
MIXTRAL_LAYERS = [
    *LLAMA_LAYERS,
    *rules("mlp.experts.gate_up_proj -> channel.gate channel.up", along=1),
    *rules("mlp.experts.down_proj -> channel.down", "mlp.gate.weight -> channel.router"),
]
GPT2_LAYERS = rules(
    "ln_1.* -> residual.mixer_norm.*",
    "ln_2.* -> residual.channel_norm.*",
    "attn.c_attn.* -> mixer.query.* mixer.key.* mixer.value.*",
    "attn.c_proj.* -> mixer.out.*",
    "mlp.c_fc.* -> channel.up.*",
    "mlp.c_proj.* -> channel.down.*",
    transpose=True,
)


def llama_names(layers: list[Rule]) -> list[Rule]:
    """The names of Llama and of what followed it."""
    return [
        *within("model.layers.*", "body.layers.*", layers),
        *rules(
            "model.embed_tokens.weight -> stem.weight",
            "model.norm.weight -> body.final_norm.weight",
            "lm_head.weight -> head.project.weight",
        ),
    ]


def gpt2_names() -> list[Rule]:
    return [
        *within("transformer.h.*", "body.layers.*", GPT2_LAYERS),
        *rules(
            "transformer.wte.weight -> stem.weight",
            "transformer.wpe.weight -> stem.position.weight",
            "transformer.ln_f.* -> body.final_norm.*",
        ),
    ]


def mamba_names(mixer: list[Rule]) -> list[Rule]:
    """The names around Mamba's mixers."""
    return [
        *within("backbone.layers.*.mixer", "body.layers.*.mixer", mixer),
        *rules(
            "backbone.embeddings.weight -> stem.weight",
            "backbone.layers.*.norm.weight -> body.layers.*.residual.mixer_norm.weight",
            "backbone.norm_f.weight -> body.final_norm.weight",
            "lm_head.weight -> head.project.weight",
        ),
    ]


FAMILIES = {
    "llama": Family(
        llama,
        {
            "norm": {"type": "rmsnorm", "eps": 1e-6},
            "layer": {
                "mixer": {"type": "attention", "heads": 4, "kv_heads": 2},
                "channel": {"type": "glu", "hidden": 48},
            },
            "head": UNTIED,
        },
        llama_names(LLAMA_LAYERS),
    ),
    "mixtral": Family(
        mixtral,
        {
            "position": {"type": "rotary", "base": 1000.0},
            "layer": {
                "mixer": {"type": "attention", "heads": 4, "kv_heads": 2, "window": 7},
                "channel": {"type": "moe", "experts": 4, "top_k": 2, "hidden": 24},
            },
            "head": UNTIED,
        },
        llama_names(MIXTRAL_LAYERS),
    ),
    "gpt2": Family(
        gpt2,
        {
            "norm": "layernorm",
            "position": "learned",
            "activation": {"type": "gelu", "approximate": "tanh"},
            "layer": {
                "mixer": {"type": "attention", "heads": 4, "bias": True, "out_bias": True},
                "channel": {"type": "mlp", "bias": True},
            },
            "head": "language_model",
        },
        gpt2_names(),
    ),
    "mamba": Family(
        mamba,
        {"layer": {"mixer": {"type": "mamba", "state_dim": 8}}, "head": "language_model"},
        mamba_names(MAMBA),
    ),
    "mamba2": Family(
        mamba2,
        {
            "layer": {"mixer": {"type": "mamba2", "head_dim": 8, "state_dim": 8, "groups": 2}},
            "head": UNTIED,
        },
        mamba_names(MAMBA2),
    ),
}


@dataclass(frozen=True)
class Pair:
    """Their model and ours with the same weights."""

    theirs: Any
    ours: Model
    table: list[Rule]


@pytest.fixture(scope="module", params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Pair:
    family = FAMILIES[request.param]
    theirs, ours = perturbed(family.theirs), family.ours()
    carry_over(theirs, ours, family.table)
    return Pair(theirs, ours, family.table)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(0))


def test_logits_agree(pair: Pair) -> None:
    inputs = tokens(2, 29)
    with torch.no_grad():
        expected, found = pair.theirs(inputs).logits, pair.ours(inputs).logits
    assert expected.std() > 0.3
    assert (found - expected).abs().max() <= 1e-5


def gradients(model: Any) -> Any:
    """A copy of the model that holds gradients of its logits where it held weights."""
    parameters = list(model.parameters())
    found = torch.autograd.grad(model(tokens(2, 29)).logits.square().mean(), parameters)
    copy = deepcopy(model)
    with torch.no_grad():
        for target, gradient in zip(copy.parameters(), found, strict=True):
            target.copy_(gradient)
    return copy


def test_gradients_agree(pair: Pair) -> None:
    found, expected = gradients(pair.ours), deepcopy(pair.ours)
    carry_over(gradients(pair.theirs), expected, pair.table)
    ours, theirs = dict(found.named_parameters()), dict(expected.named_parameters())
    for name, gradient in ours.items():
        # Softmax is the same whatever is added to all of a query's scores, so that keys need no offsets.
        assert gradient.abs().max() > 1e-5 or name.endswith("key.bias"), f"{name} does not matter"
        assert (gradient - theirs[name]).abs().max() <= 1e-5, name


def test_greedy_continuations_agree(pair: Pair) -> None:
    prompt = tokens(2, 13)
    expected = pair.theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert expected.shape == (2, 29)
    assert torch.equal(pair.ours.generate(prompt, 16, temperature=0.0, chunk=5), expected)


def test_parameter_counts_agree(pair: Pair) -> None:
    assert parameter_count(pair.ours) == parameter_count(pair.theirs)
