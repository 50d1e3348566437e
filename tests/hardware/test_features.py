"""What a predictor knows of a call, counted by hand."""

from __future__ import annotations

from zoo.cost import Cost
from zoo.hardware.features import HUGE, LARGE, features

PRODUCT = Cost(kind="linear", flops=100.0, backward=250.0, traffic=30.0, weights=10.0, peak=8.0)


def test_a_kind_has_its_own_terms_and_none_that_are_zero() -> None:
    scan = Cost(kind="scan", pointwise=7.0, traffic=5.0, steps=3.0)
    assert features((PRODUCT + scan).operators) == {
        "linear.calls": 1,
        "linear.flops": 100,
        "linear.traffic": 30,
        "linear.weights": 10,
        "scan.calls": 1,
        "scan.pointwise": 7,
        "scan.traffic": 5,
        "scan.steps": 3,
    }


def test_training_counts_the_products_of_both_passes() -> None:
    assert features(PRODUCT.operators, "train")["linear.flops"] == 350
    assert features(PRODUCT.operators, "decode")["linear.flops"] == 100


def test_what_is_called_again_counts_again() -> None:
    once, thrice = features(PRODUCT.operators), features((PRODUCT * 3).operators)
    assert thrice == {name: 3 * amount for name, amount in once.items()}
    assert features((PRODUCT + PRODUCT + PRODUCT).operators) == thrice


def test_results_are_large_and_huge_by_their_own_size_not_by_their_sum() -> None:
    for size, terms in ((LARGE - 1, set()), (LARGE, {"large"}), (HUGE, {"large", "huge"})):
        found = features((Cost(kind="a", traffic=1.0, peak=size) * 100).operators)
        assert {name.partition(".")[2] for name in found} - {"calls", "traffic"} == terms
        assert all(found[f"a.{term}"] == 100 * size for term in terms)
