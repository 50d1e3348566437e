"""The analytic work of each primitive against the products that torch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from flops import counted_flops

from zoo import kernels
from zoo.kernels import work


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("tokens", "keys", "window", "causal", "softcap"),
    [
        (33, 33, None, True, None),
        (33, 33, None, False, None),
        (1, 50, None, True, None),
        (1, 16, 16, True, None),
        (20, 50, None, True, None),
        (33, 33, 5, True, None),
        (300, 300, 40, True, None),
        (300, 339, 40, True, None),
        (700, 700, 256, True, None),
        (300, 300, 40, False, None),
        (300, 300, 40, True, 3.0),
    ],
)
def test_attention(
    device: str, tokens: int, keys: int, window: int | None, causal: bool, softcap: float | None
) -> None:
    q, k, v = (torch.randn(2, length, heads, 8, device=device) for length, heads in ((tokens, 4), (keys, 2), (keys, 2)))
    counted = counted_flops(kernels.attention, q, k, v, causal=causal, window=window, past=keys, softcap=softcap)
    assert counted == work.attention_flops(2, tokens, keys, 4, 8, causal=causal, window=window, softcap=softcap)


def test_attention_with_other_values_and_extras() -> None:
    q, k, v = torch.randn(2, 300, 4, 8), torch.randn(2, 300, 4, 8), torch.randn(2, 300, 4, 6)
    counted = counted_flops(kernels.attention, q, k, v, window=32, alibi_slopes=torch.ones(4))
    assert counted == work.attention_flops(2, 300, 300, 4, 8, 6, window=32)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 100])
@pytest.mark.parametrize("decays", [False, True])
def test_recurrence(device: str, tokens: int, decays: bool) -> None:
    q, k = (torch.randn(2, tokens, 2, 3, device=device) for _ in range(2))
    v = torch.randn(2, tokens, 6, 5, device=device)
    log_decay = -torch.rand(6, device=device) if decays else None
    for chunk in (16, work.CHUNK):
        counted = counted_flops(kernels.recurrence, q, k, v, log_decay=log_decay, chunk=chunk)
        assert counted == work.recurrence_flops(2, tokens, 2, 6, 3, 5, chunk=chunk)


@pytest.mark.parametrize("tokens", [1, 9])
def test_element_wise_primitives(tokens: int) -> None:
    x, delta = torch.randn(2, tokens, 6), torch.rand(2, tokens, 6)
    B = torch.randn(2, tokens, 4)
    counted = counted_flops(kernels.selective_scan, x, delta, -torch.rand(6, 4), B, B)
    assert counted == work.selective_scan_flops(2, tokens, 6, 4)
    counted = counted_flops(kernels.causal_convolution, x, torch.randn(6, 4))
    assert counted == work.causal_convolution_flops(2, tokens, 6, 4) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_grouped_matmul(device: str) -> None:
    x, weight = torch.randn(10, 4, device=device), torch.randn(3, 5, 4, device=device)
    offsets = torch.tensor([0, 3, 3, 10], device=device)
    assert counted_flops(kernels.grouped_matmul, x, weight, offsets) == work.grouped_matmul_flops(10, 4, 5)


def test_backward_of_grouped_matmul_is_counted() -> None:
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 10])
    counted = counted_flops(lambda: kernels.grouped_matmul(x, weight, offsets).sum().backward())
    assert counted == 3 * work.grouped_matmul_flops(10, 4, 5)


def test_blocks_are_worth_it() -> None:
    """At length 2048 with a window of 256, the block path does less than a quarter of the whole products."""
    assert 4 * work.attention_flops(1, 2048, 2048, 8, 64, window=256) < work.attention_flops(1, 2048, 2048, 8, 64)
