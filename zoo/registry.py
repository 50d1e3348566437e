"""The one table of components, by role and type.

A component enters it by `@register` on its class. The package's own components are found by importing the modules of
`zoo.blocks`, those of third parties by importing the modules that entry points of the group `zoo.components` name;
both happen when the table is first asked for something, and neither is privileged.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, TypeVar

from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    from zoo.component import Component, Traits

ENTRY_POINT_GROUP = "zoo.components"


class Role(StrEnum):
    """What a slot of a spec takes."""

    MIXER = "mixer"
    CHANNEL = "channel"
    NORM = "norm"
    ACTIVATION = "activation"
    LINEAR = "linear"
    POSITION = "position"
    RESIDUAL = "residual"
    STEM = "stem"
    REDUCE = "reduce"
    LAYER = "layer"
    STAGE = "stage"
    BODY = "body"
    HEAD = "head"
    MODEL = "model"
    RECORD = "record"


INHERITED = (Role.NORM, Role.ACTIVATION, Role.LINEAR, Role.POSITION)
"""Roles that a node takes from the nearest one above it that sets them."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a component comes from: papers, and the catalogue's entries that it expresses."""

    sources: tuple[str, ...] = ()
    catalogue: tuple[str, ...] = ()


_components: dict[tuple[Role, str], type[Component]] = {}

C = TypeVar("C", bound="Component")


def register(
    type_name: str,
    *,
    role: Role,
    traits: Traits | None = None,
    sources: Iterable[str] = (),
    catalogue: Iterable[str] = (),
) -> Callable[[type[C]], type[C]]:
    """Enter a component class under `type_name` in `role`.

    `sources` cites where it was published; `catalogue` names the catalogue's entries that it expresses. A name that the
    role already has is an error: nothing is replaced silently.
    """

    def enter(component: type[C]) -> type[C]:
        taken = _components.get((role, type_name))
        if taken is not None:
            raise ZooError(
                f"{role} {type_name!r} of {component.__module__} is already registered by {taken.__module__}; "
                "choose another type name"
            )
        component.type = type_name
        component.role = role
        if traits is not None:
            component.traits = traits
        component.entry = Entry(tuple(sources), tuple(catalogue))
        _components[role, type_name] = component
        return component

    return enter


@cache
def _discover() -> None:
    import zoo.blocks

    for module in pkgutil.walk_packages(zoo.blocks.__path__, "zoo.blocks."):
        importlib.import_module(module.name)
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            point.load()
        except Exception as error:  # a broken third party must not take the rest down
            warnings.warn(f"components of {point.value!r} could not be loaded: {error}", stacklevel=2)


def components(role: Role | None = None) -> list[type[Component]]:
    """All registered classes, or those of one role, ordered by role and type."""
    _discover()
    order = list(Role)
    found = [entry for (key, _), entry in _components.items() if role is None or key is role]
    return sorted(found, key=lambda entry: (order.index(entry.role), entry.type))


def types(role: Role) -> list[str]:
    """The type names of a role."""
    return [entry.type for entry in components(role)]


def with_article(noun: str) -> str:
    """`a mixer`, `an activation`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def find(role: Role, type_name: str) -> type[Component]:
    """The class registered for a type in a role; a `ZooError` names the roles that have it, or the nearest type."""
    _discover()
    found = _components.get((role, type_name))
    if found is not None:
        return found
    elsewhere = [str(other) for other, name in _components if name == type_name]
    if elsewhere:
        raise ZooError(
            f"{type_name!r} is {' or '.join(map(with_article, elsewhere))}, but {with_article(role)} is expected here"
            f"; known: {', '.join(types(role))}"
        )
    raise ZooError(f"unknown {role} {type_name!r}{did_you_mean(type_name, types(role))}")
