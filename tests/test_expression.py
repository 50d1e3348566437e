from __future__ import annotations

import contextlib
import re
import time
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.expression import MAX_LENGTH, MAX_NESTING, ExpressionError, is_expression, parse


def value(text: str, **names: Any) -> Any:
    return parse(text).evaluate(names)


def exact(number: Fraction) -> int | float:
    return number.numerator if number.denominator == 1 else float(number)


@pytest.mark.parametrize(
    ("text", "names", "expected"),
    [
        ("$(8/3 * width)", {"width": 768}, 2048),
        ("$(multiple(width * 8 / 3, 64))", {"width": 768}, 2048),
        ("$(multiple(width * 8 / 3, 64))", {"width": 512}, 1408),
        ("$(2**depth)", {"depth": 5}, 32),
        ("$(max(a, b))", {"a": 3, "b": 7}, 7),
        ("$(-2**2)", {}, -4),
        ("$(2**-1)", {}, 0.5),
        ("$(2**3**2)", {}, 512),
        ("$(7 // 2 + 7 % 4 - -1)", {}, 7),
        ("$(1.1 * 10)", {}, 11),
        ("$(ratio * 10)", {"ratio": 1.1}, 11),
        ("$(ratio == 1.1)", {"ratio": 1.1}, True),
        ("$(1 < x <= 3)", {"x": 3}, True),
        ("$(1 < x <= 3)", {"x": 1}, False),
        ("$(not x == 1 or x > 5)", {"x": 1}, False),
        ("$(a / b if b else 0)", {"a": 1, "b": 0}, 0),
        ("$('gqa' if heads > 8 else kind)", {"heads": 8, "kind": "mha"}, "mha"),
        ("$(kind == 'mha' and true)", {"kind": "mha"}, True),
        ("$(1 if a else 2 if b else 3)", {"a": False, "b": True}, 2),
        ("$(sqrt(9/4) + log2(1024))", {}, 11.5),
        ("$(sqrt(2))", {}, 2**0.5),
        ("$(round(2.345, 2))", {}, 2.34),
        ("$(floor(-1/2) + ceil(1/2))", {}, 0),
        ("$(1e-999999999)", {}, 0),
        ("$(1_000 * .5e1)", {}, 5000),
        ("$((-1)**1e300)", {}, 1),
        ("$(0.99**1e12)", {}, 0),
        ("$$(1 + 1)", {}, "$(1 + 1)"),
        ("$$", {}, "$"),
    ],
)
def test_values(text: str, names: dict[str, Any], expected: Any) -> None:
    actual = value(text, **names)
    assert actual == expected
    assert type(actual) is type(expected)


def test_a_name_alone_passes_its_value_through() -> None:
    node = object()
    assert value("$mixer", mixer=node) is node
    assert value("$(mixer if deep else 0)", mixer=node, deep=True) is node
    assert type(value("$x", x=2.0)) is float


def test_names_are_those_that_the_value_depends_on() -> None:
    assert parse("$(max(a, b) if flag else 'c' + true)").names == {"a", "b", "flag"}
    assert parse("$width").names == {"width"}
    assert parse("$$width").names == frozenset()


def test_only_text_after_a_dollar_is_an_expression() -> None:
    assert is_expression("$x")
    assert is_expression("$$x")
    assert not is_expression("x$")
    assert not is_expression(3)


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("$(1 / 0)", 4, "division by zero"),
        ("$(1 % (a - a))", 4, "division by zero"),
        ("$(0 ** -1)", 4, "division by zero"),
        ("$(2 * widht)", 6, "unknown name 'widht'; did you mean 'width'?"),
        ("$widht", 1, "did you mean 'width'?"),
        ("$(1 if true else widht)", 17, "did you mean 'width'?"),
        ("$(maxx(1, 2))", 2, "unknown function 'maxx'; did you mean 'max'?"),
        ("$(__import__('os'))", 2, "unknown function"),
        ("$(width.real)", 7, "attributes"),
        ("$(width[0])", 7, "unexpected '['"),
        ("$(9**9**9)", 3, "too large"),
        ("$(1e999)", 2, "too large"),
        ("$(1e308 * 10)", 8, "too large"),
        ("$(inf + 1)", 2, "finite"),
        ("$(nan * 1)", 2, "finite"),
        ("$(name + 1)", 2, "expected a number, found 'x'"),
        ("$(flag * 2)", 2, "expected a number, found True"),
        ("$(1 if name else 2)", 7, "expected true, false or a number"),
        ("$(-name)", 3, "expected a number"),
        ("$(name < 2)", 2, "expected a number"),
        ("$((-1) ** 0.5)", 7, "fractional power"),
        ("$(sqrt(-1))", 2, "square root"),
        ("$(log2(0))", 2, "logarithm"),
        ("$(multiple(8, 0))", 2, "positive"),
        ("$(multiple(8))", 2, "takes 2 arguments, found 1"),
        ("$(min())", 2, "takes 1 or more arguments, found 0"),
        ("$(1 +)", 5, "expected a value, found `)`"),
        ("$(1", 3, "expected `)`, found the end"),
        ("$(1))", 4, "expected the end"),
        ("$(2k)", 3, "expected `)`, found `k`"),
        ("$($width)", 2, "without `$`"),
        ("$(1 if width)", 12, "expected `else`"),
        ("$(1__0)", 2, "not a number"),
        ("$", 1, "`$$...`"),
        ("$width/2", 1, "`$(arithmetic)`"),
        ("${width}", 1, "`$(arithmetic)`"),
    ],
)
def test_errors_say_where(text: str, column: int, message: str) -> None:
    names = {"width": 8, "a": 1, "name": "x", "flag": True, "inf": float("inf"), "nan": float("nan")}
    with pytest.raises(ExpressionError) as caught:
        parse(text).evaluate(names)
    assert message in caught.value.message
    assert caught.value.column == column
    assert str(caught.value).splitlines()[-1].index("^") == 4 + column


