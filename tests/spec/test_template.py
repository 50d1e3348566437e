"""Variables, arithmetic, patterns and overrides; holes where a finished spec is needed."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest

import zoo
from zoo.errors import SpecError
from zoo.spec.document import parse

REST = "stem: {type: token, vocab: 256}\nhead: language_model\n"
HYBRID = """\
width: 1024
context: 4096
stem: {type: token, vocab: 50304}
body:
  layers: {repeat: 40, of: {mixer: mamba2, channel: glu}}
  overrides:
    "7::8": {mixer: {type: attention, heads: 16, kv_heads: 4}}
    "0": {channel: {type: mlp, ratio: 2}}
    "-2:": {mixer: {type: linear_attention}}
head: language_model
"""


def layers(body: str, top: str = "") -> list[Any]:
    """The layers of a small model with this body."""
    spec = parse(f"width: 64\n{top}body: {body}\n{REST}")
    return list(spec.body.layers)  # type: ignore[attr-defined]


def problems(text: str) -> list[tuple[int, int, str]]:
    """Line, column and message of every problem of a text."""
    with pytest.raises(SpecError) as error:
        parse(text)
    found = []
    for problem in error.value.problems:
        assert problem.mark is not None, problem
        found.append((problem.mark.line, problem.mark.column, problem.message))
    return found


def only(text: str) -> tuple[int, int, str]:
    (found,) = problems(text)
    return found


def test_forty_layers_in_ten_lines() -> None:
    assert len(HYBRID.splitlines()) <= 15
    kinds = [layer.mixer.type for layer in parse(HYBRID).body.layers]  # type: ignore[attr-defined]
    expected = ["attention" if index % 8 == 7 else "mamba2" for index in range(40)]
    assert kinds == [*expected[:38], "linear_attention", "linear_attention"]


def test_the_sum_of_nested_patterns() -> None:
    a, b, c = zoo.Layer(mixer=zoo.Attention()), zoo.Layer(mixer=zoo.Mamba()), zoo.Layer(channel=zoo.GLU())
    inside = "{repeat: 2, of: [{mixer: attention}, {repeat: 3, of: {mixer: mamba}}]}"
    assert layers(f"{{layers: [{inside}, {{channel: glu}}]}}") == [a, b, b, b, a, b, b, b, c]
    assert layers("{layers: [{repeat: 0, of: {mixer: mamba}}, {mixer: attention}]}") == [a]


@pytest.mark.parametrize(
    ("key", "picked"),
    [
        ("0", [0]),
        ("-1", [5]),
        ("::2", [0, 2, 4]),
        ("1:4", [1, 2, 3]),
        ("-2:", [4, 5]),
        ("4:1:-2", [4, 2]),
        (":", range(6)),
    ],
)
def test_overrides_pick_like_python(key: str, picked: list[int]) -> None:
    found = layers(f"{{layers: {{repeat: 6, of: {{mixer: mamba}}}}, overrides: {{'{key}': {{channel: glu}}}}}}")
    assert [index for index, layer in enumerate(found) if layer.channel is not None] == sorted(picked)


def test_later_overrides_are_laid_on_earlier_ones() -> None:
    pattern = "{repeat: 2, of: {mixer: {type: attention, heads: 2}}}"
    body = f"{{layers: {pattern}, overrides: {{':': {{mixer: {{window: 3}}}}, '1': %s}}}}"
    assert layers(body % "{mixer: {window: 5}}")[1].mixer == zoo.Attention(heads=2, window=5)
    assert layers(body % "{mixer: {heads: !remove }}")[1].mixer == zoo.Attention(window=3)
    assert layers(body % "{mixer: !replace {type: attention}}")[1].mixer == zoo.Attention()
    assert layers(body % "{mixer: mamba}") == [
        zoo.Layer(mixer=zoo.Attention(heads=2, window=3)),
        zoo.Layer(mixer=zoo.Mamba()),
    ]


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("6", "picks none of the 6 layers"),
        ("-7", "picks none"),
        ("4:2", "picks none"),
        ("x", "expected an index or a slice"),
        ("1:2:0", "step must not be zero"),
        ("9" * 500, "expected an index or a slice"),
    ],
)
def test_overrides_that_pick_nothing_are_mistakes(key: str, message: str) -> None:
    body = f"body:\n  layers: {{repeat: 6, of: {{mixer: mamba}}}}\n  overrides:\n    '{key}': {{channel: glu}}\n"
    text = f"width: 64\n{REST}{body}"
    line, column, found = only(text)
    assert (line, column) == (7, 5) and message in found


def test_overrides_reach_layers_that_a_name_stands_for() -> None:
    top = "vars: {local: {mixer: {type: attention, window: 8}}, four: {repeat: 4, of: $local}}\n"
    change = "overrides: {'1::2': {mixer: {window: null}}}"
    expected = [8, None, 8, None]
    for body in ("{repeat: 4, of: $local}", "[$local, $local, $local, $local]", "$four"):
        assert [layer.mixer.window for layer in layers(f"{{layers: {body}, {change}}}", top)] == expected
    several = "vars: {two: [{mixer: mamba}, {mixer: mamba}]}\n"
    assert len(layers("{layers: $two}", several)) == 2
    assert layers("{layers: $two, overrides: {'0': {channel: glu}}}", several)[0].channel == zoo.GLU()
    text = f"width: 64\n{several}{REST}body: {{layers: [$two], overrides: {{'0': {{channel: glu}}}}}}\n"
    assert any("$two is no single layer" in message for _, _, message in problems(text))


def test_a_removal_that_hits_no_layer_is_a_mistake() -> None:
    body = "{layers: [{mixer: mamba}, {mixer: mamba, channel: glu}], overrides: {'%s': {channel: !remove }}}"
    assert layers(body % ":") == [zoo.Layer(mixer=zoo.Mamba())] * 2
    assert "there is no 'channel' to remove" in only(f"width: 64\nbody: {body % '0'}\n{REST}")[2]


def test_values_follow_from_variables_and_the_models_fields() -> None:
    spec = parse(
        "vars:\n  {d: 64, n: $(d // 32), name: $$d, act: {type: gelu, approximate: tanh}, l: {mixer: $m},\n"
        "   m: {type: attention, heads: $n}}\n"
        "name: $name\nwidth: $(2 * d)\ncontext: $(width * 4)\nactivation: $act\n"
        "body:\n  layers:\n  - {repeat: $n, of: $l}\n"
        "  - {repeat: $(width // 64), of: {channel: {type: glu, hidden: $(8/3 * width + 2/3)}}}\n"
        f"{REST}"
    )
    assert (spec.name, spec.width, spec.context) == ("$d", 128, 512)
    assert spec.activation == zoo.GELU(approximate="tanh")
    found: Any = spec.body
    assert (
        found.layers == (zoo.Layer(mixer=zoo.Attention(heads=2)),) * 2 + (zoo.Layer(channel=zoo.GLU(hidden=342)),) * 2
    )


def test_variables_may_come_in_any_order() -> None:
    top = "vars: {body: {repeat: $n, of: {mixer: mamba}}, n: $(m + 1), m: 2}\n"
    assert len(layers("{layers: $body}", top)) == 3


@pytest.mark.parametrize(
    ("line", "column", "message"),
    [
        ("width: $widht", 9, "unknown name 'widht'"),
        ("width: $(2 * dim)", 14, "unknown name 'dim'; did you mean 'dims'?"),
        ("width: $(2 * )", 14, "expected a value, found `)`"),
        ("width: $(dims / 0)", 15, "zero"),
        ("width: $(sqr(4))", 10, "unknown function 'sqr'; did you mean 'sqrt'?"),
        ("width: $(__import__('os'))", 10, "unknown function"),
        ("width: $()", 10, "expected a value"),
        ("width: $(word + 1)", 10, "expected a number, found 'x'"),
        ("width: $(node + 1)", 10, "expected a number, found a dict"),
        ("width: $1x", 9, "expected `$name` or `$(arithmetic)`"),
        ("width: $(9**9**9)", 0, ""),
        ("width: $(dims / 3)", 8, "expected a valid integer; got 21.333"),
    ],
)
def test_expressions_are_refused_inside_the_expression(line: str, column: int, message: str) -> None:
    text = f"vars: {{dims: 64, word: x, node: {{a: 1}}}}\n{line}\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}"
    found = problems(text)[0]
    assert found[0] == 2 and message in found[2]
    if column:
        assert found[1] == column


@pytest.mark.parametrize(
    "text",
    [
        "vars: {a: $b, b: $(a + 1)}\nwidth: $a",
        "vars: {a: $a}\nwidth: $a",
        "width: $context\ncontext: $width",
        "vars: {n: $m, m: $n}\nwidth: 64\nx: {repeat: $n, of: {}}",
        "vars: {a: {mixer: {type: attention, heads: $a}}}\nwidth: 64\nx: $a",
    ],
)
def test_circles_are_named(text: str) -> None:
    found = problems(f"{text}\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}")
    assert any("is defined by itself: " in message for _, _, message in found)


def test_a_pattern_cannot_hold_itself() -> None:
    found = problems(f"vars: {{a: {{repeat: 2, of: $a}}}}\nwidth: 64\nbody: {{layers: $a}}\n{REST}")
    assert any("'a' is defined by itself: a -> a" in message for _, _, message in found)


@pytest.mark.parametrize("link", ["$v%d", "{a: $v%d}", "[$v%d, $v%d]", "{repeat: 1, of: $v%d}", "$(v%d + 1)"])
def test_long_chains_of_names_are_refused(link: str) -> None:
    values = [link.replace("%d", str(index + 1)) for index in range(3000)]
    variables = "".join(f"  v{index}: {value}\n" for index, value in enumerate(values))
    for use in (
        "width: $v0\nbody: {layers: [{mixer: mamba}]}",
        "width: 64\nbody: {layers: {repeat: $v0, of: {mixer: mamba}}}",
    ):
        assert problems(f"vars:\n{variables}  v3000: 1\n{use}\n{REST}")


def test_names_that_grow_without_end_are_refused_quickly() -> None:
    names = "abcdefghijklmnop"
    lines = [f"  {name}: [{', '.join([f'${before}'] * 10)}]" for before, name in pairwise(names)]
    started = time.process_time()
    variables = "vars:\n  a: [1]\n" + "\n".join(lines)
    found = problems(f"{variables}\nwidth: 64\nsummary: $p\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}")
    assert "more than 100000 values" in found[0][2]
    empty = "{repeat: 4096, of: " * 8 + "[]" + "}" * 8
    assert "at least one layer" in problems(f"width: 64\nbody: {{layers: {empty}}}\n{REST}")[0][2]
    full = "{repeat: 4096, of: " * 4 + "{mixer: mamba}" + "}" * 4
    assert "more than 4096 items" in problems(f"width: 64\nbody: {{layers: {full}}}\n{REST}")[0][2]
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("pattern", "column", "message"),
    [
        ("{repeat: -1, of: {mixer: mamba}}", 25, "expected a whole number of repetitions; got -1"),
        ("{repeat: true, of: {mixer: mamba}}", 25, "whole number of repetitions; got True"),
        ("{repeat: 1.5, of: {mixer: mamba}}", 25, "whole number of repetitions; got 1.5"),
        ("{repeat: x, of: {mixer: mamba}}", 25, "whole number of repetitions; got 'x'"),
        ("{repeat: [2], of: {mixer: mamba}}", 25, "whole number of repetitions; got a list"),
        ("{repeat: 1000000000000, of: {mixer: mamba}}", 25, "at most 4096 repetitions"),
        ("{repeat: {float: [1, 2]}, of: {mixer: mamba}}", 25, "a number of repetitions is whole"),
        ("{repeat: $(widht // 2), of: {mixer: mamba}}", 27, "unknown name 'widht'; did you mean 'width'?"),
        ("{repeat: 2}", 16, "'of' is missing"),
        ("{of: {mixer: mamba}}", 16, "'repeat' is missing"),
        ("{repeat: 2, of: {mixer: mamba}, off: 3}", 48, "unknown key 'off' of a pattern; did you mean 'of'?"),
        ("{repeat: 0, of: {mixer: mamba}}", 16, "expected at least one layer"),
        ("[]", 16, "expected at least one layer"),
        ("mamba", 16, "expected a list of layers; got 'mamba'"),
        ("[mamba]", 17, "'mamba' is a mixer, but a layer is expected here"),
    ],
)
def test_patterns_that_cannot_be(pattern: str, column: int, message: str) -> None:
    found = only(f"width: 64\nbody: {{layers: {pattern}}}\n{REST}")
    assert found[:2] == (2, column) and message in found[2]


def test_a_mistake_in_a_repeated_layer_is_told_once() -> None:
    for mixer in ("{type: attention, heads: 7}", "atention", "{type: attention, haeds: 8}"):
        only(f"width: 64\nbody: {{layers: {{repeat: 40, of: {{mixer: {mixer}}}}}}}\n{REST}")


@pytest.mark.parametrize(
    ("top", "body", "place"),
    [
        ("width: {choice: [64, 128]}", "[{mixer: mamba}]", (1, 8)),
        ("width: {int: [64, 128], step: 64}", "[{mixer: mamba}]", (1, 8)),
        ("init_std: {float: [0.01, 0.1], log: true}\nwidth: 64", "[{mixer: mamba}]", (1, 11)),
        ("vars: {d: {choice: [64, 128]}}\nwidth: $d", "[{mixer: mamba}]", (1, 11)),
        ("width: 64", "{repeat: 3, of: {mixer: {choice: [mamba, attention]}}}", (2, 40)),
        ("width: 64", "{repeat: {int: [1, 3]}, of: {mixer: mamba}}", (2, 25)),
        ("width: 64", "[{choice: [{mixer: mamba}, {mixer: attention}]}]", (2, 17)),
    ],
)
def test_a_hole_is_refused_where_a_spec_is_needed(top: str, body: str, place: tuple[int, int]) -> None:
    line, column, message = only(f"{top}\nbody: {{layers: {body}}}\n{REST}")
    assert (line, column) == place
    assert message.startswith("a hole, but a finished spec is needed")


@pytest.mark.parametrize(
    ("hole", "message"),
    [
        ("{choice: []}", "at least one value"),
        ("{choice: 3}", "expected a list of values"),
        ("{choice: [1, 1]}", "stands twice"),
        ("{choice: [1], step: 2}", "unknown key 'step' of a choice hole"),
        ("{int: [1]}", "expected `int: [low, high]`"),
        ("{int: [1.5, 2]}", "two whole numbers"),
        ("{int: [3, 2]}", "is empty"),
        ("{int: [1, 3], step: 0}", "at least 1"),
        ("{int: [0, 3], log: true}", "starts above zero"),
        ("{float: [a, b]}", "expected `float: [low, high]`"),
        ("{int: [1, 3], name: 'a b'}", "expected a name"),
        ("{int: [1, 3], naem: a}", "did you mean 'name'?"),
    ],
)
def test_holes_that_cannot_be(hole: str, message: str) -> None:
    found = problems(f"width: {hole}\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}")
    assert any(line == 1 and message in text for line, _, text in found)


def test_names_of_variables_are_words() -> None:
    found = problems(f"vars: {{a-b: 3, 1: 2}}\nwidth: 64\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}")
    assert [(line, column) for line, column, _ in found] == [(1, 8), (1, 16)]
    assert "expected a mapping" in only(f"vars: 3\nwidth: 64\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}")[2]


@pytest.mark.parametrize(
    ("top", "repeat", "message"),
    [
        ("", "{int: [1, 1000000000]}", "at most 4096 repetitions; got 1000000000"),
        ("", "{choice: [1, 1000000000]}", "at most 4096 repetitions; got 1000000000"),
        ("", "{choice: [1, {int: [1, 1000000000]}]}", "at most 4096 repetitions; got 1000000000"),
        ("vars: {n: {int: [1, 1000000000]}}\n", "$n", "at most 4096 repetitions; got 1000000000"),
        ("vars: {n: {int: [1, 1000000000]}}\n", "$(n // 1000000)", "a range of 1,000,000,000 values is too large"),
        ("", "{int: [1, 1000000000000000000]}", "the ends of a range are at most 9007199254740992 (2**53)"),
        ("", "{chioce: [1, 2]}", "unknown key 'chioce' of a hole; did you mean 'choice'?"),
    ],
)
def test_a_range_is_checked_before_its_values_are_listed(top: str, repeat: str, message: str) -> None:
    found = problems(f"{top}width: 64\nbody: {{layers: {{repeat: {repeat}, of: {{mixer: mamba}}}}}}\n{REST}")
    (told,) = [text for _, _, text in found if "a hole, but" not in text]
    assert message in told


@pytest.mark.parametrize(
    ("hole", "message"),
    [
        ("{choice: 5}", "expected a list of values"),
        ("{int: [1]}", "expected `int: [low, high]`"),
        ("{float: [2, 1]}", "is empty"),
        ("{chioce: [1, 2]}", "did you mean 'choice'?"),
        ("{itn: [1, 2], step: 2}", "did you mean 'int'?"),
    ],
)
def test_a_bad_hole_is_one_problem(hole: str, message: str) -> None:
    assert message in only(f"width: {hole}\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}")[2]


def test_a_circle_that_nothing_uses_is_named_too() -> None:
    text = f"vars: {{a: $b, b: $(c + 1), c: $a, d: $a}}\nwidth: 64\nbody: {{layers: [{{mixer: mamba}}]}}\n{REST}"
    assert only(text) == (1, 32, "'a' is defined by itself: a -> b -> c -> a")
