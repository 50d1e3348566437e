"""Routing: the best choices of each row and the sorted pairs, by every implementation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.grouped import Routing
from zoo.kernels.launch import without_gpu


def scores_of(rows: int, choices: int) -> Tensor:
    return torch.rand(rows, choices, generator=torch.Generator().manual_seed(rows)).softmax(-1)


def routed(implementation: str, scores: Tensor, top_k: int) -> Routing:
    if implementation == "triton":
        pytest.importorskip("triton")
    with without_gpu("sm_90"), kernels.use(route=implementation):
        return kernels.route(scores, top_k)


@pytest.mark.parametrize("implementation", ["triton", "torch"])
@pytest.mark.parametrize(("rows", "choices", "top_k"), [(0, 3, 1), (1, 1, 1), (7, 3, 3), (9, 1000, 2), (50, 6, 4)])
def test_agrees_with_reference(implementation: str, rows: int, choices: int, top_k: int) -> None:
    found, expected = (routed(each, scores_of(rows, choices), top_k) for each in (implementation, "reference"))
    for name, one, other in zip(Routing._fields, found, expected, strict=True):
        assert one.dtype == torch.int64 and torch.equal(one, other), name


@given(st.integers(1, 12), st.integers(1, 6), st.data())
def test_is_a_routing(rows: int, choices: int, data: st.DataObject) -> None:
    top_k, scores = data.draw(st.integers(1, choices)), scores_of(rows, choices)
    routing = kernels.route(scores, top_k)
    assert torch.equal(routing.chosen, scores.topk(top_k).indices)
    pairs = routing.chosen.flatten()
    order, offsets = kernels.sort_by_group(pairs, choices)
    assert torch.equal(routing.order, order) and torch.equal(routing.offsets, offsets)
    assert torch.equal(routing.order[routing.place.flatten()], torch.arange(len(pairs)))


@pytest.mark.parametrize("implementation", ["triton", "reference"])
def test_of_equal_scores_the_first(implementation: str) -> None:
    scores = torch.tensor([[0.0, 1.0, 1.0, 0.0], [-torch.inf] * 4, [1.0, torch.inf, torch.nan, 2.0]])
    chosen = routed(implementation, scores, 3).chosen
    assert chosen[:2].tolist() == [[1, 2, 0], [0, 1, 2]]
    assert set(chosen[2, :2].tolist()) == {1, 2} and chosen[2, 2] == 3


def test_experts_from_a_routing() -> None:
    x, weight, scores = torch.randn(9, 4), torch.randn(3, 5, 4), scores_of(9, 3)
    routing = kernels.route(scores, 2)
    made = kernels.grouped_matmul(x, weight, routing.offsets, source=routing.order // 2)[routing.place]
    torch.testing.assert_close(made, torch.einsum("ri,rkoi->rko", x, weight[routing.chosen]))


def test_operator_is_well_formed() -> None:
    pytest.importorskip("triton")
    from zoo.kernels.grouped import triton_path

    with without_gpu("sm_90"):
        torch.library.opcheck(triton_path._route, (scores_of(5, 3), 2))


def test_bad_input() -> None:
    with pytest.raises(ZooError, match="top_k is 4, expected 1 to the number of choices, 3"):
        kernels.route(scores_of(2, 3), 4)
    with pytest.raises(ZooError, match=r"scores has dtype torch\.int64, expected one of float32"):
        kernels.route(torch.ones(2, 3, dtype=torch.int64), 1)
    with pytest.raises(ZooError, match=r"scores has shape \[3\], expected 2 dimensions"):
        kernels.route(torch.ones(3), 1)
    with pytest.raises(ZooError, match="takes up to 1024 choices, not 1025"):
        routed("triton", scores_of(1, 1025), 1)
