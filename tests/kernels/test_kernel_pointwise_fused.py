"""Norms with a residual, rotary pairs and activations: against their formulas, torch, and each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_as_exact_as_reference, outputs_and_gradients
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.launch import without_gpu
from zoo.kernels.pointwise import KINDS

HALVES = [torch.float32, torch.float16, torch.bfloat16]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_norms_with_residual_agree_with_reference(offset: float) -> None:
    x, residual, weight, bias = random(2, 3, 8), random(2, 3, 8, seed=1), random(8), random(8, seed=1)

    def rms_norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.rms_norm(x, w, residual=r, weight_offset=offset)

    def layer_norm(x: Tensor, r: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.layer_norm(x, w, b, residual=r, weight_offset=offset)

    assert_agrees("rms_norm", rms_norm, x, residual, weight)
    assert_agrees("layer_norm", layer_norm, x, residual, weight, bias)


@pytest.mark.parametrize("dtype", HALVES)
def test_norms_with_residual_as_exact_as_reference(dtype: torch.dtype) -> None:
    x, residual, weight = random(5, 32), random(5, 32, seed=1), random(32)
    assert_as_exact_as_reference(
        "rms_norm", dtype, lambda x, r, w: kernels.rms_norm(x, w, residual=r), x, residual, weight
    )
    assert_as_exact_as_reference(
        "layer_norm",
        dtype,
        lambda x, r, w: kernels.layer_norm(x, w, residual=r, weight_offset=1.0),
        x,
        residual,
        weight,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_residual_is_the_sum_and_its_norm(dtype: torch.dtype) -> None:
    x, residual, weight = random(5, 8).to(dtype), random(5, 8, seed=1).to(dtype), random(8).to(dtype)
    for norm in (kernels.rms_norm, kernels.layer_norm):
        out, total = norm(x, weight, residual=residual, weight_offset=1.0)
        assert torch.equal(total, x + residual)
        assert torch.equal(out, norm(x + residual, weight, weight_offset=1.0))
        assert_close(out, norm(x + residual, weight + 1))


def test_a_wider_residual_keeps_its_dtype() -> None:
    x, residual = random(5, 8).bfloat16(), random(5, 8, seed=1).float()
    out, total = kernels.rms_norm(x, residual=residual)
    assert (out.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(total, x + residual)


@pytest.mark.parametrize("positions", [torch.arange(5) + 7, torch.arange(10).view(2, 5) * 90])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [0, 4, None])
def test_rotary_pair_is_rotary_of_both(positions: Tensor, interleaved: bool, dim: int | None) -> None:
    q, k = random(2, 5, 4, 8), random(2, 5, 2, 8)
    flags: dict[str, Any] = {"dim": dim, "interleaved": interleaved, "base": 500.0}
    both = kernels.rotary_pair(q, k, positions, **flags)
    assert torch.equal(both[0], kernels.rotary(q, positions, **flags))
    assert torch.equal(both[1], kernels.rotary(k, positions, **flags))
    assert_agrees("rotary_pair", lambda q, k, p: kernels.rotary_pair(q, k, p, **flags), q, k, positions)


THEIRS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "linear": lambda x: x,
}


@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation(kind: str) -> None:
    gate, up = random(2, 3, 8) * 2, random(2, 3, 8, seed=1)
    assert_agrees("gated_activation", lambda g, u: kernels.gated_activation(g, u, kind), gate, up)
    assert_close(kernels.gated_activation(gate, up, kind), THEIRS[kind](gate) * up)
    for dtype in HALVES:
        assert_as_exact_as_reference(
            "gated_activation", dtype, lambda g, u: kernels.gated_activation(g, u, kind), random(40, 8), random(40, 8)
        )
    inputs = gate[:1].requires_grad_(), up[:1].requires_grad_()
    assert torch.autograd.gradcheck(lambda g, u: kernels.gated_activation(g, u, kind), inputs)


def test_gated_activation_keeps_its_inputs_only() -> None:
    gate, up = random(3, 8).bfloat16().requires_grad_(), random(3, 8).bfloat16().requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        kernels.gated_activation(gate, up, "gelu")
    assert {x.data_ptr() for x in kept} == {gate.data_ptr(), up.data_ptr()}


@pytest.mark.parametrize("normalized", [False, True])
def test_polynomial_activation(normalized: bool) -> None:
    x, coefficients = random(2, 3, 8), random(4)

    def ours(x: Tensor, c: Tensor) -> Tensor:
        return kernels.polynomial_activation(x, c, normalized=normalized)

    def theirs(x: Tensor, c: Tensor) -> Tensor:
        powers = [x**i if normalized else F.relu(x) ** i for i in (1, 2, 3)]
        return c[0] + sum(a * (F.rms_norm(p, (8,), eps=1e-6) if normalized else p) for a, p in zip(c[1:], powers))

    assert_agrees("polynomial_activation", ours, x, coefficients)
    assert_close(ours(x, coefficients), theirs(x, coefficients))
    for dtype in HALVES:
        assert_as_exact_as_reference("polynomial_activation", dtype, ours, random(40, 8), coefficients)
    with kernels.use(polynomial_activation="reference"):
        assert torch.autograd.gradcheck(ours, (x.requires_grad_(), coefficients.requires_grad_()))


def test_one_graph() -> None:
    x, weight = random(2, 5, 8), random(8)
    functions: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
        "residual": (
            lambda x, y, w: kernels.layer_norm(*kernels.rms_norm(x, w, residual=y)[:1]),
            (x, x.flip(0), weight),
        ),
        "gated": (kernels.gated_activation, (x, x.flip(0))),
        "gated in two dtypes": (kernels.gated_activation, (x.float(), x.flip(0))),
        "polynomial": (lambda x, c: kernels.polynomial_activation(x, c, normalized=True), (x, weight[:4])),
        "pair": (lambda q, k: kernels.rotary_pair(q, k, torch.arange(2)), (random(1, 2, 4, 8), random(1, 2, 2, 8))),
    }
    for function, inputs in functions.values():
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        actual, expected = outputs_and_gradients(compiled, inputs), outputs_and_gradients(function, inputs)
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_empty() -> None:
    x = random(0, 8).requires_grad_()
    for out in (
        kernels.rms_norm(x, residual=x)[0],
        kernels.gated_activation(x, x),
        kernels.polynomial_activation(x, random(4), normalized=True),
    ):
        assert out.shape == x.shape
        out.sum().backward()


def test_bad_input() -> None:
    x, heads = random(5, 8), random(2, 5, 3, 8)
    with pytest.raises(ZooError, match=r"residual has shape \[4, 8\], expected \[..., width\] = \[5, 8\]"):
        kernels.rms_norm(x, residual=x[:4])
    with pytest.raises(ZooError, match=r"x has dtype torch.int64, expected one of float32"):
        kernels.layer_norm(x.long())
    with pytest.raises(ZooError, match=r"weight is on meta, expected cpu, where x is"):
        kernels.rms_norm(x, torch.ones(8, device="meta"))
    with pytest.raises(ZooError, match=r"kind is 'swish', expected one of silu, gelu"):
        kernels.gated_activation(x, x, "swish")
    with pytest.raises(ZooError, match="did you mean 'gelu_tanh'"):
        kernels.gated_activation(x, x, "gelu_than")
    with pytest.raises(ZooError, match=r"up has shape \[5, 7\], expected \[..., width\] = \[5, 8\]"):
        kernels.gated_activation(x, x[:, :7])
    with pytest.raises(ZooError, match=r"coefficients has shape \[3\], expected \[powers\] = \[4\]"):
        kernels.polynomial_activation(x, x[0, :3])
    with pytest.raises(ZooError, match="eps is 0, expected a number above 0"):
        kernels.polynomial_activation(x, x[0, :4], eps=0)
    with pytest.raises(ZooError, match=r"k has shape \[2, 5, 3, 6\], expected .* = \[2, 5, any, 8\], as q has"):
        kernels.rotary_pair(heads, heads[..., :6], torch.arange(5))
    with pytest.raises(ZooError, match="positions is on meta, expected cpu, where x is"):
        kernels.rotary(heads, torch.arange(5, device="meta"))


def test_width_that_no_kernel_takes() -> None:
    x = torch.zeros(1, 40_000)
    with (
        without_gpu("sm_90"),
        kernels.use(rms_norm="triton"),
        pytest.raises(ZooError, match=r"up to 32768 wide, not 40000"),
    ):
        kernels.rms_norm(x)
    with (
        without_gpu("sm_90"),
        kernels.use(polynomial_activation="triton"),
        pytest.raises(ZooError, match="up to 16384 wide, not 40000"),
    ):
        kernels.polynomial_activation(x, torch.zeros(4), normalized=True)


class TestKernels:
    """What the interpreter's cases leave open about the operators with kernels."""

    @pytest.fixture(autouse=True)
    def interpreted(self) -> Any:
        pytest.importorskip("triton")
        with without_gpu("sm_90"):
            yield

    @pytest.mark.parametrize("dim", [1, 3])
    def test_operators(self, dim: int) -> None:
        from zoo.kernels.pointwise import activation_path, rotary_path, triton_path

        x, weight = torch.randn(*(2, 3)[: dim - 1], 8, requires_grad=True), torch.randn(8, requires_grad=True)
        heads, fixed = torch.randn(1, 3, 2, 8, requires_grad=True), x.detach()
        mean, inverse = torch.zeros(x.shape[:-1].numel()), torch.ones(x.shape[:-1].numel())
        calls: list[tuple[Any, tuple[Any, ...]]] = [
            (triton_path._norm_forward, (x, x, weight, weight, 1e-5, 1.0, True)),
            (triton_path._norm_forward, (x, None, None, None, 1e-5, 0.0, False)),
            (triton_path._norm_backward, (fixed, fixed, fixed, weight.detach(), mean, inverse, 0.0, True, True)),
            (rotary_path._turn, (heads, heads, torch.arange(3), 100.0, 4, True, False)),
            (rotary_path._turn, (heads, None, torch.arange(3), 100.0, 8, False, False)),
            (activation_path.gated_activation, (x, x, "silu")),
            (activation_path._gated_backward, (fixed, fixed, fixed, "silu")),
            (activation_path.polynomial_activation, (x, weight[:4], True, 1e-6)),
            (activation_path._polynomial_backward, (fixed, fixed, weight[:4].detach(), False, 1e-6)),
        ]
        for operator, arguments in calls:
            torch.library.opcheck(
                operator, arguments, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"]
            )

    @pytest.mark.parametrize("index", [0, 1])
    def test_unused_outputs_have_no_gradient(self, index: int) -> None:
        def one(x: Tensor, r: Tensor) -> Tensor:
            return kernels.rms_norm(x, residual=r)[index]

        inputs = torch.randn(3, 8), torch.randn(3, 8)
        with kernels.use(rms_norm="triton"):
            found = outputs_and_gradients(one, inputs)
        torch.testing.assert_close(found, outputs_and_gradients(one, inputs))

    def test_mixed_dtypes(self) -> None:
        x, residual, weight = torch.randn(3, 8).bfloat16(), torch.randn(3, 8), torch.randn(8)

        def norm(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
            return kernels.layer_norm(x.bfloat16(), w, w.double(), residual=r)

        with kernels.use(layer_norm="triton"):
            found = outputs_and_gradients(norm, (x.float(), residual, weight))
        assert [out.dtype for out in found[0]] == [torch.bfloat16, torch.float32]
        torch.testing.assert_close(found, outputs_and_gradients(norm, (x.float(), residual, weight)))

    def test_parts_of_tensors(self) -> None:
        """Strides of any kind, in and out, do not change a result."""
        x = torch.randn(8, 3, 2, 6).permute(1, 3, 2, 0)
        choices = dict.fromkeys(("rotary", "rms_norm", "gated_activation", "polynomial_activation"), "triton")
        functions: tuple[Callable[[Tensor], Tensor], ...] = (
            kernels.rms_norm,
            lambda x: kernels.rotary(x, torch.arange(12)[::2]),
            lambda x: kernels.gated_activation(x[..., :4], x[..., 4:]),
            lambda x: kernels.polynomial_activation(x, torch.ones(4, dtype=x.dtype), normalized=True),
        )
        for function in functions:
            with kernels.use(**choices):
                found = outputs_and_gradients(function, (x,))
            torch.testing.assert_close(found, outputs_and_gradients(function, (x,)))

    def test_empty(self) -> None:
        choices = dict.fromkeys(("rotary_pair", "layer_norm", "gated_activation", "polynomial_activation"), "triton")
        x, c = torch.randn(0, 8, requires_grad=True), torch.ones(4, requires_grad=True)
        heads = torch.randn(1, 0, 2, 8)
        with kernels.use(**choices):
            total = kernels.layer_norm(x, c.repeat(2), residual=x)[0].sum() + kernels.gated_activation(x, x).sum()
            (total + kernels.polynomial_activation(x, c).sum()).backward()
            assert kernels.rotary_pair(heads, heads[:, :, :1], torch.arange(0))[1].shape == (1, 0, 1, 8)
        assert c.grad is not None and torch.equal(c.grad, torch.zeros(4))

    def test_rotary_keeps_late_positions(self) -> None:
        """A kernel's angle is right where float32 has lost it: differences of positions are all that scores hang on."""
        x = torch.randn(1, 4, 2, 64)
        with kernels.use(rotary="triton"):
            late = kernels.rotary(x, torch.arange(4) + 10_000_000)
        exact = kernels.rotary(x.double(), torch.arange(4) + 10_000_000)
        torch.testing.assert_close(late.double(), exact, rtol=0, atol=1e-6)

    def test_rotary_twice_differentiable(self) -> None:
        with kernels.use(rotary="triton"):
            x = torch.randn(1, 2, 1, 4, requires_grad=True)
            (first,) = torch.autograd.grad(kernels.rotary(x, torch.arange(2)).square().sum(), x, create_graph=True)
            (second,) = torch.autograd.grad(first.sum(), x)
        torch.testing.assert_close(second, torch.full_like(x, 2.0))
