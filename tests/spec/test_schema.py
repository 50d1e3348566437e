"""The JSON Schema accepts what the loader accepts, as far as a schema can know."""

from __future__ import annotations

from typing import Any

import jsonschema
import pytest

from zoo.errors import ZooError
from zoo.registry import components
from zoo.spec.document import parse, read_text_as, specs_folder
from zoo.spec.schema import json_schema
from zoo.spec.source import parse_yaml

SCHEMA = json_schema()
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
BASE = "stem: {type: token, vocab: 256}\nhead: language_model\n"


def accepted(text: str) -> bool:
    return VALIDATOR.is_valid(parse_yaml(text).plain())


def loads(text: str) -> bool:
    try:
        read_text_as(text)
    except ZooError:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", sorted(specs_folder().rglob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_files_are_right(file: Any) -> None:
    assert [error.message for error in VALIDATOR.iter_errors(parse_yaml(file.read_text()).plain())] == []


def test_every_field_of_every_component_is_described() -> None:
    for component in components():
        key = "model" if component.role == "model" else f"{component.role}.{component.type}"
        found = SCHEMA["$defs"][key]
        assert set(component.model_fields) <= set(found["properties"]), key
        assert found["additionalProperties"] is False and found["description"]
        assert f"change.{key}" in SCHEMA["$defs"]


@pytest.mark.parametrize(
    "text",
    [
        "width: 64\nbody: {layers: [{mixer: attention}]}\n",
        "width: $d\nvars: {d: 3}\nbody: {layers: {repeat: $d, of: {mixer: attention, channel: $d}}}\n",
        "width: {choice: [64, 128]}\n"
        "body: {layers: {repeat: {int: [1, 3]}, of: {mixer: {choice: [mamba, attention]}}}}\n",
        "vars: {m: {mixer: mamba}}\nwidth: {int: [64, 128], step: 64, name: w}\n"
        "body: {layers: [{repeat: 2, of: [{mixer: mamba}, {repeat: 1, of: $m}]}]}\n",
        "width: 64\ninit_std: {float: [0.01, 0.1], log: true}\n"
        "body: {layers: [{choice: [{mixer: mamba}, {channel: glu}]}]}\n",
        "width: 64\n"
        "body: {choice: {a: {layers: [{mixer: mamba}]}}}\nnorm: {choice: [rmsnorm, {type: layernorm, eps: 1e-3}]}\n",
        "width: 64\nbody: {layers: [{mixer: mamba}], overrides: {'::2': {mixer: {type: attention}}}}\n",
        "width: 64\n"
        "body: {layers: [{mixer: {type: attention, window: null, heads: $(2 * width // 64)}, channel: null}]}\n",
    ],
)
def test_what_the_loader_takes_the_schema_takes(text: str) -> None:
    assert accepted(text + BASE)
    assert loads(text + BASE)


@pytest.mark.parametrize(
    "text",
    [
        "extends: gpt2\nstem: {vocab: 9}\nbody: {layers: {of: {mixer: {window: 3}}}}\nnorm: null\n",
        "extends: x.yaml\nbody: {overrides: {'0': {mixer: mamba}}}\n",
    ],
)
def test_a_file_that_extends_needs_only_changes(text: str) -> None:
    assert accepted(text)
    assert not accepted(text.split("\n", 1)[1])
    assert not accepted(text + "widht: 3\n")
    assert not accepted(text.replace("mixer", "mixr"))


@pytest.mark.parametrize(
    "text",
    [
        "width: 64\n",
        "width: '64'\nbody: {layers: [{mixer: mamba}]}\n",
        "width: 0\nbody: {layers: [{mixer: mamba}]}\n",
        "width: 64\nwidht: 3\nbody: {layers: [{mixer: mamba}]}\n",
        "width: 64\nbody: {layers: [{mixer: atention}]}\n",
        "width: 64\nbody: {layers: [{mixer: glu}]}\n",
        "width: 64\nbody: {layers: [{mixer: {heads: 3}}]}\n",
        "width: 64\nbody: {layers: [{mixer: {type: attention, haeds: 3}}]}\n",
        "width: 64\nbody: {layers: [{mixer: {type: attention, gate: heads}}]}\n",
        "width: 64\nbody: {layers: {mixer: mamba}}\n",
        "width: 64\nbody: {layers: {repeat: 2}}\n",
        "width: 64\nbody: {layers: {repeat: -2, of: {mixer: mamba}}}\n",
        "width: {choice: []}\nbody: {layers: [{mixer: mamba}]}\n",
        "width: {int: [1]}\nbody: {layers: [{mixer: mamba}]}\n",
        "width: {float: [1, 2], step: 2}\nbody: {layers: [{mixer: mamba}]}\n",
        "width: {oneof: [1, 2]}\nbody: {layers: [{mixer: mamba}]}\n",
        "width: 64\nvars: [1]\nbody: {layers: [{mixer: mamba}]}\n",
        "zoo: 2\nwidth: 64\nbody: {layers: [{mixer: mamba}]}\n",
    ],
)
def test_wrong_files_are_wrong_in_an_editor_too(text: str) -> None:
    assert not accepted(text + BASE)
    with pytest.raises(ZooError):
        parse(text + BASE)


def test_what_the_schema_takes_for_a_hole_the_loader_takes() -> None:
    holes = [
        "{choice: [1]}", "{choice: {a: 1}}", "{choice: []}", "{choice: {}}", "{choice: 3}", "{choice: [1], name: a}",
        "{int: [1, 2]}", "{int: [1, 2], step: 1}", "{int: [1, 2], log: true}", "{int: [1, 2, 3]}", "{int: [1.5, 2]}",
        "{float: [1, 2]}", "{float: [0.5, 2], log: true}", "{float: [1, 2], step: 1}", "{float: [a, 2]}", "{int: 3}",
        "{int: [1, 2], name: 3}", "{int: [1, 2], choice: [1]}", "{float: [1, 2], lgo: true}",
    ]  # fmt: skip
    for hole in holes:
        text = f"width: {hole}\nbody: {{layers: [{{mixer: mamba}}]}}\n{BASE}"
        assert accepted(text) == loads(text), hole
