from __future__ import annotations

import contextlib
import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.errors import ZooError
from zoo.search.budget import METRICS, Budget, BudgetError, Term, TermContext


def only(text: str) -> Term:
    (term,) = Budget.parse(text).terms
    return term


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("params<=2M", Term("params", high=2e6)),
        ("params < 2 M", Term("params", high=2e6, high_strict=True)),
        ("params>1.5B", Term("params", low=1.5e9, low_strict=True)),
        ("params >= 1_000", Term("params", low=1000)),
        ("params in [1M, 2M]", Term("params", low=1e6, high=2e6)),
        ("params>=1M params<=2M", Term("params", low=1e6, high=2e6)),
        ("params>=1M,params<=2M,params<3M", Term("params", low=1e6, high=2e6)),
        ("params<2M params<=2M", Term("params", high=2e6, high_strict=True)),
        ("params<=0", Term("params", high=0)),
        ("depth in [4,4]", Term("depth", low=4, high=4)),
        ("latency<=15ms@cpu", Term("latency", high=0.015, device="cpu")),
        ("latency <= 15 ms @ cpu {seq=8}", Term("latency", high=0.015, device="cpu", context=TermContext(seq=8))),
        (
            "latency<=5ms@cuda:1{batch=1, seq=1024,dtype=bf16 , quantile=.9}",
            Term("latency", high=0.005, device="cuda:1", context=TermContext(1, 1024, None, "bfloat16", 0.9)),
        ),
        ("decode<=3ms@cpu{past=4096}", Term("decode", high=0.003, device="cpu", context=TermContext(past=4096))),
        ("state<=64KiB{seq=32768}", Term("state", high=65536, context=TermContext(seq=32768))),
        ("flops<=3GFLOP", Term("flops", high=3e9)),
        ("flops<=3G", Term("flops", high=3e9)),
        ("params<=60% of specs/t++-125m.yaml", Term("params", high=0.6, relative_to=(60, "specs/t++-125m.yaml"))),
        ("decode>12.5 % of a@cpu", Term("decode", 0.125, low_strict=True, device="cpu", relative_to=(12.5, "a"))),
    ],
)
def test_terms(text: str, expected: Term) -> None:
    assert only(text) == expected


def test_separators_and_several_texts_are_one_budget() -> None:
    budget = Budget.parse("params in [1M, 2M], latency<=5ms@cpu{batch=1,seq=8}", "memory<=2 GiB\n\tweights<=1GB")
    assert [term.metric for term in budget.terms] == ["params", "latency", "memory", "weights"]
    assert budget == Budget.parse(str(budget))
    assert Budget.parse() == Budget.parse(" , ") == Budget()


def test_other_circumstances_are_other_terms() -> None:
    budget = Budget.parse("latency<=5ms latency<=4ms@cpu latency<=3ms@cpu{seq=8} latency<=9ms{quantile=0.9}")
    assert [term.high for term in budget.terms] == [0.005, 0.004, 0.003, 0.009]


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("parms<=2M", 1, "unknown metric 'parms'; did you mean 'params'?"),
        ("params<=2Q", 9, "unknown unit 'Q'"),
        ("memory<=2Gb", 9, "unknown unit 'Gb'; did you mean 'GB'?"),
        ("params<=5ms", 9, "'5ms' is a time, expected a count"),
        ("latency<=15", 10, "has no unit"),
        ("params<=-2M", 9, "negative"),
        ("params<=nan", 9, "not a number"),
        ("params<=", 9, "expected a count such as"),
        ("params", 7, "expected an operator"),
        ("params 2M", 8, "expected an operator"),
        ("params==2M", 7, "found '=='"),
        ("2M>=params", 1, "expected a term such as params<=2M"),
        ("params<=60%", 12, "60% of NAME"),
        ("params in 2M", 11, "expected [LOW, HIGH]"),
        ("params in [2M]", 11, "two ends, found 1"),
        ("params in [2M, 1M]", 11, "2M is more than 1M"),
        ("params in [2M, 1M", 11, "']' is missing"),
        ("params in [2M, x]", 16, "not a number"),
        ("latency<=5ms@cpuu", 14, "unknown device 'cpuu'; did you mean 'cpu'?"),
        ("latency<=5ms@", 14, "unknown device ''"),
        ("params<=2M@cpu", 12, "the same on every device"),
        ("latency<=5ms{bach=1}", 14, "unknown context key 'bach'; did you mean 'batch'?"),
        ("latency<=5ms{past=1}", 14, "latency does not depend on past, only on batch, seq, dtype, quantile"),
        ("params<=2M{seq=1}", 12, "params does not depend on seq"),
        ("latency<=5ms{seq}", 14, "expected KEY=VALUE"),
        ("latency<=5ms{seq=0}", 18, "whole number of at least 1"),
        ("latency<=5ms{seq=1k}", 18, "whole number"),
        ("latency<=5ms{seq=1, seq=2}", 21, "seq is given twice"),
        ("latency<=5ms{dtype=bf17}", 20, "did you mean 'bf16'?"),
        ("latency<=5ms{quantile=1}", 23, "between 0 and 1"),
        ("latency<=5ms{quantile=0.0}", 23, "between 0 and 1"),
        ("latency<=5ms{seq=1", 13, "'}' is missing"),
        ("params<=2M params>=3M", 12, "no value meets params<=2M params>=3M"),
        ("params<=2M params>2M", 12, "no value meets"),
        ("params<0", 1, "no value meets params<0"),
    ],
)
def test_errors_point_at_the_place(text: str, column: int, message: str) -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse(text)
    (problem,) = caught.value.problems
    assert problem.mark is not None
    assert (problem.mark.line, problem.mark.column) == (1, column)
    assert message in problem.message
    assert str(caught.value).splitlines()[-2:] == [f"    {text}", f"    {' ' * (column - 1)}^"]
    assert isinstance(caught.value, ZooError)


