"""`pooling` against plain averages and PyTorch's pooling, streaming, packing."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from places import built, complaints, context, draw, place
from sequences import model, packed_and_apart, streamed, words
from tolerance import assert_close

from zoo.blocks.pooling import Pooling
from zoo.builder import empty_state
from zoo.context import Context


@given(
    grid=st.lists(st.integers(1, 5), min_size=1, max_size=3),
    size=st.sampled_from([1, 3, 5]),
    prefix=st.integers(0, 2),
)
def test_averages_what_lies_on_the_grid(grid: list[int], size: int, prefix: int) -> None:
    scope = place(2, grid=tuple(grid), prefix=prefix, causal=False)
    ours = built(Pooling(size=size), scope)
    x = draw(2, scope.tokens, 2)
    field = x[:, prefix:].unflatten(1, grid)
    expected = torch.zeros_like(field)
    for here in itertools.product(*map(range, grid)):
        near = tuple(slice(max(0, at - size // 2), at + size // 2 + 1) for at in here)
        expected[:, *here] = field[:, *near].flatten(1, -2).mean(1) - field[:, *here]
    found = ours(x, Context(torch.arange(scope.tokens), grid=tuple(grid), prefix=prefix))
    assert_close(found[:, prefix:], expected.flatten(1, -2))
    assert not found[:, :prefix].any()


def test_agrees_with_a_pooling_layer() -> None:
    """As PoolFormer computes it, channels first."""
    ours = built(Pooling(), place(grid=(6, 7), causal=False))
    x = draw(2, 42, 16)
    image = x.transpose(1, 2).unflatten(2, (6, 7))
    expected = torch.nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)(image) - image
    assert_close(ours(x, Context(torch.arange(42), grid=(6, 7))), expected.flatten(2).transpose(1, 2))


@given(size=st.integers(1, 8), tokens=st.integers(1, 12))
def test_causal_averages_trail(size: int, tokens: int) -> None:
    ours = built(Pooling(size=size))
    x = draw(2, tokens, 16)
    expected = torch.stack([x[:, max(0, i + 1 - size) : i + 1].mean(1) - x[:, i] for i in range(tokens)], dim=1)
    found = ours(x)
    assert_close(found[:, 1:], expected[:, 1:])
    assert not found[:, 0].any()


@given(size=st.integers(1, 8), pieces=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_pieces_equal_the_whole(size: int, pieces: list[int]) -> None:
    ours = model({"type": "pooling", "size": size}, context=45)
    inputs = words(2, sum(pieces))
    assert_close(streamed(ours, inputs, pieces), ours(inputs).logits)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_packed_causal_sequences_do_not_meet(size: int) -> None:
    packed, apart = packed_and_apart(model({"type": "pooling", "size": size}), [5, 1, 9])
    assert_close(packed, apart)


def test_packed_sequences_do_not_meet() -> None:
    ours, x = built(Pooling(size=5), place(causal=False)), draw(1, 15, 16)
    whole = context(x)
    whole.segments = torch.tensor([[0] * 5 + [1] + [2] * 9])
    expected = torch.cat([ours(part) for part in x.split([5, 1, 9], dim=1)], dim=1)
    assert_close(ours(x, whole), expected)


def test_constant_input_gives_zero() -> None:
    ours = built(Pooling(size=5), place(causal=False))
    assert ours(torch.ones(1, 12, 16, dtype=torch.float64)).abs().max() < 1e-15


def test_state_is_the_tail() -> None:
    ours, x = built(Pooling(size=4)), draw(2, 7, 16)
    state = empty_state(ours.component, ours.scope, 2, 100, x)
    assert state["tail"].shape == (2, 3, 16)
    _, after = ours.module(x, context(x), state)
    assert torch.equal(after["tail"], x[:, -3:])
    assert not ours.component.state(place(causal=False), 100)


@pytest.mark.parametrize(
    ("size", "causal", "message"),
    [
        (4, False, ["size: a neighbourhood of 4 tokens has no middle; use size 3 or 5"]),
        (25, False, ["size: size 25 reaches beyond all 12 tokens; use at most 23"]),
        (13, True, ["size: size 13 reaches beyond all 12 tokens; use at most 12"]),
        (23, False, []),
        (12, True, []),
    ],
)
def test_complains(size: int, causal: bool, message: list[str]) -> None:
    assert complaints(Pooling(size=size), place(causal=causal)) == message


def test_gradients_reach_all_neighbours() -> None:
    ours, x = built(Pooling(), place(causal=False)), draw(1, 6, 16).requires_grad_()
    (gradient,) = torch.autograd.grad(ours(x)[0, 2, 0], x)
    expected = torch.tensor([0, 1, -2, 1, 0, 0], dtype=torch.float64) / 3
    assert_close(gradient[0, :, 0], expected)