def test_work_is_bounded() -> None:
    longest = "$(" + "1+" * ((MAX_LENGTH - 4) // 2) + "1)"
    assert value(longest) == (MAX_LENGTH - 4) // 2 + 1
    deepest = "$(" + "(" * (MAX_NESTING - 1) + "1" + ")" * MAX_NESTING
    assert value(deepest) == 1
    for opening, closing in [("(", ")"), ("-", ""), ("not ", ""), ("max(", ")"), ("2**", "")]:
        deep = "$(" + opening * (MAX_NESTING + 1) + "1" + closing * (MAX_NESTING + 1) + ")"
        with pytest.raises(ExpressionError, match="nested"):
            parse(deep)
    with pytest.raises(ExpressionError, match="at most 500 characters"):
        parse("$(" + "1" * MAX_LENGTH + ")")


@pytest.mark.parametrize("step", ["**1e3", "*1.0000000001", "**-0.5", "/3", "**2"])
def test_the_slowest_expressions_end_at_once(step: str) -> None:
    start = time.process_time()
    text = "1.0000000000001"
    while len(text) + len(step) + 5 < MAX_LENGTH and text.count("(") < MAX_NESTING - 5:
        text = f"({text}{step})"
    with contextlib.suppress(ExpressionError):
        parse(f"$({text})").evaluate({})
    assert time.process_time() - start < 5, "bounded by design to milliseconds; seconds mean a number without bound"


def trees() -> st.SearchStrategy[str]:
    numbers = st.integers(0, 40).map(str) | st.sampled_from(["a", "b", "0.1", "2.5"])
    arithmetic = st.sampled_from(["+", "-", "*", "/", "//", "%"])
    comparisons = st.sampled_from(["<", "<=", ">", ">=", "==", "!="])

    def extend(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.tuples(inner, arithmetic, inner).map(" ".join),
            st.tuples(inner, arithmetic, inner).map(lambda t: f"({' '.join(t)})"),
            inner.map(lambda t: f"-({t})"),
            st.tuples(inner, st.integers(0, 3)).map(lambda t: f"({t[0]})**{t[1]}"),
            st.tuples(inner, inner).map(lambda t: f"max({t[0]}, {t[1]})"),
            st.tuples(inner, inner, comparisons, inner, inner).map(
                lambda t: f"({t[0]} if {t[1]} {t[2]} {t[3]} else {t[4]})"
            ),
        )

    return st.recursive(numbers, extend, max_leaves=8)


@given(trees(), st.integers(-20, 20), st.integers(-20, 20))
def test_agrees_with_fractions(text: str, a: int, b: int) -> None:
    names = {"a": Fraction(a), "b": Fraction(b), "F": Fraction, "max": max}
    exactly = re.sub(r"(?<![\w*.])(\d+(\.\d+)?)", r"F('\1')", text)
    try:
        expected = exact(Fraction(eval(exactly, names)))
    except ZeroDivisionError:
        with pytest.raises(ExpressionError, match="division by zero"):
            parse(f"$({text})").evaluate({"a": a, "b": b})
        return
    assert parse(f"$({text})").evaluate({"a": a, "b": b}) == expected


@given(st.text(max_size=60) | st.text("()+-*/%<>=!,.ab1e '_if$", max_size=60))
def test_any_text_is_a_value_or_an_error(text: str) -> None:
    for form in (f"$({text})", f"${text}"):
        try:
            parse(form).evaluate({"a": 1, "b": 2.5})
        except ExpressionError as error:
            assert 0 <= error.column <= len(form)
