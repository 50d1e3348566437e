"""Budgets: what a candidate may cost, in a line of text.

    budget   := term ((" " | ",") term)*
    term     := metric operator value ["@" device] ["{" key "=" value ("," key "=" value)* "}"]
    operator := "<=" | "<" | ">=" | ">" with a quantity or `60% of NAME`, or "in" with `[quantity, quantity]`

For example `params<=2M latency<=15ms@cpu{batch=1,seq=1024,quantile=0.9} flops<=60% of gpt2`. `METRICS` lists the
metrics with their units and the context keys that each depends on. A device is `cpu`, `cuda` or `cuda:N` of this
machine, one whose profile is shipped (`zoo device list`), or one that was calibrated, by name or file.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from zoo.device import device_name
from zoo.errors import Mark, Problem, SpecError, ZooError, did_you_mean, nearest
from zoo.quantity import (
    EXAMPLES,
    Dimension,
    QuantityError,
    exact_quantity,
    format_quantity,
    parse_percent,
    parse_quantity,
    plain_number,
)


@dataclass(frozen=True, slots=True)
class Metric:
    """Something that a budget can bound; `context` names the keys that its value depends on.

    Only a metric that `needs_measurement` belongs to a device; all others are arithmetic on the spec.
    """

    name: str
    dimension: Dimension
    needs_measurement: bool
    summary: str
    context: tuple[str, ...] = ()


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("params", "count", False, "parameters"),
        Metric("active_params", "count", False, "parameters that one token uses"),
        Metric("embedding_params", "count", False, "parameters of embedding tables"),
        Metric("depth", "count", False, "layers"),
        Metric("weights", "bytes", False, "size of the parameters", ("dtype",)),
        Metric("flops", "flops", False, "work of a forward pass", ("batch", "seq")),
        Metric("train_flops", "flops", False, "work of a forward and a backward pass", ("batch", "seq")),
        Metric("decode_flops", "flops", False, "work of decoding one token", ("batch", "past")),
        Metric("traffic", "bytes", False, "bytes that a forward pass moves", ("batch", "seq", "dtype")),
        Metric("state", "bytes", False, "decoding state after `seq` tokens", ("batch", "seq", "dtype")),
        Metric("memory", "bytes", False, "peak of inference: weights, state, activations", ("batch", "seq", "dtype")),
        Metric("train_memory", "bytes", False, "peak of a training step", ("batch", "seq", "dtype")),
        Metric("latency", "time", True, "time of a forward pass", ("batch", "seq", "dtype", "quantile")),
        Metric("decode", "time", True, "time of decoding one token", ("batch", "past", "dtype", "quantile")),
    )
}

DTYPES: Mapping[str, str] = {
    **{name: name for name in ("float64", "float32", "bfloat16", "float16")},
    "fp64": "float64",
    "fp32": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
}
"""Names of dtypes and what they stand for."""

_OPERATORS = ("<=", "<", ">=", ">", "in")


class BudgetError(ZooError):
    """A text that is not a budget, or a budget that nothing can meet, with every problem that was found."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems: tuple[Problem, ...] = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


@dataclass(frozen=True, slots=True)
class TermContext:
    """The circumstances that a term names; None leaves one to whoever evaluates the term.

    batch: sequences. seq: tokens of each. past: tokens before the one that is decoded. dtype: as torch names it.
    quantile: of the timed runs, between 0 and 1.
    """

    batch: int | None = None
    seq: int | None = None
    past: int | None = None
    dtype: str | None = None
    quantile: float | None = None

    def given(self) -> dict[str, int | float | str]:
        """The keys that are not None."""
        return {key.name: value for key in fields(self) if (value := getattr(self, key.name)) is not None}

    def __str__(self) -> str:
        items = [f"{key}={_plain(value)}" for key, value in self.given().items()]
        return f"{{{','.join(items)}}}" if items else ""


