"""Predicted latencies against measured ones on this machine: models drawn from the shipped spaces, and finalists.

    python -m bench.bench_latency --json bench/results/latency.json [--models 100]

Calibrates the CPU with one thread unless it is calibrated, draws models from every shipped space, at random with
lengths from 128 to 2,048 and batches of 1 and 8, and times each in several passes over all of them, minutes apart. What
a model is said to take is the median over the passes; how far one pass strays from another is what no prediction can be
better than. Before and behind each run of a model the calibration's sentinel runs. Where it strays by more than a
calibration tolerates, something else runs on the machine, and the model is timed again, as in a calibration. Figures
"at the speed of the calibration" are those of runs divided by what the sentinel took around each, over what it took in
the calibration. Then for a bound on the 0.9 quantile of latency: of 20 models that the predictor lets pass, those
closest to the bound, how many measure below it.

A second file beside the results, `latency-models.json`, has what was predicted and measured of every model. With
`--timed FILE` nothing is timed: the calibration of this machine, a shipped one too, predicts the models of such a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from bench.record import finish, publish
from zoo.device import Device, resolve_device
from zoo.errors import SpecError
from zoo.hardware.calibrate import DRIFT, TRIES, calibrate
from zoo.hardware.predictor import PredictedLatency, Predictor, load_predictor
from zoo.hardware.probe import probe
from zoo.hardware.stopwatch import DeviceStopwatch
from zoo.hardware.store import calibration_path, find_predictor, log_path
from zoo.latency import Context, LatencyCache, LatencyFigure, MeasuredLatency, Phase, Timing
from zoo.model import build
from zoo.search.space import load_space
from zoo.train.bench import trainer

PASSES = 3
SLOW = 2.0
"""Seconds from which on a phase is timed once: long runs stray less, and three passes would take an hour."""
SPACES = ("spaces/hybrid-24", "spaces/hybrid-bytes", "spaces/vision-digits")
LENGTHS, BATCHES = (128, 256, 512, 1024, 2048), (1, 8)
FINALISTS, POOL = 20, 400
FIGURES = {
    "mean absolute error": (0.06, "at most"),
    "share within 10%": (0.85, "at least"),
    "Spearman": (0.98, "at least"),
    "coverage of 90% intervals, at least": (0.85, "at least"),
    "coverage of 90% intervals, at most": (0.95, "at most"),
}
CALIBRATION_SECONDS = 255.0
TIMING = {"repeats": 7, "warmup": 1, "min_seconds": 0.05, "max_seconds": 4.0, "settle": 0.02}
SEED = 4


def predictor() -> Predictor:
    """The calibration of one thread of this CPU that was made here, now if there is none; never a shipped one."""
    device = resolve_device("cpu", 1)
    path = calibration_path(device, "float32")
    if not path.exists():
        stopwatch = DeviceStopwatch(device, trainer(device, "float32"))
        log = log_path(device, "float32")
        calibrate(stopwatch, probe(device), log, seconds=CALIBRATION_SECONDS).save(path)
    return load_predictor(path)


def drawn(rng: random.Random, names: tuple[str, ...] = SPACES) -> Iterator[tuple[str, Any, Context]]:
    """Models without end, from each space in turn."""
    spaces = {name: load_space(name) for name in names}
    while True:
        for name, space in spaces.items():
            try:
                spec = space.spec_at(space.sample(rng))
            except SpecError:
                continue
            tokens = rng.choice(LENGTHS) if spec.root().causal else spec.context
            yield name, spec, Context(rng.choice(BATCHES), tokens, tokens)


@dataclass
class Model:
    """One model with what is predicted and, pass after pass, measured of each phase."""

    space: str
    spec: Any
    context: Context
    predicted: dict[Phase, LatencyFigure]
    passes: dict[Phase, list[float]]
    evened: dict[Phase, list[float]]
    """The same as they would be were the machine as fast as when it was calibrated."""

    def measured(self, phase: Phase, evened: bool = False) -> float:
        """Seconds, half of the passes take longer."""
        return statistics.median((self.evened if evened else self.passes)[phase])


def models(source: PredictedLatency, count: int, seed: int) -> list[Model]:
    """Models at random, and what is predicted of them."""
    found: list[Model] = []
    for space, spec, context in itertools.islice(drawn(random.Random(seed)), count):
        phases: tuple[Phase, ...] = ("forward", "decode") if spec.root().causal else ("forward",)
        predicted: dict[Phase, LatencyFigure] = {phase: source.latency(spec, context, phase) for phase in phases}
        found.append(Model(space, spec, context, predicted, {p: [] for p in phases}, {p: [] for p in phases}))
    return found


def timed_before(found: list[Model], file: Path, sentinel: float) -> None:
    """Take what was measured from a file of the same draw, at the speed of a calibration with this sentinel."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    for model, row in zip(found, recorded, strict=True):
        if (model.spec.hash, model.context.batch, model.context.seq) != (row["spec"], row["batch"], row["seq"]):
            raise SystemExit(f"{file} is of other models; give the --seed that it was made with")
        for phase in model.passes:
            model.passes[phase] = row["measured"][phase]
            evened = row["at the speed of the calibration"][phase]
            model.evened[phase] = [seconds * sentinel / row["sentinel"] for seconds in evened]


