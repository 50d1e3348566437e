"""The kernels as operators that compilers know: one case of each primitive, traced whole, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import kernels
from zoo.kernels.case import Case, Draw, cases
from zoo.kernels.launch import without_gpu
from zoo.testing.kernels import outcome
from zoo.testing.tolerance import assert_close

pytest.importorskip("triton", reason="Triton is not installed on this system")


def first_cases() -> Iterator[Any]:
    """The first case of each primitive."""
    seen: dict[str, Case] = {}
    for case in cases():
        seen.setdefault(case.primitive, case)
    for name, case in seen.items():
        yield pytest.param(case, id=name)


class Whole(torch.nn.Module):
    """A case as a module of the tensors that it is given."""

    def __init__(self, case: Case, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.case = case
        self.names = [name for name, value in inputs.items() if isinstance(value, Tensor)]
        self.rest = {name: value for name, value in inputs.items() if not isinstance(value, Tensor)}

    def forward(self, *tensors: Tensor) -> Any:
        return self.case.call(**dict(zip(self.names, tensors, strict=True)), **self.rest)


def tensors_of(found: Any) -> list[Tensor]:
    return [each for each in ((found,) if isinstance(found, Tensor) else found) if each is not None]


@pytest.fixture(autouse=True)
def no_gpu() -> Iterator[None]:
    torch.compiler.reset()
    with without_gpu("sm_90"):
        yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", [*first_cases()])
def test_compiles_without_a_graph_break(case: Case) -> None:
    inputs = dict(case.inputs(Draw("small", torch.float32)))
    expected = outcome(case, inputs, "triton")
    whole = Whole(case, inputs)
    compiled = torch.compile(whole, fullgraph=True, backend="aot_eager")
    given = [inputs[name] for name in whole.names]
    given = [x.detach().requires_grad_(case.gradients) if x.is_floating_point() else x for x in given]
    with kernels.use(**{case.primitive: "triton"}):
        outputs = tensors_of(compiled(*given))
    for one, other in zip(outputs, expected.outputs, strict=True):
        assert_close(one, other, what="compiled output")
    if case.gradients:
        torch.stack([(out.float() ** 2).sum() for out in outputs if out.requires_grad]).sum().backward()
        for name, x in zip(whole.names, given, strict=True):
            assert (x.grad is not None) == (name in expected.gradients), name


@pytest.mark.parametrize("case", [*first_cases()])
def test_exports(case: Case) -> None:
    inputs = dict(case.inputs(Draw("small", torch.float32)))
    expected = outcome(case, inputs, "triton").outputs
    whole = Whole(case, inputs)
    given = tuple(inputs[name].detach() for name in whole.names)
    with kernels.use(**{case.primitive: "triton"}), torch.no_grad():
        exported = torch.export.export(whole, given)
        found = tensors_of(exported.module()(*given))
    for one, other in zip(found, expected, strict=True):
        assert_close(one, other, what="exported output")
    targets = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert any(target.startswith("zoo.") for target in targets), targets