@dataclass(frozen=True, slots=True)
class Term:
    """Bounds on one metric on one device in one context; `low` is 0 and `high` infinite where there is none.

    With `relative_to`, the percentage and the name of a spec, the bounds are multiples of that spec's value until
    `Budget.resolve` puts the value in. `text` is what the user wrote, `name_mark` where that name stands.
    """

    metric: str
    low: float = 0.0
    high: float = math.inf
    low_strict: bool = False
    high_strict: bool = False
    device: str | None = None
    context: TermContext = TermContext()
    text: str = field(default="", compare=False)
    relative_to: tuple[float, str] | None = None
    name_mark: Mark | None = field(default=None, compare=False, repr=False)

    @property
    def dimension(self) -> Dimension:
        return METRICS[self.metric].dimension

    @property
    def needs_measurement(self) -> bool:
        return METRICS[self.metric].needs_measurement

    def violation(self, value: float) -> float:
        """How far `value` is outside, as a share of the bound that it misses: `(value - high) / high` above.

        0 if the term is met, the smallest rounding error for a value on a strict bound, infinite for NaN.
        """
        self._check_resolved()
        if math.isnan(value):
            return math.inf
        if value > self.high or (self.high_strict and value == self.high):
            return max((value - self.high) / (self.high or 1.0), sys.float_info.epsilon)
        if value < self.low or (self.low_strict and value == self.low):
            return max((self.low - value) / (self.low or 1.0), sys.float_info.epsilon)
        return 0.0

    def slack(self, value: float) -> float:
        """How far `value` is inside, as a share of the nearer bound; minus the violation if it is outside."""
        if violation := self.violation(value):
            return -violation
        above = (self.high - value) / (self.high or 1.0) if self.high < math.inf else math.inf
        below = (value - self.low) / self.low if self.low else math.inf
        return min(above, below)

    def describe(self) -> str:
        """For people, with three digits: `latency <= 15ms@cpu{batch=1,seq=1024}`; a share says what it was of."""
        origin = f" ({self.text})" if "%" in self.text and self.relative_to is None else ""
        return self._written(format_quantity, " ") + origin

    def __str__(self) -> str:
        """The canonical text, which parses back to an equal term."""
        return self._written(exact_quantity, "")

    def _written(self, quantity: Callable[[float, Dimension], str], space: str) -> str:
        where = f"{'@' if self.device else ''}{self.device or ''}{self.context}"

        def shown(bound: float) -> str:
            if self.relative_to is not None:
                return f"{plain_number(self.relative_to[0])}% of {self.relative_to[1]}"
            return quantity(bound, self.dimension)

        has_low, has_high = self.low > 0 or self.low_strict, self.high < math.inf
        closed = not (self.low_strict or self.high_strict or self.relative_to)
        if has_low and has_high and closed:
            return f"{self.metric} in [{shown(self.low)}, {shown(self.high)}]{where}"
        sides: list[str] = []
        if has_low or not has_high:
            sides.append(f"{self.metric}{space}{'>' if self.low_strict else '>='}{space}{shown(self.low)}{where}")
        if has_high:
            sides.append(f"{self.metric}{space}{'<' if self.high_strict else '<='}{space}{shown(self.high)}{where}")
        return " ".join(sides)

    def _check_resolved(self) -> None:
        if self.relative_to is not None:
            raise ValueError(f"{self} has no value yet: call Budget.resolve first")


