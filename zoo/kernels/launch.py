"""Where Triton kernels can run, and with which launch configuration.

A kernel has at most three configurations for each architecture, in `launch.json` of its primitive's folder:

    {"attention_forward": {"sm_90": [{"when": {"head_dim": 64}, "BLOCK": 128, "num_warps": 4, "num_stages": 3}, {...}]}}

The first whose bounds (`when`, inclusive, none in the last) hold for the sizes of a call is taken. Nothing is tuned at
run time: what runs is what was tested.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.resources import files
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    import torch

    from zoo.kernels.dispatch import Call

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
MOST_CONFIGURATIONS = 3
MOST: Mapping[str, int] = MappingProxyType(
    {"tokens": 2**30, "keys": 2**30, "rows": 2**30, "pairs": 2**30, "vocab": 2**30, "features": 2**20}
)
"""Largest sizes of a call, by their names in its facts. Kernels count these in 32 bits, rounded up to tiles, and places
in memory in 64; but within a chunk, of rows of so many features, in 32."""

Configuration = Mapping[str, Any]
Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]

_stand_in: ContextVar[str | None] = ContextVar("stand_in", default=None)
_forced: ContextVar[Mapping[str, int]] = ContextVar("forced", default=MappingProxyType({}))


@contextmanager
def without_gpu(architecture: str) -> Iterator[None]:
    """Within the block kernels that were chosen by `use` take CPU tensors, configured for `architecture`.

    For harnesses that interpret or only compile them; nothing else makes a kernel run on the CPU.
    """
    if architecture not in ARCHITECTURES:
        raise ZooError(f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}")
    token = _stand_in.set(architecture)
    try:
        yield
    finally:
        _stand_in.reset(token)


@contextmanager
def configured(**indices: int) -> Iterator[None]:
    """Within the block the named kernels run with the configuration of that index, whatever the sizes."""
    token = _forced.set({**_forced.get(), **indices})
    try:
        yield
    finally:
        _forced.reset(token)


def refusal(call: Call, dtypes: Collection[str] = ("float32", "float16", "bfloat16")) -> str | None:
    """Why no Triton kernel can serve a call, whatever it computes; None if one may."""
    if call.device == "cpu":
        if not (call.chosen and _simulated()):
            return "needs a CUDA device"
    elif call.device != "cuda":
        return f"needs a CUDA device, not {call.device}"
    elif not sys.platform.startswith("linux"):
        return f"Triton runs on Linux, not on {sys.platform}"
    elif (reason := _unfit(call.supposed)) is not None:
        return reason
    name = str(call.dtype).removeprefix("torch.")
    if name not in dtypes:
        return f"takes {', '.join(dtypes)}, not {name}"
    return too_many(call.facts, MOST)


def too_many(facts: Mapping[str, Any], limits: Mapping[str, int]) -> str | None:
    """Which size is above its limit. One that a trace leaves open is not: a guard would bound what may be exported."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    for name, most in limits.items():
        size = facts.get(name, 0)
        if statically_known_true(size > most):
            return f"takes up to {most:,} {name}, not {size:,}"
    return None


def _simulated() -> str | None:
    """The architecture that kernels are configured for without a GPU, if any."""
    return _stand_in.get()


def _unfit(supposed: bool) -> str | None:
    """Why the CUDA device of this machine cannot run kernels; one that is only supposed can."""
    return _capability(supposed)


@cache
def _capability(supposed: bool) -> str | None:
    import torch

    if not torch.cuda.is_available():
        return None if supposed else "there is no CUDA device on this machine"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"needs compute capability 8.0 or newer, the device has {major}.{minor}"


# As in `zoo.kernels.dispatch`: Dynamo calls them once and keeps the result.
for _function in (_simulated, _unfit):
    _function._dynamo_marked_constant = True  # type: ignore[attr-defined]


def architecture(device: torch.device) -> str:
    """The architecture whose configurations a device takes: the newest of its family that is not newer than it."""
    stand_in = _stand_in.get()
    if stand_in is not None:
        return stand_in
    import torch

    major, _ = torch.cuda.get_device_capability(device)
    # 12.x has the memory and the instructions of 8.x, whatever its number says.
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


class Launches:
    """The launch configurations of a primitive's kernels; `folder` is the primitive's, below `zoo.kernels`."""

    def __init__(self, folder: str) -> None:
        text = (files("zoo.kernels") / folder / "launch.json").read_text(encoding="utf-8")
        self.kernels: Mapping[str, Mapping[str, list[Configuration]]] = json.loads(text)

    def of(self, kernel: str, architecture: str) -> list[Configuration]:
        """The configurations of a kernel, without their bounds."""
        found = self.kernels[kernel][architecture]
        return [{name: value for name, value in one.items() if name != "when"} for one in found]

    def trials(self, kernels: Collection[str], architecture: str) -> list[dict[str, int]]:
        """What to give to `configured`, one after the other, to go through every configuration of some kernels."""
        counts = {kernel: len(self.of(kernel, architecture)) for kernel in kernels}
        most = max(counts.values(), default=1)
        return [{kernel: min(index, count - 1) for kernel, count in counts.items()} for index in range(most)]

    def run(
        self, kernel: Any, grid: Grid, device: torch.device, sizes: Mapping[str, int], *arguments: Any, **constants: Any
    ) -> None:
        """Launch a kernel on a grid, which may hang on its configuration, for a call of these sizes."""
        kernel[grid](*arguments, **constants, **self.configuration(kernel.__name__, device, sizes))

    def configuration(self, kernel: str, device: torch.device, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Keyword arguments of a launch for a call of these sizes."""
        target = architecture(device)
        index = _forced.get().get(kernel)
        if index is None:
            bounds = [one.get("when", {}) for one in self.kernels[kernel][target]]
            index = next(
                (i for i, when in enumerate(bounds) if all(sizes[name] <= most for name, most in when.items())),
                len(bounds) - 1,
            )
        # Said explicitly because Triton's default is about to change.
        return {"enable_fp_fusion": True, **self.of(kernel, target)[index]}


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device: the programs of a launch in which each takes a share of the rows."""
    if _stand_in.get() is not None:
        return 4
    import torch

    return torch.cuda.get_device_properties(device).multi_processor_count
