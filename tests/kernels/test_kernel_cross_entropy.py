"""The loss in chunks: against its formula, torch's own loss, and finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_as_exact_as_reference, outputs_and_gradients
from flops import counted_flops
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels import work
from zoo.kernels.cross_entropy import chunks
from zoo.kernels.launch import without_gpu

ROWS, WIDTH, VOCAB = 11, 6, 17
TARGETS = torch.tensor([3, -100, 0, 16, 5, 5, -100, 1, 2, 9, 12])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)), dtype=torch.float64)


X, WEIGHT, BIAS = random(ROWS, WIDTH), random(VOCAB, WIDTH, seed=1), random(VOCAB)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [None, 4, 11])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_is_the_loss_of_torch(reduction: Any, label_smoothing: float, chunk: int | None, implementation: str) -> None:
    flags: dict[str, Any] = {"reduction": reduction, "label_smoothing": label_smoothing}

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, w, b), TARGETS, **flags)

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, w, TARGETS, bias=b, chunk=chunk, **flags)

    with kernels.use(linear_cross_entropy=implementation):
        found = outputs_and_gradients(ours, (X, WEIGHT, BIAS))
    torch.testing.assert_close(found, outputs_and_gradients(theirs, (X, WEIGHT, BIAS)), rtol=1e-12, atol=1e-12)


FLAGS: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0, "reduction": "sum"},
    {"z_loss": 0.1, "label_smoothing": 0.2},
    {"softcap": 3.0, "z_loss": 0.1, "label_smoothing": 1.0, "reduction": "none", "ignore_index": 5},
]


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_agrees_with_reference(flags: dict[str, Any]) -> None:
    targets = TARGETS.clamp(min=5) if "ignore_index" in flags else TARGETS

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return kernels.linear_cross_entropy(x, w, targets, bias=b, chunk=4, **flags)

    assert_agrees("linear_cross_entropy", ours, X, WEIGHT, BIAS)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_as_exact_as_reference("linear_cross_entropy", dtype, ours, X, WEIGHT, BIAS)
    small = X[:3].clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets[:3], chunk=2, **flags), small
    )


def test_half_precision_adds_up_in_float32() -> None:
    """A thousand chunks cost no digits; added up in bfloat16, most would be lost."""
    x, weight = torch.ones(2000, 4).bfloat16() * 0.01, torch.zeros(3, 4).bfloat16().requires_grad_()
    targets = torch.zeros(2000, dtype=torch.long)
    kernels.linear_cross_entropy(x, weight, targets, chunk=2, reduction="sum").backward()
    assert weight.grad is not None
    exact = float(x[0, 0]) * 2000 * (1 / 3 - 1)
    assert abs(float(weight.grad[0, 0]) - exact) < 0.005 * abs(exact)


def test_only_what_needs_a_gradient_gets_one() -> None:
    x, weight = X.clone().requires_grad_(), WEIGHT.clone()
    product = 2 * ROWS * WIDTH * VOCAB
    assert counted_flops(kernels.linear_cross_entropy, x, weight, TARGETS) == 2 * product
    assert counted_flops(kernels.linear_cross_entropy, X, WEIGHT, TARGETS) == product
    with torch.no_grad():
        assert counted_flops(kernels.linear_cross_entropy, x, weight, TARGETS) == product
    weight.requires_grad_()

    def each() -> None:
        kernels.linear_cross_entropy(x, weight, TARGETS, reduction="none").sum().backward()

    assert counted_flops(lambda: kernels.linear_cross_entropy(x, weight, TARGETS).backward()) == 3 * product
    assert counted_flops(each) == 4 * product


def test_gradients_can_be_taken_again() -> None:
    weight = WEIGHT.clone().requires_grad_()
    loss = kernels.linear_cross_entropy(X, weight, TARGETS)
    (first,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (second,) = torch.autograd.grad(3 * loss, weight)
    assert_close(second, 3 * first)


def test_second_derivatives_are_an_error() -> None:
    x = X.clone().requires_grad_()
    for reduction in ("mean", "none"):
        loss = kernels.linear_cross_entropy(x, WEIGHT, TARGETS, reduction=reduction).sum().square()
        (first,) = torch.autograd.grad(loss, x, create_graph=True)
        with pytest.raises(RuntimeError, match="no autograd formula"):
            first.sum().backward()


def test_no_row_counts() -> None:
    nothing = torch.full_like(TARGETS, -100)
    for targets, x in ((nothing, X), (nothing[:0], X[:0])):
        for reduction in ("mean", "sum"):
            leaves = x.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
            loss = kernels.linear_cross_entropy(*leaves, targets, reduction=reduction)
            assert loss == 0
            loss.backward()
            assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)
    assert kernels.linear_cross_entropy(X[:0], WEIGHT, nothing[:0], reduction="none").shape == (0,)


def test_logits_of_rows_that_do_not_count_may_be_anything() -> None:
    x = X.clone()
    x[1] = float("inf")
    assert torch.isfinite(kernels.linear_cross_entropy(x, WEIGHT, TARGETS))


def test_large_logits() -> None:
    loss = kernels.linear_cross_entropy(X.float() * 1e4, WEIGHT.float(), TARGETS)
    assert_close(loss, F.cross_entropy(F.linear(X.float() * 1e4, WEIGHT.float()), TARGETS), slack=2.0)


def test_autocast() -> None:
    x, weight = X.float().requires_grad_(), WEIGHT.float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(x, weight, TARGETS)
    loss.backward()
    assert weight.grad is not None
    assert loss.dtype == weight.grad.dtype == torch.float32


def test_one_graph() -> None:
    for reduction in ("mean", "none"):

        def loss(x: Tensor, w: Tensor, reduction: Any = reduction) -> Tensor:
            return kernels.linear_cross_entropy(x * 2, w, TARGETS, reduction=reduction, chunk=4)

        torch._dynamo.reset()
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        found, expected = (outputs_and_gradients(one, (X, WEIGHT)) for one in (compiled, loss))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_meta() -> None:
    x, weight = X.to("meta").requires_grad_(), WEIGHT.to("meta").requires_grad_()
    loss = kernels.linear_cross_entropy(x, weight, TARGETS.to("meta"))
    loss.backward()
    assert loss.shape == () and weight.grad is not None and weight.grad.shape == weight.shape


@pytest.mark.parametrize("rows", [0, 1, 63, 1000, 100_000])
@pytest.mark.parametrize("vocab", [2, 50_257, 300_000])
def test_chunks(rows: int, vocab: int) -> None:
    x = torch.empty(rows, 512, device="meta")
    chunk = chunks.rows_of_chunk(rows, 512, vocab, x)
    assert chunk % chunks.MULTIPLE == 0 and chunk >= chunks.MULTIPLE
    most = max(rows * 512, work.CROSS_ENTROPY_ELEMENTS, chunks.MULTIPLE * vocab)
    assert (chunk - chunks.MULTIPLE) * vocab <= most


def test_bad_input() -> None:
    def loss(x: Tensor = X, weight: Tensor = WEIGHT, targets: Tensor = TARGETS, **rest: Any) -> Tensor:
        return kernels.linear_cross_entropy(x, weight, targets, **rest)

    calls: list[tuple[str, dict[str, Any]]] = [
        (r"weight has shape \[17, 5\], expected \[vocab, width\] = \[17, 6\]", {"weight": WEIGHT[:, :5]}),
        (r"x has shape \[11, 1, 6\], expected 2 dimensions", {"x": X[:, None]}),
        (r"targets has shape \[10\], expected \[rows\] = \[11\]", {"targets": TARGETS[:10]}),
        ("targets has dtype torch.float32, expected an integer dtype", {"targets": TARGETS.float()}),
        (
            "targets has 17, expected classes from 0 to 16, or ignore_index = -100",
            {"targets": TARGETS.clamp(min=0) + 1},
        ),
        (r"bias has shape \[6\], expected \[vocab\] = \[17\]", {"bias": BIAS[:6]}),
        ("weight has dtype torch.float32, expected torch.float64, as x has", {"weight": WEIGHT.float()}),
        ("x has dtype torch.int64, expected one of float32", {"x": X.long()}),
        ("weight is on meta, expected cpu, where x is", {"weight": WEIGHT.to("meta")}),
        ("reduction is 'men', expected one of mean, sum, none; did you mean 'mean'", {"reduction": "men"}),
        ("label_smoothing is 2, expected a number from 0 to 1", {"label_smoothing": 2}),
        ("z_loss is -1, expected a number of at least 0", {"z_loss": -1}),
        ("softcap is 0, expected a number above 0", {"softcap": 0}),
        ("chunk is 0, expected a number above 0", {"chunk": 0}),
        ("expected at least one class", {"weight": WEIGHT[:0]}),
    ]
    for message, arguments in calls:
        with pytest.raises(ZooError, match=message):
            loss(**arguments)


class TestKernels:
    """What the interpreter's cases leave open."""

    @pytest.fixture(autouse=True)
    def interpreted(self) -> Any:
        pytest.importorskip("triton")
        with without_gpu("sm_90"):
            yield

    def test_operators(self) -> None:
        x, weight, bias = (t.float().requires_grad_() for t in (X, WEIGHT, BIAS))
        fixed = tuple(t.detach() for t in (x, weight, bias))
        for home in ("zoo.kernels.cross_entropy.torch_path", "zoo.kernels.cross_entropy.triton_path"):
            settings = TARGETS, -100, 2.0, 0.1, 0.1, 4, home
            calls: list[tuple[Any, tuple[Any, ...]]] = [
                (chunks._sum, (x, weight, bias, *settings, True, True, True)),
                (chunks._sum, (*fixed[:2], None, *settings, False, True, False)),
                (chunks._rows, (x, weight, None, *settings)),
                (chunks._rows_backward, (torch.ones(ROWS), *fixed, *settings, True, False, True)),
            ]
            for operator, arguments in calls:
                torch.library.opcheck(
                    operator, arguments, test_utils=["test_schema", "test_faketensor", "test_autograd_registration"]
                )

    def test_rows_that_do_not_count(self) -> None:
        x = X.float()
        x[1] = float("inf")
        leaf, weight = x.requires_grad_(), WEIGHT.float()
        with kernels.use(linear_cross_entropy="triton"):
            loss = kernels.linear_cross_entropy(leaf, weight, TARGETS)
        loss.backward()
        assert leaf.grad is not None
        assert torch.isfinite(loss) and torch.isfinite(leaf.grad).all() and not leaf.grad[1].any()

    def test_large_and_capped_logits(self) -> None:
        x, weight = X.float() * 1e4, WEIGHT.float()
        for softcap in (None, 30.0):
            with kernels.use(linear_cross_entropy="triton"):
                loss = kernels.linear_cross_entropy(x, weight, TARGETS, softcap=softcap)
            assert_close(loss, kernels.linear_cross_entropy(x.double(), weight.double(), TARGETS, softcap=softcap))
