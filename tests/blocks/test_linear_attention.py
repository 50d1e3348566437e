"""`linear_attention` against its formula pair by pair and public descriptions, streaming, packing and counts."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from flops import counted_flops
from hypothesis import given
from hypothesis import strategies as st
from parity import parameter_count, perturb
from places import Built, built, complaints, context, draw, place
from sequences import model, packed_and_apart, streamed, words
from tolerance import assert_close
from torch import Tensor

from zoo.blocks.linear_attention import LinearAttention
from zoo.blocks.positions import NoPosition, Rotary
from zoo.builder import empty_state
from zoo.cost import Call

FEATURES = {
    "elu1": lambda x: torch.where(x > 0, x + 1, x.exp()),
    "relu": lambda x: x.clamp(min=0),
    "silu": lambda x: x / (1 + (-x).exp()),
    "identity": lambda x: x,
}


def turned(x: Tensor, base: float) -> Tensor:
    """`x` `[tokens, channels]` with pairs of channels as complex numbers, rotated by the position."""
    tokens, channels = x.shape
    pairs = torch.complex(x[:, : channels // 2], x[:, channels // 2 :])
    rates = base ** (-torch.arange(0, channels, 2, dtype=x.dtype) / channels)
    angles = torch.arange(tokens, dtype=x.dtype)[:, None] * rates
    pairs = pairs * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((pairs.real, pairs.imag), dim=1)


def pair_by_pair(ours: Built, x: Tensor) -> Tensor:
    """The formula of the class, for one sequence `[tokens, width]`, one head and one pair of tokens after the other."""
    c, tokens = ours.component, x.shape[0]
    w = {name: tensor.detach() for name, tensor in ours.weights.items()}

    def heads(name: str) -> Tensor:
        return (x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)).view(tokens, c.heads, -1)

    q, k, v = FEATURES[c.feature_map](heads("query")), FEATURES[c.feature_map](heads("key")), heads("value")
    kept = torch.ones(tokens, c.heads, dtype=x.dtype)
    if c.decay == "fixed":
        kept = kept * (1 - 2.0 ** (-5 - torch.arange(c.heads, dtype=x.dtype)))
    elif c.decay == "data":
        kept = (heads("decay")[..., 0] + w["decay_bias"]).sigmoid()
    out = torch.zeros(tokens, c.heads, c.value_dim, dtype=x.dtype)
    for h in range(c.heads):
        rotates = isinstance(c.position, Rotary)
        rq, rk = (turned(z[:, h], c.position.base) if rotates else z[:, h] for z in (q, k))
        for i in range(tokens):
            total = 0.0
            for j in range(i + 1 if c.causal else tokens):
                factor = math.prod(kept[j + 1 : i + 1, h].tolist() if j <= i else kept[i:j, h].tolist())
                factor /= math.sqrt(c.key_dim)
                out[i, h] += factor * (rq[i] @ rk[j]) * v[j, h]
                total += factor * float(q[i, h] @ k[j, h])
            if c.normaliser == "sum":
                out[i, h] /= total + 1e-6
    if c.normaliser == "head":
        out = out / (out.square().mean(-1, keepdim=True) + c.norm.eps).sqrt() * w["head_norm.weight"]
    if c.gate:
        out = out * FEATURES["silu"](heads("gate"))
    return out.flatten(1) @ w["out.weight"].T + w.get("out.bias", 0)


@given(
    heads=st.integers(1, 3),
    key_dim=st.sampled_from([2, 4]),
    value_dim=st.integers(1, 5),
    mapped=st.sampled_from(
        [(name, normaliser) for name in FEATURES for normaliser in ("head", None)] + [("elu1", "sum"), ("relu", "sum")]
    ),
    decay=st.sampled_from([None, "fixed", "data"]),
    causal=st.booleans(),
    rotary=st.booleans(),
    gate=st.booleans(),
    bias=st.booleans(),
    tokens=st.integers(1, 7),
)
def test_is_the_formula(mapped: tuple[Any, Any], causal: bool, rotary: bool, tokens: int, **settings: Any) -> None:
    feature_map, normaliser = mapped
    position = Rotary(base=100.0) if rotary else NoPosition()
    component = LinearAttention(feature_map=feature_map, normaliser=normaliser, position=position, **settings)
    ours = built(component, place(6, causal=causal))
    perturb(ours.module)
    x = draw(1, tokens, 6)
    assert_close(ours(x), pair_by_pair(ours, x[0])[None])


def test_chunks_are_invisible() -> None:
    """Longer than a chunk of the kernel, against attention with the softmax left out."""
    ours = built(LinearAttention(heads=2, decay="fixed", normaliser=None, position=NoPosition()), place(8, tokens=300))
    x = draw(2, 300, 8)
    q, k, v = (F.linear(x, ours.weights[f"{name}.weight"]).unflatten(-1, (2, 4)) for name in ("query", "key", "value"))
    distance = (torch.arange(300)[:, None] - torch.arange(300)).double()
    gammas = 1 - 2.0 ** (-5 - torch.arange(2).double())
    weights = torch.where(distance >= 0, gammas[:, None, None] ** distance, 0.0)
    scores = torch.einsum("bihd,bjhd->bhij", F.elu(q) + 1, F.elu(k) + 1) / 2 * weights
    expected = torch.einsum("bhij,bjhd->bihd", scores, v).flatten(-2) @ ours.weights["out.weight"].T
    assert_close(ours(x), expected)


def test_normalised_weights_are_an_average() -> None:
    """Divided by their sum, the weights of positive features leave constant values as they are."""
    ours = built(LinearAttention(heads=2, normaliser="sum", position=NoPosition(), decay="data"), place(8))
    with torch.no_grad():
        ours.module.out.weight.copy_(torch.eye(8))
    x = draw(1, 1, 8).expand(3, 12, 8)
    values = F.linear(x, ours.weights["value.weight"])
    assert (ours(x) - values).abs().max() < 1e-5 * values.abs().max()


@given(
    mixer=st.fixed_dictionaries(
        {
            "decay": st.sampled_from([None, "fixed", "data"]),
            "normaliser": st.sampled_from(["head", "sum", None]),
            "feature_map": st.sampled_from(["elu1", "relu"]),
        }
    ),
    position=st.sampled_from(["rotary", "alibi", "none", "learned"]),
    pieces=st.lists(st.integers(1, 70), min_size=1, max_size=3),
)
def test_pieces_equal_the_whole(mixer: dict[str, Any], position: str, pieces: list[int]) -> None:
    ours = model({"type": "linear_attention", "heads": 3, **mixer}, position=position, context=210)
    inputs = words(1, sum(pieces))
    assert_close(streamed(ours, inputs, pieces), ours(inputs).logits)


@pytest.mark.parametrize("decay", [None, "fixed", "data"])
@pytest.mark.parametrize("normaliser", ["head", "sum"])
@pytest.mark.parametrize("causal", [True, False])
def test_packed_sequences_do_not_meet(decay: str | None, normaliser: str, causal: bool) -> None:
    mixer = {"type": "linear_attention", "heads": 3, "decay": decay, "normaliser": normaliser}
    head = "language_model" if causal else {"type": "classifier", "classes": 3, "pool": "mean"}
    ours = model(mixer, causal=causal, head=head)
    if causal:
        packed, apart = packed_and_apart(ours, [5, 1, 9])
        assert_close(packed, apart)
        return
    component, x, ids = ours.get_submodule("body.layers.0.mixer"), draw(1, 15, 24), [0] * 5 + [1] + [2] * 9
    positions = torch.tensor([[*range(5), 0, *range(9)]])
    whole = context(x)
    whole.segments, whole.positions = torch.tensor([ids]), positions
    expected = torch.cat([component(part, context(part))[0] for part in x.split([5, 1, 9], dim=1)], dim=1)
    assert_close(component(x, whole)[0], expected)


def test_first_decays_reach_from_32_to_512_tokens() -> None:
    ours = built(LinearAttention(heads=4, decay="data"), dtype=torch.float32)
    decays = ours.weights["decay_bias"].double().sigmoid()
    assert torch.allclose(1 / (1 - decays[[0, -1]]), torch.tensor([32.0, 512.0], dtype=torch.float64), rtol=1e-3)
    assert (decays.diff() > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_is_kept_in_at_least_float32(dtype: torch.dtype) -> None:
    ours = built(LinearAttention(heads=2, key_dim=4, value_dim=3, normaliser="sum"), dtype=dtype)
    x = draw(2, 5, 16, dtype=dtype)
    state = empty_state(ours.component, ours.scope, 2, 100, x)
    y, after = ours.module(x, context(x), state)
    assert y.dtype == dtype
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == {
        "memory": (2, 2, 4, 3),
        "sums": (2, 2, 4, 1),
    }
    for name, tensor in after.items():
        assert tensor.dtype == state[name].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    "settings",
    [{}, {"decay": "data", "gate": True}, {"normaliser": "sum", "bias": True}, {"key_dim": 6, "value_dim": 10}],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tokens", [1, 9, 150])
def test_counts_are_exact(settings: dict[str, Any], causal: bool, tokens: int) -> None:
    scope = place(tokens=200, causal=causal)
    ours = built(LinearAttention(heads=4, **settings), scope)
    declared = sum(
        parameter.count for _, part, at in ours.component.walk(scope) for parameter in part.parameters(at).values()
    )
    assert declared == parameter_count(ours.module)
    counted = ours.component.cost(scope, Call(batch=2, tokens=tokens, element_bytes=8))
    assert counted.flops == counted_flops(ours, draw(2, tokens, 16))


@pytest.mark.parametrize(
    ("settings", "scope", "message"),
    [
        (
            {"heads": 5},
            {"width": 64},
            "heads: heads 5 does not divide width 64; heads 4 or 8 would, or set `key_dim` and `value_dim`",
        ),
        (
            {"heads": 5, "key_dim": 4},
            {"width": 64},
            "heads: heads 5 does not divide width 64; heads 4 or 8 would, or set `value_dim`",
        ),
        (
            {"key_dim": 7},
            {},
            "key_dim: rotary positions turn pairs of channels, and key_dim 7 is odd; key_dim 6 or 8 would do, or "
            "another `position`",
        ),
        (
            {"feature_map": "silu", "normaliser": "sum"},
            {},
            "normaliser: weights from `feature_map: silu` may be negative and their sum zero; use `elu1` or `relu`, "
            "or `normaliser: head`",
        ),
        ({"causal": False}, {}, "causal: linear_attention to later tokens in a causal model; remove `causal: false`"),
    ],
)
def test_complains(settings: dict[str, Any], scope: dict[str, Any], message: str) -> None:
    assert complaints(LinearAttention(**settings), place(**scope)) == [message]
