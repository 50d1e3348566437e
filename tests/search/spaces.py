"""Spaces for the tests of the search: generated ones, and some of every shape that real files have."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from zoo.search.program import Decision, Point, Value
from zoo.search.space import Space
from zoo.spec.template import Template, compile_document
from zoo.spec.tree import tree

HYBRID = Path(__file__).with_name("hybrid.yaml")

STAGES = """
vars:
  scale: {choice: [1, 3]}
  expansion: {choice: [2, 4], name: expansion}
width: 16
norm: {choice: [layernorm, rmsnorm]}
stem: {type: patch, image: [32, 32], size: 4, class_token: false}
body:
  type: stages
  stages:
    - width: 16
      layers:
        repeat: {int: [1, 3]}
        of: {mixer: {choice: [identity, pooling]}, channel: {type: mlp, ratio: $expansion}}
    - width: $(16 * scale)
      reduce: merge
      layers:
        - repeat: {choice: [1, 2]}
          of:
            mixer: {type: attention, heads: {choice: [1, 2, 3]}, causal: false}
            channel: {choice: {none: null, mlp: {type: mlp, ratio: {choice: [1, $expansion]}}}}
head: {type: classifier, classes: 10}
"""

SHARED = """
vars:
  d: {choice: [32, 48, 64]}
  n: {int: [1, 3]}
  window: {choice: [null, 8]}
width: $d
context: {choice: [16, 32]}
stem: {type: token, vocab: 64}
body:
  layers:
    - repeat: $(2 * n)
      of:
        mixer: {type: attention, heads: {choice: [1, 3, 4], name: heads}, window: $window}
        channel: {choice: {glu: {type: glu, hidden: $(2 * d)}, mlp: {type: mlp, ratio: {choice: [1, 2, 4]}}}}
        residual: {choice: [pre, post]}
    - {mixer: {choice: {mamba2: {type: mamba2, head_dim: 16}, nothing: identity}}, channel: mlp}
head: {type: language_model, tied: {choice: [true, false]}}
"""

EVERYTHING = """
width: 32
context: 32
stem: {type: token, vocab: 64}
body:
  choice:
    plain: {layers: {repeat: {int: [2, 4]}, of: {mixer: {choice: [identity, attention]}, channel: mlp}}}
    nested:
      layers:
        repeat: {choice: [1, 2]}
        of:
          - {mixer: attention, channel: {type: moe, experts: {choice: [2, 4]}, top_k: {choice: [1, 2, 3]}}}
          - repeat: {int: [0, 2]}
            of: {channel: {type: mlp, hidden: {int: [8, 32], step: 8}}, norm: {choice: [rmsnorm, layernorm]}}
head: language_model
"""


RESIDUALS = """
width: 32
context: 16
stem: {type: token, vocab: 64}
head: language_model
body: {layers: {repeat: {int: [5, 6]}, of: {channel: mlp, residual: {choice: [pre, post]}}}}
"""
"""A stack has a norm at its end unless all layers normalise the stream: layers decide about what follows them."""


OPTIONAL = """
width: 32
context: 16
stem: {type: token, vocab: 64}
head: language_model
body:
  layers:
    repeat: {int: [2, 3]}
    of:
      mixer: identity
      channel: {choice: {none: null, mlp: {type: mlp, hidden: {choice: [16, 64, 256], name: hidden}}}}
