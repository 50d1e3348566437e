"""Timing samples on a device of this machine, beside a sentinel that tells whether the machine has changed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from zoo.device import Device
from zoo.hardware.features import Phase
from zoo.hardware.memory import kept_bytes, peak_bytes
from zoo.hardware.modules import ModuleTimes
from zoo.hardware.samples import Sample
from zoo.latency import Case, Clock, Timing, kept_memory, measure, pinned_threads
from zoo.model import Model, build
from zoo.spec.document import parse

REPEATS = 4
MOST_SECONDS = 1.0
"""Seconds of timed runs after which a case has enough, repeats or not."""
SETTLE_SECONDS = 0.02
"""How long a case runs before each timed run."""
SENTINEL = """
width: 128
context: 256
stem: {type: token, vocab: 256}
body:
  layers:
    - {mixer: {type: attention, heads: 4}, channel: glu}
    - {mixer: {type: mamba2, head_dim: 32, state_dim: 16}, channel: glu}
head: language_model
"""
"""A model that feels whatever slows models down: products, memory, and Python."""
SENTINEL_TOKENS = 128
TRAINING_RUNS = 3
"""Steps of training that are timed, behind four that are not."""
SENTINEL_RUNS = 7
"""Rounds in which the sentinel is timed by itself."""


class Reading(NamedTuple):
    """Seconds of a sample in one phase, and of its modules by path, each without those inside it; in training none.

    held: bytes that it held at once, of a thorough sample.
    """

    seconds: float
    modules: Mapping[str, float]
    held: float | None = None


Readings = dict[Phase, Reading]
Training = Callable[[Sample], Case | None]
"""Makes a step of training a sample's model; None where nobody trains such models."""


class Stopwatch(Protocol):
    """Whatever times samples: a device, or in tests something that only pretends to be one."""

    device: Device

    def read(self, samples: Sequence[Sample]) -> tuple[list[Readings], float]:
        """The medians of each sample by phase, and the seconds of the sentinel, the same work each time."""
        ...


class DeviceStopwatch:
    """Times samples against each other: every round runs each case once, warm, with the sentinel before and behind it.

    Times are as they would be were the machine as fast throughout as it is half of the time, as the sentinel has it.

    A sample is timed as it is and, by turns, with its modules timed, which takes a little longer. Of thorough samples
    the memory is measured behind that and, where `training` makes steps of it, training is timed. `pace` is the
    sentinel's forward pass, as `zoo.latency.measure` takes it.
    """

    def __init__(self, device: Device, training: Training | None = None, clock: Clock = time.perf_counter) -> None:
        self.device = device
        self._training = training
        self._clock = clock
        model = build(parse(SENTINEL), device=device.name).eval()
        with torch.inference_mode():
            self.pace: Case = model.forward_case(1, SENTINEL_TOKENS)

    def read(self, samples: Sequence[Sample]) -> tuple[list[Readings], float]:
        with kept_memory():
            return self._read(samples)

    def sentinel(self) -> float:
        """Seconds of the sentinel by itself, to tell how fast the machine is now."""
        with kept_memory():
            return _paced(self._measured({"sentinel": self.pace}, SENTINEL_RUNS, settle=0.0))

    def _measured(self, cases: Mapping[str, Case], repeats: int, settle: float = SETTLE_SECONDS) -> dict[str, Timing]:
        return measure(
            cases,
            device=self.device,
            repeats=repeats,
            warmup=1,
            min_seconds=0.0,
            max_seconds=MOST_SECONDS,
            settle=settle,
            clock=self._clock,
            pace=self.pace,
        )

    def _read(self, samples: Sequence[Sample]) -> tuple[list[Readings], float]:
        cases: dict[str, Case] = {}
        modules: dict[str, ModuleTimes] = {}
        models: list[Model] = []
        with torch.inference_mode(), pinned_threads(self.device.threads):
            for number, sample in enumerate(samples):
                model = build(sample.spec, device=self.device.name, dtype=getattr(torch, sample.dtype)).eval()
                models.append(model)
                for phase in sample.phases:
                    name = f"{number} {phase}"
                    paths = [piece.path for part in sample.parts(phase) for piece in part]
                    cases[name] = _case(model, sample, phase)
                    modules[name] = ModuleTimes(model, paths, self.device, self._clock)
                    cases[f"{name} in parts"] = modules[name].timed(cases[name])
        found = self._measured(cases, REPEATS)
        pace = _paced(found)

        def reading(name: str) -> Reading:
            in_parts = found[f"{name} in parts"]
            usual = _usual(in_parts)
            evened = _usual(in_parts.at(pace)) / usual if usual else 1.0
            medians = {path: evened * statistics.median_low(times) for path, times in modules[name].seconds().items()}
            return Reading(_usual(found[name].at(pace)), medians)

        readings: list[Readings] = [
            {phase: reading(f"{number} {phase}") for phase in sample.phases} for number, sample in enumerate(samples)
        ]
        with pinned_threads(self.device.threads):
            for sample, model, mine in zip(samples, models, readings, strict=True):
                if sample.thorough:
                    self._look_closer(sample, model, mine, pace)
        return readings, pace

    def _look_closer(self, sample: Sample, model: Model, readings: Readings, pace: float) -> None:
        """Add to a sample's readings what it holds of memory, and training."""
        weights = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
        for phase in sample.phases:
            with torch.inference_mode():
                _, held = self._held(lambda phase=phase: _case(model, sample, phase))
            readings[phase] = readings[phase]._replace(held=weights + held)
        if self._training is None:
            return
        case, held = self._held(partial(self._training, sample))
        if case is not None:
            seconds = _usual(self._measured({"train": case}, TRAINING_RUNS, settle=0.0)["train"].at(pace))
            readings["train"] = Reading(seconds, {}, held)

    def _held(self, make: Callable[[], Case | None]) -> tuple[Case | None, int]:
        """A case that has run, and the bytes that it holds at once."""

        def ready() -> Case | None:
            case = make()
            if case is not None:
                case()
            return case

        case, kept = kept_bytes(ready, self.device)
        return case, kept if case is None else kept + peak_bytes(case, self.device)


def _paced(found: Mapping[str, Timing]) -> float:
    """What the sentinel takes half of the time."""
    return statistics.median(pace for timing in found.values() for pace in timing.paces)


def _usual(timing: Timing) -> float:
    """The lower of the two runs in the middle: what disturbs a few runs makes them longer."""
    return statistics.median_low(timing.runs)


def _case(model: Model, sample: Sample, phase: Phase) -> Case:
    """What is timed of a sample without gradients."""
    if phase == "decode":
        return model.decode_case(sample.batch, sample.past)
    return model.forward_case(sample.batch, sample.tokens)
