"""Which implementations the calls of a model would run."""

from __future__ import annotations

import pytest
import torch

import zoo
from zoo.blocks.model import Spec
from zoo.choices import choices
from zoo.errors import SpecError, ZooError
from zoo.kernels.dispatch import primitive
from zoo.spec.document import as_spec, parse

TEXT = """
width: 32
context: 24
kernels: [attention=reference]
stem: {type: token, vocab: 16}
body:
  layers:
    - {mixer: {type: attention, heads: 2, window: 8}, channel: {type: glu, hidden: 48}}
    - {mixer: {type: attention, heads: 2, window: 8}, channel: {type: glu, hidden: 48}}
    - {mixer: {type: mamba2, state_dim: 8, head_dim: 16}, channel: mlp}
head: language_model
"""


def spec(text: str = TEXT) -> Spec:
    return as_spec(parse(text))


def test_each_call_is_listed_once_with_its_phase() -> None:
    found = choices(spec(), tokens=20)
    attention = [choice for choice in found if choice.primitive == "attention"]
    assert [(choice.phase, choice.count) for choice in attention] == [("forward", 2), ("decode", 2)]
    assert attention[0].facts["window"] == 8 and attention[0].facts["tokens"] == 20
    assert attention[1].facts["tokens"] == 1
    assert {choice.primitive for choice in found} >= {"attention", "recurrence", "causal_convolution", "rms_norm"}


def test_what_the_spec_chose_runs_and_others_take_the_first_that_serves() -> None:
    for choice in choices(spec(), "cpu"):
        assert choice.runs == ("reference" if choice.primitive == "attention" else "torch")
        if "triton" in [one.name for one in primitive(choice.primitive).implementations]:
            assert choice.refusals["triton"]
        assert choice.runs not in choice.refusals


def test_a_device_that_is_not_there_is_answered_for_all_the_same() -> None:
    runs = {choice.primitive: choice.runs for choice in choices(spec(), "cuda", "bfloat16")}
    assert torch.cuda.is_available() or (runs["rms_norm"], runs["attention"]) == ("triton", "reference")
    with pytest.raises(ZooError, match="'coda' is no device"):
        choices(spec(), "coda")
    with pytest.raises(ZooError, match="'float33' is no dtype"):
        choices(spec(), dtype="float33")


def test_the_last_token_that_a_context_holds_is_decoded() -> None:
    learned = TEXT.replace("{type: token, vocab: 16}", "{type: token, vocab: 16, position: learned}")
    decoded = [choice for choice in choices(spec(learned)) if choice.phase == "decode"]
    assert next(one for one in decoded if one.primitive == "attention").facts["past"] == 23


def test_a_chosen_implementation_runs_and_changes_no_result() -> None:
    chosen, free = zoo.build(spec()), zoo.build(spec(TEXT.replace("kernels: [attention=reference]", "")))
    assert chosen.spec.kernel_choices == {"attention": "reference"}
    tokens = torch.arange(20).view(1, 20) % 16
    with torch.no_grad():
        torch.testing.assert_close(chosen(tokens).logits, free(tokens).logits)
    assert chosen.spec.hash == free.spec.hash == free.spec.computation != chosen.spec.computation


def test_a_choice_that_cannot_serve_says_why() -> None:
    found = choices(spec(TEXT.replace("attention=reference", "rms_norm=triton")), tokens=8)
    norms = [choice for choice in found if choice.primitive == "rms_norm"]
    assert norms and all(choice.runs is None and choice.refusals["triton"] for choice in norms)
    model = zoo.build(spec(TEXT.replace("attention=reference", "rms_norm=triton")))
    with pytest.raises(ZooError, match="'triton' was chosen but cannot serve: needs a CUDA device"):
        model(torch.zeros(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("atention=reference", "no primitive is called 'atention'; did you mean 'attention'?"),
        ("attention=cuda", "expected attention=IMPLEMENTATION with triton, torch, reference; got 'cuda'"),
        ("attention", "got ''"),
    ],
)
def test_wrong_choices_are_errors_of_the_spec(given: str, message: str) -> None:
    with pytest.raises(SpecError) as error:
        spec(TEXT.replace("attention=reference", given))
    problem = error.value.problems[0]
    assert message in problem.message and problem.path == "kernels[0]"
    assert problem.mark is not None and problem.mark.line == 4
