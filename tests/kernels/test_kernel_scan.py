"""The selective scan: against one step after another, states, packed sequences, and transformers' Mamba."""

from __future__ import annotations

import pytest
import torch
from agreement import assert_agrees, assert_as_exact_as_reference
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels import work


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks even for the few tokens of a test."""
    monkeypatch.setattr(work, "SCAN_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(work, "LEAST_SCAN_CHUNK", 4)
    monkeypatch.setattr(work, "SCAN_PIECE_ELEMENTS", 60)


def inputs(batch: int = 2, tokens: int = 11, channels: int = 5, state_dim: int = 3) -> list[Tensor]:
    """`x, delta, A, B, C, D, z, state`."""
    torch.manual_seed(0)
    inner, state = (batch, tokens, channels), (batch, tokens, state_dim)
    tensors = [torch.randn(inner), torch.rand(inner), -torch.rand(channels, state_dim), torch.randn(state)]
    tensors += [torch.randn(state), torch.randn(channels), torch.randn(inner), torch.randn(batch, channels, state_dim)]
    return [x.double() for x in tensors]


def run(*tensors: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    x, delta, A, B, C, D, z, state = tensors
    return kernels.selective_scan(x, delta, A, B, C, D=D, z=z, state=state, segments=segments)


@given(st.integers(1, 2), st.integers(1, 13), st.integers(1, 5), st.integers(1, 3), st.booleans())
def test_agrees_with_reference(batch: int, tokens: int, channels: int, state_dim: int, packed: bool) -> None:
    segments = torch.stack([torch.arange(tokens) // (row + 3) for row in range(batch)]) if packed else None
    tensors = inputs(batch, tokens, channels, state_dim)
    assert_agrees("selective_scan", lambda *tensors: run(*tensors, segments=segments), *tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_reference(
        "selective_scan", dtype, lambda *tensors: kernels.selective_scan(*tensors), *inputs(tokens=40)[:5]
    )


@pytest.mark.parametrize("cuts", [[5, 6], [1] * 11, [4, 4, 3]])
def test_split_equals_whole(cuts: list[int]) -> None:
    x, delta, A, B, C, D, z, state = inputs()
    whole, final = run(x, delta, A, B, C, D, z, state)
    parts = []
    for x_, delta_, B_, C_, z_ in zip(*(each.split(cuts, 1) for each in (x, delta, B, C, z)), strict=True):
        out, state = run(x_, delta_, A, B_, C_, D, z_, state)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_packed_equals_apart() -> None:
    x, delta, A, B, C, D, z, state = inputs()
    lengths = [5, 1, 5]
    segments = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths)).expand(2, -1)
    whole, final = run(x, delta, A, B, C, D, z, state, segments=segments)
    parts = []
    for x_, delta_, B_, C_, z_ in zip(*(each.split(lengths, 1) for each in (x, delta, B, C, z)), strict=True):
        out, last = run(x_, delta_, A, B_, C_, D, z_, state)
        parts.append(out)
        state = torch.zeros_like(state)
    assert_close(whole, torch.cat(parts, 1))
    assert_close(final, last)


def test_agrees_with_transformers_mamba() -> None:
    x, delta, A, B, C, D, z, _ = (each.float() for each in inputs())
    time_last = [each.transpose(1, 2) for each in (x, delta)]
    expected, final = mamba_selective_scan(
        *time_last, A, B.transpose(1, 2), C.transpose(1, 2), D, z.transpose(1, 2), return_last_state=True
    )
    out, last = kernels.selective_scan(x, delta, A, B, C, D=D, z=z)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-5, atol=1e-5)


def test_without_gradients_it_is_the_same() -> None:
    tensors = inputs()
    expected = run(*(each.clone().requires_grad_() for each in tensors))
    for found, wanted in zip(run(*tensors), expected, strict=True):
        assert torch.equal(found, wanted)


def test_gradcheck() -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 6, 2, 2)]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, segments=segments), tensors)


def test_operators_are_well_formed() -> None:
    x, delta, A, B, C, _, _, state = inputs(1, 6, 2, 2)
    torch.library.opcheck(torch.ops.zoo.selective_scan, (x, delta, A, B, C, state, None, False))
    tensors = [each.requires_grad_() for each in (x, delta, A, B, C, state)]
    starts = torch.tensor([[False, True, False] * 2])
    torch.library.opcheck(torch.ops.zoo.selective_scan, (*tensors, starts, True))


@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 3), (1, 1)])
def test_empty_and_tiny(batch: int, tokens: int) -> None:
    tensors = inputs(batch, tokens)
    out, final = run(*tensors)
    assert out.shape == tensors[0].shape
    if tokens == 0:
        assert torch.equal(final, tensors[-1])


def test_the_state_given_is_left_alone() -> None:
    tensors = inputs()
    before = tensors[-1].clone()
    run(*tensors)
    assert torch.equal(tensors[-1], before)


@pytest.mark.parametrize("tokens", [1, 11])
def test_meta(tokens: int) -> None:
    tensors = [x.to("meta") for x in inputs(tokens=tokens)]
    out, final = run(*tensors)
    assert (out.shape, final.shape) == (tensors[0].shape, tensors[-1].shape)


def test_bad_input() -> None:
    x, delta, A, B, C, *_ = inputs()
    with pytest.raises(ZooError, match=r"delta has shape \[2, 10, 5\], expected .* \[2, 11, 5\]"):
        kernels.selective_scan(x, delta[:, 1:], A, B, C)
    with pytest.raises(ZooError, match=r"A has shape \[3, 5\], expected \[channels, state_dim\] = \[5, 5\]"):
        kernels.selective_scan(x, delta, A.T, B, C)
    with pytest.raises(ZooError, match=r"C has shape \[2, 11, 2\]"):
        kernels.selective_scan(x, delta, A, B, C[..., 1:])
