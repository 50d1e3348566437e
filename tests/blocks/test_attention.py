"""`attention` against transformers, its formula pair by pair, streaming, packing and counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flops import counted_flops
from hypothesis import given
from hypothesis import strategies as st
from parity import parameter_count, perturb
from places import Built, built, complaints, context, draw, place
from sequences import model, packed_and_apart, streamed, words
from tolerance import assert_close
from torch import Tensor, nn

from zoo.blocks.attention import Attention, usual_heads
from zoo.blocks.norms import RMSNorm
from zoo.blocks.positions import ALiBi, LearnedPosition, NoPosition, Rotary
from zoo.builder import empty_state
from zoo.cost import Call

WIDTH, HEADS, KV_HEADS, HEAD_DIM, WINDOW = 32, 4, 2, 12, 5
USUAL: dict[str, Any] = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "attn_implementation": "eager"}
GROUPED: dict[str, Any] = USUAL | {"num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
WIDE: dict[str, Any] = GROUPED | {"head_dim": 16}


def mask(tokens: int, window: int | None) -> Tensor:
    """`[1, 1, tokens, tokens]`, zero where a token sees another and a large negative number elsewhere."""
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    seen = (distance >= 0) & (distance < (window or tokens))
    return torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]


def renamed(theirs: nn.Module) -> dict[str, Tensor]:
    """The weights of a module with four projections, under our names."""
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "out", "q_norm": "query_norm"}
    names["k_norm"] = "key_norm"
    return {f"{names[name.split('.')[0]]}.{name.split('.')[1]}": w for name, w in theirs.named_parameters()}


def llama() -> tuple[Any, Any, Attention, dict[str, Tensor]]:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

    config = LlamaConfig(**GROUPED)
    theirs = LlamaAttention(config, layer_idx=0)
    perturb(theirs)
    ours = Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    return theirs, LlamaRotaryEmbedding(config), ours, renamed(theirs)


def gemma2(layer: int) -> tuple[Any, Any, Attention, dict[str, Tensor]]:
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention, Gemma2RotaryEmbedding

    config = Gemma2Config(
        **GROUPED,
        num_hidden_layers=2,
        query_pre_attn_scalar=20,
        attn_logit_softcapping=1.5,
        sliding_window=WINDOW,
    )
    theirs = Gemma2Attention(config, layer_idx=layer)
    perturb(theirs)
    ours = Attention(
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        softcap=1.5,
        scale=20**-0.5,
        window=theirs.sliding_window,
    )
    return theirs, Gemma2RotaryEmbedding(config), ours, renamed(theirs)


def qwen3() -> tuple[Any, Any, Attention, dict[str, Tensor]]:
    from transformers import Qwen3Config
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

    config = Qwen3Config(**GROUPED, rms_norm_eps=1e-5)
    theirs = Qwen3Attention(config, layer_idx=0)
    perturb(theirs)
    ours = Attention(heads=HEADS, kv_heads=KV_HEADS, head_dim=HEAD_DIM, qk_norm=RMSNorm())
    return theirs, Qwen3RotaryEmbedding(config), ours, renamed(theirs)


def qwen3_next() -> tuple[Any, Any, Attention, dict[str, Tensor]]:
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    config = Qwen3NextConfig(
        **WIDE,
        rms_norm_eps=1e-5,
        attention_bias=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25},
    )
    theirs = Qwen3NextAttention(config, layer_idx=0)
    perturb(theirs)
    weights = renamed(theirs)
    for kind in ("weight", "bias"):
        # Each head's gates lie behind its queries, and norms hold what is added to one.
        halves = weights.pop(f"query.{kind}").unflatten(0, (HEADS, 2, 16)).unbind(1)
        weights |= {f"{name}.{kind}": half.flatten(0, 1) for name, half in zip(("query", "gate"), halves, strict=True)}
    weights |= {name: weights[name] + 1 for name in ("query_norm.weight", "key_norm.weight")}
    ours = Attention(
        heads=HEADS,
        kv_heads=KV_HEADS,
        head_dim=16,
        qk_norm=RMSNorm(),
        gate="channel",
        bias=True,
        out_bias=True,
        position=Rotary(fraction=0.25),
    )
    return theirs, Qwen3NextRotaryEmbedding(config), ours, weights


def gpt_neox() -> tuple[Any, Any, Attention, dict[str, Tensor]]:
    from transformers import GPTNeoXConfig
    from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXRotaryEmbedding

    config = GPTNeoXConfig(
        **USUAL,
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
    )
    theirs = GPTNeoXAttention(config, layer_idx=0)
    perturb(theirs)
    weights: dict[str, Tensor] = {f"out.{kind}": tensor for kind, tensor in theirs.dense.named_parameters()}
    for kind, tensor in theirs.query_key_value.named_parameters():
        thirds = tensor.unflatten(0, (HEADS, 3, WIDTH // HEADS)).unbind(1)
        weights |= {f"{n}.{kind}": t.flatten(0, 1) for n, t in zip(("query", "key", "value"), thirds, strict=True)}
    ours = Attention(heads=HEADS, bias=True, out_bias=True, position=Rotary(fraction=0.5))
    return theirs, GPTNeoXRotaryEmbedding(config), ours, weights


@pytest.mark.parametrize(
    "make",
    [llama, lambda: gemma2(0), lambda: gemma2(1), qwen3, qwen3_next, gpt_neox],
    ids=["llama", "gemma2_window", "gemma2_full", "qwen3", "qwen3_next", "gpt_neox"],
)
@pytest.mark.parametrize("tokens", [1, 4, 11])
def test_agrees_with_transformers(make: Any, tokens: int) -> None:
    theirs, rotary, component, weights = make()
    ours = built(component, place(WIDTH), dtype=torch.float32)
    ours.module.load_state_dict(weights)
    assert parameter_count(ours.module) == parameter_count(theirs)
    x = draw(2, tokens, WIDTH, dtype=torch.float32)
    with torch.no_grad():
        turns = rotary(x, torch.arange(tokens)[None])
        expected = theirs(x, position_embeddings=turns, attention_mask=mask(tokens, component.window))[0]
        found = ours(x)
    assert expected.std() > 0.1
    assert (found - expected).abs().max() <= 1e-5


def pair_by_pair(ours: Built, x: Tensor) -> Tensor:
    """The formula of the class, for one sequence, one head and one pair of tokens after the other."""
    c, tokens = ours.component, x.shape[0]
    w = {name: tensor.detach() for name, tensor in ours.weights.items()}

    def heads(name: str, count: int) -> Tensor:
        return (x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)).view(tokens, count, -1)

    q, k, v = heads("query", c.heads), heads("key", c.kv_heads), heads("value", c.kv_heads)
    if c.qk_norm is not None:
        q, k = (
            (z - z.mean(-1, keepdim=True))
            / (z.var(-1, correction=0, keepdim=True) + c.qk_norm.eps).sqrt()
            * w[f"{name}_norm.weight"]
            + w[f"{name}_norm.bias"]
            for name, z in (("query", q), ("key", k))
        )
    out = torch.zeros(tokens, c.heads, c.head_dim, dtype=x.dtype)
    for h in range(c.heads):
        shared = h // (c.heads // c.kv_heads)
        slope = 2 ** (-8 * (h + 1) / c.heads) if isinstance(c.position, ALiBi) else 0.0
        for i in range(tokens):
            weights = torch.zeros(tokens, dtype=x.dtype)
            for j in range(tokens):
                if (c.causal and j > i) or abs(i - j) >= (c.window or tokens):
                    continue
                score = c.scale * float(q[i, h] @ k[j, shared])
                score = score if c.softcap is None else c.softcap * math.tanh(score / c.softcap)
                weights[j] = math.exp(score - slope * abs(i - j))
            out[i, h] = weights / weights.sum() @ v[:, shared]
    if c.gate is not None:
        out = out * heads("gate", c.heads).sigmoid()
    return out.flatten(1) @ w["out.weight"].T + w.get("out.bias", 0)


@given(
    heads=st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4)]),
    head_dim=st.integers(1, 5),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 9),
    alibi=st.booleans(),
    qk_norm=st.sampled_from([None, "layernorm"]),
    softcap=st.none() | st.floats(0.5, 5.0),
    scale=st.none() | st.floats(0.1, 2.0),
    gate=st.sampled_from([None, "channel", "head"]),
    bias=st.booleans(),
    tokens=st.integers(1, 7),
)
def test_is_the_formula(
    heads: tuple[int, int], alibi: bool, bias: bool, causal: bool, tokens: int, **settings: Any
) -> None:
    component = Attention(
        heads=heads[0],
        kv_heads=heads[1],
        position=ALiBi() if alibi else NoPosition(),
        bias=bias,
        out_bias=bias,
        **settings,
    )
    ours = built(component, place(6, causal=causal))
    perturb(ours.module)
    x = draw(1, tokens, 6)
    assert_close(ours(x), pair_by_pair(ours, x[0])[None])


@given(
    kv_heads=st.sampled_from([2, 4]),
    window=st.none() | st.integers(1, 9),
    softcap=st.sampled_from([None, 2.0]),
    position=st.sampled_from(["rotary", "alibi", "none", "learned"]),
    pieces=st.lists(st.integers(1, 7), min_size=1, max_size=5),
    gradients=st.booleans(),
)
def test_pieces_equal_the_whole(position: str, pieces: list[int], gradients: bool, **settings: Any) -> None:
    mixer = {"type": "attention", "heads": 4, "head_dim": 4, **settings}
    ours = model(mixer, context=40, position=position)
    inputs = words(2, sum(pieces))
    with torch.set_grad_enabled(gradients):
        whole, split = ours(inputs).logits, streamed(ours, inputs, pieces, capacity=sum(pieces))
    assert_close(split, whole.detach())
    if gradients:
        weight = ours.get_parameter("body.layers.0.mixer.key.weight")
        expected, found = (torch.autograd.grad(y.square().sum(), weight)[0] for y in (whole, split))
        assert_close(found, expected)


@pytest.mark.parametrize(("window", "capacity", "kept"), [(None, 20, 20), (6, 20, 5), (6, 5, 5), (6, 3, 3), (1, 20, 0)])
def test_state_holds_what_may_be_seen(window: int | None, capacity: int, kept: int) -> None:
    ours = built(Attention(heads=4, kv_heads=2, head_dim=4, window=window))
    state = empty_state(ours.component, ours.scope, 3, capacity, draw(1))
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "keys": (3, kept, 2, 4),
        "values": (3, kept, 2, 4),
    }
    _, after = ours.module(x := draw(3, 3, 16), context(x), state)
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in state.items()}


@pytest.mark.parametrize("window", [None, 4])
def test_earlier_states_can_be_continued_again(window: int | None) -> None:
    ours = model({"type": "attention", "heads": 4, "window": window})
    inputs = words(2, 12)
    with torch.no_grad():
        state = ours.prefill(inputs[:, :7]).state
        first = ours(inputs[:, 7:], state=state).logits
        ours(inputs[:, 7:].flip(1), state=state)
        again = ours(inputs[:, 7:], state=state).logits
    assert torch.equal(first, again)


def test_no_state_where_later_tokens_are_seen() -> None:
    component = Attention(heads=4)
    scope = place(causal=False)
    assert not component.fill(scope).state(scope, 10)


@pytest.mark.parametrize("position", ["rotary", "alibi"])
@pytest.mark.parametrize("window", [None, 3])
def test_packed_sequences_do_not_meet(position: str, window: int | None) -> None:
    ours = model({"type": "attention", "heads": 4, "window": window}, position=position)
    packed, apart = packed_and_apart(ours, [5, 1, 9])
    assert_close(packed, apart)


def test_absolute_positions_leave_attention_alone() -> None:
    ours = built(Attention(heads=4), place(causal=False, position=LearnedPosition()))
    assert "position" not in ours.module._modules
    x, order = draw(2, 8, 16), torch.randperm(8, generator=torch.Generator().manual_seed(0))
    assert_close(ours(x[:, order]), ours(x)[:, order])


@pytest.mark.parametrize(
    ("width", "given", "heads", "head_dim"),
    [
        (16, {}, 1, 16),
        (256, {}, 4, 64),
        (200, {}, 2, 100),
        (96, {"heads": 6}, 6, 16),
        (96, {"head_dim": 40}, 2, 40),
        (16, {"head_dim": 40}, 1, 40),
    ],
)
def test_heads_fit_the_width(width: int, given: dict[str, Any], heads: int, head_dim: int) -> None:
    filled = Attention(**given).fill(place(width))
    assert (filled.heads, filled.kv_heads, filled.head_dim) == (heads, heads, head_dim)
    assert filled.scale == head_dim**-0.5
    assert not complaints(filled, place(width))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kv_heads": 2},
        {"window": 3},
        {"softcap": 2.0},
        {"gate": "channel", "qk_norm": "rmsnorm", "bias": True},
        {"gate": "head", "position": ALiBi()},
    ],
)
@pytest.mark.parametrize("causal", [True, False])
def test_counts_are_exact(settings: dict[str, Any], causal: bool) -> None:
    scope = place(tokens=200, causal=causal)
    ours = built(Attention(heads=4, **settings), scope)
    x = draw(2, 150, 16).requires_grad_()
    counted = ours.component.cost(scope, Call(batch=2, tokens=150, element_bytes=8))
    assert counted.flops == counted_flops(ours, x)
    y = ours(x).sum()
    assert counted.backward_flops == counted_flops(y.backward)


@pytest.mark.parametrize(
    ("settings", "causal", "call", "spared"),
    [
        ({}, True, Call(tokens=1024), 0.25),
        ({"window": 1024}, True, Call(tokens=1024), 0.25),
        ({}, True, Call(tokens=512), 0.0),
        ({}, False, Call(tokens=1024), 0.0),
        ({"window": 1023}, True, Call(tokens=1024), 0.0),
        ({"window": 64}, True, Call(tokens=1024), 0.0),
        ({"softcap": 2.0}, True, Call(tokens=1024), 0.0),
        ({"position": ALiBi()}, True, Call(tokens=1024), 0.0),
        ({}, True, Call(tokens=1024, past=1), 0.0),
        ({}, True, Call(tokens=1024, packed=True), 0.0),
    ],
)
def test_hidden_keys_are_counted_and_only_without_other_rules_spared(
    settings: dict[str, Any], causal: bool, call: Call, spared: float
) -> None:
    scope = place(tokens=1025, causal=causal)
    (product,) = Attention(heads=4, **settings).fill(scope).product(call).operators
    assert product.spared == pytest.approx(spared)
    assert product.computed() == pytest.approx((1 - spared) * product.flops)
    assert product.computed(training=True) == pytest.approx((1 - spared) * (product.flops + product.backward))


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("past", [0, 3, 30])
@pytest.mark.parametrize("tokens", [1, 7])
def test_decoding_counts_are_exact(window: int | None, past: int, tokens: int) -> None:
    ours = model({"type": "attention", "heads": 4, "window": window}, context=64)
    with torch.no_grad():
        state = ours.prefill(words(2, past)).state if past else ours.init_state(2)
        found = counted_flops(lambda: ours(words(2, tokens), state=state))
    assert ours.spec.cost(ours.scope, Call(batch=2, tokens=tokens, past=past)).flops == found


@pytest.mark.parametrize(
    ("settings", "scope", "message"),
    [
        (
            {"heads": 5},
            {"width": 64},
            "heads: heads 5 does not divide width 64; heads 4 or 8 would, or set `head_dim`",
        ),
        (
            {"heads": 12, "head_dim": 4, "kv_heads": 5},
            {},
            "kv_heads: kv_heads 5 does not divide the 12 heads; kv_heads 4 or 6 would",
        ),
        (
            {"heads": 2, "kv_heads": 4},
            {},
            "kv_heads: kv_heads 4 does not divide the 2 heads; kv_heads 2 would",
        ),
        (
            {"window": 13},
            {},
            "window: window 13 is longer than the context of 12 tokens; use at most 12, or leave it out to see all "
            "of them",
        ),
        (
            {"heads": 2, "head_dim": 5},
            {},
            "head_dim: rotary positions turn pairs of channels, and head_dim 5 is odd; head_dim 4 or 6 would do, or "
            "another `position`",
        ),
        ({"causal": False}, {}, "causal: attention to later tokens in a causal model; remove `causal: false`"),
        (
            {"position": "learned"},
            {},
            "position: 'learned' positions are added at the stem; set them for the whole model, or use `rotary`, "
            "`alibi` or `none` here",
        ),
    ],
)
def test_complains(settings: dict[str, Any], scope: dict[str, Any], message: str) -> None:
    assert complaints(Attention(**settings), place(**scope)) == [message]


def test_odd_heads_are_fine_without_rotation() -> None:
    assert not complaints(Attention(heads=2, head_dim=5, position=ALiBi()))
    assert not complaints(Attention(heads=2, head_dim=5), place(position=LearnedPosition()))


def test_the_usual_heads_are_the_most_of_64_channels_that_divide_the_width() -> None:
    for width in (1, 63, 64, 96, 100, 127, 128, 768, 1000, 4096):
        every = [heads for heads in range(1, max(1, width // 64) + 1) if width % heads == 0]
        assert usual_heads(width, None) == max(every)
    assert usual_heads(15_999_992, None) * 64 <= 15_999_992
