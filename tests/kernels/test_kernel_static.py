"""The committed table of what the kernels compile to is whole, keeps the rules, and a worse one would be noticed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from bench.kernels_static import COMMITTED, complaints, products, slow, written
from zoo.kernels.dispatch import HOMES
from zoo.kernels.launch import ARCHITECTURES, Launches

TABLE = json.loads(COMMITTED.read_text())
ROWS: Mapping[str, dict[str, Any]] = TABLE["kernels"]
NAME = "attention_forward sm_90 bfloat16 attention-all 0"
GOOD = {"registers": 128, "spills": 0, "shared": 1000, "tensor": "wgmma", "products": 16}


def found(**worse: Any) -> list[str]:
    return list(complaints({NAME: GOOD | worse}, {NAME: GOOD}))


def test_every_shipped_configuration_is_in_the_table() -> None:
    compiled = set()
    for name in ROWS:
        kernel, architecture, dtype, _, index, *_ = name.split()
        compiled |= {(kernel, architecture, int(index)), (f"{kernel}_{dtype}", architecture, int(index))}
    shipped = {
        (kernel, architecture, index)
        for home in HOMES.values()
        for kernel, by_architecture in Launches(home).kernels.items()
        for architecture in ARCHITECTURES
        for index in range(len(by_architecture[architecture]))
    }
    assert not shipped - compiled


def test_the_table_keeps_the_rules() -> None:
    assert not [*complaints(ROWS, ROWS), *slow(TABLE["cold"])]
    assert {name.split()[0] for name in TABLE["cold"]} >= {name for name in HOMES if name not in _WITHOUT_KERNELS}
    assert TABLE["processor_seconds"] <= 2 * 600


_WITHOUT_KERNELS = {"long_convolution"}


def test_nothing_is_said_about_what_is_as_before_or_better() -> None:
    assert found() == found(registers=100) == found(registers=140) == []


@pytest.mark.parametrize(
    ("worse", "said"),
    [
        ({"registers": 200}, "registers 128 before, 200 now"),
        ({"spills": 4}, "spills 4 bytes"),
        ({"shared": 300_000}, "300,000 bytes of shared memory"),
        ({"tensor": "mma"}, "by mma and not by wgmma"),
    ],
)
def test_what_got_worse_or_breaks_a_rule_is_said(worse: Mapping[str, Any], said: str) -> None:
    assert said in "\n".join(found(**worse))


def test_missing_rows_and_slow_calls_are_said() -> None:
    assert "no longer compiled" in next(complaints({}, {NAME: GOOD}))
    assert "not in the committed table" in next(complaints({NAME: GOOD}, {}))
    assert list(slow({"attention float32": {"seconds": 30.1}})) and not list(slow({"attention": {"seconds": 30.0}}))


def test_tensor_core_instructions_are_told_apart() -> None:
    assert products("wgmma.mma_async.sync.aligned x;\nwgmma.mma_async.sync y;") == {"tensor": "wgmma", "products": 2}
    assert products("mma.sync.aligned.m16n8k16 x;") == {"tensor": "mma", "products": 1}
    assert products("fma.rn.f32 x;") == {"tensor": "none", "products": 0}


def test_the_file_reads_as_it_was_written() -> None:
    table = {"triton": "3", "cold": {"a": {"seconds": 1.5}}, "kernels": {NAME: GOOD}}
    assert json.loads(written(table)) == table
    assert json.dumps(GOOD) in written(table)
