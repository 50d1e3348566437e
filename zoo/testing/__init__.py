"""Conformance tests for components: what the registry's contract promises, checked on any component.

A package that registers components puts them under the same tests as this package's own:

    from zoo.testing import ComponentContract, Example

    class TestMyMixer(ComponentContract):
        examples = (Example(MyMixer()), Example(MyMixer(window=3)))

Needs `pytest`. Nothing else in the package imports this.
"""

from zoo.testing.contract import ComponentContract
from zoo.testing.subject import Example

__all__ = ["ComponentContract", "Example"]
