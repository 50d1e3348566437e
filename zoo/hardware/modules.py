"""What each module of a model takes while the model runs, beside what the modules inside it take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from zoo.device import Device
from zoo.latency import Case, Clock


@dataclass(slots=True)
class _Run:
    """One run of a module: marks before and behind it, and the runs of modules inside."""

    path: str
    start: Any
    end: Any = None
    inside: list[_Run] = field(default_factory=list)


class ModuleTimes:
    """Runs of a model in which the modules at `paths` are timed, those that are called.

    Two readings of the clock go with each call of a module, some tenths of a microsecond, on a GPU two events on its
    stream.
    """

    def __init__(
        self, model: nn.Module, paths: Iterable[str], device: Device, clock: Clock = time.perf_counter
    ) -> None:
        self._modules = {path: model.get_submodule(path) for path in paths}
        self._on_gpu = device.kind == "cuda"
        self._device = device.name
        self._clock = clock
        self._runs: list[_Run] = []

    def timed(self, case: Case) -> Case:
        """The case, with its modules timed each time that it is called."""

        def run() -> object:
            open_runs: list[_Run] = []
            for path, module in self._modules.items():
                # What an instance has of a name comes before what its class has.
                module.forward = self._marked(path, module.forward, open_runs)
            try:
                return case()
            finally:
                for module in self._modules.values():
                    del module.forward

        return run

    def _marked(self, path: str, forward: Callable[..., Any], open_runs: list[_Run]) -> Callable[..., Any]:
        def marked(*args: Any, **kwargs: Any) -> Any:
            run = _Run(path, self._mark())
            open_runs.append(run)
            try:
                return forward(*args, **kwargs)
            finally:
                run.end = self._mark()
                open_runs.pop()
                (open_runs[-1].inside if open_runs else self._runs).append(run)

        return marked

    def _mark(self) -> Any:
        if not self._on_gpu:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self) -> dict[str, list[float]]:
        """What each call of a module took, without the modules inside it, by path; they are forgotten then."""
        if self._on_gpu:
            torch.cuda.synchronize(self._device)
        found: dict[str, list[float]] = defaultdict(list)
        waiting = self._runs
        self._runs = []
        while waiting:
            run = waiting.pop()
            inside = sum(self._between(one.start, one.end) for one in run.inside)
            found[run.path].append(max(0.0, self._between(run.start, run.end) - inside))
            waiting += run.inside
        return dict(found)

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start
