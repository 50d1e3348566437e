"""What the cases launch: each distinct compilation of each kernel, found without a GPU and without compiling anything.

A driver that answers for a device that is not there stands in for CUDA's, and a hook takes what Triton is about to
compile: the types of the arguments, which of them are 1 or divisible by 16, the constants and the launch configuration.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from zoo.kernels.case import Case, Draw
from zoo.kernels.dispatch import HOMES
from zoo.kernels.launch import Launches, configured, without_gpu
from zoo.testing.kernels import outcome


class StandIn:
    """What Triton asks of a CUDA driver in order to compile, answered for a device that is not there."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        del device
        return 0


@dataclass(frozen=True, eq=False)
class Call:
    """A case in one dtype, with the configurations for its sizes, or with others where `natural` is false."""

    architecture: str
    case: Case
    dtype: str
    natural: bool


@dataclass(frozen=True)
class Launch:
    """One compilation: of the function `kernel` of `module` from what Triton's `preload` takes, `specialization`."""

    call: Call
    module: str
    kernel: str
    configuration: int
    specialization: str

    @property
    def compilation(self) -> tuple[str, str]:
        """What is the same for launches that are compiled once."""
        return self.kernel, self.specialization

    @cached_property
    def arguments(self) -> Mapping[str, Any]:
        """Of each parameter the value that it is compiled for, or else its type."""
        data = json.loads(self.specialization)
        names = list(data["signature"])
        constants = {
            names[place]: value["constexpr"] if isinstance(value, dict) else value
            for (place, *_), value in zip(data["constant_keys"], data["constant_vals"], strict=True)
        }
        return {**data["signature"], **constants}

    @property
    def listed(self) -> str:
        """The kernel's name in `launch.json`: some kernels have configurations of their own for a dtype."""
        own = f"{self.kernel}_{self.call.dtype}"
        return own if own in _launches(self.call).kernels else self.kernel

    def features(self) -> frozenset[tuple[Any, ...]]:
        """What is special about a launch: sizes and configurations in its dtype, flags and tensors in any."""
        short = {"float32": "*fp32", "bfloat16": "*bf16"}[self.call.dtype]
        settings = _launches(self.call).of(self.listed, self.call.architecture)[self.configuration]
        found: set[tuple[Any, ...]] = {("configuration", self.configuration, self.call.dtype)}
        for name, value in self.arguments.items():
            if type(value) is int and value != 1 and name not in settings:
                found.add((name, value, self.call.dtype))
            elif name not in settings:
                found.add((name, "own" if value == short else value))
        return frozenset(found)


def _launches(call: Call) -> Launches:
    return Launches(HOMES[call.case.primitive])


def launched(call: Call, dtype: torch.dtype, indices: Mapping[str, int]) -> Iterator[Launch]:
    """What a call would compile, forward and backward."""
    seen: list[tuple[str, str, str]] = []

    def take(*, fn: Any, compile: Mapping[str, Any], **rest: Any) -> bool:
        del rest
        seen.append((fn.module, fn.name, compile["specialization_data"]))
        return True

    driver.set_active(StandIn(call.architecture))  # type: ignore[arg-type]
    knobs.runtime.jit_cache_hook = take  # type: ignore[assignment]
    try:
        inputs = call.case.inputs(Draw("large", dtype, blank=True))
        with without_gpu(call.architecture), configured(**indices), torch.random.fork_rng():
            outcome(call.case, inputs, "triton", cotangent=torch.zeros_like)
    finally:
        knobs.runtime.jit_cache_hook = None
    for module, kernel, specialization in dict.fromkeys(seen):
        data = json.loads(specialization)
        found = Launch(call, module, kernel, 0, specialization)
        used = {**data["options"], **found.arguments}
        for index, settings in enumerate(_launches(call).of(found.listed, call.architecture)):
            if all(used[name] == value for name, value in settings.items()):
                yield Launch(call, module, kernel, index, specialization)
                break
        else:
            where = f"{call.case} in {call.dtype} on {call.architecture}"
            raise LookupError(f"{where}: {kernel} was launched with settings that launch.json does not have")


class Plan(NamedTuple):
    """The distinct launches to compile, and those of one whole call of each primitive and dtype."""

    launches: list[Launch]
    calls: dict[tuple[str, str], list[Launch]]


def plan(cases: Iterable[Case], architecture: str) -> Plan:
    """What to compile for an architecture, so that of each kernel there is, at least once, each configuration
    and each size of a tile in each dtype, and each flag and optional tensor in one of them.

    Of each primitive and dtype one whole call is taken, that which uses most of its kernels, for the time that a user
    waits for it; then, for each kernel, launches that add most to what is covered, in half precision if they can.
    """
    natural: list[Launch] = []
    others: list[Launch] = []
    calls = [(case, dtype, str(dtype).removeprefix("torch.")) for case in cases for dtype in case.dtypes]
    for case, dtype, name in calls:
        natural += launched(Call(architecture, case, name, True), dtype, {})
    # Configurations that no case takes by itself are tried once, in half precision if they can be.
    reached = {(one.listed, one.configuration) for one in natural}
    for case, dtype, name in sorted(calls, key=lambda call: call[2]):
        call = Call(architecture, case, name, False)
        for indices in Launches(HOMES[case.primitive]).trials(case.kernels, architecture):
            if set(indices.items()) - reached:
                found = [
                    one for one in launched(call, dtype, indices) if (one.listed, one.configuration) not in reached
                ]
                others += found
                reached |= {(one.listed, one.configuration) for one in found}

    whole = {which: [one for one in natural if one.call is call] for which, call in fullest(natural).items()}
    chosen = dict.fromkeys(one for launches in whole.values() for one in launches)
    of_kernel: dict[str, list[Launch]] = defaultdict(list)
    for one in sorted(natural, key=lambda one: one.call.dtype):
        of_kernel[one.kernel].append(one)
    for found in of_kernel.values():
        missing = {feature for one in found for feature in one.features()}
        missing.difference_update(*(one.features() for one in found if one in chosen))
        while missing:
            best = max(found, key=lambda one: len(one.features() & missing))
            missing -= best.features()
            chosen[best] = None
    distinct = {one.compilation: one for one in reversed([*chosen, *others])}
    return Plan([*reversed(distinct.values())], whole)


def fullest(launches: Iterable[Launch]) -> dict[tuple[str, str], Call]:
    """For each primitive and dtype the call that leaves fewest arguments of its kernels out."""
    given: dict[tuple[str, str], dict[Call, int]] = defaultdict(lambda: defaultdict(int))
    for one in launches:
        used = sum(value is not None and value is not False for value in one.arguments.values())
        given[one.call.case.primitive, one.call.dtype][one.call] += used
    return {which: max(calls, key=calls.__getitem__) for which, calls in given.items()}
