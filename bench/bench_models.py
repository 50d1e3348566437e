"""Building a very large model on `meta`, and counts against what is built.

    python -m bench.bench_models --json bench/results/models.json

For each shipped space, 200 random points: counted parameters against the parameters of the built module. For small
models of each space and every small shipped spec: counted FLOPs against `torch.utils.flop_counter`.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from typing import Any

from bench.record import arguments, finish, publish

POINTS = 200
COUNTED = 4
"""Points of each space whose FLOPs are counted; a forward pass of each on the CPU."""
BUILD = """
import json, resource, time
import zoo, torch
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.perf_counter()
model = zoo.build("gpt3-175b", device="meta")
seconds = time.perf_counter() - start
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps({"seconds": seconds, "peak": peak * 1024, "before": before * 1024,
                  "params": sum(p.numel() for p in model.parameters())}))
"""


def large() -> list[dict[str, Any]]:
    """The 175-billion-parameter spec in a process of its own: seconds and peak memory of the whole process."""
    done = subprocess.run([sys.executable, "-c", BUILD], check=True, capture_output=True, text=True)
    found = json.loads(done.stdout)
    return [
        {"what": "gpt3-175b on meta, seconds", "found": found["seconds"], "required": 5.0, "met": found["seconds"] < 5},
        {
            "what": "gpt3-175b on meta, GB of the process",
            "found": found["peak"] / 1e9,
            "required": 1.0,
            "met": found["peak"] < 1e9,
        },
    ]


def spaces() -> list[dict[str, Any]]:
    """Counts of random points of every shipped space against what is built."""
    import torch

    import zoo
    from tests.flops import counted_flops
    from zoo.spec.document import spec_names

    rows: list[dict[str, Any]] = []
    for name in spec_names():
        if not name.startswith("spaces/"):
            continue
        space, rng = zoo.load_space(name), random.Random(0)
        wrong, worst, counted, start = 0, 0.0, 0, time.perf_counter()
        tried = 0
        while tried < POINTS:
            point = space.sample(rng)
            try:
                spec = space.spec_at(point)
            except zoo.SpecError:
                continue
            tried += 1
            model = zoo.build(spec, device="meta")
            wrong += sum(p.numel() for p in model.parameters()) != zoo.metrics(spec)["params"]
            if counted < COUNTED:
                counted += 1
                tokens = min(128, spec.context)
                real = zoo.build(spec)
                inputs = real.example_inputs(1, tokens)
                with torch.no_grad():
                    measured = counted_flops(real.eval(), inputs)
                stated = zoo.metrics(spec, zoo.Workload(batch=1, seq=tokens))["flops"]
                worst = max(worst, abs(stated - measured) / measured)
        rows.append(
            {"what": f"{name}: wrong parameter counts of {POINTS}", "found": wrong, "required": 0, "met": wrong == 0}
        )
        rows.append({"what": f"{name}: FLOPs off by at most", "found": worst, "required": 0.01, "met": worst <= 0.01})
        print(f"{name}: {tried} points in {time.perf_counter() - start:.1f} s", file=sys.stderr)
    return rows


def main() -> None:
    """Run all."""
    options = arguments(__doc__ or "")
    finish(publish("Models: size and counts", [*large(), *spaces()], options.json))


if __name__ == "__main__":
    main()
