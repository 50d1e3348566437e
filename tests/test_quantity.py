from __future__ import annotations

import contextlib
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zoo.quantity import (
    Dimension,
    QuantityError,
    exact_quantity,
    format_quantity,
    parse_percent,
    parse_quantity,
    plain_number,
)

DIMENSIONS = st.sampled_from(get_args(Dimension))


@pytest.mark.parametrize(
    ("text", "dimension", "expected"),
    [
        ("2M", "count", 2e6),
        ("1.5B", "count", 1.5e9),
        ("1.5G", "count", 1.5e9),
        ("3k", "count", 3000),
        ("3K", "count", 3000),
        ("1T", "count", 1e12),
        ("1e6", "count", 1e6),
        ("1_000_000", "count", 1e6),
        (" 2.3 M ", "count", 2_300_000),
        ("0", "count", 0),
        ("512", "bytes", 512),
        ("512B", "bytes", 512),
        ("2KB", "bytes", 2000),
        ("2KiB", "bytes", 2048),
        ("1.5GB", "bytes", 1.5e9),
        ("2GiB", "bytes", 2 * 1024**3),
        ("1TiB", "bytes", 1024**4),
        ("15ms", "time", 0.015),
        ("200us", "time", 2e-4),
        ("200µs", "time", 2e-4),
        ("200μs", "time", 2e-4),
        ("7ns", "time", 7e-9),
        (".5s", "time", 0.5),
        ("2min", "time", 120),
        ("3GFLOP", "flops", 3e9),
        ("3GFLOPs", "flops", 3e9),
        ("3 kFLOP", "flops", 3000),
        ("2EFLOP", "flops", 2e18),
        ("1.5e3B", "flops", 1.5e12),
        ("1e-999999999", "count", 0),
    ],
)
def test_values(text: str, dimension: Dimension, expected: float) -> None:
    assert parse_quantity(text, dimension) == expected


@pytest.mark.parametrize(
    ("text", "dimension", "message"),
    [
        ("5ms", "count", "'5ms' is a time, expected a count such as 2M"),
        ("2M", "time", "'2M' is a count, expected a time"),
        ("2G", "bytes", "'2G' is a count, expected a size such as 512MB"),
        ("2GB", "flops", "'2GB' is a size"),
        ("60%", "count", "is a percentage"),
        ("15", "time", "'15' has no unit"),
        ("2Mb", "bytes", "unknown unit 'Mb'; did you mean 'MB'?"),
        ("2m", "count", "did you mean 'M'?"),
        ("2Gflops", "flops", "did you mean 'GFLOPs'?"),
        ("2 parsecs", "time", "unknown unit 'parsecs'; known: min, ms"),
        ("-2M", "count", "is negative"),
        ("nan", "count", "not a number"),
        ("inf", "count", "not a number"),
        ("1e999", "count", "too large"),
        ("1e308M", "count", "too large"),
        ("", "count", "not a number"),
        ("M", "count", "not a number"),
        ("1__0", "count", "not a number"),
        ("1,5M", "count", "not a number"),
        ("2M3", "count", "not a number"),
    ],
)
def test_errors_say_what_was_expected(text: str, dimension: Dimension, message: str) -> None:
    with pytest.raises(QuantityError) as caught:
        parse_quantity(text, dimension)
    assert message in str(caught.value)


def test_percentages() -> None:
    assert parse_percent("60%") == 60
    assert parse_percent("12.5 %") == 12.5
    for wrong in ("60", "-5%", "60M", "%"):
        with pytest.raises(QuantityError):
            parse_percent(wrong)


@pytest.mark.parametrize(
    ("value", "dimension", "text"),
    [
        (1_234_567, "count", "1.23M"),
        (999_999, "count", "1M"),
        (124_439_808, "count", "124M"),
        (1.5e9, "count", "1.5B"),
        (12, "count", "12"),
        (0, "count", "0"),
        (0, "time", "0s"),
        (0.015, "time", "15ms"),
        (0.0009999, "time", "1ms"),
        (90, "time", "1.5min"),
        (1536, "bytes", "1.54KB"),
        (3e9, "flops", "3GFLOP"),
        (1.2e16, "count", "12000T"),
        (-0.015, "time", "-15ms"),
        (float("nan"), "time", "nan"),
    ],
)
def test_text_for_people(value: float, dimension: Dimension, text: str) -> None:
    assert format_quantity(value, dimension) == text


@given(st.floats(1e-12, 1e24), DIMENSIONS)
def test_text_for_people_keeps_three_digits(value: float, dimension: Dimension) -> None:
    assert parse_quantity(format_quantity(value, dimension), dimension) == pytest.approx(value, rel=0.5001e-2)


@given(st.one_of(st.floats(0, 1e24), st.integers(0, 10**15), st.decimals(0, 1000, places=2)), DIMENSIONS)
def test_exact_text_keeps_everything(value: float, dimension: Dimension) -> None:
    assert parse_quantity(exact_quantity(float(value), dimension), dimension) == float(value)


def test_exact_text_is_short() -> None:
    assert exact_quantity(2e6, "count") == "2M"
    assert exact_quantity(2147483648, "bytes") == "2GiB"
    assert exact_quantity(0.015, "time") == "15ms"
    assert exact_quantity(2_300_001, "count") == "2300001"
    assert exact_quantity(3e9, "flops") == "3GFLOP"
    assert plain_number(60.0) == "60"
    assert plain_number(1e30) == "1e30"


@given(st.text(max_size=12) | st.from_regex(r"[0-9._e+-]{1,8}[kMGTBmsuFLOP%]{0,5}", fullmatch=True), DIMENSIONS)
def test_any_text_is_a_quantity_or_an_error(text: str, dimension: Dimension) -> None:
    with contextlib.suppress(QuantityError):
        assert parse_quantity(text, dimension) >= 0
