"""Arithmetic in specs, without `eval`.

A scalar that begins with `$` is an expression: `$name`, or `$(arithmetic)`; `$$text` is the literal `$text`. Operators
and precedence are Python's: `+ - * / // % **`, comparisons (chained), `and or not`, `a if condition else b`; functions
are those of `FUNCTIONS`; literals are numbers, `true`, `false` and quoted strings.

Arithmetic is exact: numbers are fractions, a float is the decimal that it prints as, and only `sqrt`, `log2` and
fractional powers round. A result that is a whole number is an int, any other is the nearest float, so
`$(8/3 * width)` is 2048 for a width of 768. Values that no operator touches are passed through as they are.

Work is bounded: `MAX_LENGTH` characters, `MAX_NESTING` levels, and no number beyond the range of a float.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from zoo.errors import ZooError, did_you_mean

MAX_LENGTH = 500
MAX_NESTING = 50

_LARGEST = Fraction(math.ldexp(1 - 2**-53, 1024))
_FINEST = 2**2048

Names = Mapping[str, Any]
Node = Callable[[Names], Any]


class ExpressionError(ZooError):
    """An expression that cannot be read or has no value; `column` is the offset in `text` of what is wrong."""

    def __init__(self, message: str, text: str, column: int) -> None:
        self.message = message
        self.text = text
        self.column = column
        super().__init__(f"{message}\n    {text}\n    {' ' * column}^")


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed expression: `text` as written and the `names` that its value depends on."""

    text: str
    columns: Mapping[str, int] = field(compare=False, repr=False)
    node: Node = field(compare=False, repr=False)

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self.columns)

    def evaluate(self, names: Names) -> Any:
        """The value, given the values of all `names`, also of those in a branch that is not taken.

        Raises `ExpressionError` for a name that is missing, a value of the wrong kind, a division by zero, and a
        number beyond the range of a float.
        """
        for name, column in self.columns.items():
            if name not in names:
                message = f"unknown name {name!r}{did_you_mean(name, names)}"
                raise ExpressionError(message, self.text, column)
        try:
            value = self.node(names)
        except _LocatedError as error:
            raise ExpressionError(error.message, self.text, error.column) from None
        if isinstance(value, Fraction):
            return value.numerator if value.denominator == 1 else float(value)
        return value


def is_expression(text: object) -> bool:
    """Whether a scalar is to be parsed as an expression (which includes the escape `$$`)."""
    return isinstance(text, str) and text.startswith("$")


@lru_cache(maxsize=4096)
def parse(text: str) -> Expression:
    """Parse `$name`, `$(arithmetic)` or `$$literal`; raises `ExpressionError`."""
    if text.startswith("$$"):
        literal = text[1:]
        return Expression(text, {}, _constant(literal))
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"an expression has at most {MAX_LENGTH} characters, this one {len(text)}", text, 0)
    if re.fullmatch(r"\$[A-Za-z_][A-Za-z0-9_]*", text):
        name = text[1:]
        return Expression(text, {name: 1}, lambda names: names[name])
    if not text.startswith("$("):
        message = "expected `$name` or `$(arithmetic)`; a text that begins with `$` is written `$$...`"
        raise ExpressionError(message, text, min(1, len(text)))
    try:
        parser = _Parser(text)
        node = parser.whole()
    except _LocatedError as error:
        raise ExpressionError(error.message, text, error.column) from None
    return Expression(text, parser.columns, node)


class _LocatedError(Exception):
    """An error at a column of a text that only `parse` and `evaluate` know."""

    def __init__(self, message: str, column: int) -> None:
        self.message = message
        self.column = column
        super().__init__(message)


def _constant(value: Any) -> Node:
    return lambda _: value


def _exact(value: int | float) -> Fraction:
    return Fraction(value) if isinstance(value, int) else Fraction(repr(float(value)))


