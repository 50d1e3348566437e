"""What parameters, weights and states are made of, against what is built and against arithmetic."""

from __future__ import annotations

import pytest

import zoo
from zoo.accounting import Workload, metrics
from zoo.breakdown import (
    breakdown,
    parameters_by_axis,
    parameters_by_part,
    quantised_traffic,
    state_by_tensor,
    stored_weights,
    weight_bits,
)
from zoo.errors import ZooError
from zoo.spec.document import load, parse, spec_names
from zoo.testing.subject import tensors

SPECS = [name for name in spec_names() if not name.startswith("spaces/")]
TEXT = """
width: 8
context: 16
stem: {type: token, vocab: 9}
head: {type: language_model, tied: false}
body: {layers: [{mixer: {type: attention, heads: 2, kv_heads: 1, window: 5}, channel: {type: mlp, hidden: 20}}]}
"""
QUERY, KEY, UP, TABLE, NORM = 8 * 8, 8 * 4, 8 * 20, 9 * 8, 8


@pytest.mark.parametrize("name", SPECS)
def test_sums_are_those_of_the_figures(name: str) -> None:
    spec, work = load(name), Workload(batch=2, dtype="bf16")
    figures, found = metrics(spec, work), breakdown(spec, work)
    assert sum(found["parts"].values()) == figures["params"]
    assert sum(found["state"].values()) == figures["state"]
    assert found["weights"]["bfloat16"] == figures["weights"] == 2 * figures["params"]
    assert found["weights"]["float32"] == 4 * figures["params"]
    assert found["weights"]["int4"] < found["weights"]["int8"] < found["weights"]["bfloat16"]
    assert all(0 < count <= figures["params"] for count in found["axes"].values())
    assert quantised_traffic(spec, work, "bf16") == pytest.approx(figures["decode_traffic"], rel=1e-12)


def test_parts_and_axes() -> None:
    spec = parse(TEXT)
    assert parameters_by_part(spec) == {
        "stem": TABLE,
        "mixer": 2 * QUERY + 2 * KEY,
        "channel": 2 * UP,
        "norm": 3 * NORM,
        "head": TABLE,
    }
    assert parameters_by_axis(spec) == {
        "width": metrics(spec)["params"],
        "hidden": 2 * UP,
        "vocab": 2 * TABLE,
        "heads": 2 * QUERY,
        "kv_heads": 2 * KEY,
    }


def test_matrices_are_quantised_and_norms_are_not() -> None:
    spec = parse(TEXT)
    matrices = 2 * QUERY + 2 * KEY + 2 * UP + 2 * TABLE
    # Rows: 8 + 4 + 4 + 8 of attention, 20 + 8 of the network, 9 + 9 of tables; one of 20 weights has two scales.
    rows = 24 + 28 + 18
    found = stored_weights(spec, "int8")
    assert (found.quantised, found.kept, found.scales) == (matrices, 3 * NORM, 2 * rows)
    assert found.bytes == matrices + 2 * rows + 2 * 3 * NORM
    assert stored_weights(spec, "int8", group=10).scales == 2 * (rows + 8)
    half = stored_weights(spec, "int4", kept="float32")
    assert half.bytes == matrices // 2 + 2 * rows + 4 * 3 * NORM
    assert stored_weights(spec, "float16").bytes == 2 * (matrices + 3 * NORM)
    assert [weight_bits(name) for name in ("fp64", "bf16", "int8", "int2")] == [64, 16, 8, 2]


def test_rates_of_a_state_space_stay_as_they_are() -> None:
    text = "width: 8\nstem: {type: token, vocab: 9}\nhead: language_model\nbody: {layers: [{mixer: mamba}]}\n"
    spec = parse(text)
    rates, vectors = 16 * 16, 16 + 16 + 16 + 2 * 8  # A; D and the offsets of steps and convolution; norms
    assert stored_weights(spec, "int8").kept == rates + vectors


def test_states_are_called_as_components_call_them() -> None:
    assert state_by_tensor(parse(TEXT)) == {"keys": 4 * 4 * 4, "values": 4 * 4 * 4}
    for name in ("mamba2-hybrid", "mamba-130m"):
        spec = load(name)
        tree = zoo.build(spec, device="meta").init_state(1, 6).tree
        held: dict[str, int] = {}
        for path, tensor in tensors(tree):
            held[path.rpartition(".")[2]] = held.get(path.rpartition(".")[2], 0) + tensor.nbytes
        assert state_by_tensor(spec, Workload(past=5)) == held


def test_mistakes_are_told() -> None:
    spec = parse(TEXT)
    with pytest.raises(ZooError, match="unknown dtype 'int3x' of weights"):
        stored_weights(spec, "int3x")
    with pytest.raises(ZooError, match="a group of 0 weights"):
        stored_weights(spec, "int8", group=0)
