"""Groups that use a part of a weight, rows by index, and products of blocks."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from agreement import assert_agrees, assert_as_exact_as_reference, outputs_and_gradients
from flops import counted_flops
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError

WIDTH, HIDDEN = 5, 7
SIZES = [4, 0, 3, 6]
WIDTHS = torch.tensor([2, 7, 0, 5])


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def network(x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, widths: Tensor) -> Tensor:
    h = kernels.grouped_matmul(x, up, offsets, output_widths=widths)
    return kernels.grouped_matmul(h.relu(), down.T, offsets, input_widths=widths)


def one_by_one(x: Tensor, up: Tensor, down: Tensor, offsets: Tensor, widths: Tensor) -> Tensor:
    parts = [
        (x[low:high] @ up[:width].T).relu() @ down[:width]
        for (low, high), width in zip(pairwise(offsets.tolist()), widths.tolist())
    ]
    return torch.cat(parts)


def test_mixed_widths_are_the_networks_one_by_one() -> None:
    given = draw(13, WIDTH), draw(HIDDEN, WIDTH, seed=1), draw(HIDDEN, WIDTH, seed=2), offsets_of(SIZES), WIDTHS
    for found, expected in zip(outputs_and_gradients(network, given), outputs_and_gradients(one_by_one, given)):
        for one, other in zip(found, expected, strict=True):
            assert_close(one, other)


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=4), st.booleans()
)
def test_agrees_with_reference(groups: list[tuple[int, int, int]], shared: bool) -> None:
    sizes, outputs, inputs = (list(each) for each in zip(*groups, strict=True))

    def product(x: Tensor, weight: Tensor, offsets: Tensor, outputs: Tensor, inputs: Tensor) -> Tensor:
        return kernels.grouped_matmul(x, weight, offsets, output_widths=outputs, input_widths=inputs)

    x, weight = draw(sum(sizes), 4), draw(*([] if shared else [len(sizes)]), 3, 4, seed=1)
    assert_agrees("grouped_matmul", product, x, weight, offsets_of(sizes), torch.tensor(outputs), torch.tensor(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    given = draw(13, 32), draw(HIDDEN, 32, seed=1), draw(HIDDEN, 32, seed=2), offsets_of(SIZES), WIDTHS
    assert_as_exact_as_reference("grouped_matmul", dtype, network, *given)


@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_gradcheck(implementation: str) -> None:
    x, up, down = (draw(*shape, seed=i).requires_grad_() for i, shape in enumerate([(13, 2), (3, 2), (3, 2)]))
    offsets, widths = offsets_of(SIZES), torch.tensor([2, 3, 0, 1])

    def run(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return network(x, up, down, offsets, widths)

    with kernels.use(grouped_matmul=implementation):
        assert torch.autograd.gradcheck(run, (x, up, down))


def test_what_lies_beyond_a_width_is_never_read() -> None:
    x, weight = draw(13, HIDDEN), draw(WIDTH, HIDDEN, seed=1)
    expected = kernels.grouped_matmul(x, weight, offsets_of(SIZES), input_widths=WIDTHS)
    for (low, high), width in zip(pairwise(offsets_of(SIZES).tolist()), WIDTHS.tolist()):
        x[low:high, width:] = float("nan")
    assert torch.equal(kernels.grouped_matmul(x, weight, offsets_of(SIZES), input_widths=WIDTHS), expected)


@given(st.lists(st.lists(st.integers(0, 4), max_size=4), min_size=1, max_size=4))
def test_rows_by_index(source: list[list[int]]) -> None:
    """Rows that are read several times, and never."""
    index, offsets = torch.tensor([*chain(*source)]).long(), offsets_of([len(each) for each in source])

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.grouped_matmul(x, weight, offsets, source=index)

    x, weight = draw(5, 4), draw(len(source), 3, 4, seed=1)
    assert_agrees("grouped_matmul", product, x, weight)
    assert_close(product(x, weight), kernels.grouped_matmul(x[index], weight, offsets))
    assert counted_flops(product, x, weight) == 2 * len(index) * 4 * 3


def test_gradcheck_by_index() -> None:
    x, weight, index = draw(3, 2).requires_grad_(), draw(2, 2, 2, seed=1).requires_grad_(), torch.tensor([2, 0, 2, 1])

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.grouped_matmul(x, weight, torch.tensor([0, 3, 4]), source=index)

    assert torch.autograd.gradcheck(product, (x, weight))
    torch.library.opcheck(torch.ops.zoo.grouped_matmul, (x, weight, torch.tensor([0, 3, 4]), None, None, index))


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("shared", [True, False])
def test_hardly_any_rows(rows: int, shared: bool) -> None:
    x, weight = draw(rows, 4), draw(*([] if shared else [1]), 3, 4)
    assert_agrees("grouped_matmul", kernels.grouped_matmul, x, weight, torch.tensor([0, rows]))


def test_bad_widths() -> None:
    x, weight, offsets = draw(13, 4), draw(3, 4), offsets_of(SIZES)
    with pytest.raises(ZooError, match=r"widths are \[2, 7, 0, 5\], expected numbers from 0 to the weight's, 3"):
        kernels.grouped_matmul(x, weight, offsets, output_widths=WIDTHS)
    with pytest.raises(ZooError, match=r"input_widths has shape \[3\], expected \[groups\] = \[4\]"):
        kernels.grouped_matmul(x, weight, offsets, input_widths=WIDTHS[:3])
    with pytest.raises(ZooError, match=r"output_widths has dtype torch\.float64, expected an integer dtype"):
        kernels.grouped_matmul(x, weight, offsets, output_widths=WIDTHS.double())


def test_bad_operands() -> None:
    x, weight, offsets = draw(13, 4), draw(3, 4), offsets_of(SIZES)
    with pytest.raises(ZooError, match=r"x has dtype torch\.float64 and weight torch.float32, expected one"):
        kernels.grouped_matmul(x, weight.float(), offsets)
    with pytest.raises(ZooError, match="expected one"):
        kernels.grouped_matmul(x.long(), weight.long(), offsets)
    with pytest.raises(ZooError, match="weight is on meta, expected cpu, where x is"):
        kernels.grouped_matmul(x, weight.to("meta"), offsets)
    with pytest.raises(ZooError, match="source asks for 13 rows, x has none"):
        kernels.grouped_matmul(x[:0], weight, offsets, source=torch.arange(13))
    with pytest.raises(ZooError, match=r"source has dtype torch\.bool, expected an integer dtype"):
        kernels.grouped_matmul(x, weight, offsets, source=torch.ones(13, dtype=torch.bool))
    with pytest.raises(ZooError, match=r"offsets has shape \[1\], no group for 13 rows"):
        kernels.grouped_matmul(x, weight, offsets[:1])
    with pytest.raises(ZooError, match=r"weight has shape \[4\], expected 3 dimensions"):
        kernels.grouped_matmul(x, weight[0], offsets)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (9, 6), (2, 0, 6), (2, 3, 6), (300, 6)])
def test_block_diagonal(interleaved: bool, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weight = draw(*shape), draw(3, 2, 4, seed=1)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.block_diagonal_matmul(x, weight, interleaved=interleaved)

    if dtype == torch.float64:
        assert_agrees("block_diagonal_matmul", product, x, weight)
    else:
        assert_as_exact_as_reference("block_diagonal_matmul", dtype, product, x, weight)
    if interleaved:
        x = x.unflatten(-1, (2, 3)).mT.flatten(-2)
    expected = x @ torch.block_diag(*weight)
    found = product(draw(*shape), weight)
    assert_close(found, expected.unflatten(-1, (3, 4)).mT.flatten(-2) if interleaved else expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_block_diagonal_operator(interleaved: bool) -> None:
    x, weight = draw(5, 6).requires_grad_(), draw(3, 2, 4, seed=1).requires_grad_()

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return kernels.block_diagonal_matmul(x, weight, interleaved=interleaved)

    assert torch.autograd.gradcheck(product, (x, weight))
    operator = torch.ops.zoo.interleaved_matmul if interleaved else torch.ops.zoo.block_diagonal_matmul
    torch.library.opcheck(operator, (x, weight))
    assert counted_flops(product, x, weight) == 2 * 5 * 3 * 2 * 4
    compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight), product(x, weight))


def test_bad_blocks() -> None:
    x, weight = draw(5, 6), draw(3, 2, 4)
    with pytest.raises(ZooError, match=r"x has shape \[5, 6\], expected \[..., blocks \* input_width\] = \[..., 12\]"):
        kernels.block_diagonal_matmul(x, weight.mT)
    with pytest.raises(ZooError, match=r"weight has shape \[2, 4\], expected 3 dimensions"):
        kernels.block_diagonal_matmul(x, weight[0])
    with pytest.raises(ZooError, match="weight is on meta"):
        kernels.block_diagonal_matmul(x, weight.to("meta"))
    with pytest.raises(ZooError, match="expected one"):
        kernels.block_diagonal_matmul(x, weight.float())
