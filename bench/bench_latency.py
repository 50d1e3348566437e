"""Predicted latencies against measured ones on this machine: models drawn from the shipped spaces, and finalists.

    python -m bench.bench_latency --json bench/results/latency.json [--models 100]

Calibrates the CPU with one thread unless it is calibrated, draws models from every shipped space, at random with
lengths from 128 to 2,048 and batches of 1 and 8, and times each. Then for a bound on the 0.9 quantile of latency: of 20
models that the predictor lets pass, those closest to the bound, how many measure below it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from bench.record import finish, publish
from zoo.device import resolve_device
from zoo.errors import SpecError, ZooError
from zoo.hardware.calibrate import calibrate
from zoo.hardware.predictor import PredictedLatency, Predictor
from zoo.hardware.probe import probe
from zoo.hardware.stopwatch import DeviceStopwatch
from zoo.hardware.store import calibration_path, find_predictor, log_path
from zoo.latency import Context, LatencyFigure, MeasuredLatency, Phase
from zoo.model import build
from zoo.search.space import load_space

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
CALIBRATION_SECONDS = 285.0


def predictor() -> Predictor:
    """The calibration of one thread of this CPU, made now if there is none."""
    device = resolve_device("cpu", 1)
    try:
        return find_predictor("cpu", threads=1)
    except ZooError:
        found = calibrate(
            DeviceStopwatch(device), probe(device), log_path(device, "float32"), seconds=CALIBRATION_SECONDS
        )
        found.save(calibration_path(device, "float32"))
        return found


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


def compared(found: list[tuple[str, LatencyFigure, float]], phase: Phase) -> list[dict[str, Any]]:
    """The figures over pairs of a prediction and a measurement."""
    predicted = np.array([figure.seconds for _, figure, _ in found])
    measured = np.array([seconds for _, _, seconds in found])
    inside = np.array([figure.low <= seconds <= figure.high for _, figure, seconds in found])
    errors = predicted / measured - 1
    values = {
        "mean absolute error": float(np.abs(errors).mean()),
        "share within 10%": float((np.abs(errors) <= 0.1).mean()),
        "Spearman": float(np.corrcoef(rankdata(predicted), rankdata(measured))[0, 1]),
        "coverage of 90% intervals, at least": float(inside.mean()),
        "coverage of 90% intervals, at most": float(inside.mean()),
    }
    rows: list[dict[str, Any]] = []
    for what, value in values.items():
        bound, side = FIGURES[what]
        met = value <= bound if side == "at most" else value >= bound
        rows.append({"what": f"{phase}: {what}", "found": value, "required": bound, "met": met})
    for name in SPACES:
        mine = [abs(figure.seconds / seconds - 1) for space, figure, seconds in found if space == name]
        if mine:
            what = f"{phase}: mean absolute error in {name}"
            rows.append({"what": what, "found": float(np.mean(mine)), "required": 0.0, "met": True})
    return rows


def finalists(source: PredictedLatency, measured: MeasuredLatency[Any], rng: random.Random) -> list[dict[str, Any]]:
    """Of those that are predicted to meet a bound with probability 0.9 the closest to it, measured."""
    context = Context(1, 256, 256)
    pool = [spec for _, (_, spec, _) in zip(range(POOL), drawn(rng, ("spaces/hybrid-bytes",)), strict=False)]
    upper = {spec.hash: source.latency(spec, context, "forward", 0.9).seconds for spec in pool}
    bound = float(np.median(list(upper.values())))
    passing = sorted((spec for spec in pool if upper[spec.hash] <= bound), key=lambda spec: -upper[spec.hash])
    took = [measured.latency(spec, context).seconds for spec in passing[:FINALISTS]]
    within, beyond = sum(seconds <= bound for seconds in took), sum(seconds > 1.1 * bound for seconds in took)
    what = f"of {FINALISTS} finalists of latency<={bound * 1e3:.3g}ms@cpu{{quantile=0.9}}, "
    return [
        {"what": f"{what}within the bound", "found": within, "required": 17, "met": within >= 17},
        {"what": f"{what}beyond 1.1 of it", "found": beyond, "required": 0, "met": beyond == 0},
    ]


def main() -> None:
    """Run all."""
    parser = argparse.ArgumentParser(description="Predicted latencies against measured ones on this machine.")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--models", type=int, default=100, help="models to draw")
    options = parser.parse_args()
    found = predictor()
    source = PredictedLatency(found)
    device = resolve_device("cpu", 1)
    timing = {"repeats": 7, "warmup": 1, "min_seconds": 0.2, "max_seconds": 4.0}
    measured: MeasuredLatency[Any] = MeasuredLatency(device, build, lambda spec: spec.hash, **timing)
    pairs: dict[Phase, list[tuple[str, LatencyFigure, float]]] = {"forward": [], "decode": []}
    start, samples = time.monotonic(), drawn(random.Random(2))
    for number in range(options.models):
        name, spec, context = next(samples)
        for phase in pairs:
            if phase == "forward" or spec.root().causal:
                figure = source.latency(spec, context, phase)
                pairs[phase].append((name, figure, measured.latency(spec, context, phase).seconds))
        _, last, seconds = pairs["forward"][-1]
        print(
            f"{number + 1}/{options.models}  {time.monotonic() - start:.0f} s  {name} {context}  "
            f"predicted {last.seconds * 1e3:.3g} ms, measured {seconds * 1e3:.3g} ms",
            file=sys.stderr,
        )
    rows = [row for phase, mine in pairs.items() for row in compared(mine, phase)]
    rows += finalists(source, measured, random.Random(3))
    title = f"latency: {options.models} models of the shipped spaces, one thread; calibrated {found.made['date']} on "
    title += f"{found.made['samples']} models"
    finish(publish(title, rows, options.json))


if __name__ == "__main__":
    main()
