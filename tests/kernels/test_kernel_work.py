"""The analytic work of each primitive against the products that torch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from flops import counted_flops

from zoo import kernels
from zoo.kernels import work
from zoo.kernels.work import RecurrentShape


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


@pytest.mark.parametrize("tokens", [1, 300, 512, 700, 1024, 2048, 2050])
def test_causal_attention_leaves_out_keys_behind_a_block(tokens: int) -> None:
    met = sum(min(-(-(query + 1) // work.ATTENTION_KEYS) * work.ATTENTION_KEYS, tokens) for query in range(tokens))
    assert work.causal_spared(tokens) == pytest.approx(1 - met / tokens**2, abs=1e-12)
    assert (work.causal_spared(tokens) > 0) == (tokens > work.ATTENTION_KEYS)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 100])
@pytest.mark.parametrize("decays", [False, True])
def test_recurrence(device: str, tokens: int, decays: bool) -> None:
    q, k = (torch.randn(2, tokens, 2, 3, device=device) for _ in range(2))
    v = torch.randn(2, tokens, 6, 5, device=device)
    log_decay = -torch.rand(6, device=device) if decays else None
    for chunk in (16, work.CHUNK):
        counted = counted_flops(kernels.recurrence, q, k, v, log_decay=log_decay, chunk=chunk)
        assert counted == work.recurrence_flops(RecurrentShape(2, tokens, 2, 6, 3, 5), chunk=chunk)


@pytest.mark.parametrize("tokens", [0, 1, 5, 64, 100])
def test_recurrence_with_a_decay_for_each_channel(tokens: int) -> None:
    v = torch.randn(2, tokens, 6, 5)
    for groups in (2, 6):
        q, k = (torch.randn(2, tokens, 2, 3) for _ in range(2))
        log_decay = -torch.rand(2, tokens, groups, 3)
        counted = counted_flops(kernels.recurrence, q, k, v, log_decay=log_decay, chunk=16)
        shape = RecurrentShape(2, tokens, groups, 6, 3, 5)
        assert counted == work.recurrence_flops(shape, chunk=16, channels=True)


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 40])
@pytest.mark.parametrize("decay", [None, (2, -1, 6), (2, -1, 2, 3)])
def test_backward_of_recurrence(tokens: int, decay: tuple[int, ...] | None) -> None:
    q, k = (torch.randn(2, tokens, 2, 3, requires_grad=True) for _ in range(2))
    v = torch.randn(2, tokens, 6, 5, requires_grad=True)
    log_decay = None if decay is None else (-torch.rand(decay[0], tokens, *decay[2:])).requires_grad_()
    out, _ = kernels.recurrence(q, k, v, log_decay=log_decay, chunk=16)
    expected = work.recurrence_backward_flops(
        RecurrentShape(2, tokens, 2, 6, 3, 5), chunk=16, channels=decay is not None and len(decay) == 4
    )
    assert counted_flops(out.sum().backward) == expected


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tokens", [0, 1, 5, 16, 40])
@pytest.mark.parametrize("steps", [1, 3])
def test_delta_rule(device: str, tokens: int, steps: int) -> None:
    q = torch.randn(2, tokens, 2, 3, device=device)
    k = torch.randn(2, tokens * steps, 2, 3, device=device)
    v, beta = torch.randn(2, tokens * steps, 6, 5, device=device), torch.rand(2, tokens * steps, 6, device=device)
    counted = counted_flops(kernels.delta_rule, q, k, v, beta, steps=steps, chunk=16)
    assert counted == work.delta_rule_flops(RecurrentShape(2, tokens, 2, 6, 3, 5), steps=steps, chunk=16)


def test_systems_of_the_delta_rule() -> None:
    """A chunk of two steps has one entry below the diagonal, so one multiplication and one addition a column."""
    four, two, one = (RecurrentShape(1, tokens, 1, 1, 3, 5) for tokens in (4, 2, 1))
    assert work.delta_rule_solve(four, chunk=2) == 2 * 2 * 5
    assert work.delta_rule_solve(two, steps=2, chunk=2) == 2 * 2 * 5
    assert work.delta_rule_solve(one) == 0


def test_spectra() -> None:
    """Two rows of 5 tokens and filters of 3 need transforms of 7 rounded up to 8: five for the two inputs, their two
    outputs and the filter, with 8 log2 8 times 2.5, and 5 products of spectra for each row.
    """
    x, filters = torch.randn(2, 5, 1), torch.randn(1, 3)
    assert counted_flops(kernels.long_convolution, x, filters) == work.long_convolution_flops(2, 5, 1, 3) == 0
    assert work.long_convolution_pointwise(2, 5, 1, 3) == 5 * 60 + 6 * 2 * 5
    assert work.long_convolution_pointwise(2, 0, 1, 3) == 0


@pytest.mark.parametrize("wanted", [0, 1, 2])
def test_linear_cross_entropy(wanted: int) -> None:
    x, weight = torch.randn(6, 4, requires_grad=wanted > 0), torch.randn(5, 4, requires_grad=wanted > 1)
    targets = torch.tensor([0, 1, 2, 3, 4, 0])
    counted = counted_flops(kernels.linear_cross_entropy, x, weight, targets)
    assert counted == work.linear_cross_entropy_flops(6, 4, 5, gradients=wanted)
    loss = kernels.linear_cross_entropy(x, weight, targets)
    assert wanted == 0 or counted_flops(loss.backward) == 0


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_block_diagonal_matmul(device: str) -> None:
    x, weight = torch.randn(2, 5, 12, device=device), torch.randn(3, 4, 6, device=device)
    counted = counted_flops(kernels.block_diagonal_matmul, x, weight)
    assert counted == work.block_diagonal_matmul_flops(10, 3, 4, 6)


@pytest.mark.parametrize("tokens", [1, 9])
def test_element_wise_primitives(tokens: int) -> None:
    x, delta = torch.randn(2, tokens, 6), torch.rand(2, tokens, 6)
    B = torch.randn(2, tokens, 4)
    counted = counted_flops(kernels.selective_scan, x, delta, -torch.rand(6, 4), B, B)
    assert counted == work.selective_scan_flops(2, tokens, 6, 4)
    assert counted_flops(kernels.diagonal_scan, x, delta) == work.diagonal_scan_flops(2, tokens, 6) == 0
    assert work.diagonal_scan_pointwise(2, tokens, 6) == 24 * tokens
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
