"""Figures from the specification alone agree with what is built, add up, and need no torch."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from flops import counted_flops
from torch._subclasses.fake_tensor import FakeTensorMode

import zoo
from bench.bench_memory import DERIVED, HELD_OUT, TOLERANCE, measured, small
from zoo.accounting import Tally, Workload, figures, metrics, parts, total
from zoo.blocks.model import Spec
from zoo.blocks.stack import Stack
from zoo.errors import ZooError
from zoo.model import Model, State
from zoo.spec.document import load, parse, spec_names
from zoo.testing.subject import tensors
from zoo.train.module import loss_sum

SPECS = [name for name in spec_names() if not name.startswith("spaces/")]
LARGE = ("gpt3-175b", "mixtral-8x7b", "llama2-7b", "llama3-8b", "gemma2-2b")
SMALL = [name for name in SPECS if name not in LARGE]
MEMORY = dict(small({**DERIVED, **HELD_OUT}))


@pytest.mark.parametrize("name", SPECS)
def test_counted_parameters_are_those_of_the_built_module(name: str) -> None:
    spec = load(name)
    model = zoo.build(spec, device="meta")
    assert metrics(spec)["params"] == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", SMALL)
def test_parts_sum_to_the_whole(name: str) -> None:
    spec = load(name)
    work = Workload(batch=2).at(spec.context)
    found = list(parts(spec.fill(), work))
    assert len({path for path, _, _ in found}) == len(found)
    assert {path.split(".")[0] for path, _, _ in found} == {"stem", "body", "head"}
    whole = figures(sum((tally for _, _, tally in found), Tally()), work)
    assert whole == metrics(spec, work) == figures(total(spec, work), work)
    for key in ("params", "embedding_params", "flops", "traffic", "state", "decode_flops", "weights"):
        # The parts' sums are of floats in the same order as the whole's.
        assert whole[key] == sum(figures(tally, work)[key] for _, _, tally in found), key
    assert whole["activations"] == max(tally.peak for _, _, tally in found)
    # A tied head costs what its own part does not: the model asks the root for the same work.
    assert spec.fill().cost(spec.root(), work.forward()).flops == pytest.approx(whole["flops"], rel=1e-12)


def test_figures_follow_the_workload() -> None:
    spec = load("tiny-bytes")
    one, two = metrics(spec), metrics(spec, Workload(batch=2))
    assert two["flops"] == 2 * one["flops"] and two["state"] == 2 * one["state"]
    assert two["params"] == one["params"] and two["state_token"] == one["state_token"]
    half = metrics(spec, Workload(dtype="bf16"))
    assert half["weights"] * 2 == one["weights"] == 4 * one["params"]
    assert metrics(spec, Workload(dtype="bfloat16")) == half
    assert metrics(spec, Workload(seq=64))["flops"] < one["flops"]
    # Attention's cache: two vectors of the width for each of four layers.
    assert one["state_token"] == 4 * 2 * spec.width * 4
    assert one["state"] == one["state_token"] * (spec.context + 1)
    assert one["train_flops"] > 2 * one["flops"]
    # Gradients are read for their norm, read and written by clipping, and read by AdamW, which reads and writes weights
    # and two moments.
    assert one["train_traffic"] == 3 * one["traffic"] + 4 * (1 + 2 + 1 + 2 * 3) * one["params"]


def test_experts_count_in_part() -> None:
    text = "width: 8\nstem: {type: token, vocab: 9}\nhead: language_model\nbody: {layers: [{channel: %s}]}\n"
    two, one = (metrics(parse(text % f"{{type: moe, experts: 4, top_k: {k}, hidden: 16}}")) for k in (2, 1))
    expert = 3 * 8 * 16
    assert two["params"] == one["params"]
    assert two["active_params"] - one["active_params"] == expert
    assert two["params"] - two["active_params"] == 2 * expert
    assert one["embedding_params"] == 9 * 8


@pytest.mark.parametrize("name", SPECS)
def test_state_is_that_of_the_built_model(name: str) -> None:
    spec = load(name)
    model = zoo.build(spec, device="meta")
    if not model.scope.causal:
        assert metrics(spec)["state"] == 0
        return
    for past in (0, 3, spec.context):
        tree = model.init_state(3, past + 1).tree
        held = sum(tensor.nbytes for _, tensor in tensors(tree))
        found = metrics(spec, Workload(batch=3, past=past))
        assert found["state"] == held


@pytest.mark.parametrize("name", SPECS)
def test_flops_are_those_of_the_counter(name: str) -> None:
    """Forward, decoding and a training step."""
    spec, tokens = load(name), 96
    # Where values decide what is computed there must be some, and each form of layer is enough. Others need no memory.
    values = any(part.type in ("mamba2", "mohd") for _, part, _ in spec.fill().walk(spec.root()))
    spec = short(spec) if values else spec
    found = metrics(spec, Workload(seq=tokens, past=tokens))
    with nullcontext() if values else FakeTensorMode():
        model = (zoo.build(spec) if values else Model(spec)).eval()
        inputs = model.example_inputs(1, tokens)
        with torch.no_grad():
            assert found["flops"] == pytest.approx(counted_flops(model, inputs), rel=0.005)
        assert found["train_flops"] == pytest.approx(counted_flops(step, model, inputs), rel=0.005)
        if model.head_kind == "language_model":
            with torch.no_grad():
                state = State(tokens, tokens + 1, model.init_state(1, tokens + 1).tree)
                assert found["decode_flops"] == pytest.approx(
                    counted_flops(model, inputs[:, :1], state=state), rel=0.005
                )


def short(spec: Spec) -> Spec:
    """The same with one layer of each form."""
    body = spec.body
    assert isinstance(body, Stack)
    return spec.model_copy(update={"body": body.model_copy(update={"layers": tuple(dict.fromkeys(body.layers))})})


def step(model: Model, inputs: torch.Tensor) -> None:
    """Forward and backward pass of training, as `zoo train` runs them."""
    labels = torch.zeros(inputs.shape if model.head_kind == "language_model" else 1, dtype=torch.long)
    output = model(inputs, labels=labels)
    loss = output.loss if output.loss is not None else loss_sum(output.logits, labels, model.head_kind)[0]
    loss.backward()


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_what_the_allocator_records(name: str) -> None:
    """Forward, in a training step, and with checkpointing."""
    spec, batch, tokens = MEMORY[name]
    found = metrics(spec, Workload(batch=batch, seq=tokens))
    for figure, bytes_held in measured(spec, batch, tokens).items():
        assert found[figure] == pytest.approx(bytes_held, rel=TOLERANCE), figure


def test_an_unknown_dtype_is_told() -> None:
    with pytest.raises(ZooError, match=r"unknown dtype 'bf61'; did you mean 'bf16'\?"):
        metrics(load("tiny-bytes"), Workload(dtype="bf61"))


HEAVY = ("torch", "lightning", "optuna", "transformers", "numpy", "pandas")
COMMANDS = [
    ["--help"],
    ["validate"],
    ["list"],
    ["show", "gpt2"],
    ["show", "attention", "--json"],
    ["show", "spaces/hybrid-bytes"],
    ["cost", "gpt2", "--layers"],
    ["schema"],
    ["nonsense"],
]


def test_facts_are_told_without_torch() -> None:
    code = f"""
import contextlib, io, sys
import zoo
from zoo.cli import main
zoo.metrics(zoo.load("mamba2-hybrid"))
for command in {COMMANDS!r}:
    sys.argv = ["zoo", *command]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            main()
        except SystemExit:
            pass
    loaded = [name for name in {HEAVY!r} if name in sys.modules]
    assert not loaded, (command, loaded)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
