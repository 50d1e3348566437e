"""The contract, on every component that the package registers."""

from __future__ import annotations

from contract_examples import examples, unknown

from zoo.registry import components
from zoo.testing import ComponentContract


class TestComponents(ComponentContract):
    examples = examples()


def test_every_component_has_an_example() -> None:
    tried = {type(example.component) for example in TestComponents.examples}
    own = {component for component in components() if component.__module__.startswith("zoo.")}
    assert tried == own
    assert not unknown()
