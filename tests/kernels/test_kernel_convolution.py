"""The short causal convolution: against the formula and torch's convolution, states and packed sequences."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_as_exact_as_reference
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError


def inputs(batch: int = 2, tokens: int = 9, channels: int = 3, kernel: int = 4) -> list[Tensor]:
    """`x, weight, bias, state`."""
    torch.manual_seed(0)
    shapes = (batch, tokens, channels), (channels, kernel), (channels,), (batch, kernel - 1, channels)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@given(st.integers(1, 2), st.integers(1, 9), st.integers(1, 6), st.booleans(), st.sampled_from([None, "silu"]))
def test_agrees_with_reference(batch: int, tokens: int, kernel: int, packed: bool, activation: str | None) -> None:
    segments = torch.stack([torch.arange(tokens) // (row + 2) for row in range(batch)]) if packed else None

    def function(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.causal_convolution(x, weight, bias, state=state, segments=segments, activation=activation)  # type: ignore[arg-type]

    assert_agrees("causal_convolution", function, *inputs(batch, tokens, 3, kernel))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    def function(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return kernels.causal_convolution(x, weight, bias, activation="silu")[0]

    assert_as_exact_as_reference("causal_convolution", dtype, function, *inputs(tokens=50, channels=16)[:3])


def test_agrees_with_torch() -> None:
    x, weight, bias, state = inputs()
    out, kept = kernels.causal_convolution(x, weight, bias, state=state)
    everything = torch.cat([state, x], 1)
    expected = F.conv1d(everything.transpose(1, 2), weight[:, None], bias, groups=3).transpose(1, 2)
    assert_close(out, expected)
    assert torch.equal(kept, everything[:, -3:])


@pytest.mark.parametrize("cuts", [[2, 7], [1] * 9])
def test_split_equals_whole(cuts: list[int]) -> None:
    x, weight, bias, state = inputs()
    whole, final = kernels.causal_convolution(x, weight, bias, state=state)
    parts = []
    for piece in x.split(cuts, 1):
        out, state = kernels.causal_convolution(piece, weight, bias, state=state)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, final)


def test_packed_equals_apart() -> None:
    x, weight, bias, _ = inputs()
    lengths = [2, 5, 2]
    segments = torch.repeat_interleave(torch.tensor([3, 1, 3]), torch.tensor(lengths)).expand(2, -1)
    whole, final = kernels.causal_convolution(x, weight, bias, segments=segments)
    apart = [kernels.causal_convolution(piece, weight, bias) for piece in x.split(lengths, 1)]
    assert_close(whole, torch.cat([out for out, _ in apart], 1))
    assert torch.equal(final, apart[-1][1])


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 3, 2, 3)]
    segments = torch.tensor([[0, 1, 1]])

    def function(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.causal_convolution(x, weight, bias, state=state, segments=segments, activation="silu")

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("tokens", [0, 1])
def test_empty_and_meta(tokens: int) -> None:
    for device in ("cpu", "meta"):
        x, weight, bias, state = (each.to(device) for each in inputs(tokens=tokens))
        out, kept = kernels.causal_convolution(x, weight, bias, state=state)
        assert (out.shape, kept.shape) == (x.shape, state.shape)


def test_bad_input() -> None:
    x, weight, bias, state = inputs()
    with pytest.raises(ZooError, match=r"weight has shape \[4, 3\], expected \[channels, kernel\] = \[3, 3\]"):
        kernels.causal_convolution(x, weight.T)
    with pytest.raises(ZooError, match=r"state has shape \[2, 2, 3\], expected .* \[2, 3, 3\]"):
        kernels.causal_convolution(x, weight, bias, state=state[:, 1:])
    with pytest.raises(ZooError, match="activation is 'gelu'"):
        kernels.causal_convolution(x, weight, activation="gelu")  # type: ignore[arg-type]
