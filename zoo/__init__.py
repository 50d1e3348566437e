"""zoo: specs in YAML become PyTorch models, specs with holes become architecture searches under budgets.

`zoo.load` reads a spec, `zoo.build` makes it a model, `zoo.metrics` counts what it costs; every registered component is
here under its class name (`zoo.Attention(heads=8)`). Nothing is imported before it is asked for: reading, checking and
counting specs never imports torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zoo.accounting import Workload as Workload
    from zoo.accounting import metrics as metrics
    from zoo.blocks.model import Spec as Spec
    from zoo.component import Axis as Axis
    from zoo.component import Child as Child
    from zoo.component import Component as Component
    from zoo.component import Role as Role
    from zoo.component import Scope as Scope
    from zoo.component import Traits as Traits
    from zoo.errors import SpecError as SpecError
    from zoo.errors import ZooError as ZooError
    from zoo.model import Model as Model
    from zoo.model import Output as Output
    from zoo.model import State as State
    from zoo.model import build as build
    from zoo.model import load_model as load_model
    from zoo.registry import components as components
    from zoo.registry import register as register
    from zoo.search.space import Space as Space
    from zoo.search.space import load_space as load_space
    from zoo.spec.document import dump as dump
    from zoo.spec.document import load as load
    from zoo.spec.document import parse as parse
    from zoo.spec.document import spec_hash as spec_hash

_HOMES = {
    "Axis": "zoo.parameter",
    "Child": "zoo.component",
    "Component": "zoo.component",
    "Model": "zoo.model",
    "Output": "zoo.model",
    "Role": "zoo.registry",
    "Scope": "zoo.component",
    "Space": "zoo.search.space",
    "SpecError": "zoo.errors",
    "State": "zoo.model",
    "Traits": "zoo.component",
    "Workload": "zoo.accounting",
    "ZooError": "zoo.errors",
    "build": "zoo.model",
    "components": "zoo.registry",
    "dump": "zoo.spec.document",
    "load": "zoo.spec.document",
    "load_model": "zoo.model",
    "load_space": "zoo.search.space",
    "metrics": "zoo.accounting",
    "parse": "zoo.spec.document",
    "register": "zoo.registry",
    "spec_hash": "zoo.spec.document",
}

try:
    __version__ = version("zoo-nas")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [*_HOMES, "__version__"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is not None:
        found = getattr(import_module(home), name)
    elif name.startswith("_") or name.islower():
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    else:
        found = _component(name)
    globals()[name] = found
    return found


def _component(name: str) -> Any:
    from zoo.errors import did_you_mean
    from zoo.registry import components

    by_name = {component.__name__: component for component in components()}
    if name not in by_name:
        raise AttributeError(f"module 'zoo' has no component {name!r}{did_you_mean(name, by_name)}")
    return by_name[name]


def __dir__() -> list[str]:
    from zoo.registry import components

    return sorted({*__all__, *(component.__name__ for component in components())})
