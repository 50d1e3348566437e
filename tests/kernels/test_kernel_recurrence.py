"""The recurrence: chunks against one step after another, states, packed sequences, decays at their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import assert_agrees, assert_as_exact_as_reference, outputs_and_gradients
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.linear_recurrence import torch_path


@pytest.fixture(params=["mild", "strong", "compiled"], autouse=True)
def ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests run as decays demand, with all decays taken to be strong, and in one piece as in a compiled graph."""
    if request.param == "strong":
        monkeypatch.setattr(torch_path, "MILD", -1.0)
    if request.param == "compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)


def inputs(
    batch: int = 2, tokens: int = 13, groups: int = 2, heads: int = 4, key_dim: int = 3, value_dim: int = 5
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`q, k, v, log_decay, state`."""
    torch.manual_seed(0)
    q, k = (torch.randn(batch, tokens, groups, key_dim, dtype=torch.float64) for _ in range(2))
    v = torch.randn(batch, tokens, heads, value_dim, dtype=torch.float64)
    log_decay = -torch.rand(batch, tokens, heads, dtype=torch.float64)
    return q, k, v, log_decay, torch.randn(batch, heads, key_dim, value_dim, dtype=torch.float64)


def run(*tensors: Tensor, **flags: Any) -> tuple[Tensor, Tensor]:
    q, k, v, log_decay, state = tensors
    return kernels.recurrence(q, k, v, log_decay=log_decay, state=state, **flags)


@given(st.data())
def test_agrees_with_reference(data: st.DataObject) -> None:
    draw = data.draw
    groups = draw(st.integers(1, 3))
    batch, tokens, heads = draw(st.integers(1, 2)), draw(st.integers(1, 40)), groups * draw(st.integers(1, 3))
    q, k, v, log_decay, state = inputs(batch, tokens, groups, heads, draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    flags: dict[str, Any] = {"chunk": draw(st.sampled_from([1, 4, 7, 64])), "scale": draw(st.sampled_from([None, 0.3]))}
    if draw(st.booleans()):
        flags["segments"] = torch.stack([torch.arange(tokens) * (row + 1) // 5 for row in range(batch)])
    decay = draw(st.sampled_from(["none", "constant", "full", "channels"]))
    if decay == "none":
        assert_agrees("recurrence", lambda q, k, v, s: kernels.recurrence(q, k, v, state=s, **flags), q, k, v, state)
    else:
        if decay == "constant":
            log_decay = log_decay[0, 0]
        if decay == "channels":
            log_decay = -torch.rand(batch, tokens, draw(st.sampled_from([groups, heads])), q.shape[3]).double()
        assert_agrees("recurrence", lambda *tensors: run(*tensors, **flags), q, k, v, log_decay, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    *tensors, log_decay, _ = inputs(tokens=70)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.recurrence(q, k, v, log_decay=log_decay.to(q.dtype), chunk=16)

    assert_as_exact_as_reference("recurrence", dtype, function, *tensors)


def test_gradient_of_the_decay_in_float32() -> None:
    """It is a difference of sums over a chunk, so a few digits worse than step by step, but not more than that."""
    tensors = inputs(tokens=70)
    _, exact = outputs_and_gradients(lambda *tensors: run(*tensors, chunk=16), tensors)
    _, found = outputs_and_gradients(lambda *tensors: run(*tensors, chunk=16), [x.float() for x in tensors])
    assert_close(found[3], exact[3])


@pytest.mark.parametrize("cuts", [[6, 7], [1] * 13, [4, 1, 8]])
def test_split_equals_whole(cuts: list[int]) -> None:
    *tensors, state = inputs()
    whole, final = run(*tensors, state, chunk=4)
    parts = []
    for q, k, v, log_decay in zip(*(x.split(cuts, 1) for x in tensors), strict=True):
        out, state = run(q, k, v, log_decay, state, chunk=4)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_packed_equals_apart() -> None:
    q, k, v, log_decay, state = inputs()
    lengths = [3, 1, 9]
    segments = torch.repeat_interleave(torch.tensor([5, 0, 5]), torch.tensor(lengths)).expand(2, -1)
    whole, final = run(q, k, v, log_decay, state, segments=segments, chunk=4)
    parts = []
    for pieces in zip(*(x.split(lengths, 1) for x in (q, k, v, log_decay)), strict=True):
        out, last = run(*pieces, state)
        parts.append(out)
        state = torch.zeros_like(state)
    assert_close(whole, torch.cat(parts, 1))
    assert_close(final, last)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_decay_at_its_limits(chunk: int) -> None:
    """A decay of zero forgets, a decay of one keeps, and neither gives NaN, nor do both side by side."""
    q, k, v, log_decay, state = inputs(tokens=12)
    log_decay[:, 4] = log_decay[0, 5] = float("-inf")
    log_decay[:, 7:9] = 0
    log_decay[0, 9:] = -50
    assert_agrees("recurrence", lambda *tensors: run(*tensors, chunk=chunk), q, k, v, log_decay, state)
    out, final = run(q, k, v, log_decay, state, chunk=chunk)
    rest, last = run(q[:, 4:], k[:, 4:], v[:, 4:], log_decay[:, 4:], torch.zeros_like(state), chunk=chunk)
    assert_close(out[:, 4:], rest)
    assert_close(final, last)


def test_strong_decay_does_not_disturb_what_follows() -> None:
    """Sums of logarithms lose digits after a strong decay; what remains must be good to float32 all the same."""
    q, k, v, log_decay, _ = inputs(tokens=64)
    log_decay[:, 5] = float("-inf")
    exact, _ = kernels.recurrence(q, k, v, log_decay=log_decay)
    tensors = [x.float() for x in (q, k, v)]
    out, _ = kernels.recurrence(*tensors, log_decay=log_decay.float())
    assert_close(out, exact)


def by_channel(batch: int = 2, tokens: int = 13, heads: int = 2, strength: float = 1.0) -> Tensor:
    torch.manual_seed(1)
    return -torch.rand(batch, tokens, heads, 3, dtype=torch.float64) * strength


@pytest.mark.parametrize("chunk", [1, 5, 8, 64])
@pytest.mark.parametrize("strength", [0.1, 30.0])
def test_decay_of_each_channel_at_its_limits(chunk: int, strength: float) -> None:
    q, k, v, _, state = inputs(tokens=40)
    log_decay = by_channel(2, 40, 2, strength)
    log_decay[:, 4, :, 0] = log_decay[0, 5] = float("-inf")
    log_decay[:, 7:9], log_decay[1, 9] = 0, 0.5
    assert_agrees("recurrence", lambda *tensors: run(*tensors, chunk=chunk), q, k, v, log_decay, state)


def test_decay_of_each_channel_packed_and_split() -> None:
    q, k, v, _, state = inputs()
    log_decay = by_channel()
    segments = torch.tensor([5, 5, 5, 0, 5, 5, 5, 5, 5, 5, 5, 5, 5]).expand(2, -1)
    whole, final = run(q, k, v, log_decay, state, segments=segments, chunk=4)
    parts = []
    for pieces in zip(*(x.split([3, 1, 9], 1) for x in (q, k, v, log_decay)), strict=True):
        steps = []
        for step in zip(*(x.split(1, 1) for x in pieces), strict=True):
            out, state = run(*step, state)
            steps.append(out)
        parts.append(torch.cat(steps, 1))
        last, state = state, torch.zeros_like(state)
    assert_close(whole, torch.cat(parts, 1))
    assert_close(final, last)


def test_equal_channels_are_a_decay_of_the_head() -> None:
    """For groups and for heads of their own alike."""
    q, k, v, log_decay, state = inputs(heads=2)
    expected, final = run(q, k, v, log_decay, state)
    out, last = run(q, k, v, log_decay[..., None].expand(-1, -1, -1, 3), state)
    assert_close(out, expected)
    assert_close(last, final)
    q, k, v, log_decay, state = inputs()
    expected, final = run(q, k, v, log_decay, state)
    out, last = run(q, k, v, log_decay[..., None].expand(-1, -1, -1, 3), state)
    assert_close(out, expected)
    assert_close(last, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decay_of_each_channel_as_exact_as_reference(dtype: torch.dtype) -> None:
    *tensors, _, _ = inputs(tokens=70)
    log_decay = by_channel(2, 70, 2, 0.2)

    def function(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.recurrence(q, k, v, log_decay=log_decay.to(q.dtype), chunk=16)

    assert_as_exact_as_reference("recurrence", dtype, function, *tensors)


@pytest.mark.parametrize("step", [-0.9, -1.8, -3.0])
@pytest.mark.parametrize("channels", [False, True])
def test_factors_of_tokens_stay_in_range(step: float, channels: bool) -> None:
    """On either side of the bounds between the ways in which a chunk is computed, forward and backward."""
    q, k, v, _, state = inputs(tokens=130)
    log_decay = torch.full((2, 130, 2, 3) if channels else (2, 130, 4), step, dtype=torch.float64)
    tensors = q, k, v, log_decay, state
    with kernels.use(recurrence="reference"):
        exact = outputs_and_gradients(run, tensors)
    found = outputs_and_gradients(run, [x.float() for x in tensors])
    for kind, truth in zip(found, exact, strict=True):
        for one, other in zip(kind, truth, strict=True):
            assert_close(one, other)


def test_agrees_with_transformers_mamba2() -> None:
    q, k, v, _, state = inputs(tokens=21, groups=2, heads=4)
    dt, A = torch.rand(2, 21, 4, dtype=torch.float64), -torch.rand(4, dtype=torch.float64)
    expected, final = mamba2_chunk_scan(
        v, dt, A, k, q, 8, initial_states=state.transpose(2, 3), return_final_states=True
    )
    out, last = run(q, k, v * dt[..., None], dt * A, state)
    # They compute in float32.
    torch.testing.assert_close(out.float(), expected.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(last.transpose(2, 3).float(), final.float(), rtol=1e-4, atol=1e-4)


def test_without_decay_it_is_causal_attention_without_softmax() -> None:
    q, k, v, _, _ = inputs(groups=4)
    scores = torch.einsum("bihd,bjhd->bhij", q, k).tril()
    out, final = kernels.recurrence(q, k, v, chunk=4, scale=0.5)
    assert_close(out, 0.5 * torch.einsum("bhij,bjhd->bihd", scores, v))
    assert_close(final, torch.einsum("bihd,bihe->bhde", k, v))


@pytest.mark.parametrize("segments", [None, torch.tensor([[0, 0, 1, 1, 1]])])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_gradcheck(segments: Tensor | None, implementation: str) -> None:
    q, k, v, log_decay, state = inputs(1, 5, 1, 2, 2, 2)
    for decay in (log_decay, by_channel(1, 5, 1)[..., :2].contiguous()):
        tensors = [x.detach().requires_grad_() for x in (q, k, v, decay, state)]
        with kernels.use(recurrence=implementation):
            assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, segments=segments, chunk=2), tensors)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 3), (1, 1)])
def test_empty_and_tiny(batch: int, tokens: int) -> None:
    q, k, v, log_decay, state = inputs(batch, tokens)
    out, final = run(q, k, v, log_decay, state)
    assert out.shape == v.shape
    assert final.shape == state.shape
    if tokens == 0:
        assert torch.equal(final, state)


def test_state_of_half_precision_is_float32() -> None:
    q, k, v, _, _ = (x.bfloat16() for x in inputs())
    out, final = kernels.recurrence(q, k, v)
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("tokens", [1, 70])
def test_meta(tokens: int) -> None:
    tensors = [x.to("meta") for x in inputs(tokens=tokens)]
    out, final = run(*tensors)
    assert (out.shape, final.shape) == (tensors[2].shape, tensors[4].shape)


def test_bad_input() -> None:
    q, k, v, log_decay, state = inputs()
    with pytest.raises(ZooError, match=r"v has 3 heads and q has 2 groups"):
        kernels.recurrence(q, k, v[:, :, :3])
    with pytest.raises(ZooError, match=r"k has shape \[2, 12, 2, 3\], expected .* \[2, 13, 2, 3\]"):
        kernels.recurrence(q, k[:, 1:], v)
    with pytest.raises(ZooError, match=r"log_decay has shape \[2, 13\], expected \[heads\] = \[4\]"):
        kernels.recurrence(q, k, v, log_decay=log_decay[..., 0])
    with pytest.raises(ZooError, match=r"log_decay has shape \[2, 13, 4, 5\], expected .* \[2, 13, 2, 3\]"):
        kernels.recurrence(q, k, v, log_decay=v)
    with pytest.raises(ZooError, match=r"state has shape \[2, 4, 5, 3\]"):
        kernels.recurrence(q, k, v, state=state.transpose(2, 3))
    with pytest.raises(ZooError, match=r"segments has dtype torch\.float64"):
        kernels.recurrence(q, k, v, segments=log_decay[..., 0])
    with pytest.raises(ZooError, match="chunk is 0"):
        kernels.recurrence(q, k, v, chunk=0)


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("strength", [0.5, 1.9, 4.0])
def test_gradients_stay_exact_where_a_chunk_forgets_almost_everything(strength: float, per_channel: bool) -> None:
    q, k, v = (torch.randn(1, 130, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3))
    shape = (1, 130, 2, 8) if per_channel else (1, 130, 2)
    log_decay = -strength * torch.rand(shape, generator=torch.Generator().manual_seed(3))

    def run(*given: torch.Tensor) -> torch.Tensor:
        return kernels.recurrence(*given[:3], log_decay=given[3])[0]

    assert_agrees("recurrence", run, q, k, v, log_decay)
