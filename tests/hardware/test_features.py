"""What a predictor knows of a call, counted by hand."""

from __future__ import annotations

import pytest

from zoo.accounting import Piece, Workload, places
from zoo.cost import Cost
from zoo.hardware.features import LARGE, by_piece, cold, cold_share, features, moved, with_cold
from zoo.hardware.work import parts_of
from zoo.spec.document import load

PRODUCT = Cost(kind="linear", flops=100.0, backward=250.0, traffic=30.0, weights=10.0, peak=8.0)


def piece(cost: Cost, kind: str = "dense") -> Piece:
    return Piece("layer", kind, cost.operators)


def test_a_kind_has_its_own_terms_and_none_that_are_zero() -> None:
    scan = Cost(kind="scan", pointwise=7.0, traffic=5.0, steps=3.0)
    found = features([[piece(PRODUCT), piece(scan, "mamba")]])
    assert found == pytest.approx(
        {
            "dense.modules": 1,
            "linear.calls": 1,
            "linear.flops": 100,
            "linear.inputs": 12,
            "linear.weights": 10,
            "linear.packed_weights": 10,
            "linear.outputs": 8,
            "mamba.modules": 1,
            "scan.calls": 1,
            "scan.pointwise": 7,
            "scan.inputs": 5,
            "scan.steps": 3,
        }
    )
    assert moved(found) == 35


def test_training_counts_the_products_of_both_passes() -> None:
    assert features([[piece(PRODUCT)]], "train")["linear.flops"] == 350
    assert features([[piece(PRODUCT)]], "decode")["linear.flops"] == 100


def test_what_is_called_again_counts_again() -> None:
    once, thrice = features([[piece(PRODUCT)]]), features([[piece(PRODUCT)]] * 3)
    assert thrice == pytest.approx({name: 3 * amount for name, amount in once.items()})
    same_part = features([[piece(PRODUCT * 3)]])
    assert {name: same_part[name] for name in ("linear.calls", "linear.flops", "linear.weights")} == {
        "linear.calls": 3,
        "linear.flops": 300,
        "linear.weights": 30,
    }


def test_operands_are_large_by_their_own_size_not_by_their_sum() -> None:
    for size, terms in ((LARGE - 1, set()), (LARGE, {"large_inputs", "large_outputs"})):
        found = features([[piece(Cost(kind="a", traffic=2.0 * size, peak=size) * 100)]])
        assert {name for name in found if "large" in name} == {f"a.{term}" for term in terms}
        assert all(found[f"a.{term}"] == 100 * size for term in terms)


def test_half_of_a_model_that_moves_as_much_as_the_cache_holds_is_cold() -> None:
    counts = features([[piece(PRODUCT)], [piece(PRODUCT)]])
    assert [cold_share(moved(counts), cache) for cache in (60.0, 20.0, 180.0)] == pytest.approx([0.5, 0.9, 0.1])
    half = with_cold(counts, 0.5)
    assert counts.items() < half.items()
    assert {name: amount for name, amount in half.items() if name not in counts} == {
        "linear.cold_calls": 1,
        "linear.cold_inputs": 12,
        "linear.cold_weights": 10,
        "linear.cold_packed_weights": 10,
    }
    assert all(cold(name) == f"linear.cold_{name[7:]}" for name in ("linear.calls", "linear.weights"))
    assert cold("linear.flops") is cold("dense.modules") is None


@pytest.mark.parametrize(("batch", "packed"), [(1, 0), (2, 1), (8, 1)])
def test_weights_are_packed_where_they_meet_several_rows(batch: int, packed: int) -> None:
    spec = load("gpt2")
    found = features(parts_of(spec, Workload(batch, 64, 64), "decode"), "decode")
    assert found["linear.weights"] > 0
    assert found.get("linear.packed_weights", 0) == packed * found["linear.weights"]


@pytest.mark.parametrize("name", ["gpt2", "mamba2-130m", "mixer-b16"])
@pytest.mark.parametrize("decoding", [False, True])
def test_the_pieces_of_a_part_are_its_operators_and_all_its_modules(name: str, decoding: bool) -> None:
    spec, work = load(name), Workload(2, 64, 64)
    for place in places(spec.fill(), work.at(spec.context)):
        pieces = place.pieces(decoding)
        found = sorted(operator for one in pieces for operator in one.operators)
        assert found == sorted(place.cost(decoding).operators)
        assert pieces[0].path == place.path and len({one.path for one in pieces}) == len(pieces)
    assert {"attention", "dense"} <= {one.type for part in parts_of(load("gpt2"), work, "forward") for one in part}


def test_pieces_together_count_what_the_part_does() -> None:
    part = parts_of(load("gpt2"), Workload(1, 64, 64), "forward")[2]
    assert len(part) > 5
    for name, amount in features([part]).items():
        assert amount == pytest.approx(sum(counts.get(name, 0.0) for _, counts in by_piece(part)))
