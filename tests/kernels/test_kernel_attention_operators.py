"""Attention's operators as PyTorch sees them, and what its kernels promise beyond the cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.kernels.launch import without_gpu

pytest.importorskip("triton", reason="Triton is not installed on this system")

CHECKS = ("test_schema", "test_faketensor", "test_autograd_registration")


def inputs(tokens: int = 20, keys: int = 20) -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "q": torch.randn(1, tokens, 2, 16),
        "k": torch.randn(1, keys, 1, 16),
        "v": torch.randn(1, keys, 1, 16),
        "sink": torch.randn(2),
        "log_forget": -torch.rand(1, keys, 2),
        "bias": torch.randn(2, 7),
        "alibi_slopes": torch.rand(2),
    }


def served(function: Callable[[], Any]) -> Any:
    with without_gpu("sm_90"), kernels.use(attention="triton"):
        return function()


def test_operators_keep_their_contracts() -> None:
    from zoo.kernels.softmax_attention import triton_path

    given = {name: x.requires_grad_() for name, x in inputs().items()}
    decay = given["log_forget"].detach().double().cumsum(1).transpose(1, 2).contiguous().requires_grad_()
    tensors = [given["q"], given["k"], given["v"], None, None, None, None]
    tensors += [given["alibi_slopes"], given["bias"], decay, given["sink"]]
    rest = (True, 5, 1, 1, 0, 0, 0.25, 3.0, None, None)
    with without_gpu("sm_90"):
        torch.library.opcheck(triton_path._forward, (*tensors, *rest), test_utils=CHECKS)
        out, log_sum = (x.detach() for x in triton_path._forward(*tensors, *rest))
        detached = [None if x is None else x.detach() for x in tensors]
        arguments = (out, None, out, log_sum, [True] * 4, *detached, *rest)
        torch.library.opcheck(triton_path._backward, arguments, test_utils=CHECKS)


def test_only_wanted_gradients() -> None:
    given = inputs()
    q = given["q"].requires_grad_()

    def gradient() -> Tensor:
        return torch.autograd.grad(kernels.attention(**given, window=9).sum(), q)[0]

    assert_close(served(gradient), gradient())


def test_a_shut_gate_lets_nothing_through() -> None:
    given = inputs()
    given["log_forget"][:, 8] = float("-inf")
    leaves = [x.requires_grad_() for x in given.values()]

    def result() -> tuple[Tensor, ...]:
        out = kernels.attention(**given)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    found = served(result)
    for one, other in zip(found, result(), strict=True):
        assert_close(one, other)
    assert found[5][:, 8].eq(0).all()


@pytest.mark.parametrize("flags", [{"window": 4}, {"clip": (1.1, -0.1)}, {"dilation": 3}])
def test_rows_without_keys_give_zeros(flags: dict[str, Any]) -> None:
    q, k, v = (inputs()[name].requires_grad_() for name in "qkv")

    def result() -> tuple[Tensor, ...]:
        out, lse = kernels.attention(q, k, v, key_length=torch.tensor([0]), return_lse=True, **flags)
        return lse, out, *torch.autograd.grad(out.sum(), (q, k, v))

    lse, *zeros = served(result)
    assert lse.isneginf().all()
    assert all(x.eq(0).all() for x in zeros)


@pytest.mark.parametrize(("tokens", "keys"), [(0, 5), (3, 0)])
def test_empty(tokens: int, keys: int) -> None:
    given: dict[str, Any] = inputs(tokens, keys)
    del given["log_forget"]
    for x in given.values():
        x.requires_grad_()

    def result() -> tuple[Tensor, ...]:
        out, lse = kernels.attention(**given, past=keys, causal=False, return_lse=True)
        return lse, out, *torch.autograd.grad(out.sum() + lse.sum(), (given["q"], given["k"]))

    lse, *zeros = served(result)
    assert lse.shape == (1, tokens, 2)
    assert keys or torch.equal(lse, given["sink"].expand(1, tokens, 2))
    assert all(x.eq(0).all() for x in zeros)


def test_views_are_read_as_they_are() -> None:
    torch.manual_seed(0)
    joined = torch.randn(2, 30, 6, 16)
    q, k, v = joined.split([4, 1, 1], 2)
    apart = [x.contiguous() for x in (q, k, v)]
    assert torch.equal(
        served(lambda: kernels.attention(q, k, v, window=7)), served(lambda: kernels.attention(*apart, window=7))
    )
    turned = [x.transpose(1, 3).contiguous().transpose(1, 3) for x in apart]
    assert torch.equal(
        served(lambda: kernels.attention(*turned, window=7)), served(lambda: kernels.attention(*apart, window=7))
    )


def test_steps_with_gradients_after_a_cache() -> None:
    given = inputs(2, 90)
    leaves = [x.requires_grad_() for x in given.values()]

    def result() -> tuple[Tensor, ...]:
        out = kernels.attention(**given, past=88)
        return out, *torch.autograd.grad(out.square().sum(), leaves)

    for one, other in zip(served(result), result(), strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("flags", [{"window": 9, "segments": torch.zeros(1, 20, dtype=torch.long)}, {"prefix": 5}])
def test_compiles_into_one_graph(flags: dict[str, Any]) -> None:
    from zoo.kernels.softmax_attention import triton_path
    from zoo.kernels.softmax_attention.terms import Extras, Rules

    given = inputs()
    rules = Rules(causal=True, scale=0.25, window=flags.get("window"))
    prefix = torch.tensor([5]) if "prefix" in flags else None
    extras = Extras(segments=flags.get("segments"), prefix=prefix, sink=given["sink"], bias=given["bias"])

    def result(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return triton_path.attention(q, k, v, extras, rules)[0]

    leaves = [given[name].requires_grad_() for name in "qkv"]
    with without_gpu("sm_90"):
        out = torch.compile(result, fullgraph=True, backend="aot_eager")(*leaves)
        found = torch.autograd.grad(out.square().sum(), leaves)
        plain = torch.autograd.grad(result(*leaves).square().sum(), leaves)
    for one, other in zip(found, plain, strict=True):
        assert torch.equal(one, other)
