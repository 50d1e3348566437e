"""Attention's patterns, score terms and log-sum-exp: torch path against reference, what must hold, and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agreement import assert_agrees, assert_as_exact_as_reference
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.launch import without_gpu
from zoo.kernels.work import attention_block


def heads(batch: int, tokens: int, keys: int, count: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, count, 4, dtype=torch.float64)
    k, v = (torch.randn(batch, keys, kv_heads, size, dtype=torch.float64) for size in (4, 3))
    return q, k, v


def gates(batch: int, keys: int, count: int = 4) -> Tensor:
    """Logarithms of forget gates, some of which are shut."""
    found = -torch.rand(batch, keys, count, dtype=torch.float64)
    found[:, 5::11, 0] = float("-inf")
    return found


@given(st.data())
def test_agrees_with_reference(data: st.DataObject) -> None:
    draw = data.draw
    batch, tokens, more = draw(st.integers(1, 2)), draw(st.integers(1, 70)), draw(st.integers(0, 40))
    keys = tokens + more
    q, k, v = heads(batch, tokens, keys)
    causal = draw(st.booleans())
    flags: dict[str, Any] = {
        "causal": causal,
        "window": draw(st.none() | st.integers(1, 90)),
        "dilation": draw(st.sampled_from([1, 1, 3])),
        "past": more + draw(st.integers(0, 3)),
        "softcap": draw(st.sampled_from([None, None, 1.5])),
        "clip": draw(st.sampled_from([None, None, (1.1, -0.05)])),
        "return_lse": draw(st.booleans()),
    }
    tensors: dict[str, Tensor] = {}
    if draw(st.booleans()):
        tensors["bias"] = torch.randn(4, draw(st.integers(1, 30)), dtype=torch.float64)
    if draw(st.booleans()):
        tensors["alibi_slopes"] = torch.rand(4, dtype=torch.float64)
    if draw(st.booleans()):
        flags["segments"] = (torch.arange(keys) // 40).expand(batch, -1)
    if draw(st.booleans()):
        flags["key_length"] = torch.tensor([keys, keys // 2][-batch:])
    if draw(st.booleans()):
        end = flags["past"] + tokens
        flags["blocks"] = torch.rand(draw(st.sampled_from([1, 4])), *[-(-end // 16)] * 2) < 0.7
        flags["block"] = 16
    if causal and draw(st.booleans()):
        tensors["log_forget"] = gates(batch, keys)
    elif draw(st.booleans()):
        flags["prefix"] = draw(st.integers(0, 50)) if draw(st.booleans()) else torch.tensor([20, 3][:batch])
    if tensors or draw(st.booleans()):
        # With it no gradient of the others is zero but for rounding, as with a single key.
        tensors["sink"] = torch.randn(4, dtype=torch.float64)
    elif flags["return_lse"]:
        # A row without keys has -inf, which no error is relative to; one that sees all has not.
        flags |= {"key_length": None, "blocks": None, "block": None}
    assert_agrees(
        "attention",
        lambda q, k, v, *rest: kernels.attention(q, k, v, **dict(zip(tensors, rest, strict=True)), **flags),
        q,
        k,
        v,
        *tensors.values(),
    )


@pytest.mark.parametrize("keys", [230, 275])
@pytest.mark.parametrize("term", ["sink", "bias", "log_forget", "dilation"])
def test_blocks_of_a_window(keys: int, term: str) -> None:
    tokens, window = 230, 37
    assert attention_block(tokens, keys, window, True) is not None
    q, k, v = heads(2, tokens, keys)
    given: dict[str, Tensor] = {
        "sink": torch.randn(4, dtype=torch.float64),
        "bias": torch.randn(4, 20, dtype=torch.float64),
        "log_forget": gates(2, keys),
    }
    flags: dict[str, Any] = {"window": window, "past": keys - tokens, "dilation": 2 if term == "dilation" else 1}
    tensors = [given[term]] if term in given else []
    assert_agrees(
        "attention",
        lambda q, k, v, *one: kernels.attention(q, k, v, **flags, **dict(zip([term], one, strict=False))),
        q,
        k,
        v,
        *tensors,
    )


@pytest.mark.parametrize("term", ["sink", "bias", "log_forget", "clip"])
def test_as_exact_as_reference(term: str) -> None:
    q, k, v = heads(2, 13, 13)
    given: dict[str, Any] = {"sink": torch.randn(4), "bias": torch.randn(4, 9), "log_forget": gates(2, 13)}
    flags = {term: given.get(term, (1.1, -0.01))}
    assert_as_exact_as_reference(
        "attention", torch.bfloat16, lambda q, k, v: kernels.attention(q, k, v, **flags), q, k, v
    )


def test_reference_gradcheck() -> None:
    torch.manual_seed(0)
    q, k, v = heads(1, 3, 4, 2, 1)
    terms = {
        "bias": torch.randn(2, 3, dtype=torch.float64),
        "sink": torch.randn(2, dtype=torch.float64),
        "alibi_slopes": torch.rand(2, dtype=torch.float64),
        "log_forget": -torch.rand(1, 4, 2, dtype=torch.float64),
    }

    def call(*given: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.attention(*given[:3], past=1, return_lse=True, **dict(zip(terms, given[3:], strict=True)))

    inputs = [x.requires_grad_() for x in (q, k, v, *terms.values())]
    with kernels.use(attention="reference"):
        assert torch.autograd.gradcheck(call, inputs)


def test_forget_gate_is_its_formula() -> None:
    q, k, v = heads(1, 6, 6)
    log_forget = -torch.rand(1, 6, 4, dtype=torch.float64)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 2
    for i in range(6):
        for j in range(6):
            scores[:, :, i, j] += log_forget[:, j + 1 : i + 1].sum(1) if j <= i else float("-inf")
    expected = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.repeat_interleave(2, 2))
    assert_close(kernels.attention(q, k, v, log_forget=log_forget), expected)


def test_a_shut_gate_hides_what_was_before() -> None:
    q, k, v = heads(2, 10, 10)
    log_forget = -torch.rand(2, 10, 4, dtype=torch.float64)
    log_forget[:, 6] = float("-inf")
    whole = kernels.attention(q, k, v, log_forget=log_forget)
    after = kernels.attention(q[:, 6:], k[:, 6:], v[:, 6:], log_forget=log_forget[:, 6:])
    assert_close(whole[:, 6:], after)


def test_a_sink_is_a_key_without_a_value() -> None:
    q, k, v = heads(2, 7, 7)
    out, lse = kernels.attention(q, k, v, return_lse=True)
    sink = torch.randn(4, dtype=torch.float64)
    assert_close(kernels.attention(q, k, v, sink=sink), out * (lse - lse.logaddexp(sink)).exp()[..., None])


def test_parts_merge_by_their_log_sum_exps() -> None:
    q, k, v = heads(2, 1, 20)
    flags: dict[str, Any] = {"return_lse": True, "causal": False}
    whole, total = kernels.attention(q, k, v, **flags)
    parts = [kernels.attention(q, k[:, a:b], v[:, a:b], **flags) for a, b in ((0, 3), (3, 3), (3, 20))]
    lse = torch.stack([lse for _, lse in parts])
    assert_close(lse.logsumexp(0), total)
    assert_close(sum(out * (one - total).exp()[..., None] for out, one in parts), whole)  # type: ignore[arg-type]


def test_a_prefix_is_seen_by_all() -> None:
    q, k, v = heads(2, 9, 9)
    out = kernels.attention(q, k, v, prefix=torch.tensor([4, 0]))
    assert_close(out[0, :4], kernels.attention(q[:1, :4], k[:1, :4], v[:1, :4], causal=False)[0])
    assert_close(out[0, 4:], kernels.attention(q, k, v)[0, 4:])
    assert_close(out[1], kernels.attention(q, k, v)[1])


def test_dilation_is_attention_within_residue_classes() -> None:
    q, k, v = heads(1, 12, 12)
    out = kernels.attention(q, k, v, dilation=3, window=6)
    for residue in range(3):
        assert_close(out[:, residue::3], kernels.attention(*(x[:, residue::3] for x in (q, k, v)), window=2))


def test_blocks_of_the_diagonal_are_sequences_apart() -> None:
    q, k, v = heads(2, 12, 12)
    out = kernels.attention(q, k, v, blocks=torch.eye(3, dtype=torch.bool), block=4)
    assert_close(out, kernels.attention(q, k, v, segments=torch.arange(12).expand(2, -1) // 4))


@pytest.mark.parametrize(
    "flags", [{"prefix": 5, "window": 3}, {"dilation": 2}, {"block": 4}, {"log_forget": gates(2, 11)}]
)
def test_token_by_token_equals_whole(flags: dict[str, Any]) -> None:
    q, k, v = heads(2, 11, 11)
    if "block" in flags:
        flags = {**flags, "blocks": torch.rand(3, 3) < 0.6}
    whole = kernels.attention(q, k, v, **flags)
    for t in range(5, 11):
        step = {name: value[:, : t + 1] if name == "log_forget" else value for name, value in flags.items()}
        assert_close(
            kernels.attention(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1], past=t, **step), whole[:, t : t + 1]
        )


def test_clipped_weights() -> None:
    q, k, v = heads(1, 5, 5, 1, 1)
    scores = (q[:, :, 0] @ k[:, :, 0].mT) / 2
    weights = (1.2 * scores.softmax(-1) - 0.1).clamp(0, 1)
    assert_close(kernels.attention(q, k, v, causal=False, clip=(1.1, -0.1))[:, :, 0], weights @ v[:, :, 0])


def test_a_row_without_keys_gives_zeros_and_finite_gradients() -> None:
    inputs = [x.requires_grad_() for x in heads(2, 4, 4)]
    length = torch.tensor([0, 4])
    for flags in ({}, {"sink": torch.zeros(4, dtype=torch.float64)}, {"clip": (1.1, -0.1)}, {"return_lse": True}):
        found = kernels.attention(*inputs, key_length=length, **flags)  # type: ignore[call-overload]
        out, *lse = found if isinstance(found, tuple) else (found,)
        assert out[0].eq(0).all()
        assert all(one[0].isneginf().all() and one[1].isfinite().all() for one in lse)
        assert all(x.isfinite().all() for x in torch.autograd.grad(out.square().sum(), inputs))


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 3, 3), (2, 0, 4), (1, 2, 0)])
def test_empty(batch: int, tokens: int, keys: int) -> None:
    q, k, v = heads(batch, tokens, keys)
    out, lse = kernels.attention(q, k, v, past=keys, causal=False, sink=torch.ones(4), return_lse=True)
    assert out.shape == (batch, tokens, 4, 3)
    assert lse.shape == (batch, tokens, 4)
    assert keys or lse.eq(1).all()


def test_bad_input() -> None:
    q, k, v = heads(2, 7, 7)

    def refused(match: str, **flags: Any) -> None:
        with pytest.raises(ZooError, match=match):
            kernels.attention(q, k, v, **flags)

    refused("dilation is 0, expected at least 1", dilation=0)
    refused("prefix is -1, expected at least 0", prefix=-1)
    refused(r"prefix has shape \[3\], expected \[batch\] = \[2\]", prefix=torch.zeros(3, dtype=torch.long))
    refused("blocks and block come together", block=4)
    refused(r"blocks has dtype torch.float32, expected torch.bool", blocks=torch.ones(2, 2), block=4)
    refused(r"blocks has shape \[1, 1, 2\].* \[4, 2, 2\]", blocks=torch.ones(1, 2, dtype=torch.bool), block=4)
    refused(r"bias has shape \[3, 5\]", bias=torch.zeros(3, 5))
    refused(r"bias has shape \[4, 0\]", bias=torch.zeros(4, 0))
    refused(r"sink has shape \[5\]", sink=torch.zeros(5))
    refused(r"log_forget has shape \[2, 4, 7\]", log_forget=torch.zeros(2, 4, 7))
    refused("log_forget goes from earlier to later", log_forget=torch.zeros(2, 7, 4), causal=False)
    refused(r"clip is \(0.9, 0\)", clip=(0.9, 0))
    refused("sink is on meta, expected cpu, where q is", sink=torch.zeros(4, device="meta"))
    with pytest.raises(ZooError, match=r"q has dtype torch.int64, expected one of float32"):
        kernels.attention(q.long(), k.long(), v.long())


def test_the_kernels_say_why_not() -> None:
    q, k, v = (x.float() for x in heads(1, 7, 7))

    def refused(match: str, *given: Tensor, **flags: Any) -> None:
        with (
            without_gpu("sm_90"),
            kernels.use(attention="triton"),
            pytest.raises(ZooError, match=match),
        ):
            kernels.attention(*given, **flags)

    refused("served by PyTorch's own", q, k, v)
    refused("takes float32, float16, bfloat16, not float64", *(x.double() for x in (q, k, v)), window=3)
    refused("multiples of 128", q, k, v, blocks=torch.ones(1, 1, dtype=torch.bool), block=16)
    refused("heads up to 256 wide, not 300", *(torch.zeros(1, 4, 1, 300) for _ in range(3)), window=3)
    with kernels.use(attention="triton"), pytest.raises(ZooError, match="needs a CUDA device"):
        kernels.attention(q, k, v, window=3)
