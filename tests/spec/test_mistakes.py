"""Every mistake is told with file, line, column, a caret under the right token, and the nearest thing that works."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import zoo
from zoo.blocks.model import Spec
from zoo.component import Component, slots
from zoo.errors import SpecError, ZooError
from zoo.registry import components
from zoo.spec.document import as_spec, load, parse, specs_folder

MODEL = "width: 64\ncontext: 128\nstem: {type: token, vocab: 256}\nhead: language_model\nbody:\n  layers:\n"


def caret(text: str, layer: str = "") -> tuple[str, str]:
    """What stands above the caret of the only problem of a model, up to its end, and the message."""
    with pytest.raises(SpecError) as error:
        parse(f"{text}  - {layer}\n" if layer else text, "model.yaml")
    (problem,) = error.value.problems
    headline, line, pointer = str(problem).splitlines()
    assert problem.mark is not None
    assert headline.startswith(f"model.yaml:{problem.mark.line}:{problem.mark.column}: {problem.path}")
    match = re.match(r"[^\s,:{}\[\]]+", line[pointer.index("^") :])
    return match[0] if match else line[pointer.index("^")], problem.message


@pytest.mark.parametrize(
    ("layer", "token", "message"),
    [
        ("{mixer: atention}", "atention", "unknown mixer 'atention'; did you mean 'attention'?"),
        ("{mixer: {type: attention, haeds: 8}}", "haeds", "unknown key 'haeds' of attention; did you mean 'heads'?"),
        ("{mixer: {type: attention, heads: '8'}}", "'8'", "expected a valid integer; got '8'"),
        ("{mixer: {type: attention, heads: 8.0}}", "8.0", "expected a valid integer; got 8.0"),
        ("{mixer: {type: attention, heads: true}}", "true", "expected a valid integer; got True"),
        ("{mixer: {type: attention, bias: 1}}", "1", "expected a valid boolean; got 1"),
        ("{mixer: {type: attention, heads: 0}}", "0", "expected greater than or equal to 1; got 0"),
        ("{mixer: {type: attention, head_dim: 1000000000000}}", "1000000000000", "less than or equal to 16777216"),
        (
            "{mixer: {type: attention, heads: 1" + "0" * 70 + "}}",
            "1" + "0" * 70,
            "less than or equal to 16777216; got 100",
        ),
        ("{mixer: {type: attention, softcap: -1.5}}", "-1.5", "expected greater than 0; got -1.5"),
        ("{mixer: {type: attention, gate: heads}}", "heads", "expected 'channel' or 'head'; got 'heads'"),
        ("{mixer: {heads: 8}}", "{", "a mixer needs a `type`; known: attention,"),
        ("{mixer: {type: 3}}", "3", "a mixer needs a `type`; known: attention,"),
        ("{mixer: 3}", "3", "expected a mixer: a type name or a mapping with a `type`; got 3"),
        ("{mixer: [attention]}", "[", "expected a mixer: a type name or a mapping with a `type`; got a list"),
        ("{mixer: glu}", "glu", "'glu' is a channel, but a mixer is expected here; known: attention,"),
        ("{channel: attention}", "attention", "'attention' is a mixer, but a channel is expected here; known: glu,"),
        ("{mixer: mamba, norm: gelu}", "gelu", "'gelu' is an activation, but a norm is expected"),
        ("{mixer: mamba, residual: prenorm}", "prenorm", "unknown residual 'prenorm'; did you mean 'pre'?"),
        ("{mixer: {type: attention, qk_norm: 3}}", "3", "expected a norm: a type name or a mapping"),
        ("{mixer: {type: attention, heads: 7}}", "7", "heads 7 does not divide width 64; heads 4 or 8 would"),
        (
            "{mixer: {type: attention, heads: 8, kv_heads: 3}}",
            "3",
            "kv_heads 3 does not divide the 8 heads; kv_heads 2 or 4",
        ),
        ("{mixer: {type: attention, window: 500}}", "500", "longer than the context of 128 tokens"),
        ("{channel: {type: moe, experts: 4, top_k: 5}}", "5", "experts"),
        ("{mixer: {type: attention, causal: false}}", "false", "causal"),
        ("{}", "{", "a layer needs a `mixer`, a `channel`, or both"),
        ("{mixer: token_mlp}", "token_mlp", "causal"),
    ],
)
def test_the_caret_stands_under_what_is_wrong_in_a_layer(layer: str, token: str, message: str) -> None:
    found = caret(MODEL, layer)
    assert found[0] == token and message in found[1]


@pytest.mark.parametrize(
    ("change", "token", "message"),
    [
        (("width: 64", "widht: 64"), "widht", "unknown key 'widht' of model; did you mean 'width'?"),
        (("width: 64\n", ""), "context", "model needs 'width'"),
        (("width: 64", "width:"), "", "expected a valid integer; got nothing"),
        (("width: 64", "width: 64.5"), "64.5", "expected a valid integer; got 64.5"),
        (("width: 64", "zoo: 2\nwidth: 64"), "2", "expected 1; got 2"),
        (("language_model", "language_modl"), "language_modl", "did you mean 'language_model'?"),
        (("language_model", "classifier"), "classifier", "classifier needs 'classes'"),
        (("language_model", "{type: language_model, tied: no}"), "no", "expected a valid boolean; got 'no'"),
        (("language_model", "null"), "null", "expected a head: a type name or a mapping with a `type`; got nothing"),
        (("{type: token, vocab: 256}", "token"), "token", "token needs 'vocab'"),
        (("{type: token, vocab: 256}", "{type: tokens, vocab: 256}"), "tokens", "did you mean 'token'?"),
        (
            ("{type: token, vocab: 256}", "{type: patch, image: [8], size: 1}"),
            "[",
            "expected at least 2 items; got [8]",
        ),
        (("{type: token, vocab: 256}", "{type: patch, image: [8, 8, 3], size: 1}"), "[", "expected at most 2 items"),
        (
            ("{type: token, vocab: 256}", "{type: patch, image: [8, x], size: 1}"),
            "x",
            "expected a valid integer; got 'x'",
        ),
        (("{type: token, vocab: 256}", "{type: patch, image: 8, size: 1}"), "8", "expected a list; got 8"),
        (("width: 64", "causal: false\nwidth: 64"), "false", "a language model that sees later tokens"),
        (("width: 64", "norm: layernrm\nwidth: 64"), "layernrm", "did you mean 'layernorm'?"),
        (("width: 64", "norm: {type: layernorm, eps: 0}\nwidth: 64"), "0", "expected greater than 0; got 0"),
        (("width: 64", "sources: x\nwidth: 64"), "x", "expected a list; got 'x'"),
        (("width: 64", "published: {total: 3}\nwidth: 64"), "total", "unknown key 'total' of published"),
    ],
)
def test_the_caret_stands_under_what_is_wrong_in_the_model(change: tuple[str, str], token: str, message: str) -> None:
    text = MODEL.replace(*change)
    assert text != MODEL
    with pytest.raises(SpecError) as error:
        parse(text + "  - {channel: mlp}\n", "model.yaml")
    (problem,) = error.value.problems
    assert problem.mark is not None and message in problem.message
    assert problem.mark.text[problem.mark.column - 1 :].startswith(token)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_lines() -> None:
    text = """\
