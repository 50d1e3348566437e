"""The table of components."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import zoo
from zoo.blocks.attention import Attention
from zoo.component import Component, slots
from zoo.errors import ZooError
from zoo.registry import INHERITED, Entry, Role, components, find, register, types


def test_order_is_that_of_roles_and_types() -> None:
    listed = [(list(Role).index(component.role), component.type) for component in components()]
    assert listed == sorted(listed)
    assert len(set(listed)) == len(listed)


def test_components_know_what_they_are_registered_as() -> None:
    for role in Role:
        for component in components(role):
            assert component.role is role
            assert find(role, component.type) is component
    assert Attention.entry.sources[0].startswith("Vaswani")


def test_what_the_issue_names_is_there() -> None:
    assert {"attention", "linear_attention", "mamba2", "mamba", "token_mlp", "pooling", "identity"} <= {
        *types(Role.MIXER)
    }
    assert {"mlp", "glu", "moe", "mohd", "matformer"} <= {*types(Role.CHANNEL)}
    assert {"pre", "post", "sandwich", "parallel"} <= {*types(Role.RESIDUAL)}


def test_class_names_are_unique() -> None:
    names = [component.__name__ for component in components()]
    assert len(set(names)) == len(names)
    assert zoo.Attention is Attention
    assert set(names) <= set(dir(zoo))


def test_unknown_types_get_the_nearest_name() -> None:
    with pytest.raises(ZooError, match=re.escape("unknown mixer 'atention'; did you mean 'attention'?")):
        find(Role.MIXER, "atention")
    with pytest.raises(ZooError, match="unknown norm 'qqq'; known: layernorm, rmsnorm"):
        find(Role.NORM, "qqq")
    with pytest.raises(AttributeError, match="no component 'Atention'; did you mean 'Attention'"):
        _ = zoo.Atention


def test_a_type_in_the_wrong_slot_names_its_role() -> None:
    with pytest.raises(ZooError, match="'glu' is a channel, but a mixer is expected here; known: attention"):
        find(Role.MIXER, "glu")


def test_nothing_is_replaced_silently() -> None:
    with pytest.raises(ZooError, match=r"mixer 'attention' of .* is already registered by zoo.blocks.attention"):

        @register("attention", role=Role.MIXER)
        class Mine(Component):
            """Not that one."""

    assert find(Role.MIXER, "attention") is Attention
    assert Component.entry == Entry()


def test_inherited_slots_are_those_named_like_their_role() -> None:
    for component in components():
        for name, slot in slots(component).items():
            assert slot.inherited == (slot.role in INHERITED and name == slot.role.value)


def test_listing_needs_no_torch() -> None:
    program = (
        "import sys; from zoo.registry import components; n = len(components());"
        "heavy = {'torch', 'lightning', 'optuna', 'numpy'} & set(sys.modules); assert n and not heavy, heavy"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