def test_all_errors_of_all_texts_come_at_once() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("parms<=2X latency<=5mss@cpuu{bach=1,seq=x} foo bar weights<=5ms", "depth<=4 depth>=5 params")
    places = [(p.mark.line, p.mark.column) for p in caught.value.problems if p.mark]
    assert places == [(1, 1), (1, 20), (1, 25), (1, 30), (1, 41), (1, 44), (1, 48), (1, 61), (2, 10), (2, 25)]


def test_what_stands_in_brackets_is_not_taken_for_a_term() -> None:
    with pytest.raises(BudgetError) as caught:
        Budget.parse("latency=5ms{batch=1, seq=8} [x, params<=1M] depth<=4 state<=1x")
    assert [p.mark.column for p in caught.value.problems if p.mark] == [8, 61]


def test_violation_and_slack_are_shares_of_the_bound() -> None:
    term = only("params in [1M, 2M]")
    assert term.violation(1.5e6) == 0
    assert term.violation(2e6) == term.violation(1e6) == 0
    assert term.violation(3e6) == 0.5
    assert term.violation(0.25e6) == 0.75
    assert term.violation(math.nan) == math.inf
    assert term.slack(1.9e6) == pytest.approx(0.05)
    assert term.slack(1.2e6) == pytest.approx(0.2)
    assert term.slack(3e6) == -0.5
    assert only("params<=2M").slack(0) == 1
    assert only("params>=2M").slack(3e6) == 0.5
    assert only("params>=0").slack(3) == math.inf
    assert only("state<=0").violation(0) == 0
    assert only("state<=0").violation(8) == 8


def test_a_strict_bound_is_violated_by_its_own_value() -> None:
    for text in ("params<2M", "params>2M"):
        assert 0 < only(text).violation(2e6) < 1e-12
        assert only(text).slack(2e6) < 0
    assert only("depth>0").violation(0) > 0


def test_shares_of_named_specs() -> None:
    asked: list[tuple[str, str]] = []

    def lookup(name: str, term: Term) -> float:
        asked.append((name, term.metric))
        return {"gpt2": 100e6, "tiny": 1e6}[name]

    budget = Budget.parse("params<=60% of gpt2 params>=200% of tiny flops<5% of gpt2 params<=59.5M")
    resolved = budget.resolve(lookup)
    assert asked == [("gpt2", "params"), ("tiny", "params"), ("gpt2", "flops")]
    assert resolved == Budget.parse("params in [2M, 59.5M] flops<5M")
    assert resolved.resolve(lookup) == resolved
    assert "60% of gpt2" in resolved.terms[0].describe()
    with pytest.raises(ValueError, match="resolve"):
        budget.terms[0].violation(1)


