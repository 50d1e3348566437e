"""Kernels on a GPU: first their numerics in every configuration, then their time against public implementations.

    python -m bench.gpu                  # on a machine with an NVIDIA GPU; writes zoo/kernels/timings/DEVICE.json
    python -m bench.gpu --interpret      # anywhere: the same at tiny sizes in Triton's interpreter, writing nothing

A configuration that is numerically wrong is named and its kernel is not timed. Rivals run in the same process, turn by
turn with ours; a figure is the median. `share` is the share of the device's measured copy bandwidth, or of its measured
rate of bfloat16 matrix products, whichever the kernel is bound by.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

TIMINGS = Path(__file__).parent.parent / "zoo" / "kernels" / "timings"
REPEATS = 30

Row = dict[str, Any]
Run = Callable[[], Any]


def numerics(device: str, sizes: tuple[str, ...]) -> Iterator[Row]:
    """A row for each case, dtype and configuration: whether it is as exact as plain PyTorch, or what is wrong."""
    import torch

    from zoo.kernels.case import cases
    from zoo.kernels.dispatch import HOMES
    from zoo.kernels.launch import Launches, architecture, configured
    from zoo.testing.kernels import check

    for case in cases():
        target = architecture(torch.device(device))
        configurations = Launches(HOMES[case.primitive]).trials(case.kernels, target)
        for dtype in case.dtypes:
            for index, indices in enumerate(configurations):
                for size in sizes:
                    row = {"case": str(case), "dtype": str(dtype)[6:], "configuration": index, "size": size}
                    try:
                        with configured(**indices):
                            check(case, dtype, size=size, device=device)  # type: ignore[arg-type]
                        yield {**row, "right": True, "error": ""}
                    except Exception as error:  # Whatever a wrong kernel does, the others have to be tried.
                        yield {**row, "right": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def probe(device: str, elements: int) -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of a bfloat16 matrix product."""
    import torch

    source = torch.empty(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    side = max(16, int(elements**0.5) // 4)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    copy = median(lambda: target.copy_(source), device, 5)
    product = median(lambda: a @ b, device, 5)
    return {"copy_bytes_per_second": 2 * source.nbytes / copy, "matrix_flops_per_second": 2 * side**3 / product}


def seconds(run: Run, device: str) -> float:
    """One run, on the device's own clock."""
    import time

    import torch

    if device == "cpu":
        started = time.perf_counter()
        run()
        return time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e-3


def median(run: Run, device: str, repeats: int) -> float:
    run()
    return statistics.median(seconds(run, device) for _ in range(repeats))


def interleaved(runs: Mapping[str, Run], device: str, repeats: int) -> dict[str, float]:
    """The median seconds of each, turn by turn after a warm-up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        for _ in range(min(3, repeats)):
            run()
    for _ in range(repeats):
        for name, run in runs.items():
            taken[name].append(seconds(run, device))
    return {name: statistics.median(values) for name, values in taken.items()}


def timings(device: str, small: bool, wrong: set[str], rates: Mapping[str, float]) -> Iterator[Row]:
    """A row for each contest and rival."""
    from bench.gpu_contests import contests

    for contest in contests(device, small):
        if contest.primitive in wrong:
            yield {"what": contest.what, "error": "numerically wrong, not timed"}
            continue
        try:
            found = interleaved({"ours": contest.ours, **contest.rivals}, device, 1 if small else REPEATS)
        except Exception as error:
            yield {"what": contest.what, "error": f"{type(error).__name__}: {error}".splitlines()[0]}
            continue
        ours = found.pop("ours")
        bound = max(contest.bytes / rates["copy_bytes_per_second"], contest.flops / rates["matrix_flops_per_second"])
        for rival, theirs in found.items() or [("", float("nan"))]:
            required = contest.required.get(rival)
            yield {
                "what": contest.what,
                "ms": round(ours * 1e3, 4),
                "rival": rival,
                "its_ms": round(theirs * 1e3, 4) if found else "",
                "ratio": round(theirs / ours, 3) if found else "",
                "share": round(bound / ours, 3),
                "at_least": required if required is not None else "",
                "met": "" if required is None else theirs / ours >= required,
                "missing": ", ".join(contest.missing),
            }


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "flash-linear-attention", "liger-kernel", "mamba-ssm", "zoo-nas"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    parser.add_argument("--numerics-only", action="store_true", help="check and do not time")
    given = parser.parse_args()
    if given.interpret:
        # Read by Triton when it is imported.
        os.environ["TRITON_INTERPRET"] = "1"
        sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "kernels"))
    import torch

    if not given.interpret and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --interpret runs the same at tiny sizes without one")
    device = "cpu" if given.interpret else "cuda"
    with ExitStack() as stack:
        if given.interpret:
            from interpreter import bfloat16  # type: ignore[import-not-found]

            from zoo.kernels.launch import without_gpu

            stack.enter_context(without_gpu("sm_90"))
            stack.enter_context(bfloat16())
        checked = []
        for row in numerics(device, ("small",) if given.interpret else ("small", "large")):
            checked.append(row)
            print("right" if row["right"] else "WRONG", *list(row.values())[:4], row["error"], flush=True)
        rates = probe(device, 1 << 16 if given.interpret else 1 << 29)
        wrong = {row["case"].split("-")[0] for row in checked if not row["right"]}
        found: list[Row] = []
        for row in () if given.numerics_only else timings(device, given.interpret, wrong, rates):
            found.append(row)
            print(*row.values(), sep="  ", flush=True)
    if not given.interpret:
        name = torch.cuda.get_device_name().lower().replace(" ", "-")
        record = {
            "device": torch.cuda.get_device_name(),
            "date": datetime.now(UTC).date().isoformat(),
            "versions": versions(),
            **rates,
            "rows": found,
            "numerics": checked,
        }
        TIMINGS.mkdir(exist_ok=True)
        (TIMINGS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(bool(wrong) or any(row.get("met") is False for row in found))


if __name__ == "__main__":
    main()