"""
"""A shared choice that no layer at its first option asks."""


def hybrid() -> Space:
    return Space.parse(HYBRID.read_text(), "hybrid.yaml")


@cache
def real() -> dict[str, Space]:
    """Spaces of every shape that real files have, by name."""
    texts = {
        "stages": STAGES,
        "shared": SHARED,
        "everything": EVERYTHING,
        "residuals": RESIDUALS,
        "optional": OPTIONAL,
    }
    return {"hybrid": hybrid(), **{name: Space.parse(text, f"{name}.yaml") for name, text in texts.items()}}


def points(space: Space) -> Iterator[Point]:
    """Every point of a small space, by trying for each decision in turn the next of its values."""
    script: list[int] = []
    while True:
        left: list[int] = []
        yield space.decide(_following(script, left))
        script = [*script, *[0] * len(left)][: len(left)]
        while left and left[-1] == 0:
            left.pop()
            script.pop()
        if not left:
            return
        script[-1] += 1


def _following(script: list[int], left: list[int]) -> Callable[[Decision], Value]:
    """Takes the values that the script has the numbers of, then first ones; notes how many values follow each."""

    def choose(decision: Decision) -> Value:
        values = decision.values()
        index = script[len(left)] if len(left) < len(script) else 0
        left.append(len(values) - index - 1)
        return values[index]

    return choose


def _layer(reduced: bool) -> st.SearchStrategy[dict[str, Any]]:
    """A layer, of tokens or of image patches, with private, shared and conditional holes; some settings are invalid."""
    heads = st.sampled_from([2, "$h", {"choice": [1, 2, 3]}, {"choice": [1, 3], "name": "heads"}])
    attention = st.fixed_dictionaries(
        {"type": st.just("attention"), "heads": heads, **({"causal": st.just(False)} if reduced else {})},
        optional={"window": st.sampled_from(["$w", {"choice": [None, 8]}])},
    )
    mixers = st.one_of(st.just("identity"), attention)
    ratios = st.sampled_from([2, "$e", {"choice": [1, "$e"]}, {"int": [1, 3]}, {"choice": [2, 4], "name": "ratio"}])
    sizes = st.one_of(
        st.fixed_dictionaries({"ratio": ratios}),
        st.fixed_dictionaries({"hidden": st.sampled_from(["$(3 * d)", {"int": [8, 24], "step": 8}])}),
    )
    channels = st.one_of(
        st.none(),
        st.tuples(st.sampled_from(["mlp", "glu"]), sizes).map(lambda found: {"type": found[0], **found[1]}),
    )

    def open_(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        named = st.dictionaries(st.sampled_from(["a", "b", "c"]), inner, min_size=1)
        return st.one_of(inner, named.map(lambda found: {"choice": found}))

    return st.fixed_dictionaries(
        {"mixer": open_(mixers), "channel": open_(channels)},
        optional={
            "residual": st.sampled_from(["post", {"choice": ["pre", "post"]}]),
            "norm": st.sampled_from(["rmsnorm", {"choice": ["rmsnorm", "layernorm"], "name": "norm"}]),
        },
    )


def _layers(reduced: bool = False) -> st.SearchStrategy[Any]:
    lengths = st.sampled_from(
        [2, "$n", "$(2 * n)", {"int": [1, 3]}, {"choice": [0, 2]}, {"choice": {"few": 1, "n": "$n"}}]
    )
    layer = _layer(reduced)
    repeated = st.fixed_dictionaries({"repeat": lengths, "of": layer})
    nested = st.fixed_dictionaries({"repeat": lengths, "of": st.tuples(layer, repeated).map(list)})
    return st.lists(st.one_of(layer, repeated, nested), min_size=1, max_size=3)


@st.composite
def models(draw: st.DrawFn) -> Space:
    """Spaces of models: layers of every form under one body, under a choice of bodies, or in stages."""
    kind = draw(st.sampled_from(["one", "choice", "stages"]))
    document: dict[str, Any] = {
        "vars": {
            "d": draw(st.sampled_from([32, {"choice": [16, 32]}])),
            "n": draw(st.sampled_from([1, {"int": [0, 2]}])),
            "h": draw(st.sampled_from([4, {"choice": [1, 4]}])),
            "e": draw(st.sampled_from([3, {"choice": [1, 2]}, {"choice": {"one": 1, "more": {"choice": [2, 3]}}}])),
            "w": draw(st.sampled_from([4, {"choice": [None, 4]}])),
        },
        "width": "$d",
        "stem": {"type": "token", "vocab": 64},
        "head": {"type": "language_model", "tied": draw(st.sampled_from([True, {"choice": [True, False]}]))},
    }
    if kind == "stages":
        second = {"width": "$(2 * d)", "reduce": "merge", "layers": draw(_layers(True))}
        document["body"] = {"type": "stages", "stages": [{"width": "$d", "layers": draw(_layers(True))}, second]}
        document["stem"] = {"type": "patch", "image": [16, 16], "size": 4, "class_token": False}
        document["head"] = {"type": "classifier", "classes": 10}
    else:
        document["context"] = draw(st.sampled_from([16, {"choice": [16, 32]}]))
        bodies = [{"layers": draw(_layers())} for _ in range(1 + (kind == "choice"))]
        document["body"] = bodies[0] if kind == "one" else {"choice": dict(zip(["x", "y"], bodies, strict=True))}
    return Space.from_template(compile_document(tree(document)))


LABELS = st.lists(st.sampled_from([1, 2, 3, None, "a", "b"]), min_size=1, max_size=3, unique=True)


def _hole(options: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    named = st.dictionaries(st.sampled_from(["x", "y", "z"]), options, min_size=1, max_size=3)
    return st.one_of(
        LABELS.map(lambda labels: {"choice": labels}),
        named.map(lambda found: {"choice": found}),
        st.tuples(st.integers(0, 2), st.integers(0, 2)).map(lambda ends: {"int": [ends[0], sum(ends)]}),
    )


VALUES = st.recursive(
    st.one_of(st.sampled_from([1, "word", "$v", "$w", "$(2 * n)"]), _hole(st.sampled_from([1, "$v", "$w"]))),
    lambda inner: st.one_of(
        _hole(inner), st.dictionaries(st.sampled_from(["k", "l"]), inner, min_size=1), st.lists(inner, max_size=2)
    ),
    max_leaves=4,
)
LENGTHS = st.sampled_from(
    [
        1,
        2,
        {"int": [0, 2]},
        {"int": [1, 2]},
        {"choice": [1, 3]},
        "$n",
        {"choice": {"a": 1, "b": {"int": [0, 1]}, "c": "$n"}},
    ]
)
REPEATED = st.fixed_dictionaries({"repeat": LENGTHS, "of": VALUES})
NESTED = st.fixed_dictionaries({"repeat": LENGTHS, "of": st.tuples(VALUES, REPEATED).map(list)})
LAYERS = st.lists(st.one_of(VALUES, REPEATED, NESTED), min_size=1, max_size=2)
BODIES = st.one_of(
    st.fixed_dictionaries({"layers": LAYERS}),
    st.fixed_dictionaries({"layers": LAYERS, "x": st.just("$(2 * width)")}),
)
SHARED_HOLES = st.sampled_from([{"choice": [1, 2]}, {"choice": {"one": 1, "more": {"choice": [2, 3]}}}])
SHARED_NODES = st.sampled_from(
    [{"k": {"choice": [1, 2]}}, {"choice": {"r": {"k": {"choice": [1, 2]}}, "v": "$v"}}, "$v"]
)


@st.composite
def templates(draw: st.DrawFn) -> Template:
    """Documents without meaning that use everything of the language: shared and private holes, arithmetic, lengths."""
    lengths = st.sampled_from([1, {"int": [0, 2]}, "$m"])
    document = {
        "vars": {"n": draw(lengths), "m": 2, "v": draw(SHARED_HOLES), "w": draw(SHARED_NODES)},
        "width": draw(st.sampled_from([8, {"choice": [8, 16]}])),
        "other": draw(VALUES),
        "body": draw(BODIES),
        "list": draw(LAYERS),
    }
    return compile_document(tree(document))
