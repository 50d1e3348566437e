"""What is wrong with an input is said; what is only odd gives the right numbers, in every implementation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tolerance import FORWARD_SLACK, GRADIENT_SLACK, assert_close
from torch import Tensor

from zoo import kernels
from zoo.errors import ZooError
from zoo.kernels.case import Draw
from zoo.kernels.dispatch import HOMES, primitive
from zoo.kernels.launch import without_gpu

try:
    import interpreter
except ModuleNotFoundError:
    interpreter = None  # Triton is not installed on this system.

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """A primitive and a call of it: `inputs` makes one of `batch` rows and `tokens` tokens.

    Arguments in `loose` may have another rank, those in `complex` be complex.
    """

    name: str
    inputs: Callable[[Draw, int, int], Inputs]
    settings: Mapping[str, Any] = field(default_factory=dict)
    loose: tuple[str, ...] = ()
    complex: tuple[str, ...] = ()

    def call(self, inputs: Mapping[str, Any]) -> Any:
        return getattr(kernels, self.name)(**inputs, **self.settings)

    def drawn(self, batch: int = 2, tokens: int = 21) -> Inputs:
        return self.inputs(Draw("small", torch.float32), batch, tokens)

    def __str__(self) -> str:
        return self.name


def packed(batch: int, tokens: int) -> Tensor:
    """Three sequences a row, of which the ids 1 and 3 have no token at all."""
    return (
        torch.tensor([0, 2, 4])
        .repeat_interleave(torch.tensor([tokens // 3, tokens // 3, tokens - tokens // 3 * 2]))[None]
        .repeat(batch, 1)
    )


def attention(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "q": draw.normal(batch, tokens, 4, 16),
        "k": draw.normal(batch, tokens, 2, 16),
        "v": draw.normal(batch, tokens, 2, 20),
        "segments": packed(batch, tokens),
        "alibi_slopes": draw.uniform(0.1, 1, 4),
        "log_forget": -draw.uniform(0, 1, batch, tokens, 4),
        "sink": draw.normal(4),
    }


def recurrence(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "q": draw.normal(batch, tokens, 2, 16),
        "k": draw.normal(batch, tokens, 2, 16),
        "v": draw.normal(batch, tokens, 4, 20),
        "log_decay": -draw.uniform(0, 1, batch, tokens, 4),
        "state": draw.normal(batch, 4, 16, 20),
        "segments": packed(batch, tokens),
    }


def delta_rule(draw: Draw, batch: int, tokens: int) -> Inputs:
    inputs = recurrence(draw, batch, tokens)
    inputs["k"] = torch.nn.functional.normalize(inputs["k"], dim=-1)
    return {**inputs, "beta": draw.uniform(0, 1, batch, tokens, 4)}


def selective_scan(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "x": draw.normal(batch, tokens, 20),
        "delta": draw.uniform(0, 1, batch, tokens, 20),
        "A": -draw.uniform(0.1, 2, 20, 8),
        "B": draw.normal(batch, tokens, 8),
        "C": draw.normal(batch, tokens, 8),
        "D": draw.normal(20),
        "z": draw.normal(batch, tokens, 20),
        "state": draw.normal(batch, 20, 8),
        "segments": packed(batch, tokens),
    }


def diagonal_scan(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "x": draw.normal(batch, tokens, 20),
        "decay": draw.uniform(0, 1, batch, tokens, 20),
        "state": draw.normal(batch, 20),
        "segments": packed(batch, tokens),
    }


def causal_convolution(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "x": draw.normal(batch, tokens, 20),
        "weight": draw.normal(20, 4),
        "bias": draw.normal(20),
        "state": draw.normal(batch, 3, 20),
        "segments": packed(batch, tokens),
    }


def long_convolution(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "x": draw.normal(batch, tokens, 20),
        "filters": draw.normal(20, 30),
        "state": draw.normal(batch, 5, 20),
        "segments": packed(batch, tokens),
    }


def grouped_matmul(draw: Draw, batch: int, tokens: int) -> Inputs:
    rows = batch * tokens
    return {
        "x": draw.normal(rows, 16),
        "weight": draw.normal(4, 20, 16),
        "offsets": torch.tensor([0, rows // 3, rows // 3, rows, rows]),
    }


def block_diagonal_matmul(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {"x": draw.normal(batch, tokens, 12), "weight": draw.normal(3, 4, 5)}


def route(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {"scores": draw.normal(batch * tokens, 6)}


def subset_matmul(draw: Draw, batch: int, tokens: int) -> Inputs:
    rows = batch * tokens
    subsets = torch.tensor([[0, 2], [1, 3]])[torch.arange(rows) * 2 // max(1, rows)]
    return {"x": draw.normal(rows, 2, 16), "weight": draw.normal(4, 20, 16), "subsets": subsets}


def norm(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "x": draw.normal(batch, tokens, 20),
        "weight": draw.normal(20),
        "residual": draw.normal(batch, tokens, 20),
    }


def layer_norm(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {**norm(draw, batch, tokens), "bias": draw.normal(20)}


def rotary(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {"x": draw.normal(batch, tokens, 2, 16), "positions": torch.arange(tokens)}


def rotary_pair(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {
        "q": draw.normal(batch, tokens, 4, 16),
        "k": draw.normal(batch, tokens, 2, 16),
        "positions": torch.arange(batch * tokens).view(batch, tokens),
    }


def gated_activation(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {"gate": draw.normal(batch, tokens, 20), "up": draw.normal(batch, tokens, 20)}


def polynomial_activation(draw: Draw, batch: int, tokens: int) -> Inputs:
    return {"x": draw.normal(batch, tokens, 20), "coefficients": draw.normal(4)}


def linear_cross_entropy(draw: Draw, batch: int, tokens: int) -> Inputs:
    rows = batch * tokens
    return {
        "x": draw.normal(rows, 16),
        "weight": draw.normal(33, 16),
        "targets": torch.arange(rows) % 33,
        "bias": draw.normal(33),
    }


SUBJECTS = (
    Subject("attention", attention),
    Subject("recurrence", recurrence),
    Subject("delta_rule", delta_rule),
    Subject("selective_scan", selective_scan),
    Subject("diagonal_scan", diagonal_scan, complex=("x", "decay", "state")),
    Subject("causal_convolution", causal_convolution),
    Subject("long_convolution", long_convolution),
    Subject("grouped_matmul", grouped_matmul),
    Subject("block_diagonal_matmul", block_diagonal_matmul, {"interleaved": True}, loose=("x",)),
    Subject("route", route, {"top_k": 2}),
    Subject("subset_matmul", subset_matmul),
    Subject("rms_norm", norm),
    Subject("layer_norm", layer_norm),
    Subject("rotary", rotary),
    Subject("rotary_pair", rotary_pair),
    Subject("gated_activation", gated_activation),
    Subject("polynomial_activation", polynomial_activation, {"normalized": True}, loose=("x",)),
    Subject("linear_cross_entropy", linear_cross_entropy, {"ignore_index": 5}),
)
BY_NAME = {subject.name: subject for subject in SUBJECTS}
every_primitive = pytest.mark.parametrize("subject", SUBJECTS, ids=str)


def implementations(*names: str) -> Any:
    """Each primitive, of `names` or of all, with each of its implementations."""
    pairs = [
        (BY_NAME[name], one.name)
        for name in names or BY_NAME
        for one in primitive(name).implementations
        if one.name != "triton" or interpreter is not None
    ]
    return pytest.mark.parametrize(("subject", "implementation"), pairs, ids=lambda each: str(each))


def outputs(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def results(subject: Subject, inputs: Mapping[str, Any], implementation: str) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of all inputs that are differentiated."""
    with ExitStack() as stack:
        stack.enter_context(kernels.use(**{subject.name: implementation}))
        if implementation == "triton":
            assert interpreter is not None
            stack.enter_context(without_gpu("sm_90"))
            stack.enter_context(interpreter.trials())
        given = {
            name: value.detach().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
        found = outputs(subject.call(given))
        ends = [out for out in found if out.requires_grad]
        leaves = [value for value in given.values() if isinstance(value, Tensor) and value.requires_grad]
        given = [torch.linspace(-1, 1, out.numel()).view(out.shape).to(out.dtype) for out in ends]
        if not ends:
            return found, [torch.zeros_like(leaf) for leaf in leaves]
        gradients = torch.autograd.grad(ends, leaves, given, materialize_grads=True)
        return [out.detach() for out in found], list(gradients)


def assert_right(subject: Subject, inputs: Mapping[str, Any], implementation: str) -> None:
    """Results and gradients are finite and those of the reference, in float64 where the implementation has it."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    exact, plain = results(subject, wide, "reference"), None
    if implementation == "triton":
        plain = results(subject, inputs, "reference")
    found = results(subject, wide if plain is None else inputs, implementation)
    for part, (kind, slack) in enumerate((("output", FORWARD_SLACK), ("gradient", GRADIENT_SLACK))):
        for index, (one, truth) in enumerate(zip(found[part], exact[part], strict=True)):
            what = f"{kind} {index}"
            if not truth.is_floating_point():
                assert torch.equal(one, truth), what
                continue
            assert_close(one, truth, plain=None if plain is None else plain[part][index], slack=slack, what=what)


def test_every_primitive_is_a_subject() -> None:
    assert list(BY_NAME) == list(HOMES)


def arguments() -> Iterator[Any]:
    for subject in SUBJECTS:
        for name, value in subject.drawn().items():
            if isinstance(value, Tensor):
                yield pytest.param(subject, name, id=f"{subject}-{name}")


@pytest.mark.parametrize(("subject", "name"), [*arguments()])
def test_a_wrong_tensor_is_named(subject: Subject, name: str) -> None:
    inputs = subject.drawn()
    value: Tensor = inputs[name]
    wrong = {"a list": value.tolist(), "a dtype": value.to(torch.float8_e4m3fn), "a device": value.to("meta")}
    if value.is_floating_point():
        wrong |= {"integers": value.long(), "booleans": value > 0}
        if name not in subject.complex:
            wrong["complex"] = value.to(torch.complex64)
    else:
        wrong |= {"floats": value.float(), "booleans": value > 0}
    if name not in subject.loose:
        wrong["a rank"] = value[None, ..., None]
    for what, each in wrong.items():
        if what == "a device" and len(inputs) == 1:
            continue
        with pytest.raises(ZooError) as error:
            subject.call({**inputs, name: each})
        message = str(error.value)
        assert message.startswith(f"{subject}: ") and name in message, (what, message)
        assert "expected" in message, (what, message)


@pytest.mark.parametrize("name", ["attention", "recurrence", "delta_rule"])
@pytest.mark.parametrize("heads", [0, 3])
def test_heads_that_do_not_divide_are_an_error(name: str, heads: int) -> None:
    subject = BY_NAME[name]
    inputs = subject.drawn()
    shared = ("k", "v") if name == "attention" else ("q", "k")
    inputs |= {each: inputs[each][:, :, :1].expand(-1, -1, heads, -1) for each in shared}
    with pytest.raises(ZooError, match=r"has 4 heads and . has \d"):
        subject.call(inputs)


@implementations()
def test_strides_do_not_matter(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.is_floating_point()}
    apart = {
        name: torch.stack((value.mT, value.mT), -1)[..., 0].mT if value.dim() > 1 else value.repeat_interleave(2)[::2]
        for name, value in tensors.items()
    }
    first = len(next(iter(inputs.values())))
    alike = {name: value[:1].expand_as(value) for name, value in tensors.items() if len(value) == first}
    for changed in (apart, alike):
        assert_right(subject, {**inputs, **changed}, implementation)


@implementations()
@pytest.mark.parametrize(("batch", "tokens"), [(2, 0), (0, 5), (2, 1)])
def test_nothing_to_do(subject: Subject, implementation: str, batch: int, tokens: int) -> None:
    inputs = subject.drawn(batch, tokens)
    assert_right(subject, inputs, implementation)


@implementations("recurrence", "delta_rule", "linear_cross_entropy")
def test_a_chunk_longer_than_the_sequence(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    assert_right(subject, {**inputs, "chunk": 4096}, implementation)
    for chunk in (0, -1):
        with pytest.raises(ZooError, match=f"chunk is {chunk}, expected a number above 0"):
            subject.call({**inputs, "chunk": chunk})


@implementations("recurrence", "delta_rule")
def test_decays_that_forget_everything(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    of_heads, of_tokens = torch.tensor([-torch.inf, -1e30, 0.0, -0.5]), inputs["log_decay"].clone()
    of_tokens[:, ::3], of_tokens[:, 1::3], of_tokens[0, :4] = -torch.inf, -1e30, -torch.inf
    for decay in (of_heads, of_tokens):
        assert_right(subject, {**inputs, "log_decay": decay}, implementation)


@implementations("recurrence")
def test_channels_that_forget_everything(subject: Subject, implementation: str) -> None:
    decay = -Draw("small", torch.float32).uniform(0, 1, 2, 21, 2, 16)
    decay[:, ::3, 0], decay[:, 1::3, :, ::2], decay[0, :4] = -torch.inf, -1e30, -torch.inf
    assert_right(subject, {**subject.drawn(), "log_decay": decay}, implementation)


@implementations("attention")
def test_gates_that_forget_everything(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    inputs["log_forget"][:, ::5] = -torch.inf
    inputs["log_forget"][0] = -torch.inf
    assert_right(subject, inputs, implementation)


@implementations("selective_scan")
def test_steps_and_states_that_forget_everything(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    inputs["A"][::3], inputs["A"][1, :3] = -torch.inf, -1e30
    inputs["delta"][:, ::2] = 0.0
    assert_right(subject, inputs, implementation)


@implementations("diagonal_scan")
def test_decays_of_zero(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    inputs["decay"][:, ::3] = 0.0
    assert_right(subject, inputs, implementation)
    assert_right(subject, {**inputs, "decay": torch.zeros(20)}, implementation)


@implementations("attention")
def test_rows_that_see_no_key(subject: Subject, implementation: str) -> None:
    inputs = {name: value for name, value in subject.drawn().items() if name in ("q", "k", "v", "alibi_slopes")}
    nothing = torch.tensor([0, 3])
    for odd in (
        {**inputs, "key_length": nothing},
        {**inputs, "key_length": nothing, "causal": False},
        {**inputs, "key_length": nothing, "softcap": 2.0},
        {**inputs, "blocks": torch.zeros(1, 1, dtype=torch.bool), "block": 128, "past": 0},
        {**inputs, "past": 400, "window": 3, "causal": True, "k": inputs["k"][:, :5], "v": inputs["v"][:, :5]},
    ):
        assert_right(subject, odd, implementation)
    keyless = {
        name: value[:, :0] if name in "kv" else value for name, value in subject.drawn().items() if name in "qkv"
    }
    assert_right(subject, {**keyless, "causal": False, "softcap": 2.0}, implementation)


@implementations("linear_cross_entropy")
def test_rows_that_do_not_count(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    assert_right(subject, {**inputs, "targets": torch.full((42,), 5)}, implementation)


@implementations("grouped_matmul")
def test_groups_without_rows(subject: Subject, implementation: str) -> None:
    inputs = subject.drawn()
    for offsets in ([0, 0, 0, 0, 42], [0, 42, 42, 42, 42], [0, 0, 42, 42, 42]):
        assert_right(subject, {**inputs, "offsets": torch.tensor(offsets)}, implementation)