def test_an_interval_of_shares_is_written_as_two_terms() -> None:
    budget = Budget.parse("params>=50% of gpt2 params<=50% of gpt2")
    assert str(budget) == "params>=50% of gpt2 params<=50% of gpt2"
    assert Budget.parse(str(budget)) == budget


def test_shares_that_cannot_be_met() -> None:
    with pytest.raises(BudgetError, match="no value meets"):
        Budget.parse("params<=10% of gpt2 params>=20M").resolve(lambda *_: 100e6)
    with pytest.raises(BudgetError, match="the params of gpt2 is nan"):
        Budget.parse("params<=10% of gpt2").resolve(lambda *_: math.nan)
    with pytest.raises(BudgetError, match="no value meets params<0% of gpt2"):
        Budget.parse("params<0% of gpt2")


def test_descriptions_for_people() -> None:
    assert only("params<=1234567").describe() == "params <= 1.23M"
    assert only("latency<15ms@cpu{seq=8,batch=1}").describe() == "latency < 15ms@cpu{batch=1,seq=8}"
    assert only("params<=60% of gpt2").describe() == "params <= 60% of gpt2"


NUMBERS = st.one_of(
    st.integers(1, 10**12).map(str),
    st.floats(1e-9, 1e15).map(lambda x: repr(float(x))),
    st.sampled_from(["1.5", "2e3", "1_000", ".25"]),
)
UNITS = {
    "count": ["", "k", "M", "B", "G", "T"],
    "bytes": ["", "B", "KB", "GB", "KiB", "GiB"],
    "time": ["ns", "us", "ms", "s", "min"],
    "flops": ["", "GFLOP", "kFLOP", "TFLOPs", "M"],
}
VALUES = {
    "batch": st.integers(1, 64).map(str),
    "seq": st.integers(1, 10**6).map(str),
    "past": st.integers(0, 10**6).map(str),
    "dtype": st.sampled_from(["bf16", "float32", "fp16"]),
    "quantile": st.sampled_from(["0.5", ".9", "0.995"]),
}


@st.composite
def term_texts(draw: st.DrawFn) -> str:
    metric = METRICS[draw(st.sampled_from(sorted(METRICS)))]
    quantity = st.tuples(NUMBERS, st.sampled_from(UNITS[metric.dimension])).map("".join)
    if draw(st.booleans()):
        bounds = f" in [{draw(quantity)}, {draw(quantity)}]"
    else:
        share = st.tuples(NUMBERS, st.sampled_from(["gpt2", "specs/t++-1.yaml"])).map(lambda t: f"{t[0]}% of {t[1]}")
        bounds = draw(st.sampled_from(["<=", "<", ">=", ">"])) + draw(quantity | share)
    device = draw(st.sampled_from(["", "@cpu", "@cuda:1"])) if metric.needs_measurement else ""
    keys = draw(st.lists(st.sampled_from(metric.context), unique=True)) if metric.context else []
    context = f"{{{','.join(f'{key}={draw(VALUES[key])}' for key in keys)}}}" if keys else ""
    return f"{metric.name}{bounds}{device}{context}"


@given(st.lists(term_texts(), max_size=4), st.sampled_from([" ", ",", ", ", "  "]))
def test_canonical_text_parses_back(texts: list[str], separator: str) -> None:
    with contextlib.suppress(BudgetError):
        budget = Budget.parse(separator.join(texts))
        assert Budget.parse(str(budget)) == budget
        assert str(Budget.parse(str(budget))) == str(budget)
        assert Budget.parse(*texts) == budget


@given(st.text("params latncyde<>=in[]{}@,%of 0123.kMGBs", max_size=60) | st.text(max_size=30))
def test_any_text_is_a_budget_or_an_error(text: str) -> None:
    with contextlib.suppress(BudgetError):
        Budget.parse(text)


def test_needs_neither_torch_nor_optuna() -> None:
    code = "import sys, zoo.search.budget; sys.exit(any(m in sys.modules for m in ('torch', 'optuna')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_spec_is_told_at_its_place() -> None:
    def lookup(name: str, term: Term) -> float:
        raise ZooError(f"no spec is called {name!r}")

    with pytest.raises(BudgetError) as error:
        Budget.parse("flops<=2G params<=60% of gtp2").resolve(lookup)
    assert str(error.value).splitlines() == [
        "--budget:1:26: no spec is called 'gtp2'",
        "    flops<=2G params<=60% of gtp2",
        "                             ^",
    ]
