"""The diagonal scan: against one step after another, real and complex, states, packed sequences, decays of zero."""

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


def inputs(batch: int = 2, tokens: int = 11, channels: int = 5, constant: bool = False) -> list[Tensor]:
    """`x, decay, state`."""
    torch.manual_seed(0)
    inner = (batch, tokens, channels)
    decay = torch.rand((channels,) if constant else inner)
    return [each.double() for each in (torch.randn(inner), decay, torch.randn(batch, channels))]


def run(x: Tensor, decay: Tensor, state: Tensor, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    return kernels.diagonal_scan(x, decay, state=state, segments=segments)


def turned(decay: Tensor) -> Tensor:
    """A complex decay of that size."""
    return torch.polar(decay, 5 * decay)


@given(st.integers(1, 2), st.integers(1, 40), st.integers(1, 4), st.booleans(), st.booleans(), st.booleans())
def test_agrees_with_reference(
    batch: int, tokens: int, channels: int, constant: bool, packed: bool, is_complex: bool
) -> None:
    segments = torch.stack([torch.arange(tokens) // (row + 3) for row in range(batch)]) if packed else None

    def function(x: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, ...]:
        found = run(x, turned(decay) if is_complex else decay, state, segments)
        return tuple(part for each in found for part in (torch.view_as_real(each) if is_complex else each,))

    assert_agrees("diagonal_scan", function, *inputs(batch, tokens, channels, constant))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_reference("diagonal_scan", dtype, run, *inputs(tokens=150))


@pytest.mark.parametrize("cuts", [[5, 6], [1] * 11, [4, 4, 3]])
def test_split_equals_whole(cuts: list[int]) -> None:
    x, decay, state = inputs()
    whole, final = run(x, decay, state)
    parts = []
    for x_, decay_ in zip(x.split(cuts, 1), decay.split(cuts, 1), strict=True):
        out, state = run(x_, decay_, state)
        parts.append(out)
    assert_close(torch.cat(parts, 1), whole)
    assert_close(state, final)


def test_packed_equals_apart() -> None:
    x, decay, state = inputs()
    lengths = [5, 1, 5]
    segments = torch.repeat_interleave(torch.tensor([7, 2, 7]), torch.tensor(lengths)).expand(2, -1)
    whole, final = run(x, decay, state, segments)
    parts = []
    for x_, decay_ in zip(x.split(lengths, 1), decay.split(lengths, 1), strict=True):
        out, last = run(x_, decay_, state)
        parts.append(out)
        state = torch.zeros_like(state)
    assert_close(whole, torch.cat(parts, 1))
    assert_close(final, last)


def test_a_decay_of_zero_forgets() -> None:
    x, decay, state = inputs(tokens=60)
    decay[:, ::7] = 0
    out, _ = run(x, decay, state)
    assert torch.equal(out[:, ::7], x[:, ::7])
    grads = torch.autograd.grad(run(x, decay.requires_grad_(), state)[0].sum(), [decay])
    assert torch.isfinite(grads[0]).all()


def test_sums_up_with_a_decay_of_one() -> None:
    x, _, state = inputs(tokens=60)
    assert_close(run(x, torch.ones(5, dtype=torch.float64), state)[0], x.cumsum(1) + state.unsqueeze(1))


@pytest.mark.parametrize("constant", [False, True])
@pytest.mark.parametrize("is_complex", [False, True])
def test_gradcheck(constant: bool, is_complex: bool) -> None:
    x, decay, state = inputs(1, 6, 2, constant)
    tensors = [each.detach().requires_grad_() for each in (x, turned(decay) if is_complex else decay, state)]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda *tensors: run(*tensors, segments=segments), tensors)


def test_operator_is_well_formed() -> None:
    x, decay, state = (each.requires_grad_() for each in inputs(1, 6, 2))
    torch.library.opcheck(torch.ops.zoo.diagonal_scan, (x, decay, state))


def test_compiles_whole() -> None:
    def function(x: Tensor, decay: Tensor, state: Tensor) -> Tensor:
        return run(x, decay, state, torch.arange(11).expand(2, -1) // 4)[0]

    torch._dynamo.reset()
    assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(*inputs()), function(*inputs()))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 3), (1, 1)])
def test_empty_and_meta(device: str, batch: int, tokens: int) -> None:
    x, decay, state = (each.to(device) for each in inputs(batch, tokens))
    out, final = run(x, decay, state)
    assert (out.shape, final.shape) == (x.shape, state.shape)


def test_dtypes() -> None:
    x, decay, state = (each.to(torch.bfloat16) for each in inputs())
    assert [each.dtype for each in run(x, decay, state)] == [torch.bfloat16, torch.float32]
    decay = turned(decay.float())
    assert [each.dtype for each in run(x, decay, state)] == [torch.complex64, torch.complex64]


def test_bad_input() -> None:
    x, decay, state = inputs()
    with pytest.raises(
        ZooError, match=r"decay has shape \[2, 10, 5\], expected \[channels\] = \[5\] or .* \[2, 11, 5\]"
    ):
        run(x, decay[:, 1:], state)
    with pytest.raises(ZooError, match=r"state has shape \[2, 4\], expected \[batch, channels\] = \[2, 5\]"):
        run(x, decay, state[:, 1:])
    with pytest.raises(ZooError, match="x has shape"):
        run(x[0], decay, state)
    with pytest.raises(ZooError, match="segments has dtype"):
        run(x, decay, state, torch.zeros(2, 11))
    with kernels.use(diagonal_scan="triton"), pytest.raises(ZooError, match="needs a CUDA device"):
        run(x, decay, state)
