"""Every primitive compiles into one graph, with gradients; the operators that hide loops stay whole in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from agreement import outputs_and_gradients
from torch import Tensor

from zoo import kernels

SEGMENTS = torch.arange(150).expand(2, -1) // 70


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float64)


def moe(x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
    order, offsets = kernels.sort_by_group(group, 3)
    return kernels.grouped_matmul(x[order], weight, offsets)


HEADS = random(2, 150, 4, 8), random(2, 150, 2, 8), random(2, 150, 2, 8)
CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "attention": (kernels.attention, HEADS),
    "window": (lambda q, k, v: kernels.attention(q, k, v, window=40, segments=SEGMENTS), HEADS),
    "softcap": (
        lambda q, k, v: kernels.attention(q, k, v, softcap=3.0, alibi_slopes=torch.ones(4, dtype=torch.float64)),
        HEADS,
    ),
    "recurrence": (
        lambda v, k, q, a: kernels.recurrence(q, k, v, log_decay=-a.exp(), segments=SEGMENTS),
        (*HEADS, random(2, 150, 4)),
    ),
    "selective_scan": (
        lambda x, a, b: kernels.selective_scan(x, x.exp(), -a.exp(), b, b, segments=SEGMENTS),
        (random(2, 150, 6), random(6, 4), random(2, 150, 4)),
    ),
    "causal_convolution": (
        lambda x, w: kernels.causal_convolution(x, w, segments=SEGMENTS, activation="silu"),
        (random(2, 150, 6), random(6, 4)),
    ),
    "rotary": (lambda x: kernels.rotary(x, torch.arange(150), dim=4), HEADS[:1]),
    "norms": (lambda x: kernels.layer_norm(kernels.rms_norm(x)), HEADS[:1]),
    "grouped_matmul": (moe, (random(20, 8), random(3, 5, 8), torch.arange(20) % 2)),
}


def assert_compiles(backend: str, name: str) -> None:
    function, inputs = CASES[name]
    torch._dynamo.reset()
    actual = outputs_and_gradients(torch.compile(function, fullgraph=True, backend=backend), inputs)
    expected = outputs_and_gradients(function, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_one_graph(name: str) -> None:
    assert_compiles("aot_eager", name)


@pytest.mark.slow
def test_inductor() -> None:
    assert_compiles("inductor", "selective_scan")
    q, k, v, log_decay = (x[:, :100] for x in (HEADS[1], HEADS[1], *CASES["recurrence"][1][::3]))
    with torch.no_grad():
        compiled = torch.compile(kernels.recurrence, fullgraph=True, backend="inductor")
        torch.testing.assert_close(
            compiled(q, k, v, log_decay=-log_decay.exp()), kernels.recurrence(q, k, v, log_decay=-log_decay.exp())
        )


def test_a_choice_holds_in_a_compiled_function() -> None:
    with kernels.use(rms_norm="reference"):
        compiled = torch.compile(kernels.rms_norm, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(HEADS[0]), kernels.rms_norm(HEADS[0]))