width: 64
nmae: x
stem: {type: token, vocab: 256}
body:
  layers:
  - {mixer: {type: attention, heads: 7}, chanel: glu}
  - {mixer: {type: attention, heads: 8, kv_heads: 3}, channel: attention}
  - {mixer: {type: atention}, channel: {type: glu, ratio: .nan}}
  - repeat: 3
    of: {mixer: {type: attention, heads: 5}, channel: {type: glu, hidden: $(4 * d)}}
  - {mixer: {type: attention, gate: yes}}
  - {mixer: {type: linear_attention, heads: {choice: [2, 4]}}}
  - {mixer: {type: linear_attention, heads: $(3 + )}}
  - {repeat: -1, of: {mixer: mamba}}
head: {type: language_model, softcap: x}
"""
    with pytest.raises(SpecError) as error:
        parse(text)
    places = [(problem.mark.line, problem.mark.column) for problem in error.value.problems if problem.mark]
    assert places == [
        (2, 1),
        *((6, 38), (6, 42), (7, 51), (7, 64), (8, 20), (8, 59)),
        *((10, 42), (10, 81), (11, 37), (12, 45), (13, 51), (14, 14)),
        (15, 39),
    ]


def test_a_misspelt_field_causes_no_further_complaints() -> None:
    # Without `head_dim` 7 heads would not fit, without `context` the window would not.
    assert caret(MODEL, "{mixer: {type: attention, heads: 7, haed_dim: 8}}")[0] == "haed_dim"
    text = MODEL.replace("context: 128", "contxt: 4096")
    assert caret(text, "{mixer: {type: attention, window: 2000}}")[0] == "contxt"


def test_a_mistake_in_an_extended_file_is_told_there(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(MODEL + "  - {mixer: {type: attention, heads: 4}}\n")
    top = tmp_path / "top.yaml"
    for text, place in (
        ("extends: base.yaml\nwidth: 6", "base.yaml:7:38"),
        ("extends: base.yaml\nbody: {overrides: {'0': {mixer: {heads: 5}}}}", "top.yaml:2:41"),
        ("extends: base.yaml\nbody: {overrides: {'0': {mixer: {haeds: 5}}}}", "top.yaml:2:34"),
        ("extends: base.yaml\nvars: {h: 5}\nbody: {overrides: {'0': {mixer: {heads: $h}}}}", "top.yaml:2:11"),
        ("extends: base.yaml\nvars: {h: 5}\nbody: {overrides: {'0': {mixer: {heads: $(h)}}}}", "top.yaml:3:41"),
    ):
        top.write_text(text)
        with pytest.raises(SpecError) as error:
            load(top)
        assert f"{place}: " in str(error.value)


def test_wide_characters_and_tabs_do_not_move_the_caret() -> None:
    with pytest.raises(SpecError) as error:
        parse(f"{{summary: 漢字é,\twidht: 3, {MODEL[:9]}}}")
    problem = next(problem for problem in error.value.problems if "widht" in problem.message)
    _, line, pointer = str(problem).splitlines()
    assert problem.mark is not None and problem.mark.column == 16
    assert "\t" not in line
    # Two columns of a terminal for each of the two Chinese characters.
    assert pointer.index("^") == line.index("widht") + 2


def test_python_tells_the_same_mistakes() -> None:
    with pytest.raises(SpecError, match="unknown key 'haeds' of attention; did you mean 'heads'"):
        zoo.Attention(haeds=8)
    with pytest.raises(SpecError, match="'glu' is a channel, but a mixer is expected here"):
        zoo.Layer(mixer=zoo.GLU())
    with pytest.raises(SpecError, match=r"layers\[1\].mixer: unknown mixer 'atention'"):
        zoo.Stack(layers=[{"mixer": "attention"}, {"mixer": "atention"}])
    spec = Spec(
        width=64,
        stem=zoo.TokenStem(vocab=9),
        body=zoo.Stack(layers=(zoo.Layer(mixer=zoo.Attention(heads=7)),)),
        head=zoo.LanguageModelHead(),
    )
    with pytest.raises(SpecError, match=r"body.layers\[0\].mixer.heads: heads 7 does not divide"):
        as_spec(spec)
    with pytest.raises(ZooError, match="needs 'width'"):
        as_spec({"stem": "x"})


@pytest.mark.parametrize("component", components(), ids=lambda component: f"{component.role}.{component.type}")
def test_no_number_of_a_component_may_be_infinite(component: type[Component]) -> None:
    for name in component.model_fields:
        for value in (math.nan, math.inf, -math.inf, [math.nan], [math.inf]):
            with pytest.raises(SpecError) as error:
                component(**{name: value})
            assert any(re.split(r"[.\[]", problem.path)[0] == name for problem in error.value.problems), (name, value)


# Mutations of the shipped specs


class Mutation(NamedTuple):
    kind: str
    text: str
    line: int
    right: str
    """What a suggestion should name, for a misspelt word."""


FREE = ("zoo", "name", "summary", "sources", "catalogue", "source", "vars")


def _swapped(word: str) -> str:
    """Two neighbours in the middle of a word changed about."""
    for index in range(len(word) // 2, 0, -1):
        if word[index] != word[index - 1]:
            return word[: index - 1] + word[index] + word[index - 1] + word[index + 1 :]
    return word + word[-1]


def _places(node: yaml.Node, key: str = "") -> Iterator[tuple[str, str, yaml.ScalarNode]]:
    """Keys and scalars of a document with the key they stand under."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value in FREE:
                continue
            yield "key", name.value, name
            yield from _places(value, name.value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _places(item, key)
    elif isinstance(node, yaml.ScalarNode):
        yield "value", key, node


def mutations(text: str) -> Iterator[Mutation]:
    """Changes of one word each that make a right file wrong."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert root is not None
    for what, key, node in _places(root):
        start, end, word = node.start_mark.index, node.end_mark.index, node.value
        line = node.start_mark.line + 1

        def to(kind: str, new: str, right: str = "", at: tuple[int, int, int] = (start, end, line)) -> Mutation:
            return Mutation(kind, text[: at[0]] + new + text[at[1] :], at[2], right)

        number = re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", word)
        if what == "key" and word.isidentifier() and len(word) >= 4:
            yield to("key", _swapped(word), word)
            yield to("key", word + "x", word)
        elif what == "value" and number and node.style is None:
            yield to("scalar", "x")
            yield to("scalar", "true")
            yield to("negative", f"-{word}")
            yield to("list", "[]")
        elif what == "value" and word in ("true", "false"):
            yield to("scalar", "maybe")
        elif what == "value" and word.isidentifier() and key not in ("", "approximate") and len(word) >= 3:
            yield to("type", _swapped(word), word)
            if key != "type" and word != "null":
                yield to("role", "3")
                yield to("role", "merge")


def mutants() -> list[tuple[str, Mutation]]:
    found = [
        (file.stem, mutation)
        for file in sorted(specs_folder().glob("*.yaml"))
        for mutation in mutations(file.read_text())
    ]
    return found[::2]


def test_mutations_of_the_shipped_specs_are_refused_on_their_line() -> None:
    found = mutants()
    assert len(found) >= 200
    accepted, elsewhere, unguessed = [], [], []
    for name, mutation in found:
        try:
            parse(mutation.text, str(specs_folder() / f"{name}.yaml"))
        except SpecError as error:
            lines = [problem.mark.line for problem in error.problems if problem.mark is not None]
            if mutation.line not in lines:
                elsewhere.append((name, mutation.kind, mutation.line, str(error)[:200]))
            if mutation.right and f"did you mean {mutation.right!r}?" not in str(error):
                unguessed.append((name, mutation.right, str(error)[:200]))
        else:
            accepted.append((name, mutation.kind, mutation.line, mutation.text.splitlines()[mutation.line - 1]))
    typos = sum(1 for _, mutation in found if mutation.right)
    assert accepted == []
    assert len(elsewhere) <= 0.02 * len(found), elsewhere
    assert len(unguessed) <= 0.1 * typos, unguessed


def test_what_a_component_needs_cannot_be_left_out() -> None:
    for component in components():
        needed = [name for name, field in component.model_fields.items() if field.is_required()]
        if not needed:
            continue
        with pytest.raises(SpecError) as error:
            component()
        told: list[Any] = [problem.path for problem in error.value.problems]
        assert told == needed, component
        assert slots(component) is slots(component)