@dataclass(frozen=True, slots=True)
class Budget:
    """Terms that a candidate has to meet, all of them; those on the same metric in the same circumstances are one."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def parse(cls, *texts: str) -> Budget:
        """The budget that the texts state together; raises `BudgetError` with all problems of all texts."""
        problems: list[Problem] = []
        terms: list[Term] = []
        for line, text in enumerate(texts, 1):
            reader = _Reader(re.sub(r"\s", " ", text), line, problems)
            for column, term in reader.terms():
                terms, clash = _intersected(terms, term)
                if clash:
                    reader.problem(column, clash)
        if problems:
            raise BudgetError(problems)
        return cls(tuple(terms))

    def resolve(self, lookup: Callable[[str, Term], float]) -> Budget:
        """The budget with shares of named specs put into numbers; `lookup(name, term)` is that spec's value.

        Raises `BudgetError` if there is no such spec, if a value is not a finite number of at least zero, or if no
        value meets all terms.
        """
        problems: list[Problem] = []
        terms: list[Term] = []
        for term in self.terms:
            if term.relative_to is not None:
                name = term.relative_to[1]
                try:
                    value = lookup(name, term)
                except SpecError:
                    raise
                except ZooError as error:
                    problems.append(Problem("", str(error), term.name_mark))
                    continue
                if not 0 <= value < math.inf:
                    problems.append(Problem("", f"{term}: the {term.metric} of {name} is {value}, not a bound"))
                    continue
                high = term.high if math.isinf(term.high) else term.high * value
                term = replace(term, low=term.low * value, high=high, relative_to=None)
            terms, clash = _intersected(terms, term)
            if clash:
                problems.append(Problem("", clash))
        if problems:
            raise BudgetError(problems)
        return Budget(tuple(terms))

    def __str__(self) -> str:
        """The canonical text, which parses back to an equal budget."""
        return " ".join(map(str, self.terms))


def _plain(value: int | float | str) -> str:
    return value if isinstance(value, str) else plain_number(value)


def _intersected(terms: list[Term], new: Term) -> tuple[list[Term], str]:
    """`terms` with `new` among them, and what is wrong with it: no value is left."""

    def key(term: Term) -> tuple[object, ...]:
        return term.metric, term.device, term.context, term.relative_to

    index = next((i for i, term in enumerate(terms) if key(term) == key(new)), len(terms))
    if index < len(terms):
        old = terms[index]
        low, low_strict = max((old.low, old.low_strict), (new.low, new.low_strict))
        high, high_weak = min((old.high, not old.high_strict), (new.high, not new.high_strict))
        text = " ".join(dict.fromkeys((old.text, new.text)))
        new = replace(new, low=low, low_strict=low_strict, high=high, high_strict=not high_weak, text=text)
    if new.low > new.high or (new.low == new.high and (new.low_strict or new.high_strict)):
        return terms, f"no value meets {new.text or new!s}"
    return [*terms[:index], new, *terms[index + 1 :]], ""


def latency_device(name: str) -> str:
    """The name of a device on which a term may hold: of this machine, of a shipped profile, or calibrated.

    `cpu`, `cuda` and `cuda:N` mean this machine, whether or not it has them. Raises `ZooError` with the nearest name.
    """
    try:
        return device_name(name)
    except ZooError as error:
        from zoo.hardware.profile import profile_names

        profiles = profile_names()
        if name in profiles:
            return name
        from zoo.hardware.store import calibrations

        if name.endswith(".json") and Path(name).is_file():
            return name
        calibrated = {predictor.profile.name for _, predictor in calibrations()}
        if name in calibrated:
            return name
        elsewhere = {*profiles, *calibrated}
        best = nearest(name, ("cpu", "cuda", *sorted(elsewhere)))
        if best in elsewhere:
            raise ZooError(f"unknown device {name!r}; did you mean {best!r}?") from None
        if "known: " in str(error):
            raise ZooError(f"{error}, {', '.join(sorted(elsewhere))}, or the file of a calibration") from None
        raise


class _UnreadableError(Exception):
    """What makes the rest of a term unreadable; reading goes on at the next term."""

    def __init__(self, column: int, message: str) -> None:
        self.column = column
        self.message = message
        super().__init__(message)


_START = re.compile(r"(?:(?<=[\s,])|^)[A-Za-z_]\w*\s*(?:[<>=!]|in\b)")
_BARE_NUMBER = re.compile(r"[0-9._]+(?:[eE][+-]?[0-9]+)?")
_DETACHED_UNIT = re.compile(
    rf"\s+(?!(?:of|{'|'.join(METRICS)})\b)" + r"([^\W\d_]+|%)(?=[\s,@{]|$)(?!\s*(?:[<>=!]|in\b))"
)


class _Reader:
    """One text, read term by term; columns are offsets."""

    def __init__(self, text: str, line: int, problems: list[Problem]) -> None:
        self.text = text
        self.line = line
        self.problems = problems
        self.position = 0

    def problem(self, column: int, message: str) -> None:
        self.problems.append(Problem("", message, self.mark(column)))

    def mark(self, column: int) -> Mark:
        return Mark("--budget", self.line, column + 1, self.text)

    def terms(self) -> Iterable[tuple[int, Term]]:
        """Every term that could be read, with its column; what could not is among the problems."""
        while True:
            self.match(r"[\s,]*")
            start, before = self.position, len(self.problems)
            if start == len(self.text):
                return
            try:
                term = self.term()
            except _UnreadableError as problem:
                self.problem(problem.column, problem.message)
                self.skip(problem.column)
                continue
            if len(self.problems) == before:
                yield start, replace(term, text=self.text[start : self.position].strip())

    def match(self, pattern: str | re.Pattern[str]) -> str | None:
        """Take what the pattern matches here, None if it does not."""
        found = re.compile(pattern).match(self.text, self.position)
        if found is None:
            return None
        self.position = found.end()
        return found.group()

    def skip(self, column: int) -> None:
        """To the next thing behind `column` that looks like a term and stands outside brackets."""
        blank = re.sub(r"\{[^}]*(\}|$)|\[[^\]]*(\]|$)", lambda found: "." * len(found.group()), self.text)
        following = _START.search(blank, max(column, self.position))
        self.position = following.start() if following else len(self.text)

    def term(self) -> Term:
        column = self.position
        name = self.match(r"[A-Za-z_]\w*")
        if name is None:
            raise _UnreadableError(column, f"expected a term such as params<=2M, found {self.text[column]!r}")
        metric = METRICS.get(name)
        if metric is None:
            self.problem(column, f"unknown metric {name!r}{did_you_mean(name, METRICS)}")
        self.match(r"\s*")
        column = self.position
        operator = self.match(r"[<>=!]+|in\b")
        if operator not in _OPERATORS:
            found = f"found {operator!r}" if operator else f"{name!r} has none"
            raise _UnreadableError(column, f"expected an operator, one of {' '.join(_OPERATORS)}; {found}")
        self.match(r"\s*")
        term = self.bounds(Term(name), operator, metric)
        return replace(term, device=self.device(metric), context=self.context(metric))

    def bounds(self, term: Term, operator: str, metric: Metric | None) -> Term:
        if operator == "in":
            low, high = self.interval(metric)
            return replace(term, low=low, high=high)
        column = self.position
        text = self.match(r"[^\s,@{}\[\]<>=]+")
        if text is None:
            expected = EXAMPLES[metric.dimension] if metric else "a quantity"
            raise _UnreadableError(column, f"expected {expected}")
        if _BARE_NUMBER.fullmatch(text):
            text += (self.match(_DETACHED_UNIT) or "").strip()
        if text.endswith("%"):
            bound, relative_to = self.share(column, text)
            name_mark = self.mark(self.position - len(relative_to[1]))
            term = replace(term, relative_to=relative_to, name_mark=name_mark)
        else:
            bound = self.quantity(column, text, metric)
        if operator.startswith("<"):
            return replace(term, high=bound, high_strict=operator == "<")
        return replace(term, low=bound, low_strict=operator == ">")

    def quantity(self, column: int, text: str, metric: Metric | None) -> float:
        if metric is not None:
            try:
                return parse_quantity(text, metric.dimension)
            except QuantityError as error:
                self.problem(column, f"{metric.name}: {error}")
        return 0.0

    def share(self, column: int, text: str) -> tuple[float, tuple[float, str]]:
        percent = 0.0
        try:
            percent = parse_percent(text)
        except QuantityError as error:
            self.problem(column, str(error))
        found = re.compile(r"\s*of\s+([^\s,@{}\[\]<>=]+)").match(self.text, self.position)
        if found is None:
            raise _UnreadableError(self.position, f"a percentage needs the name of a spec: {text} of NAME")
        self.position = found.end()
        return percent / 100, (percent, found[1])

    def interval(self, metric: Metric | None) -> tuple[float, float]:
        start = self.position
        inside = self.bracketed(r"\[", "]", "expected [LOW, HIGH] behind `in`")
        if len(inside) != 2:
            self.problem(start, f"an interval has two ends, found {len(inside)}")
            return 0.0, math.inf
        before = len(self.problems)
        low, high = (self.quantity(column, text, metric) for column, text in inside)
        if low > high and len(self.problems) == before:
            self.problem(start, f"the interval is empty: {inside[0][1]} is more than {inside[1][1]}")
        return low, high

    def bracketed(self, opening: str, closing: str, expected: str) -> list[tuple[int, str]]:
        """The comma-separated parts between brackets, each with its column."""
        start = self.position
        if self.match(opening) is None:
            raise _UnreadableError(start, expected)
        end = self.text.find(closing, self.position)
        if end < 0:
            raise _UnreadableError(start, f"{self.text[start]!r} is never closed; {closing!r} is missing")
        parts: list[tuple[int, str]] = []
        for part in self.text[self.position : end].split(","):
            parts.append((self.position + len(part) - len(part.lstrip()), part.strip()))
            self.position += len(part) + 1
        return parts

    def device(self, metric: Metric | None) -> str | None:
        if self.match(r"\s*@\s*") is None:
            return None
        column = self.position
        name = self.match(r"[^\s,{}\[\]]*") or ""
        if metric is not None and not metric.needs_measurement:
            self.problem(column, f"{metric.name} is the same on every device; leave `@{name}` out")
            return None
        try:
            return latency_device(name)
        except ZooError as error:
            self.problem(column, str(error))
            return None

    def context(self, metric: Metric | None) -> TermContext:
        if re.compile(r"\s*\{").match(self.text, self.position) is None:
            return TermContext()
        self.match(r"\s*")
        values: dict[str, int | float | str] = {}
        for column, item in self.bracketed(r"\{", "}", ""):
            key, equals, value = (part.strip() for part in item.partition("="))
            if not equals:
                self.problem(column, f"expected KEY=VALUE, found {item!r}")
            elif key not in _CONTEXT_VALUES:
                self.problem(column, f"unknown context key {key!r}{did_you_mean(key, _CONTEXT_VALUES)}")
            elif metric is not None and key not in metric.context:
                depends = f", only on {', '.join(metric.context)}" if metric.context else " or any other context"
                self.problem(column, f"{metric.name} does not depend on {key}{depends}")
            elif key in values:
                self.problem(column, f"{key} is given twice")
            else:
                try:
                    values[key] = _CONTEXT_VALUES[key](value)
                except ValueError as error:
                    self.problem(column + item.index("=") + 1, f"{key}: {error}")
        return TermContext(**values)  # type: ignore[arg-type]


def _whole(least: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"[0-9]+(_[0-9]+)*", text) or len(text) > 15 or int(text) < least:
            raise ValueError(f"expected a whole number of at least {least}, found {text!r}")
        return int(text)

    return read


def _dtype(text: str) -> str:
    if text not in DTYPES:
        raise ValueError(f"unknown dtype {text!r}{did_you_mean(text, DTYPES)}")
    return DTYPES[text]


def _quantile(text: str) -> float:
    if not re.fullmatch(r"0?\.[0-9]{1,9}", text) or float(text) == 0:
        raise ValueError(f"expected a number between 0 and 1 such as 0.9, found {text!r}")
    return float(text)


_CONTEXT_VALUES: Mapping[str, Callable[[str], int | float | str]] = {
    "batch": _whole(1),
    "seq": _whole(1),
    "past": _whole(0),
    "dtype": _dtype,
    "quantile": _quantile,
}