class Undisturbed:
    """Measures on a machine that is as it was when it was calibrated, as far as that is to be had."""

    def __init__(self, device: Device, predictor: Predictor) -> None:
        self._measured: MeasuredLatency[Any] = MeasuredLatency(
            device, build, lambda spec: spec.hash, Forgetful(), pace=DeviceStopwatch(device).pace, **TIMING
        )
        assert predictor.sentinel is not None
        self._usual = predictor.sentinel
        self.asked = self.again = 0

    def seconds(self, spec: Any, context: Context, phase: Phase) -> tuple[float, float]:
        """The median of the runs in the least disturbed of up to `TRIES` attempts, and at the calibration's speed."""
        attempts: list[tuple[float, float, float]] = []
        self.asked += 1
        for attempt in range(TRIES):
            self.again += attempt > 0
            timing = self._measured.timing(spec, context, phase)
            disturbance = abs(math.log(statistics.median(timing.paces) / self._usual))
            attempts.append((disturbance, timing.median, timing.at(self._usual).median))
            if disturbance <= math.log1p(DRIFT) or timing.median >= SLOW:
                break
        _, seconds, evened = min(attempts)
        return seconds, evened


def time_all(found: list[Model], measured: Undisturbed) -> None:
    """Time every model once in each pass, every other pass in reverse order."""
    start = time.monotonic()
    for number in range(PASSES):
        for index, model in enumerate(found if number % 2 == 0 else reversed(found)):
            due: list[Phase] = [phase for phase, times in model.passes.items() if not times or times[0] < SLOW]
            for phase in due:
                seconds, evened = measured.seconds(model.spec, model.context, phase)
                model.passes[phase].append(seconds)
                model.evened[phase].append(evened)
            said = ", ".join(
                f"{phase} {model.passes[phase][-1] * 1e3:.3g} ms, predicted {model.predicted[phase].seconds * 1e3:.3g}"
                f", drift {model.passes[phase][-1] / model.evened[phase][-1]:.2f}"
                for phase in due
            )
            print(
                f"pass {number + 1}: {index + 1}/{len(found)}  {time.monotonic() - start:.0f} s  {model.space} "
                f"{model.context}  {said}",
                file=sys.stderr,
                flush=True,
            )


class Forgetful(LatencyCache):
    """Remembers nothing."""

    def get(self, key: Any) -> None:
        return None

    def put(self, key: Any, timing: Timing) -> None:
        return None


def compared(found: list[Model], phase: Phase) -> list[dict[str, Any]]:
    """The figures over all models that have a phase."""
    mine = [model for model in found if phase in model.predicted]
    rows: list[dict[str, Any]] = []
    for what, value in figures(mine, phase).items():
        bound, side = FIGURES[what]
        met = value <= bound if side == "at most" else value >= bound
        rows.append({"what": f"{phase}: {what}", "found": value, "required": bound, "met": met})
    evened = figures(mine, phase, evened=True)
    rows += [told(f"{phase} at the speed of the calibration: {what}", value) for what, value in evened.items()]
    rows.append(told(f"{phase}: mean deviation of one pass from another", strayed([m.passes[phase] for m in mine])))
    what = f"{phase} at the speed of the calibration: mean deviation of one pass from another"
    rows.append(told(what, strayed([m.evened[phase] for m in mine])))
    drift = statistics.median(m.measured(phase) / m.measured(phase, evened=True) for m in mine)
    rows.append(told(f"{phase}: drift since the calibration", drift))
    for name in SPACES:
        of_space = [model for model in mine if model.space == name]
        if of_space:
            error = figures(of_space, phase)["mean absolute error"]
            rows.append(told(f"{phase}: mean absolute error in {name}", error))
    return rows


