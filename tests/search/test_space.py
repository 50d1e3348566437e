from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import spaces
from zoo.errors import SpecError, ZooError
from zoo.search.space import Space
from zoo.spec.document import spec_hash
from zoo.spec.template import Template

MANY = 3000


@given(spaces.templates())
def test_size_is_the_number_of_points(template: Template) -> None:
    space = Space.from_template(template)
    size = space.size()
    found = list(itertools.islice(spaces.points(space), MANY + 1))
    assume(len(found) <= MANY)
    assert len({tuple(sorted(point.items(), key=str)) for point in found}) == len(found) == size


@given(spaces.templates(), st.randoms(use_true_random=False))
def test_a_point_holds_what_filling_asks_for(template: Template, rng: random.Random) -> None:
    space = Space.from_template(template)
    point = space.sample(rng)
    asked: set[str] = set()

    def choose(hole: object, path: str) -> object:  # noqa: ARG001
        asked.add(path)
        return point[path]

    template.fill(choose)  # type: ignore[arg-type]
    assert asked == set(point)
    assert space.normalised(point) == point
