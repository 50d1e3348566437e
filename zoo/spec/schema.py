"""The JSON Schema of specs and spaces, with which editors complete and check them.

It describes what a file may say: every field also takes an expression or a hole, lists of layers take patterns. What
holds across fields only `zoo validate` knows.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import TypeAdapter
from pydantic_core import PydanticUndefined

from zoo.component import Component, Slot, slots
from zoo.docs import field_docs, summary
from zoo.registry import Role, components
from zoo.spec.document import brief

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DEFAULT_TYPES = (Role.LAYER, Role.STAGE, Role.BODY, Role.RECORD, Role.MODEL)
"""Roles whose slots know a type for a mapping that names none."""
_CLOSED = ("expression", "hole")
"""Definitions that a file that extends another must keep to like any other."""
_OPEN = [{"$ref": "#/$defs/expression"}, {"$ref": "#/$defs/hole"}]


def json_schema() -> dict[str, Any]:
    """The schema of a whole file, as plain data; every registered component is in it."""
    found = components()
    definitions: dict[str, Any] = {
        "expression": {"type": "string", "pattern": r"^\$", "description": "A variable or arithmetic: $d, $(4 * d)."},
        "hole": _hole(),
    }
    for component in found:
        definitions[_key(component)] = _component(component)
    for role in {component.role for component in found}:
        if role is not Role.MODEL:
            definitions[role.value] = _role(role)
            definitions[f"{role.value}_pattern"] = _pattern(role)
    root = definitions.pop("model.model")
    root["properties"].pop("type")
    root["properties"] |= {
        "extends": {"type": "string", "description": "Name or path of the spec that this one is laid on."},
        "vars": {"type": "object", "description": "Values by name, for `$name` and `$(arithmetic)`."},
    }
    definitions["model"] = root
    changes = {f"change.{key}": _change(item) for key, item in definitions.items() if key not in _CLOSED}
    return {
        "$schema": DIALECT,
        "title": "zoo spec",
        "type": "object",
        "if": {"required": ["extends"]},
        "then": {"$ref": "#/$defs/change.model"},
        "else": {"$ref": "#/$defs/model"},
        "$defs": definitions | changes,
    }


def _change(schema: Any) -> Any:
    """What a file that extends another may say in place of `schema`: any part of it, and null to remove a key."""
    if isinstance(schema, list):
        return [_change(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {key: _change(item) for key, item in schema.items() if key != "required"}
    if "$ref" in schema:
        name = schema["$ref"].removeprefix("#/$defs/")
        return schema if name in _CLOSED or name.startswith("change.") else {"$ref": f"#/$defs/change.{name}"}
    if isinstance(schema.get("properties"), dict):
        changed["properties"] = {
            key: item | {"anyOf": [*item["anyOf"], {"type": "null"}]} if "anyOf" in item else item
            for key, item in changed["properties"].items()
        }
    return changed


def _hole() -> dict[str, Any]:
    yes = {"type": "boolean"}
    whole = {"type": "integer"}
    pair = {"type": "array", "minItems": 2, "maxItems": 2}
    shared = {"name": {"type": "string", "description": "Holes of one name are decided together."}}
    choice = {"anyOf": [{"type": "array", "minItems": 1}, {"type": "object", "minProperties": 1}]}
    kinds = [
        ("choice", {"choice": choice}),
        ("int", {"int": pair | {"items": whole}, "step": whole, "log": yes}),
        ("float", {"float": pair | {"items": {"type": "number"}}, "log": yes}),
    ]
    return {
        "description": "A value that a search decides.",
        "anyOf": [
            {"type": "object", "properties": fields | shared, "required": [kind], "additionalProperties": False}
            for kind, fields in kinds
        ],
    }


def _key(component: type[Component]) -> str:
    return f"{component.role.value}.{component.type}"


def _component(component: type[Component]) -> dict[str, Any]:
    docs, known = field_docs(component), slots(component)
    properties: dict[str, Any] = {"type": {"const": component.type}}
    required: list[str] = [] if component.role in DEFAULT_TYPES else ["type"]
    for name, field in component.model_fields.items():
        slot = known.get(name)
        value = _slot(slot) if slot is not None else _value(field.annotation, field.metadata)
        optional = [{"type": "null"}] if slot is not None and field.default is None else []
        properties[name] = {"anyOf": [*value, *optional, *_OPEN]}
        if name in docs:
            properties[name]["description"] = docs[name]
        if field.is_required():
            required.append(name)
        elif field.default is not PydanticUndefined:
            default = field.default
            properties[name]["default"] = brief(default) if isinstance(default, Component) else default
    if "layers" in properties:
        properties["overrides"] = {
            "type": "object",
            "description": "Changes by index or slice: '-1', '::8'.",
            "propertyNames": {"pattern": "^[-0-9:]+$"},
            "additionalProperties": {"anyOf": [{"$ref": "#/$defs/change.layer"}, {"type": "null"}]},
        }
    schema = {
        "type": "object",
        "description": summary(component),
        "properties": properties,
        "additionalProperties": False,
    }
    return schema | ({"required": required} if required else {})


def _slot(slot: Slot) -> list[dict[str, Any]]:
    node = {"$ref": f"#/$defs/{slot.role.value}"}
    if not slot.many:
        return [node]
    items = {"anyOf": [node, {"$ref": f"#/$defs/{slot.role.value}_pattern"}]}
    return [{"type": "array", "items": items}, {"$ref": f"#/$defs/{slot.role.value}_pattern"}]


def _value(annotation: Any, metadata: list[Any]) -> list[dict[str, Any]]:
    whole: Any = Annotated[(annotation, *metadata)] if metadata else annotation
    schema = TypeAdapter(whole).json_schema()
    return schema["anyOf"] if set(schema) == {"anyOf"} else [schema]


def _role(role: Role) -> dict[str, Any]:
    """A type's name if it needs nothing else, or a mapping; a layer's or stage's type may be left out."""
    found = components(role)
    bare = [entry.type for entry in found if not any(field.is_required() for field in entry.model_fields.values())]
    named = [{"enum": bare}] if bare else []
    return {"anyOf": [*named, *({"$ref": f"#/$defs/{_key(entry)}"} for entry in found), *_OPEN]}


def _pattern(role: Role) -> dict[str, Any]:
    """A repetition of nodes of a role."""
    inside = {"anyOf": [{"$ref": f"#/$defs/{role.value}"}, {"$ref": f"#/$defs/{role.value}_pattern"}]}
    return {
        "type": "object",
        "description": f"Repeats a {role.value}, or several in turn.",
        "properties": {
            "repeat": {"anyOf": [{"type": "integer", "minimum": 0}, *_OPEN]},
            "of": {"anyOf": [inside, {"type": "array", "items": inside}]},
        },
        "required": ["repeat", "of"],
        "additionalProperties": False,
    }
