"""Every component and every field says what it is."""

from __future__ import annotations

import pytest

import zoo
from zoo.component import Component
from zoo.docs import INHERITED_FIELD, field_docs, summary
from zoo.registry import components


@pytest.mark.parametrize("component", components(), ids=lambda component: f"{component.role}.{component.type}")
def test_everything_is_described(component: type[Component]) -> None:
    assert summary(component) and "\n" not in summary(component)
    described = field_docs(component)
    assert set(described) == set(component.model_fields)
    assert all(text and "\n" not in text for text in described.values())


def test_fields_of_bases_and_inherited_settings_are_included() -> None:
    described = field_docs(zoo.Attention)
    assert described["heads"].startswith("Query heads")
    assert described["kv_heads"].startswith("Key and value heads")
    assert described["position"] == INHERITED_FIELD
    assert "activation" not in described


def test_a_class_without_source_has_no_field_docs() -> None:
    made = type("Made", (zoo.Identity,), {"__doc__": None})
    assert field_docs(made) == field_docs(zoo.Identity)
