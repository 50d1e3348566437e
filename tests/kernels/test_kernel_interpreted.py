"""Every kernel with every configuration in Triton's interpreter, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch

from zoo.kernels.case import Case, cases
from zoo.kernels.dispatch import HOMES
from zoo.kernels.launch import Launches, configured, without_gpu
from zoo.testing.kernels import Outcome, check, outcome

interpreter = pytest.importorskip("interpreter", reason="Triton is not installed on this system", exc_type=ImportError)

ARCHITECTURE = "sm_90"


def trials() -> Iterator[Any]:
    """Each case in each dtype; where a kernel has several configurations, the others once in float32."""
    for case in cases():
        configurations = Launches(HOMES[case.primitive]).trials(case.kernels, ARCHITECTURE)
        for dtype in case.dtypes:
            name = str(dtype).removeprefix("torch.")
            for index, indices in enumerate(configurations if dtype == torch.float32 else configurations[:1]):
                yield pytest.param(case, dtype, indices, id=f"{case}-{name}-{index}")


def interpreted(indices: Mapping[str, int], case: Case, inputs: Mapping[str, Any]) -> Outcome:
    with without_gpu(ARCHITECTURE), configured(**indices), interpreter.trials() as slab:
        given = {name: slab(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        return outcome(case, given, "triton")


@pytest.mark.parametrize(("case", "dtype", "indices"), [*trials()])
def test_kernel_is_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, indices: dict[str, int]) -> None:
    check(case, dtype, run=partial(interpreted, indices))