def strayed(passes: list[list[float]]) -> float:
    """By what share one pass over models is off another, on average."""
    pairs = [pair for times in passes for pair in itertools.combinations(times, 2)]
    return float(np.mean([abs(one / other - 1) for one, other in pairs]))


def figures(found: list[Model], phase: Phase, evened: bool = False) -> dict[str, float]:
    """What `FIGURES` asks for."""
    predicted = np.array([model.predicted[phase].seconds for model in found])
    measured = np.array([model.measured(phase, evened) for model in found])
    low = np.array([model.predicted[phase].low for model in found])
    high = np.array([model.predicted[phase].high for model in found])
    errors, inside = np.abs(predicted / measured - 1), (low <= measured) & (measured <= high)
    values = (
        errors.mean(),
        (errors <= 0.1).mean(),
        np.corrcoef(rankdata(predicted), rankdata(measured))[0, 1],
        inside.mean(),
        inside.mean(),
    )
    return dict(zip(FIGURES, map(float, values), strict=True))


def facts(model: Model, sentinel: float | None) -> dict[str, Any]:
    """What is kept of a model and of the calibration that predicted it, seconds throughout."""
    return {
        "sentinel": sentinel,
        "space": model.space,
        "spec": model.spec.hash,
        "batch": model.context.batch,
        "seq": model.context.seq,
        "predicted": {phase: [figure.low, figure.seconds, figure.high] for phase, figure in model.predicted.items()},
        "measured": model.passes,
        "at the speed of the calibration": model.evened,
    }


def told(what: str, found: float) -> dict[str, Any]:
    """A row of something that nobody asks for."""
    return {"what": what, "found": found, "required": "", "met": True}


def finalists(source: PredictedLatency, measured: Undisturbed, rng: random.Random) -> list[dict[str, Any]]:
    """Of those that are predicted to meet a bound with probability 0.9 the closest to it, measured."""
    context = Context(1, 256, 256)
    pool = [spec for _, (_, spec, _) in zip(range(POOL), drawn(rng, ("spaces/hybrid-bytes",)), strict=False)]
    upper = {spec.hash: source.latency(spec, context, "forward", 0.9).seconds for spec in pool}
    bound = float(np.median(list(upper.values())))
    passing = sorted((spec for spec in pool if upper[spec.hash] <= bound), key=lambda spec: -upper[spec.hash])
    took = [measured.seconds(spec, context, "forward") for spec in passing[:FINALISTS]]
    (within, beyond), (evenly_within, evenly_beyond) = (
        (sum(each <= bound for each in times), sum(each > 1.1 * bound for each in times))
        for times in zip(*took, strict=True)
    )
    what = f"of {FINALISTS} finalists of latency<={bound * 1e3:.3g}ms@cpu{{quantile=0.9}}, "
    return [
        {"what": f"{what}within the bound", "found": within, "required": 17, "met": within >= 17},
        {"what": f"{what}beyond 1.1 of it", "found": beyond, "required": 0, "met": beyond == 0},
        told(f"{what}at the speed of the calibration within the bound", evenly_within),
        told(f"{what}at the speed of the calibration beyond 1.1 of it", evenly_beyond),
    ]


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description="Predicted latencies against measured ones on this machine.")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--models", type=int, default=100, help="models to draw")
    parser.add_argument("--seed", type=int, default=SEED, help="of the draw")
    parser.add_argument("--timed", type=Path, help="predict the models of this file anew, and time nothing")
    options = parser.parse_args()
    found = predictor() if options.timed is None else find_predictor("cpu", threads=1)
    assert found.sentinel is not None
    source, device = PredictedLatency(found), resolve_device("cpu", 1)
    all_models = models(source, options.models, options.seed)
    measured = Undisturbed(device, found)
    if options.timed is not None:
        timed_before(all_models, options.timed, found.sentinel)
    else:
        time_all(all_models, measured)
    rows = [row for phase in ("forward", "decode") for row in compared(all_models, phase)]
    if options.timed is None:
        rows += finalists(source, measured, random.Random(options.seed + 1))
        rows.append(told("measurements that were disturbed and repeated, share", measured.again / measured.asked))
        if options.json:
            options.json.with_name(f"{options.json.stem}-models.json").write_text(
                json.dumps([facts(model, found.sentinel) for model in all_models], indent=1) + "\n"
            )
    title = f"latency: {options.models} models of the shipped spaces, one thread; calibrated {found.made['date']} on "
    title += f"{found.made['samples']} models{', which were timed before' if options.timed else ''}"
    finish(publish(title, rows, options.json))


if __name__ == "__main__":
    main()
