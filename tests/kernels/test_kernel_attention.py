"""Attention: every mask and score change against the reference, in one piece and token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from agreement import assert_agrees, assert_as_exact_as_reference
from hypothesis import given
from hypothesis import strategies as st
from tolerance import assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.work import attention_block


def inputs(
    batch: int = 2, tokens: int = 7, keys: int | None = None, heads: int = 4, kv_heads: int = 2, head_dim: int = 4
) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    keys = tokens if keys is None else keys
    shapes = (batch, tokens, heads, head_dim), (batch, keys, kv_heads, head_dim), (batch, keys, kv_heads, head_dim)
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q, k, v


def packed(batch: int, keys: int) -> Tensor:
    return torch.stack([(torch.arange(keys) * (row + 2)) // 9 for row in range(batch)])


@given(st.data())
def test_agrees_with_reference(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    tokens, more = draw(st.integers(1, 90)), draw(st.integers(0, 70))
    keys = tokens + more
    q, k, v = inputs(draw(st.integers(1, 2)), tokens, keys, kv_heads * draw(st.integers(1, 3)), kv_heads)
    v = torch.cat([v, v], -1)[..., : draw(st.integers(1, 8))]
    flags: dict[str, Any] = {
        "causal": draw(st.booleans()),
        "window": draw(st.none() | st.integers(1, 100)),
        "past": more + draw(st.integers(0, 3)),
        "softcap": draw(st.none() | st.just(1.5)),
        "scale": draw(st.none() | st.just(0.3)),
    }
    if draw(st.booleans()):
        flags["segments"] = packed(q.shape[0], keys)
    if draw(st.booleans()):
        flags["key_length"] = torch.tensor([keys // 2, 0][: q.shape[0]])
    if draw(st.booleans()):
        slopes = torch.rand(q.shape[2], dtype=torch.float64)
        assert_agrees(
            "attention", lambda q, k, v, a: kernels.attention(q, k, v, alibi_slopes=a, **flags), q, k, v, slopes
        )
    else:
        assert_agrees("attention", lambda q, k, v: kernels.attention(q, k, v, **flags), q, k, v)


@pytest.mark.parametrize("keys", [230, 275])
@pytest.mark.parametrize("extra", ["none", "segments", "alibi", "key_length"])
def test_blocks_of_a_window(keys: int, extra: str) -> None:
    tokens, window = 230, 37
    assert attention_block(tokens, keys, window, True) is not None
    q, k, v = inputs(2, tokens, keys, 2, 1)
    flags: dict[str, Any] = {"window": window, "past": keys - tokens}
    if extra == "segments":
        flags["segments"] = torch.arange(keys).expand(2, -1) // 50
    if extra == "alibi":
        flags["alibi_slopes"] = torch.tensor([0.1, 0.01], dtype=torch.float64)
    if extra == "key_length":
        flags["key_length"] = torch.tensor([100, keys])
    assert_agrees("attention", lambda q, k, v: kernels.attention(q, k, v, **flags), q, k, v)


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"window": 5},
        {"segments": packed(2, 13)},
        {"alibi_slopes": torch.tensor([0.5, 0.1, 0.2, 0.3])},
        {"softcap": 2.0},
    ],
    ids=["plain", "window", "segments", "alibi", "softcap"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(flags: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v = inputs(tokens=13)
    assert_as_exact_as_reference("attention", dtype, lambda q, k, v: kernels.attention(q, k, v, **flags), q, k, v)


@pytest.mark.parametrize("window", [None, 4])
def test_token_by_token_equals_whole(window: int | None) -> None:
    q, k, v = inputs(tokens=11)
    whole = kernels.attention(q, k, v, window=window)
    for t in range(11):
        first = 0 if window is None else max(0, t + 1 - window)
        step = kernels.attention(q[:, t : t + 1], k[:, first : t + 1], v[:, first : t + 1], window=window, past=t)
        assert_close(step, whole[:, t : t + 1])


@pytest.mark.parametrize("window", [None, 3, 40])
def test_chunk_after_a_cache_equals_whole(window: int | None) -> None:
    q, k, v = inputs(tokens=150)
    whole = kernels.attention(q, k, v, window=window)
    assert_close(kernels.attention(q[:, 60:], k, v, window=window, past=60), whole[:, 60:])


def test_packed_equals_apart() -> None:
    q, k, v = inputs(tokens=12)
    lengths = [5, 1, 6]
    segments = torch.repeat_interleave(torch.tensor([4, 2, 9]), torch.tensor(lengths)).expand(2, -1)
    apart = [kernels.attention(*parts) for parts in zip(*(x.split(lengths, 1) for x in (q, k, v)), strict=True)]
    assert_close(kernels.attention(q, k, v, segments=segments), torch.cat(apart, 1))


def test_agrees_with_torch_for_grouped_heads() -> None:
    q, k, v = inputs(tokens=20)
    k_, v_ = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), k_, v_, is_causal=True).transpose(1, 2)
    assert_close(kernels.attention(q, k, v), expected)


def test_a_later_key_changes_nothing_before_it() -> None:
    q, k, v = inputs(tokens=9)
    before = kernels.attention(q, k, v)
    k[:, 6] += 1
    v[:, 6] += 1
    after = kernels.attention(q, k, v)
    assert torch.equal(before[:, :6], after[:, :6])
    assert not torch.equal(before[:, 6:], after[:, 6:])


def test_a_query_without_keys_gives_zeros_and_finite_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in inputs(tokens=4, keys=3))
    out = kernels.attention(q, k, v)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert kernels.attention(q, k[:, :0], v[:, :0], causal=False).eq(0).all()


@pytest.mark.parametrize("flags", [{}, {"window": 3, "softcap": 2.0}, {"causal": False}])
def test_gradcheck(flags: dict[str, Any]) -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 4, 4, 2, 1, 2)]
    assert torch.autograd.gradcheck(lambda q, k, v: kernels.attention(q, k, v, **flags), tensors)


@pytest.mark.parametrize(("batch", "tokens", "keys"), [(0, 3, 3), (2, 0, 4), (1, 1, 1)])
def test_empty_and_tiny(batch: int, tokens: int, keys: int) -> None:
    q, k, v = inputs(batch, tokens, keys)
    assert kernels.attention(q, k, v, past=keys).shape == q.shape


@pytest.mark.parametrize("window", [None, 40])
def test_meta(window: int | None) -> None:
    q, k, v = (x.to("meta") for x in inputs(tokens=200))
    assert kernels.attention(q, k, v, window=window).shape == q.shape


def test_bad_input() -> None:
    q, k, v = inputs()
    with pytest.raises(ZooError, match=r"q has 3 heads and k has 2"):
        kernels.attention(q[:, :, :3], k, v)
    with pytest.raises(ZooError, match=r"k has shape \[2, 7, 2, 3\], expected .* \[2, 7, 2, 4\]"):
        kernels.attention(q, k[..., :3], v)
    with pytest.raises(ZooError, match=r"q has shape \[7, 4, 4\], expected 4 dimensions"):
        kernels.attention(q[0], k, v)
    with pytest.raises(ZooError, match="window is 0"):
        kernels.attention(q, k, v, window=0)
    with pytest.raises(ZooError, match="past to be at least 6"):
        kernels.attention(q[:, :1], k, v)
    with pytest.raises(ZooError, match=r"segments has shape \[2, 6\]"):
        kernels.attention(q, k, v, segments=packed(2, 6))
    with pytest.raises(ZooError, match="dtypes"):
        kernels.attention(q, k.float(), v)
