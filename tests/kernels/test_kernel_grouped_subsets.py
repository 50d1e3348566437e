"""Products with the blocks that each row takes: sorted or not, in long runs and in none, forward and backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from agreement import assert_agrees, assert_as_exact_as_reference
from flops import counted_flops
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.grouped import subset_path

BLOCKS, OUTPUTS, WIDTH = 5, 6, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn_subsets(rows: int, taken: int) -> Tensor:
    """Different blocks for each row."""
    return torch.rand(rows, BLOCKS, generator=torch.Generator().manual_seed(rows)).topk(taken).indices


def long_runs(rows: int = 200) -> Tensor:
    """A block that all take, and others in three runs, of which two adjoining ones share one."""
    runs = torch.arange(rows) * 3 // rows
    return torch.stack([torch.full_like(runs, 4), torch.tensor([2, 2, 0])[runs], torch.tensor([0, 1, 3])[runs]], dim=1)


def operands(subsets: Tensor, transposed: bool, by_rows: bool = True) -> tuple[Tensor, Tensor]:
    rows, taken = subsets.shape
    weight = draw(BLOCKS, OUTPUTS, WIDTH, seed=1) if by_rows else draw(BLOCKS, WIDTH, OUTPUTS, seed=1).mT
    return draw(rows, OUTPUTS) if transposed else draw(rows, taken, WIDTH), weight


def product(subsets: Tensor, transposed: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, weight: kernels.subset_matmul(x, weight, subsets, transposed=transposed)


def one_by_one(x: Tensor, weight: Tensor, subsets: Tensor, transposed: bool) -> Tensor:
    if transposed:
        return torch.stack([torch.stack([w.T @ row for w in weight[own]]) for row, own in zip(x, subsets)])
    return torch.stack(
        [sum((w @ part for w, part in zip(weight[own], row)), x.new_zeros(OUTPUTS)) for row, own in zip(x, subsets)]
    )


@pytest.mark.parametrize("transposed", [False, True])
@given(rows=st.integers(1, 9), taken=st.integers(1, BLOCKS))
def test_is_each_row_by_itself(transposed: bool, rows: int, taken: int) -> None:
    subsets = drawn_subsets(rows, taken)
    x, weight = operands(subsets, transposed)
    assert_close(product(subsets, transposed)(x, weight), one_by_one(x, weight, subsets, transposed))
    assert_agrees("subset_matmul", product(subsets, transposed), x, weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("by_rows", [False, True])
def test_long_runs(transposed: bool, by_rows: bool) -> None:
    subsets = long_runs()
    x, weight = operands(subsets, transposed, by_rows)
    runs = subset_path._runs(subsets, weight)
    assert len(runs) == 3 and subset_path._long(runs, WIDTH)
    assert_close(product(subsets, transposed)(x, weight), one_by_one(x, weight, subsets, transposed))
    assert_agrees("subset_matmul", product(subsets, transposed), x, weight)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("subsets", [long_runs(), drawn_subsets(9, 2), torch.tensor([[1, 1], [1, 0]])])
def test_gradcheck(transposed: bool, subsets: Tensor) -> None:
    tensors = tuple(each.requires_grad_() for each in operands(subsets[:60], transposed))
    assert torch.autograd.gradcheck(product(subsets[:60], transposed), tensors)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(transposed: bool, dtype: torch.dtype) -> None:
    for subsets in (long_runs(), drawn_subsets(9, 2)):
        given = operands(subsets, transposed)
        assert_as_exact_as_reference("subset_matmul", dtype, product(subsets, transposed), *given)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("rows", "taken"), [(0, 2), (3, 0), (0, 0)])
def test_hardly_anything(transposed: bool, rows: int, taken: int) -> None:
    subsets = torch.zeros(rows, taken, dtype=torch.long)
    assert_agrees("subset_matmul", product(subsets, transposed), *operands(subsets, transposed))


def test_order_of_rows() -> None:
    subsets = drawn_subsets(40, 2)
    order = kernels.sort_by_subset(subsets, BLOCKS)
    assert order.sort().values.tolist() == list(range(40))
    found = subsets[order].tolist()
    assert found == sorted(found)


@pytest.mark.parametrize("transposed", [False, True])
def test_operators_are_well_formed(transposed: bool) -> None:
    subsets = drawn_subsets(7, 2)
    x, weight = (each.requires_grad_() for each in operands(subsets, transposed, by_rows=transposed))
    operator = torch.ops.zoo.subset_parts if transposed else torch.ops.zoo.subset_sums
    torch.library.opcheck(operator, (x, weight, subsets))
    call = product(subsets, transposed)
    assert counted_flops(call, x, weight) == 2 * 7 * 2 * OUTPUTS * WIDTH
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert_close(compiled(x, weight), call(x, weight))
    shape = call(x, weight).shape
    assert product(subsets.to("meta"), transposed)(x.to("meta"), weight.to("meta")).shape == shape


def test_bad_input() -> None:
    subsets = drawn_subsets(7, 2)
    x, weight = operands(subsets, False)
    with pytest.raises(ZooError, match=r"x has shape \[7, 2, 3\], expected .* \[7, 6\]"):
        kernels.subset_matmul(x, weight, subsets, transposed=True)
    with pytest.raises(ZooError, match=r"x has shape \[6, 2, 3\], expected .* \[7, 2, 3\]"):
        kernels.subset_matmul(x[1:], weight, subsets)
    with pytest.raises(ZooError, match=r"subsets are from 5 to 9, expected 0 to 4"):
        kernels.subset_matmul(x, weight, subsets * 0 + torch.tensor([5, 9]))
    with pytest.raises(ZooError, match="expected an integer dtype"):
        kernels.subset_matmul(x, weight, subsets.double())
    with pytest.raises(ZooError, match="weight is on meta"):
        kernels.subset_matmul(x, weight.to("meta"), subsets)
    with pytest.raises(ZooError, match="no block for 7 rows"):
        kernels.subset_matmul(x, weight[:0], subsets)
