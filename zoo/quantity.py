"""Numbers with units, as people write them: `2M` parameters, `1.5GB`, `15ms`, `3GFLOP`, `60%`.

Values are in base units: a count, bytes, seconds, floating-point operations. Decimal prefixes are powers of 1000, `KiB
MiB GiB TiB` powers of 1024; `B` is a billion where things are counted and one byte where bytes are.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Literal

from zoo.errors import ZooError, did_you_mean

Dimension = Literal["count", "bytes", "time", "flops"]

_FLOPS = {f"{prefix}FLOP": Decimal(1000) ** power for power, prefix in enumerate(("", "k", "M", "G", "T", "P", "E"))}
_BINARY = {name: Decimal(1024) ** power for power, name in enumerate(("KiB", "MiB", "GiB", "TiB"), 1)}
_SHOWN: Mapping[Dimension, Mapping[str, Decimal]] = {
    "count": {"": Decimal(1), "k": Decimal(10**3), "M": Decimal(10**6), "B": Decimal(10**9), "T": Decimal(10**12)},
    "bytes": {name: Decimal(1000) ** power for power, name in enumerate(("B", "KB", "MB", "GB", "TB"))},
    "time": {"ns": Decimal("1e-9"), "us": Decimal("1e-6"), "ms": Decimal("1e-3"), "s": Decimal(1), "min": Decimal(60)},
    "flops": _FLOPS,
}
_COUNTS = {**_SHOWN["count"], "K": Decimal(10**3), "G": Decimal(10**9)}
UNITS: Mapping[Dimension, Mapping[str, Decimal]] = {
    "count": _COUNTS,
    "bytes": {
        **_SHOWN["bytes"],
        "": Decimal(1),
        "kB": Decimal(1000),
        **_BINARY,
    },
    "time": {**_SHOWN["time"], "µs": Decimal("1e-6"), "μs": Decimal("1e-6")},
    "flops": {**_FLOPS, **{f"{name}s": factor for name, factor in _FLOPS.items()}, **_COUNTS},
}
"""Every unit that is read, by dimension; a time has no unit by default, so that `15` is never taken for 15s."""

EXAMPLES: Mapping[Dimension, str] = {
    "count": "a count such as 2M or 1.5B",
    "bytes": "a size such as 512MB or 2GiB",
    "time": "a time such as 15ms or 200us",
    "flops": "an amount of work such as 3GFLOP or 3G",
}

_QUANTITY = re.compile(
    r"""\s*(?P<number>[+-]?(?:[0-9]+(?:_[0-9]+)*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)
        \s*(?P<unit>[^\W\d_]*|%)\s*""",
    re.VERBOSE,
)


class QuantityError(ZooError):
    """A text that is not a quantity of the expected dimension."""


def parse_quantity(text: str, dimension: Dimension) -> float:
    """The value of `text` in base units; counts, bytes and FLOPs may stand without a unit, times may not.

    Raises `QuantityError` for what is not a number, an unknown unit, a unit of another dimension, and a negative or
    infinite value.
    """
    number, unit = _split(text, EXAMPLES[dimension])
    units = UNITS[dimension]
    if unit in units:
        return _finite(number * units[unit], text)
    expected = f"expected {EXAMPLES[dimension]}"
    if unit == "%":
        raise QuantityError(f"{text.strip()!r} is a percentage, {expected}")
    if not unit:
        raise QuantityError(f"{text.strip()!r} has no unit, {expected}")
    other = next((EXAMPLES[name] for name, known in UNITS.items() if unit in known and name != dimension), None)
    if other is not None:
        raise QuantityError(f"{text.strip()!r} is {other.split(' such')[0]}, {expected}")
    raise QuantityError(f"unknown unit {unit!r}{did_you_mean(unit, filter(None, units))}")


def parse_percent(text: str) -> float:
    """The percentage that `60%` states, 60.0; raises `QuantityError`."""
    number, unit = _split(text, "a percentage such as 60%")
    if unit != "%":
        raise QuantityError(f"{text.strip()!r} is not a percentage such as 60%")
    return _finite(number, text)


def finite(value: float) -> float | None:
    """The value, None where it is infinite, which JSON cannot say."""
    return value if math.isfinite(value) else None


def format_quantity(value: float, dimension: Dimension) -> str:
    """A short text for people: three significant digits and the largest unit that is not above the value."""
    if not math.isfinite(value):
        return str(value)
    rounded = float(f"{value:.3g}")
    units = {unit: float(factor) for unit, factor in _SHOWN[dimension].items()}
    fitting = [unit for unit, factor in units.items() if abs(rounded) >= factor]
    smallest = next(iter(units)) if value else next(unit for unit, factor in units.items() if factor == 1)
    unit = fitting[-1] if fitting else smallest
    return f"{plain_number(float(f'{value / units[unit]:.3g}'))}{unit}"


def exact_quantity(value: float, dimension: Dimension) -> str:
    """The shortest text that `parse_quantity` reads back as exactly `value`, a finite number of at least zero."""
    exact = Decimal(repr(float(value)))
    units = {**_SHOWN[dimension], **(_BINARY if dimension == "bytes" else {})}
    candidates = [f"{plain_number(exact / factor)}{unit}" for unit, factor in reversed(units.items())]
    return min((text for text in candidates if parse_quantity(text, dimension) == value), key=len)


def plain_number(value: float | Decimal) -> str:
    """The shortest decimal notation of a number that keeps its value: `60`, `0.5`, `1e30`."""
    number = (value if isinstance(value, Decimal) else Decimal(repr(float(value)))).normalize()
    fixed, scientific = f"{number:f}", f"{number:e}".replace("e+", "e")
    return fixed if len(fixed) <= max(len(scientific), 12) else scientific


def _split(text: str, expected: str) -> tuple[Decimal, str]:
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise QuantityError(f"{text.strip()!r} is not a number with a unit, expected {expected}")
    if math.isinf(float(match["number"])):
        raise QuantityError(f"{text.strip()!r} is too large, expected {expected}")
    number = Decimal(match["number"])
    if number < 0:
        raise QuantityError(f"{text.strip()!r} is negative, expected {expected}")
    return number, match["unit"]


def _finite(value: Decimal, text: str) -> float:
    if math.isinf(float(value)):
        raise QuantityError(f"{text.strip()!r} is too large")
    return float(value)
