"""`token_mlp` against its formula, counts and messages."""

from __future__ import annotations

import pytest
import torch
from flops import counted_flops
from parity import parameter_count
from places import built, complaints, draw, place
from tolerance import assert_close

from zoo.blocks.activations import GELU
from zoo.blocks.token_mlp import TokenMLP
from zoo.cost import Call
from zoo.errors import ZooError


@pytest.mark.parametrize("prefix", [0, 1])
def test_is_the_formula(prefix: int) -> None:
    scope = place(grid=(3, 4), prefix=prefix, causal=False)
    ours = built(TokenMLP(hidden=5, activation=GELU()), scope)
    x, w = draw(2, scope.tokens, 16), ours.weights
    expected = torch.stack(
        [
            w["down.weight"] @ torch.nn.functional.gelu(w["up.weight"] @ one + w["up.bias"][:, None])
            + w["down.bias"][:, None]
            for one in x
        ]
    )
    assert_close(ours(x), expected)


@pytest.mark.parametrize("bias", [True, False])
def test_counts_are_exact(bias: bool) -> None:
    scope = place(causal=False)
    ours = built(TokenMLP(bias=bias), scope)
    assert ours.component.hidden == 8
    assert parameter_count(ours.module) == 2 * 12 * 8 + bias * (12 + 8)
    assert ours.component.cost(scope, Call(batch=3, tokens=12)).flops == counted_flops(ours, draw(3, 12, 16))


def test_other_lengths_are_refused() -> None:
    ours = built(TokenMLP(), place(causal=False))
    with pytest.raises(ZooError, match="built for 12 tokens; got 11"):
        ours(draw(1, 11, 16))


def test_complains_where_later_tokens_must_not_be_seen() -> None:
    assert complaints(TokenMLP()) == [
        ": token_mlp lets every token see all others, which a causal model must not; `attention`, "
        "`linear_attention` and `pooling` can be causal"
    ]
    assert not complaints(TokenMLP(), place(causal=False))
