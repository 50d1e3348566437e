"""The delta rule: chunks against one step after another, states, packed sequences, several steps, decays at limits."""

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
from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels import launch
from zoo.kernels.delta import torch_path


@pytest.fixture(params=["one span", "many spans"], autouse=True)
def spans(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All tests run in one piece, and cut into as many as there are chunks."""
    if request.param == "many spans":
        monkeypatch.setattr(torch_path, "_SPAN_ELEMENTS", 1)


def inputs(
    batch: int = 2,
    tokens: int = 13,
    groups: int = 2,
    heads: int = 4,
    key_dim: int = 3,
    value_dim: int = 5,
    steps: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`q, k, v, beta, log_decay, state`."""
    torch.manual_seed(0)
    q = torch.randn(batch, tokens, groups, key_dim, dtype=torch.float64)
    k = F.normalize(torch.randn(batch, tokens * steps, groups, key_dim, dtype=torch.float64), dim=-1)
    v = torch.randn(batch, tokens * steps, heads, value_dim, dtype=torch.float64)
    beta = 2 * torch.rand(batch, tokens * steps, heads, dtype=torch.float64)
    log_decay = -torch.rand(batch, tokens, heads, dtype=torch.float64)
    return q, k, v, beta, log_decay, torch.randn(batch, heads, key_dim, value_dim, dtype=torch.float64)


def run(*tensors: Tensor, **flags: Any) -> tuple[Tensor, Tensor]:
    q, k, v, beta, log_decay, state = tensors
    return kernels.delta_rule(q, k, v, beta, log_decay=log_decay, state=state, **flags)


@given(st.data())
def test_agrees_with_reference(data: st.DataObject) -> None:
    draw = data.draw
    groups, steps = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, tokens, heads = draw(st.integers(1, 2)), draw(st.integers(1, 30)), groups * draw(st.integers(1, 3))
    *tensors, log_decay, state = inputs(
        batch, tokens, groups, heads, draw(st.integers(1, 4)), draw(st.integers(1, 4)), steps
    )
    flags: dict[str, Any] = {
        "steps": steps,
        "chunk": draw(st.sampled_from([1, 4, 7, 64])),
        "scale": draw(st.sampled_from([None, 0.3])),
    }
    if draw(st.booleans()):
        flags["segments"] = torch.stack([torch.arange(tokens) * (row + 1) // 5 for row in range(batch)])
    decay = draw(st.sampled_from(["none", "constant", "full"]))
    if decay == "none":
        assert_agrees("delta_rule", lambda *x: kernels.delta_rule(*x[:4], state=x[4], **flags), *tensors, state)
    else:
        log_decay = log_decay if decay == "full" else log_decay[0, 0]
        assert_agrees("delta_rule", lambda *x: run(*x, **flags), *tensors, log_decay, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_exact_as_reference(dtype: torch.dtype) -> None:
    *tensors, log_decay, _ = inputs(tokens=70, key_dim=16)

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.delta_rule(*tensors, log_decay=log_decay.to(tensors[0].dtype), chunk=16)

    assert_as_exact_as_reference("delta_rule", dtype, function, *tensors)


@pytest.mark.parametrize("cuts", [[6, 7], [1] * 13, [4, 1, 8]])
@pytest.mark.parametrize("steps", [1, 2])
def test_split_equals_whole(cuts: list[int], steps: int) -> None:
    q, k, v, beta, log_decay, state = inputs(steps=steps)
    whole, final = run(q, k, v, beta, log_decay, state, steps=steps, chunk=4)
    outputs = []
    longer = [cut * steps for cut in cuts]
    pieces = (q.split(cuts, 1), *(x.split(longer, 1) for x in (k, v, beta)), log_decay.split(cuts, 1))
    for piece in zip(*pieces, strict=True):
        out, state = run(*piece, state, steps=steps, chunk=4)
        outputs.append(out)
    assert_close(torch.cat(outputs, 1), whole)
    assert_close(state, final)


def test_packed_equals_apart() -> None:
    *tensors, state = inputs()
    lengths = [3, 1, 9]
    segments = torch.repeat_interleave(torch.tensor([5, 0, 5]), torch.tensor(lengths)).expand(2, -1)
    whole, final = run(*tensors, state, segments=segments, chunk=4)
    outputs, last = [], state
    for pieces in zip(*(x.split(lengths, 1) for x in tensors), strict=True):
        out, last = run(*pieces, state)
        outputs.append(out)
        state = torch.zeros_like(state)
    assert_close(whole, torch.cat(outputs, 1))
    assert_close(final, last)


def test_steps_are_tokens_of_which_only_the_last_is_read() -> None:
    q, k, v, beta, log_decay, state = inputs(steps=3)
    out, final = run(q, k, v, beta, log_decay, state, steps=3)
    queries = q.repeat_interleave(3, 1)
    decays = torch.stack([log_decay, *[torch.zeros_like(log_decay)] * 2], 2).flatten(1, 2)
    longer, last = run(queries, k, v, beta, decays, state)
    assert_close(out, longer[:, 2::3])
    assert_close(final, last)


@pytest.mark.parametrize("chunk", [1, 5, 64])
def test_decay_at_its_limits(chunk: int) -> None:
    """A decay of zero forgets, a decay of one keeps, and neither gives NaN, nor do both side by side."""
    q, k, v, beta, log_decay, state = inputs(tokens=12)
    log_decay[:, 4] = log_decay[0, 5] = float("-inf")
    log_decay[:, 7:9] = 0
    log_decay[0, 9:] = -50
    assert_agrees("delta_rule", lambda *tensors: run(*tensors, chunk=chunk), q, k, v, beta, log_decay, state)
    out, final = run(q, k, v, beta, log_decay, state, chunk=chunk)
    tensors = [x[:, 4:] for x in (q, k, v, beta, log_decay)]
    rest, last = run(*tensors, torch.zeros_like(state), chunk=chunk)
    assert_close(out[:, 4:], rest)
    assert_close(final, last)


def test_a_step_of_one_replaces_what_the_state_holds() -> None:
    q, k, v, beta, _, state = inputs(tokens=9, groups=4)
    out, final = kernels.delta_rule(k, k, v, torch.ones_like(beta), state=state, chunk=4)
    assert_close(out, v)
    again, _ = kernels.delta_rule(q, k, v, torch.zeros_like(beta), state=final, chunk=4)
    assert_close(again, torch.einsum("bthk,bhkv->bthv", q, final))


def test_steps_of_two_reflect_the_state() -> None:
    """With a step of 2 and values of zero each key mirrors the state: its norm stays, even over many chunks."""
    q, k, v, beta, _, state = inputs(tokens=300)
    _, final = kernels.delta_rule(q, k, torch.zeros_like(v), torch.full_like(beta, 2), state=state)
    assert_close(final.norm(dim=2), state.norm(dim=2))


def test_without_queries_of_its_own_groups_are_repeated() -> None:
    q, k, *rest = inputs(heads=6)
    out, final = run(q, k, *rest)
    apart, last = run(q.repeat_interleave(3, 2), k.repeat_interleave(3, 2), *rest)
    assert_close(out, apart)
    assert_close(final, last)


@pytest.mark.parametrize("tokens", [21, 130])
def test_agrees_with_transformers(tokens: int) -> None:
    q, k, v, beta, log_decay, state = (x.float() for x in inputs(tokens=tokens, key_dim=8))
    expected, final = torch_chunk_gated_delta_rule(
        q, k, v, log_decay, beta, initial_state=state, output_final_state=True
    )
    out, last = run(q, k, v, beta, log_decay, state, scale=8**-0.5)
    assert final is not None
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, final, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("segments", [None, torch.tensor([[0, 0, 1, 1, 1]])])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
@pytest.mark.parametrize("steps", [1, 2])
def test_gradcheck(segments: Tensor | None, implementation: str, steps: int) -> None:
    tensors = [x.requires_grad_() for x in inputs(1, 5, 1, 2, 2, 2, steps)]
    with kernels.use(delta_rule=implementation):
        assert torch.autograd.gradcheck(lambda *x: run(*x, segments=segments, steps=steps, chunk=4), tensors)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 0), (0, 3), (1, 1)])
@pytest.mark.parametrize("implementation", ["torch", "reference"])
def test_empty_and_tiny(batch: int, tokens: int, implementation: str) -> None:
    *tensors, state = inputs(batch, tokens, steps=2)
    with kernels.use(delta_rule=implementation):
        out, final = run(*tensors, state, steps=2)
    assert out.shape == (batch, tokens, 4, 5)
    assert final.shape == state.shape
    if tokens == 0:
        assert torch.equal(final, state)


def test_state_of_half_precision_is_float32() -> None:
    q, k, v, beta, _, _ = (x.bfloat16() for x in inputs())
    out, final = kernels.delta_rule(q, k, v, beta)
    assert (out.dtype, final.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("tokens", [1, 70])
def test_meta(tokens: int) -> None:
    tensors = [x.to("meta") for x in inputs(tokens=tokens, steps=2)]
    out, final = run(*tensors, steps=2)
    assert (out.shape, final.shape) == ((2, tokens, 4, 5), tensors[5].shape)


def test_compiles_into_one_graph() -> None:
    tensors = inputs(tokens=30, steps=2)
    segments = torch.arange(30).expand(2, -1) // 7
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    found, wanted = (f(*tensors, segments=segments, steps=2, chunk=8) for f in (compiled, run))
    torch.testing.assert_close(found, wanted)


def test_bad_input() -> None:
    q, k, v, beta, log_decay, state = inputs()
    with pytest.raises(ZooError, match=r"v has 3 heads and q has 2 groups"):
        kernels.delta_rule(q, k, v[:, :, :3], beta[:, :, :3])
    with pytest.raises(ZooError, match=r"k has shape \[2, 12, 2, 3\], expected .* \[2, 13, 2, 3\]"):
        kernels.delta_rule(q, k[:, 1:], v, beta)
    with pytest.raises(ZooError, match=r"k has shape .* \[batch, tokens \* steps, .* \[2, 26, 2, 3\]"):
        kernels.delta_rule(q, k, v, beta, steps=2)
    with pytest.raises(ZooError, match=r"beta has shape \[2, 13, 3\], expected"):
        kernels.delta_rule(q, k, v, beta[:, :, 1:])
    with pytest.raises(ZooError, match=r"log_decay has shape \[2, 13\], expected \[heads\] = \[4\]"):
        kernels.delta_rule(q, k, v, beta, log_decay=log_decay[..., 0])
    with pytest.raises(ZooError, match=r"state has shape \[2, 4, 5, 3\]"):
        kernels.delta_rule(q, k, v, beta, state=state.transpose(2, 3))
    with pytest.raises(ZooError, match=r"segments has dtype torch\.float64"):
        kernels.delta_rule(q, k, v, beta, segments=beta[..., 0])
    with pytest.raises(ZooError, match="steps is 0"):
        kernels.delta_rule(q, k, v, beta, steps=0)
    with pytest.raises(ZooError, match="chunk is 0"):
        kernels.delta_rule(q, k, v, beta, chunk=0)


def test_kernels_say_what_they_do_not_take() -> None:
    q, k, v, beta, _, state = inputs(key_dim=200)
    with launch.without_gpu("sm_90"), kernels.use(delta_rule="triton"):
        with pytest.raises(ZooError, match="takes float32, float16, bfloat16, not float64"):
            kernels.delta_rule(q, k, v, beta)
        q, k, v, beta = (x.float() for x in (q, k, v, beta))
        with pytest.raises(ZooError, match="takes key_dim up to 128 in half precision and 64 in float32, not 200"):
            kernels.delta_rule(q, k, v, beta)
        with pytest.raises(ZooError, match="keeps the state in float32"):
            kernels.delta_rule(q[..., :8], k[..., :8], v, beta, state=state[:, :, :8])
    with kernels.use(delta_rule="triton"), pytest.raises(ZooError, match="needs a CUDA device"):
        kernels.delta_rule(q, k, v, beta)
