from __future__ import annotations

import pytest

from zoo.errors import ZooError
from zoo.search.budget import Budget
from zoo.search.objective import parse_objectives


def test_objectives_know_which_way_is_better() -> None:
    loss, accuracy, params = parse_objectives("loss, accuracy,params")
    assert [objective.direction for objective in (loss, accuracy, params)] == ["minimize", "maximize", "minimize"]
    assert accuracy.better(0.9, 0.8) and loss.better(1.0, 2.0) and params.better(1.0, 2.0)
    assert loss.trained and accuracy.trained and not params.trained


def test_a_metric_takes_the_circumstances_of_the_budget_or_its_own() -> None:
    budget = Budget.parse("latency<=15ms@cpu{seq=128}")
    (bare,) = parse_objectives("latency", budget)
    assert bare.term == budget.terms[0]
    loss, own = parse_objectives("loss,latency@cpu{batch=2,seq=512}", budget)
    assert loss.name == "loss" and own.term is not None
    assert (own.term.context.batch, own.term.context.seq, own.term.device) == (2, 512, "cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("los", "did you mean 'loss'"),
        ("", "an objective is needed"),
        ("loss,loss", "given twice"),
        ("loss@cpu", "no device"),
        ("latency@gpu", "did you mean 'cuda'"),
        ("params{seq=3}", "does not depend on seq"),
    ],
)
def test_what_is_no_objective_is_refused(text: str, message: str) -> None:
    with pytest.raises(ZooError, match=message):
        parse_objectives(text)
