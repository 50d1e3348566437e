"""The regression of `zoo.hardware` on latencies that others measured, against their own predictor.

    python -m bench.bench_predictor --json bench/results/predictor.json

2,000 Transformers each on four devices (Wang et al. 2020, HAT, arXiv 2005.14187; ten features that describe each).
Fitted to rows drawn at random, tested on 1,000 others, mean of ten draws; the released predictor has seen 1,600 of the
rows. Needs `../shared/data/hat`.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bench.record import arguments, finish, publish
from zoo.hardware.regression import Regression, fit

DATA = Path(__file__).parent.parent.parent / "shared" / "data" / "hat"
DEVICES = {
    "iwslt14deen_gpu_titanxp": (5.8, 6.98),
    "wmt14ende_cpu_raspberrypi": (2.9, 3.80),
    "wmt14ende_cpu_xeon": (5.2, 4.79),
    "wmt14ende_gpu_titanxp": (5.1, 5.91),
}
"""Error in percent that is asked for with 50 measurements, and that of the released predictor."""
FEW, MANY, HELD_OUT, DRAWS = 10, 50, 1000, 10
WITH_PRIOR = 7.0
NAMES = ("base", "layers", "encoder products", "decoder products", "width", "arbitrary attention")
ATTENTION = 512
"""Inner width of attention in all of these models, whatever the number of heads."""


def table(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features `[rows, features]` and milliseconds `[rows]`."""
    with (DATA / f"{name}.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))

    def column(key: str) -> np.ndarray:
        return np.array([float(row[key]) for row in rows])

    wide, depth, hidden = (column(f"encoder_{key}") for key in ("embed_dim", "layer_num", "ffn_embed_dim_avg"))
    encoder = depth * (4 * wide * ATTENTION + 2 * wide * hidden)
    wide, depth, hidden = (column(f"decoder_{key}") for key in ("embed_dim", "layer_num", "ffn_embed_dim_avg"))
    decoder = depth * (6 * wide * ATTENTION + 2 * wide * hidden)
    arbitrary = depth * column("decoder_arbitrary_ende_attn_avg")
    features = np.stack([np.ones_like(wide), depth, encoder, decoder, wide, arbitrary], axis=1)
    return features, column("latency_mean_encoder") + column("latency_mean_decoder")


def tried(name: str, count: int, prior: Regression | None = None) -> tuple[float, float]:
    """Mean absolute percentage error, and how many of the held-out rows an interval of 90% covers."""
    features, times = table(name)
    errors, covered = [], []
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(times))
        seen, unseen = order[:count], order[count : count + HELD_OUT]
        found = fit(features[seen], times[seen], NAMES, prior=prior)
        predicted = found.predict(features[unseen])
        errors.append(100 * np.mean(np.abs(predicted / times[unseen] - 1)))
        low, high = found.interval(0.9, predicted)
        ratios = times[unseen] / predicted
        covered.append(100 * np.mean((low <= ratios) & (ratios <= high)))
    return float(np.mean(errors)), float(np.mean(covered))


def rows() -> Iterator[dict[str, Any]]:
    for name, (wanted, released) in DEVICES.items():
        error, covered = tried(name, MANY)
        yield row(f"{name}, {MANY} measured", error, wanted, released, covered)
    with_prior = []
    for source in DEVICES:
        features, times = table(source)
        seen = np.random.default_rng(99).permutation(len(times))[:200]
        prior = fit(features[seen], times[seen], NAMES)
        with_prior += [tried(target, FEW, prior) for target in DEVICES if target != source]
    error, covered = (float(np.mean(values)) for values in zip(*with_prior, strict=True))
    yield row(f"mean of 12 pairs, {FEW} measured, another device as prior", error, WITH_PRIOR, None, covered)


def row(what: str, error: float, wanted: float, released: float | None, covered: float) -> dict[str, Any]:
    return {
        "what": what,
        "error %": error,
        "at most": wanted,
        "released predictor, 1,600 measured": released or "",
        "covered by 90%": covered,
        "met": error <= wanted,
    }


if __name__ == "__main__":
    given = arguments("The latency regression on HAT's measurements.")
    if not DATA.is_dir():
        sys.exit(f"{DATA} is not there; this benchmark needs the measurements of HAT")
    finish(publish("predictor: HAT", list(rows()), given.json))