def _number(value: Any, column: int) -> Fraction:
    if isinstance(value, Fraction):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _LocatedError(f"expected a number, found {_shown(value)}", column)
    if isinstance(value, float) and not math.isfinite(value):
        raise _LocatedError(f"expected a finite number, found {value}", column)
    return _bounded(_exact(value), column)


def _truth(value: Any, column: int) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float, Fraction)):
        return value != 0
    raise _LocatedError(f"expected true, false or a number, found {_shown(value)}", column)


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, bool, int, float)) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _bounded(value: Fraction, column: int) -> Fraction:
    if abs(value) > _LARGEST:
        raise _LocatedError("the number is too large", column)
    return value if value.denominator < _FINEST else Fraction(float(value))


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    """`base ** exponent`, exact for whole exponents while the result has at most 4,096 bits, else in floats."""
    if base == 0 and exponent < 0:
        raise ZeroDivisionError
    if base < 0 and exponent.denominator != 1:
        raise ValueError("a negative number has no fractional power")
    if base in (0, 1, -1):
        return Fraction(base**exponent)
    size = max(base.numerator.bit_length(), base.denominator.bit_length()) * abs(exponent)
    if exponent.denominator == 1 and size <= 4096:
        return base**exponent.numerator
    return Fraction(float(base) ** float(exponent))


def _multiple(value: Fraction, of: Fraction) -> Fraction:
    if of <= 0:
        raise ValueError("`of` must be positive")
    return math.ceil(value / of) * of


def _round(value: Fraction, digits: Fraction = Fraction(0)) -> Fraction:
    if digits.denominator != 1 or abs(digits) > 300:
        raise ValueError("the digits must be a whole number between -300 and 300")
    return Fraction(round(value, int(digits)))


def _square_root(value: Fraction) -> Fraction:
    if value < 0:
        raise ValueError("a negative number has no square root")
    root = Fraction(math.isqrt(value.numerator), math.isqrt(value.denominator))
    return root if root * root == value else _exact(math.sqrt(value))


def _binary_logarithm(value: Fraction) -> Fraction:
    if value <= 0:
        raise ValueError("only a positive number has a logarithm")
    return _exact(math.log2(value.numerator) - math.log2(value.denominator))


class _Function(NamedTuple):
    apply: Callable[..., Any]
    fewest: int
    most: int | None


FUNCTIONS: Mapping[str, _Function] = {
    "min": _Function(min, 1, None),
    "max": _Function(max, 1, None),
    "round": _Function(_round, 1, 2),
    "floor": _Function(math.floor, 1, 1),
    "ceil": _Function(math.ceil, 1, 1),
    "multiple": _Function(_multiple, 2, 2),
    "sqrt": _Function(_square_root, 1, 1),
    "log2": _Function(_binary_logarithm, 1, 1),
}
"""`multiple(x, of)` is the least multiple of `of` that is not below `x`; the others are Python's."""

_ARITHMETIC: Mapping[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "+": (5, operator.add),
    "-": (5, operator.sub),
    "*": (6, operator.mul),
    "/": (6, operator.truediv),
    "//": (6, operator.floordiv),
    "%": (6, operator.mod),
    "**": (8, _power),
}
_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
}
_OR, _AND, _NOT, _COMPARISON, _SIGN = 1, 2, 3, 4, 7
_KEYWORDS = frozenset({"if", "else", "and", "or", "not"})
_CONSTANTS = {"true": True, "True": True, "false": False, "False": False}

_TOKEN = re.compile(
    r"""\s*(?:
        (?P<number>(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][+-]?[0-9]+)?)
      | (?P<name>[A-Za-z_][A-Za-z0-9_]*)
      | (?P<string>'[^']*'|"[^"]*")
      | (?P<operator>\*\*|//|<=|>=|==|!=|[-+*/%<>(),])
      | (?P<end>$)
    )""",
    re.VERBOSE,
)


