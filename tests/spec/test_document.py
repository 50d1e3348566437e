"""Spec files: what they extend, how they are printed, and what identifies them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import zoo
from zoo.blocks.model import Spec
from zoo.component import Component, slots
from zoo.errors import SpecError, ZooError
from zoo.spec.document import as_spec, canonical, dump, load, locate, parse, spec_names

SPECS = [name for name in spec_names() if not name.startswith("spaces/")]
SMALL = """\
width: 64
stem: {type: token, vocab: 256}
body: {layers: [{mixer: attention, channel: glu}]}
head: language_model
"""


def message(file: Path) -> str:
    with pytest.raises(ZooError) as error:
        load(file)
    return str(error.value)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A folder that is a project of its own, with one spec."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project/pyproject.toml").touch()
    (tmp_path / "project/base.yaml").write_text(SMALL)
    return tmp_path / "project"


def write(folder: Path, name: str, text: str) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


# extends


def test_extends_by_name_merges_deeply(project: Path) -> None:
    spec = load(write(project, "a.yaml", "extends: gpt2\nwidth: 1536\nbody: {layers: {of: {mixer: {window: 64}}}}\n"))
    base = load("gpt2")
    mixer: Any = spec.body.layers[0].mixer  # type: ignore[attr-defined]
    assert (spec.width, spec.context, len(spec.body.layers)) == (1536, base.context, 12)  # type: ignore[attr-defined]
    assert (mixer.window, mixer.heads, mixer.bias) == (64, 12, True)


def test_what_describes_an_architecture_is_not_inherited(project: Path) -> None:
    spec = load(write(project, "a.yaml", "extends: gpt2\n"))
    assert (spec.name, spec.summary, spec.sources, spec.published) == (None, None, (), None)
    assert spec.hash == load("gpt2").hash


def test_extends_goes_by_path_and_in_chains(project: Path) -> None:
    write(project, "deep/middle.yaml", "extends: ../base.yaml\ncontext: 99\n")
    spec = load(write(project, "deep/er/top.yaml", "extends: ../middle.yaml\nwidth: 128\n"))
    assert (spec.width, spec.context) == (128, 99)


def test_another_type_replaces_and_the_same_type_merges(project: Path) -> None:
    write(project, "b.yaml", SMALL.replace("attention", "{type: attention, heads: 2, window: 8}"))
    other = load(write(project, "a.yaml", "extends: b.yaml\nnorm: {eps: 1e-3, type: layernorm}\nstem: {vocab: 9}\n"))
    assert other.norm == zoo.LayerNorm(eps=1e-3) and other.stem == zoo.TokenStem(vocab=9)
    base = "extends: gpt2\nbody: {layers: {of: {mixer: %s}}}\n"

    def of(text: str) -> Any:
        return load(write(project, "c.yaml", base % text)).body.layers[3].mixer  # type: ignore[attr-defined]

    assert of("{type: mamba2, state_dim: 32}") == zoo.Mamba2(state_dim=32)
    assert of("{type: attention, heads: 6}") == zoo.Attention(heads=6, bias=True, out_bias=True)
    assert of("!replace {type: attention, heads: 6}") == zoo.Attention(heads=6)
    assert of("{bias: !remove , heads: 6}") == zoo.Attention(heads=6, out_bias=True)
    assert of("mamba2") == zoo.Mamba2()


def test_fields_laid_on_a_bare_type_belong_to_it(project: Path) -> None:
    spec = load(write(project, "a.yaml", "extends: base.yaml\nhead: {softcap: 30}\n"))
    assert spec.head == zoo.LanguageModelHead(softcap=30.0)


def test_remove_takes_away_and_complains_where_nothing_is(project: Path) -> None:
    spec = load(write(project, "a.yaml", "extends: gpt2\nposition: !remove\nnorm: !remove\n"))
    assert spec.position is None and spec.norm is None
    found = message(write(project, "b.yaml", "extends: gpt2\npositoin: !remove\nstem: {scale: !remove }\n"))
    assert "b.yaml:2:1: positoin: there is no 'positoin' to remove" in found
    assert "b.yaml:3:8: stem.scale: there is no 'scale' to remove" in found
    assert "1:1: norm: there is no 'norm' to remove" in message(write(project, "c.yaml", "norm: !remove\n" + SMALL))


def test_overrides_of_a_base_are_changed_by_index(project: Path) -> None:
    write(
        project,
        "b.yaml",
        "width: 64\nstem: {type: token, vocab: 256}\nhead: language_model\nbody:\n"
        "  layers: {repeat: 4, of: {mixer: {type: attention, window: 8}}}\n"
        "  overrides: {'0': {mixer: {window: 16, heads: 2}}, '1': {channel: glu}}\n",
    )
    text = (
        "extends: b.yaml\nbody: {overrides: {'0': {mixer: {window: !remove }}, '1': !remove , '-1': {mixer: mamba}}}\n"
    )
    layers = load(write(project, "a.yaml", text)).body.layers  # type: ignore[attr-defined]
    assert layers[0].mixer == zoo.Attention(heads=2)
    assert layers[1] == layers[2] == zoo.Layer(mixer=zoo.Attention(window=8))
    assert layers[3] == zoo.Layer(mixer=zoo.Mamba())


def test_a_hole_opens_a_published_spec(project: Path) -> None:
    text = "extends: gpt2\nwidth: {choice: [768, 1536]}\nbody: {layers: {of: {mixer: {choice: [attention, mamba2]}}}}\n"
    file = write(project, "a.yaml", text)
    space = zoo.load_space(file)
    assert space.size() == 2 * 2**12
    assert "a hole, but a finished spec is needed" in message(file)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: gtp2", "1:10: extends: no spec is called 'gtp2'; did you mean 'gpt2'?"),
        ("extends: bsae.yaml", "1:10: extends: no such file: 'bsae.yaml'; did you mean 'base.yaml'?"),
        ("extends: ../outside.yaml", "leaves the project"),
        ("extends: deep/../../outside.yaml", "leaves the project"),
        ("extends: /etc/passwd", "no spec is called '/etc/passwd'; a path ends in `.yaml`"),
        ("extends: /etc/x.yaml", "leaves the project"),
        ("extends: link.yaml", "leaves the project"),
        ("extends: itself.yaml", "extends itself: itself.yaml -> itself.yaml"),
        ("extends: one.yaml", "-> one.yaml -> two.yaml -> one.yaml"),
        ("extends: [gpt2]", "expected the name or path of a spec; got a list"),
        ("extends: 3", "expected the name or path of a spec; got 3"),
        ("extends: huge.yaml", "5 MiB is no spec"),
        (f"extends: {'x' * 300}.yaml", "no such file"),
        ("extends: wrong.yaml", "wrong.yaml:2:7: stem.vocab: token needs 'vocab'"),
    ],
)
def test_extends_that_cannot_be(project: Path, text: str, expected: str) -> None:
    outside = write(project.parent, "outside.yaml", SMALL)
    (project / "link.yaml").symlink_to(outside)
    write(project, "two.yaml", "extends: one.yaml\n")
    write(project, "one.yaml", "extends: two.yaml\n")
    write(project, "wrong.yaml", "width: 3\nstem: token\nbody: {layers: [{mixer: pooling}]}\nhead: language_model")
    write(project, "huge.yaml", " " * 5 * 2**20)
    assert expected in message(write(project, "itself.yaml", text))


def test_a_long_chain_ends(project: Path) -> None:
    for index in range(30):
        write(project, f"{index}.yaml", f"extends: {index + 1}.yaml\n")
    assert "more than 16 files in a row" in message(project / "0.yaml")


def test_without_markers_the_project_is_the_files_own_folder(tmp_path: Path) -> None:
    write(tmp_path, "outside.yaml", SMALL)
    assert "leaves the project" in message(write(tmp_path, "inner/a.yaml", "extends: ../outside.yaml\n"))


def test_a_missing_file_or_name_has_a_suggestion(tmp_path: Path) -> None:
    write(tmp_path, "model.yaml", SMALL)
    with pytest.raises(ZooError, match=r"no such file; did you mean 'model.yaml'\?"):
        locate(tmp_path / "modle.yaml")
    with pytest.raises(ZooError, match=r"no spec is called 'gtp2'; did you mean 'gpt2'\?"):
        locate("gtp2")
    with pytest.raises(ZooError, match="no spec is called"):
        locate("x" * 5000)


# printing and equality


@pytest.mark.parametrize("name", SPECS)
def test_a_shipped_spec_prints_and_loads_back(name: str) -> None:
    spec = load(name)
    again = parse(dump(spec))
    assert again == spec and again.hash == spec.hash
    filled = spec.fill()
    assert parse(dump(filled)) == filled
    assert filled.hash == spec.hash
    assert as_spec(spec) is spec


def test_python_and_yaml_make_the_same_object() -> None:
    made = Spec(
        width=64,
        stem=zoo.TokenStem(vocab=256),
        body=zoo.Stack(layers=(zoo.Layer(mixer=zoo.Attention(heads=8), channel=zoo.GLU()),) * 2),
        head=zoo.LanguageModelHead(),
    )
    read = parse(
        "width: 64\nstem: {type: token, vocab: 256}\nhead: language_model\n"
        "body: {layers: {repeat: 2, of: {mixer: {type: attention, heads: 8}, channel: glu}}}\n"
    )
    assert made == read and made.hash == read.hash
    loose = Spec(
        width=64,
        stem={"type": "token", "vocab": 256},  # type: ignore[arg-type]
        body={"layers": [{"mixer": {"type": "attention", "heads": 8}, "channel": "glu"}] * 2},  # type: ignore[arg-type]
        head="language_model",  # type: ignore[arg-type]
    )
    assert loose == made
    assert as_spec({"width": 1536, "extends": "gpt2"}).width == 1536


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12)
AWKWARD = st.sampled_from(
    ["$x", "$$x", "yes", "no", "1e5", "1_0", ".inf", "null", "~", "", "!remove", "<<", "a: b", "- x"]
)
MIXERS = st.one_of(
    st.builds(
        zoo.Attention,
        heads=st.sampled_from([1, 2, 4]),
        kv_heads=st.sampled_from([None, 1]),
        window=st.sampled_from([None, 3]),
        softcap=st.one_of(st.none(), st.floats(1e-8, 1e8)),
        qk_norm=st.sampled_from([None, zoo.RMSNorm(), zoo.LayerNorm(eps=1e-3)]),
    ),
    st.builds(zoo.Mamba2, state_dim=st.sampled_from([8, 16])),
    st.builds(zoo.LinearAttention),
)
CHANNELS = st.one_of(
    st.none(),
    st.builds(zoo.GLU, hidden=st.sampled_from([None, 8, 96])),
    st.builds(zoo.MLP, bias=st.booleans(), activation=st.one_of(st.none(), st.builds(zoo.GELU))),
    st.builds(zoo.MixtureOfExperts, experts=st.sampled_from([2, 4])),
)
LAYERS = st.builds(
    zoo.Layer,
    mixer=MIXERS,
    channel=CHANNELS,
    norm=st.one_of(st.none(), st.builds(zoo.LayerNorm, eps=st.floats(1e-12, 1e-2))),
    residual=st.one_of(st.builds(zoo.PreNorm), st.builds(zoo.PostNorm)),
)


@given(
    layers=st.lists(
        st.lists(LAYERS, min_size=1, max_size=3).flatmap(lambda x: st.integers(1, 3).map(lambda n: x * n)),
        min_size=1,
        max_size=3,
    ),
    name=st.one_of(st.none(), TEXT, AWKWARD),
    sources=st.lists(st.one_of(TEXT, AWKWARD), max_size=2),
    std=st.floats(1e-30, 1.0),
    position=st.sampled_from([None, zoo.Rotary(base=5e5), zoo.NoPosition()]),
)
def test_any_spec_prints_and_loads_back(layers: Any, name: Any, sources: Any, std: float, position: Any) -> None:
    spec = Spec(
        name=name,
        sources=tuple(sources),
        width=64,
        init_std=std,
        position=position,
        stem=zoo.TokenStem(vocab=9),
        body=zoo.Stack(layers=tuple(layer for group in layers for layer in group)),
        head=zoo.LanguageModelHead(),
    )
    again = parse(dump(spec))
    assert again == spec and again.hash == spec.hash


# identity

PAIRS = [
    (SMALL, "".join(f"{line}\n" for line in reversed(SMALL.splitlines()))),
    (SMALL, SMALL.replace("64", "0x40   # a comment")),
    (SMALL, "name: other\nsummary: x\nsources: [y]\npublished: {source: z}\n" + SMALL),
    (SMALL, SMALL.replace("attention", "{type: attention}").replace("language_model", "{type: language_model}")),
    (SMALL, SMALL.replace("attention", "{type: attention, heads: 1, causal: true, bias: false}")),
    (SMALL, "norm: rmsnorm\nactivation: silu\nlinear: dense\nposition: rotary\ncontext: 1024\ncausal: true\n" + SMALL),
    (SMALL, SMALL.replace("[{mixer", "{repeat: 1, of: {mixer").replace("]}", "}}")),
    (SMALL, "vars: {d: 32}\n" + SMALL.replace("64", "$(2 * d)")),
    ("norm: layernorm\n" + SMALL, SMALL.replace("{layers", "{norm: layernorm, layers")),
    ("linear: dense\nactivation: relu\n" + SMALL, SMALL.replace("{mixer", "{activation: relu, mixer")),
    ("activation: relu\n" + SMALL, SMALL.replace("glu", "{type: glu, activation: relu}")),
]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_the_hash_is_that_of_the_architecture(one: str, other: str) -> None:
    assert one != other
    assert parse(one).hash == parse(other).hash


def changed(component: Component) -> dict[str, Component]:
    """The component with each scalar field changed in turn, as far as that is allowed."""
    found: dict[str, Component] = {}
    for name in type(component).model_fields:
        value = getattr(component, name)
        if name in slots(type(component)):
            continue
        for other in (not value if isinstance(value, bool) else None, 3, 2, 0.25, True, "mean", "head", "data", "tanh"):
            if other is None or other == value:
                continue
            try:
                found[name] = type(component)(
                    **{**{n: getattr(component, n) for n in type(component).model_fields}, name: other}
                )
            except SpecError:
                continue
            break
    return found


def test_the_hash_changes_with_every_field_of_every_part() -> None:
    layer = zoo.Layer(mixer=zoo.Attention(heads=4), channel=zoo.GLU())
    fixed: dict[str, Any] = {"width": 64, "stem": zoo.TokenStem(vocab=9), "head": zoo.LanguageModelHead()}
    base = Spec(body=zoo.Stack(layers=(layer,)), **fixed)
    variants = [
        Spec(body=zoo.Stack(layers=(layer.model_copy(update={"mixer": m}),)), **fixed)
        for m in changed(layer.mixer).values()
    ]
    variants += [
        Spec(body=zoo.Stack(layers=(layer.model_copy(update={"channel": c}),)), **fixed)
        for c in changed(layer.channel).values()
    ]
    variants += [Spec(body=base.body, **{**fixed, "head": head}) for head in changed(fixed["head"]).values()]
    variants += [Spec(body=base.body, **{**fixed, "stem": stem}) for stem in changed(fixed["stem"]).values()]
    variants += [Spec(body=body, **fixed) for body in changed(base.body).values()]
    changes: tuple[dict[str, Any], ...] = (
        {"norm": zoo.LayerNorm()}, {"activation": zoo.ReLU()}, {"position": zoo.NoPosition()}, {"context": 7},
        {"init_std": 0.5}, {"norm": zoo.RMSNorm(eps=1e-3)}, {"position": zoo.Rotary(base=7.0)},
    )  # fmt: skip
    variants += [Spec(body=base.body, **fixed, **change) for change in changes]
    variants.append(Spec(body=zoo.Stack(layers=(layer, layer)), **fixed))
    # A field that is spelled out as what it is anyway makes no other architecture.
    different = [spec for spec in variants if canonical(spec) != canonical(base)]
    assert len(different) >= 20
    assert len({spec.hash for spec in different} | {base.hash}) == len(different) + 1


def test_the_hash_is_the_same_in_every_process() -> None:
    code = "import zoo; print(zoo.load('mamba2-hybrid').hash)"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert seen == {load("mamba2-hybrid").hash}


def test_files_that_extend_each_other_are_named_from_the_current_folder(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(project, "one.yaml", "extends: two.yaml\n")
    write(project, "two.yaml", "extends: one.yaml\n")
    monkeypatch.chdir(project)
    with pytest.raises(SpecError) as error:
        load("one.yaml")
    assert str(error.value).startswith("two.yaml:1:10: extends: extends itself: one.yaml -> two.yaml -> one.yaml")
