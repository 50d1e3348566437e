"""Grouped products: any sizes of groups, empty ones too, forward and backward."""

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


def inputs(sizes: list[int], input_width: int = 4, output_width: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), input_width, dtype=torch.float64)
    weight = torch.randn(len(sizes), output_width, input_width, dtype=torch.float64)
    return x, weight, torch.tensor([0, *sizes]).cumsum(0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5))
def test_agrees_with_reference(sizes: list[int]) -> None:
    assert_agrees("grouped_matmul", kernels.grouped_matmul, *inputs(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    assert_as_exact_as_reference("grouped_matmul", dtype, kernels.grouped_matmul, *inputs([9, 0, 20, 3], 32, 16))


def test_rows_in_any_order() -> None:
    group = torch.tensor([2, 0, 3, 2, 2, 0])
    order, offsets = kernels.sort_by_group(group, 5)
    assert offsets.tolist() == [0, 2, 2, 5, 6, 6]
    assert order.tolist() == [1, 5, 0, 3, 4, 2]
    x, weight, _ = inputs([2, 0, 3, 1, 0])
    out = torch.empty(6, 3, dtype=torch.float64)
    out[order] = kernels.grouped_matmul(x[order], weight, offsets)
    assert_close(out, torch.einsum("ri,roi->ro", x, weight[group]))


def test_gradcheck() -> None:
    x, weight, offsets = inputs([2, 0, 1])
    tensors = (x.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda x, weight: kernels.grouped_matmul(x, weight, offsets), tensors)


def test_operators_are_well_formed() -> None:
    x, weight, offsets = inputs([2, 0, 1])
    torch.library.opcheck(torch.ops.zoo.grouped_matmul, (x.requires_grad_(), weight.requires_grad_(), offsets))


def test_meta() -> None:
    x, weight, offsets = (each.to("meta") for each in inputs([2, 0, 1]))
    assert kernels.grouped_matmul(x, weight, offsets).shape == (3, 3)
    order, bounds = kernels.sort_by_group(torch.empty(7, dtype=torch.long, device="meta"), 4)
    assert (order.shape, bounds.shape) == ((7,), (5,))


def test_bad_input() -> None:
    x, weight, offsets = inputs([2, 0, 1])
    with pytest.raises(ZooError, match=r"weight has shape \[3, 4, 3\], expected .* \[3, 4, 4\]"):
        kernels.grouped_matmul(x, weight.transpose(1, 2), offsets)
    with pytest.raises(ZooError, match=r"offsets has shape \[3\], expected \[groups \+ 1\] = \[4\]"):
        kernels.grouped_matmul(x, weight, offsets[1:])
    with pytest.raises(ZooError, match=r"offsets are \[0, 2, 1, 3\], expected to ascend"):
        kernels.grouped_matmul(x, weight, torch.tensor([0, 2, 1, 3]))
    with pytest.raises(ZooError, match="expected an integer dtype"):
        kernels.grouped_matmul(x, weight, offsets.double())