class _Token(NamedTuple):
    kind: str
    text: str
    column: int


def _tokens(text: str) -> list[_Token]:
    tokens: list[_Token] = []
    position = 1
    while not tokens or tokens[-1].kind != "end":
        match = _TOKEN.match(text, position)
        if match is None or match.lastgroup is None:
            column = position + len(text[position:]) - len(text[position:].lstrip())
            hint = "; inside `$(...)` names stand without `$`" if text[column] == "$" else ""
            hint = "; values have no attributes" if text[column] == "." else hint
            raise _LocatedError(f"unexpected {text[column]!r}{hint}", column)
        tokens.append(_Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup)))
        position = match.end()
    return tokens


def _applied(apply: Callable[..., Any], arguments: list[tuple[Node, int]], column: int) -> Node:
    """The node that applies a function to the numbers that its arguments evaluate to."""

    def node(names: Names) -> Fraction:
        # A loop: a comprehension would double the depth of the call stack in Python 3.11.
        numbers: list[Fraction] = []
        for argument, place in arguments:
            numbers.append(_number(argument(names), place))
        try:
            return _bounded(Fraction(apply(*numbers)), column)
        except ZeroDivisionError:
            raise _LocatedError("division by zero", column) from None
        except OverflowError:
            raise _LocatedError("the number is too large", column) from None
        except ValueError as error:
            raise _LocatedError(str(error), column) from None

    return node


