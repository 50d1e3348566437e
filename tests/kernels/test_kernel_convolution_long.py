"""The long convolution: against the direct sum, states, packed sequences."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees, assert_as_exact_as_reference
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.work import transform_length


def inputs(batch: int = 2, tokens: int = 11, channels: int = 3, length: int = 11, past: int = 4) -> list[Tensor]:
    """`x, filters, state`."""
    torch.manual_seed(0)
    shapes = (batch, tokens, channels), (channels, length), (batch, past, channels)
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


def run(x: Tensor, filters: Tensor, state: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return kernels.long_convolution(x, filters, state=state, segments=segments)


@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 30), st.integers(0, 5), st.booleans())
def test_agrees_with_reference(batch: int, tokens: int, length: int, past: int, packed: bool) -> None:
    segments = torch.stack([torch.arange(tokens) // (row + 3) for row in range(batch)]) if packed else None
    tensors = inputs(batch, tokens, 2, length, past)
    assert_agrees("long_convolution", lambda *tensors: run(*tensors, segments=segments), *tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_reference("long_convolution", dtype, run, *inputs(tokens=150, length=150))


def test_agrees_with_the_short_convolution() -> None:
    x, filters, state = inputs(length=5)
    expected, kept = kernels.causal_convolution(x, filters.flip(1), state=state)
    out, after = run(x, filters, state)
    assert_close(out, expected)
    assert torch.equal(after, kept)


@pytest.mark.parametrize("cuts", [[5, 6], [1] * 11])
def test_split_equals_whole(cuts: list[int]) -> None:
    x, filters, state = inputs(length=7)
    whole, final = run(x, filters, state)
    parts = []
    for piece in x.split(cuts, 1):
        out, state = run(piece, filters, state)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole)
    assert torch.equal(state, final)


def test_packed_equals_apart() -> None:
    x, filters, state = inputs()
    lengths = [2, 6, 3]
    segments = torch.repeat_interleave(torch.tensor([3, 1, 3]), torch.tensor(lengths)).expand(2, -1)
    whole, final = run(x, filters, state, segments)
    apart = []
    for piece in x.split(lengths, 1):
        apart.append(run(piece, filters, state))
        state = state[:, :0]
    assert_close(whole, torch.cat([out for out, _ in apart], 1))
    last = apart[-1][1]
    assert torch.equal(final[:, -last.shape[1] :], last)
    assert not final[:, : -last.shape[1]].any()


def test_gradcheck() -> None:
    tensors = [each.requires_grad_() for each in inputs(1, 5, 2, 4, 2)]
    segments = torch.tensor([[0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, segments=segments), tensors)


def test_operator_is_well_formed() -> None:
    x, filters, _ = (each.requires_grad_() for each in inputs(1, 6, 2))
    for run_of in (None, torch.tensor([[0, 0, 1, 1, 2, 2]])):
        torch.library.opcheck(torch.ops.zoo.long_convolution, (x, filters, run_of))


def test_compiles_whole() -> None:
    def function(x: Tensor, filters: Tensor, state: Tensor) -> Tensor:
        return run(x, filters, state, torch.arange(11).expand(2, -1) // 4)[0]

    torch._dynamo.reset()
    assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs()), function(*inputs()))


def test_lengths_of_transforms() -> None:
    def smooth(number: int) -> bool:
        for prime in (2, 3, 5):
            while number % prime == 0:
                number //= prime
        return number == 1

    for least in range(1, 300):
        assert transform_length(least) == next(size for size in range(least, 2 * least + 1) if smooth(size))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("batch", "tokens", "past"), [(2, 0, 0), (2, 0, 4), (0, 3, 2), (1, 1, 0)])
def test_empty_and_meta(device: str, batch: int, tokens: int, past: int) -> None:
    x, filters, state = (each.to(device) for each in inputs(batch, tokens, past=past))
    out, kept = run(x, filters, state, torch.zeros(batch, tokens, dtype=torch.long, device=device))
    assert (out.shape, kept.shape) == (x.shape, (batch, tokens + past, 3))


def test_bad_input() -> None:
    x, filters, state = inputs()
    with pytest.raises(ZooError, match=r"filters has shape \[11, 3\], expected \[channels, length\] = \[3, 3\]"):
        run(x, filters.T, state)
    with pytest.raises(ZooError, match="filters have no taps"):
        run(x, filters[:, :0], state)
    with pytest.raises(ZooError, match="expected real numbers"):
        run(x, filters.to(torch.complex128), state)
    with pytest.raises(ZooError, match=r"state has shape \[2, 4, 2\], expected .* \[2, 4, 3\]"):
        run(x, filters, state[..., 1:])
