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
        table = Launches(HOMES[case.primitive])
        most = max((len(table.of(kernel, ARCHITECTURE)) for kernel in case.kernels), default=1)
        for dtype in case.dtypes:
            for index in range(most if dtype == torch.float32 else 1):
                name = str(dtype).removeprefix("torch.")
                yield pytest.param(case, dtype, index, id=f"{case}-{name}-{index}")


def interpreted(indices: Mapping[str, int], case: Case, inputs: Mapping[str, Any]) -> Outcome:
    with without_gpu(ARCHITECTURE), configured(**indices), interpreter.trials() as slab:
        given = {name: slab(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        return outcome(case, given, "triton")


@pytest.mark.parametrize(("case", "dtype", "index"), [*trials()])
def test_kernel_is_as_exact_as_plain_pytorch(case: Case, dtype: torch.dtype, index: int) -> None:
    table = Launches(HOMES[case.primitive])
    indices = {kernel: min(index, len(table.of(kernel, ARCHITECTURE)) - 1) for kernel in case.kernels}
    check(case, dtype, run=partial(interpreted, indices))