class _Parser:
    """Precedence climbing over the tokens; each method returns the node of what it read."""

    def __init__(self, text: str) -> None:
        self.tokens = _tokens(text)
        self.position = 0
        self.nesting = 0
        self.columns: dict[str, int] = {}

    @property
    def token(self) -> _Token:
        return self.tokens[self.position]

    def take(self) -> _Token:
        token = self.token
        self.position += token.kind != "end"
        return token

    def at(self, *texts: str) -> bool:
        return self.token.kind in ("operator", "name") and self.token.text in texts

    def expect(self, text: str) -> None:
        if not self.at(text):
            raise _LocatedError(f"expected `{text}`, found {self.found()}", self.token.column)
        self.take()

    def found(self) -> str:
        return "the end" if self.token.kind == "end" else f"`{self.token.text}`"

    def whole(self) -> Node:
        self.expect("(")
        node = self.expression()
        self.expect(")")
        if self.token.kind != "end":
            raise _LocatedError(f"expected the end, found {self.found()}", self.token.column)
        return node

    def nested(self, read: Callable[[], Node]) -> Node:
        self.nesting += 1
        if self.nesting > MAX_NESTING:
            raise _LocatedError(f"nested more than {MAX_NESTING} levels deep", self.token.column)
        node = read()
        self.nesting -= 1
        return node

    def expression(self) -> Node:
        return self.nested(self.conditional)

    def conditional(self) -> Node:
        chosen = self.operation(_OR)
        if not self.at("if"):
            return chosen
        self.take()
        column = self.token.column
        condition = self.operation(_OR)
        self.expect("else")
        other = self.expression()
        return lambda names: chosen(names) if _truth(condition(names), column) else other(names)

    def operation(self, precedence: int) -> Node:
        """Operators that bind at least as strongly as `precedence`, and their operands."""
        start = self.token.column
        left = self.operand()
        while True:
            symbol = self.token.text if self.token.kind in ("operator", "name") else ""
            if symbol in _ARITHMETIC and _ARITHMETIC[symbol][0] >= precedence:
                binding, apply = _ARITHMETIC[symbol]
                column = self.take().column
                place = self.token.column
                if symbol == "**":
                    right = self.nested(lambda: self.operation(_SIGN))
                else:
                    right = self.operation(binding + 1)
                left = _applied(apply, [(left, start), (right, place)], column)
            elif symbol in _COMPARISONS and precedence <= _COMPARISON:
                left = self.comparison(left, start)
            elif symbol == "and" and precedence <= _AND:
                left = self.logical(left, start, _AND)
            elif symbol == "or" and precedence <= _OR:
                left = self.logical(left, start, _OR)
            else:
                return left

    def comparison(self, first: Node, start: int) -> Node:
        links: list[tuple[str, Node, int]] = []
        while self.at(*_COMPARISONS):
            symbol = self.take().text
            column = self.token.column
            links.append((symbol, self.operation(_COMPARISON + 1), column))

        def node(names: Names) -> bool:
            left, place = first(names), start
            for symbol, operand, column in links:
                right = operand(names)
                if symbol in ("==", "!="):
                    holds = _COMPARISONS[symbol](_comparable(left), _comparable(right))
                else:
                    holds = _COMPARISONS[symbol](_number(left, place), _number(right, column))
                if not holds:
                    return False
                left, place = right, column
            return True

        return node

    def logical(self, left: Node, start: int, binding: int) -> Node:
        self.take()
        column = self.token.column
        right = self.operation(binding + 1)
        if binding == _AND:
            return lambda names: _truth(left(names), start) and _truth(right(names), column)
        return lambda names: _truth(left(names), start) or _truth(right(names), column)

    def operand(self) -> Node:
        token = self.take()
        if token.kind == "number":
            number = _literal(token)
            return _constant(number)
        if token.kind == "string":
            string = token.text[1:-1]
            return _constant(string)
        if token.kind == "operator" and token.text in "+-(":
            if token.text == "(":
                node = self.expression()
                self.expect(")")
                return node
            place = self.token.column
            node = self.nested(lambda: self.operation(_SIGN))
            return _applied(operator.neg if token.text == "-" else operator.pos, [(node, place)], token.column)
        if token.text == "not":
            place = self.token.column
            node = self.nested(lambda: self.operation(_NOT))
            return lambda names: not _truth(node(names), place)
        if token.kind == "name" and token.text not in _KEYWORDS:
            return self.call(token) if self.at("(") else self.name(token)
        found = "the end" if token.kind == "end" else f"`{token.text}`"
        raise _LocatedError(f"expected a value, found {found}", token.column)

    def name(self, token: _Token) -> Node:
        if token.text in _CONSTANTS:
            constant = _CONSTANTS[token.text]
            return _constant(constant)
        self.columns.setdefault(token.text, token.column)
        return lambda names: names[token.text]

    def call(self, token: _Token) -> Node:
        if token.text not in FUNCTIONS:
            raise _LocatedError(f"unknown function {token.text!r}{did_you_mean(token.text, FUNCTIONS)}", token.column)
        function = FUNCTIONS[token.text]
        self.expect("(")
        arguments: list[tuple[Node, int]] = []
        while not self.at(")"):
            if arguments:
                self.expect(",")
            column = self.token.column
            arguments.append((self.expression(), column))
        self.expect(")")
        if len(arguments) < function.fewest or (function.most is not None and len(arguments) > function.most):
            wanted = f"{function.fewest}" if function.fewest == function.most else f"{function.fewest} or more"
            wanted = "1 or 2" if (function.fewest, function.most) == (1, 2) else wanted
            raise _LocatedError(f"{token.text} takes {wanted} arguments, found {len(arguments)}", token.column)
        return _applied(function.apply, arguments, token.column)


def _comparable(value: Any) -> Any:
    """A float equals the decimal that it prints as, as everywhere in an expression."""
    return _exact(value) if isinstance(value, float) and math.isfinite(value) else value


def _literal(token: _Token) -> Fraction:
    try:
        size = float(token.text)
    except ValueError:
        raise _LocatedError(f"{token.text!r} is not a number", token.column) from None
    if math.isinf(size):
        raise _LocatedError("the number is too large", token.column)
    # A fraction of 10^-999999999 would not fit into memory; as a float it is zero.
    return Fraction(token.text) if size else Fraction(0)
