"""Kernels on a GPU: first their numerics in every configuration, then their time against public implementations.

    python -m bench.gpu                            # on a machine with an NVIDIA GPU
    python -m bench.gpu --only norms --minutes 9   # one section, and nothing new after nine minutes
    python -m bench.gpu --interpret                # anywhere: the same at tiny sizes in Triton's interpreter

Results are added to `zoo/kernels/timings/DEVICE.json`, which `zoo kernels bench` prints; `--out` writes them elsewhere,
and what was interpreted is only printed. Each section runs in a process of its own, started again behind whatever
killed it, so that a crash costs one figure. What the minutes did not suffice for is named.

A configuration that is numerically wrong is named and its kernel is not timed. Rivals run in the same process, turn by
turn with ours, after their results are compared with ours (`differs`); a figure is the median. `share` is the share of
the device's measured copy bandwidth, or of its measured rate of bfloat16 matrix products, whichever binds the kernel.
`bench/README.md` says what to take along.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.gpu_contests import Contest

ROOT = Path(__file__).parent.parent
TIMINGS = ROOT / "zoo" / "kernels" / "timings"
REPEATS = 30
SECTIONS: Mapping[str, tuple[str, ...]] = {
    "attention": ("attention",),
    "recurrences": ("recurrence",),
    "deltas": ("delta_rule",),
    "scans": ("selective_scan", "diagonal_scan"),
    "convolutions": ("causal_convolution",),
    "norms": ("rms_norm", "layer_norm"),
    "activations": ("gated_activation", "polynomial_activation", "rotary", "rotary_pair"),
    "cross_entropy": ("linear_cross_entropy",),
    "products": ("grouped_matmul", "route"),
}
"""What is checked and timed together, by the primitives that it is about."""
CRASHED = "the process died"
OUT_OF_TIME = 4
"""Exit status of a section that has more to do."""

Row = dict[str, Any]
Run = Callable[[], Any]


class Journal:
    """Rows of a section by their name, each on disk as soon as it is known; one that was begun counts as a crash."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self.rows: dict[str, Row] = {row["name"]: row for row in map(json.loads, lines)}

    def begin(self, name: str, **known: Any) -> bool:
        """Whether a row is still to be made."""
        if name in self.rows:
            return False
        self.add({"name": name, **known, "error": CRASHED})
        return True

    def add(self, row: Row) -> None:
        self.rows[row["name"]] = row
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def numerics(section: str, device: str, sizes: tuple[str, ...]) -> Iterator[tuple[str, Row, Callable[[], None]]]:
    """For each case, dtype, configuration and size its name, what it is, and what raises if it is wrong."""
    import torch

    from zoo.kernels.case import cases
    from zoo.kernels.dispatch import HOMES
    from zoo.kernels.launch import Launches, architecture, configured
    from zoo.testing.kernels import check

    for case in cases():
        if case.primitive not in SECTIONS[section]:
            continue
        target = architecture(torch.device(device))
        for index, indices in enumerate(Launches(HOMES[case.primitive]).trials(case.kernels, target)):
            for dtype in case.dtypes:
                for size in sizes:

                    def checked(case: Any = case, indices: Any = indices, dtype: Any = dtype, size: Any = size) -> None:
                        with configured(**indices):
                            check(case, dtype, size=size, device=device)

                    name = f"{case}, {str(dtype)[6:]}, configuration {index}, {size}"
                    yield name, {"primitive": case.primitive}, checked


def probe(device: str, elements: int) -> dict[str, float]:
    """Bytes a second of a copy, and operations a second of a bfloat16 matrix product."""
    import torch

    source = torch.empty(elements, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    side = max(16, int(elements**0.5) // 4)
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    found = interleaved({"copy": lambda: target.copy_(source), "product": lambda: a @ b}, device, 10)
    return {
        "copy_bytes_per_second": 2 * source.nbytes / found["copy"],
        "matrix_flops_per_second": 2 * side**3 / found["product"],
    }


def seconds(run: Run, device: str) -> float:
    """One run, on the device's own clock."""
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


def difference(ours: Any, theirs: Any) -> float:
    """The largest root mean square difference between results and gradients, as a share of those of the rival."""
    found = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one is not None and other is not None:
            one, other = one.double(), other.double().view_as(one)
            scale = other.square().mean().sqrt().clamp(min=1e-30)
            found = max(found, float((one - other).square().mean().sqrt() / scale))
    return found


def peak(run: Run, device: str) -> float | None:
    """The most bytes that a run holds beyond what was there before; None on a CPU."""
    import torch

    if device == "cpu":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def compared(contest: Contest, device: str, repeats: int, rates: Mapping[str, float]) -> list[Row]:
    """Rows of a contest: ours against what it is bound by and may hold, and against each rival."""
    reference, rivals, failed = contest.ours(), {}, {}
    for name, run in contest.rivals.items():
        try:
            rivals[name] = run, difference(reference, run())
        except Exception as error:  # A rival that does not run here must not cost the others.
            failed[name] = first_line(error)
    taken = interleaved({"": contest.ours, **{name: run for name, (run, _) in rivals.items()}}, device, repeats)
    ours = taken.pop("")
    bound = max(contest.bytes / rates["copy_bytes_per_second"], contest.flops / rates["matrix_flops_per_second"])
    share = bound / ours
    start = {"what": contest.what, "ms": round(ours * 1e3, 4), "share": round(share, 3)}
    rows: list[Row] = []
    if contest.required_share:
        rows.append(start | _bar("share of the device's rate", share, contest.required_share))
    if contest.most_bytes and (held := peak(contest.ours, device)) is not None:
        rows.append(start | _bar("bytes held, allowed over used", contest.most_bytes / max(1.0, held), 1.0))
    for name, theirs in taken.items():
        bar = _bar(name, theirs / ours, contest.required.get(name))
        rows.append(start | bar | {"its_ms": round(theirs * 1e3, 4), "differs": round(rivals[name][1], 6)})
    rows += [start | _absent(name, error, contest) for name, error in failed.items()]
    rows += [start | _absent(name, "not installed", contest) for name in contest.missing]
    return rows or [start]


def _bar(rival: str, ratio: float, required: float | None) -> Row:
    """How many times better ours is, and whether that is enough."""
    row: Row = {"rival": rival, "ratio": round(ratio, 3)}
    return row if required is None else {**row, "at_least": round(required, 3), "met": ratio >= required}


def _absent(rival: str, why: str, contest: Contest) -> Row:
    required = contest.required.get(rival)
    return {"rival": rival, "error": why} | ({} if required is None else {"at_least": round(required, 3)})


def run_section(given: argparse.Namespace) -> int:
    """Check and time one section, in this process; rows go to its journal."""
    import torch

    device = "cpu" if given.interpret else "cuda"
    sizes = ("small",) if given.interpret else ("small", "large")
    journal, deadline = Journal(given.journal), time.monotonic() + given.minutes * 60
    with ExitStack() as stack:
        if given.interpret:
            sys.path.insert(0, str(ROOT / "tests" / "kernels"))
            from interpreter import bfloat16  # type: ignore[import-not-found]

            from zoo.kernels.launch import without_gpu

            stack.enter_context(without_gpu("sm_90"))
            stack.enter_context(bfloat16())
        for name, known, checked in () if given.timings_only else numerics(given.section, device, sizes):
            if time.monotonic() > deadline:
                return OUT_OF_TIME
            if not journal.begin(name, **known):
                continue
            error = ""
            try:
                checked()
            except Exception as problem:  # Whatever a wrong kernel does, the others have to be tried.
                error = first_line(problem)
            journal.add({"name": name, **known, "right": not error, "error": error})
            print("WRONG" if error else "right", name, error, flush=True)
            _alive(device)
        if given.numerics_only:
            return 0
        from bench.gpu_contests import contests

        rates = probe(device, 1 << 16 if given.interpret else 1 << 29)
        journal.add({"name": "rates", **rates})
        wrong = {row["primitive"] for row in journal.rows.values() if "primitive" in row and not row.get("right")}
        for contest in contests(given.section, device, given.interpret):
            if time.monotonic() > deadline:
                return OUT_OF_TIME
            if not journal.begin(contest.what, timed=[{"what": contest.what, "error": CRASHED}]):
                continue
            if contest.primitive in wrong:
                rows: list[Row] = [{"what": contest.what, "error": "numerically wrong, not timed"}]
            else:
                try:
                    rows = compared(contest, device, 1 if given.interpret else REPEATS, rates)
                except Exception as problem:
                    rows = [{"what": contest.what, "error": first_line(problem)}]
            journal.add({"name": contest.what, "timed": rows})
            for row in rows:
                print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            _alive(device)
            if device == "cuda":
                torch.cuda.empty_cache()
    return 0


def _alive(device: str) -> None:
    """Leave the process where the device no longer answers, as after an access out of bounds."""
    import torch

    if device == "cuda":
        try:
            torch.cuda.synchronize()
        except RuntimeError as problem:
            print(f"the device is lost to this process: {first_line(problem)}", flush=True)
            os._exit(3)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for name in ("torch", "triton", "fla-core", "liger-kernel", "mamba-ssm", "zoo-nas"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def written(path: Path, device: str, found: Mapping[str, Mapping[str, Row]]) -> None:
    """Add what was found to a device's file; sections that did not run keep what the same versions gave."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    record = record if record.get("versions") == versions() else {}
    rows = [row for row in record.get("rows", ()) if row["section"] not in found]
    checked = [row for row in record.get("numerics", ()) if row["section"] not in found]
    rates: Row = {}
    for section, named in found.items():
        rates |= {key: value for key, value in named.get("rates", {}).items() if key != "name"}
        rows += [{"section": section, **row} for one in named.values() for row in one.get("timed", ())]
        checked += [{"section": section, **row} for row in named.values() if "primitive" in row]
    head = {"device": device, "date": datetime.now(UTC).date().isoformat(), "versions": versions()}
    old = {key: record[key] for key in ("copy_bytes_per_second", "matrix_flops_per_second") if key in record}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**head, **old, **rates, "rows": rows, "numerics": checked}, indent=1) + "\n")


def run_sections(given: argparse.Namespace) -> int:
    """Run each section in its own process, again where it died, and add up what they found."""
    import torch

    if not given.interpret and not torch.cuda.is_available():
        sys.exit("this machine has no CUDA device; --interpret runs the same at tiny sizes without one")
    name = "" if given.interpret else torch.cuda.get_device_name()
    started, found, left = time.monotonic(), {}, []
    flags = [
        f"--{flag.replace('_', '-')}" for flag in ("interpret", "numerics_only", "timings_only") if vars(given)[flag]
    ]
    environment = {**os.environ, **({"TRITON_INTERPRET": "1"} if given.interpret else {})}
    with tempfile.TemporaryDirectory() as folder:
        for section in given.only or SECTIONS:
            print(f"== {section}", flush=True)
            journal, known, status = Path(folder) / f"{section}.jsonl", -1, 1
            while status not in (0, OUT_OF_TIME) and known < (known := len(Journal(journal).rows)):
                minutes = given.minutes - (time.monotonic() - started) / 60
                command = [sys.executable, "-m", "bench.gpu", *flags, "--section", section, "--journal", str(journal)]
                command += ["--minutes", str(minutes)]
                status = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            if status:
                left.append(section)
            if rows := Journal(journal).rows:
                found[section] = rows
            if name and found:
                written((given.out or TIMINGS) / f"{name.lower().replace(' ', '-')}.json", name, found)
    return _summed_up(found, left, judged=not given.interpret)


def _summed_up(found: Mapping[str, Mapping[str, Row]], left: list[str], *, judged: bool) -> int:
    """Print what is wrong, missed or not measured; the exit status is 1 if something is wrong, missed or left.

    judged: whether times mean anything, which those of the interpreter do not.
    """
    every = [row for named in found.values() for row in named.values()]
    wrong = [row for row in every if "primitive" in row and not row.get("right")]
    timed = [row for one in every for row in one.get("timed", ())]
    print("\n== bars")
    for row in timed:
        if "at_least" in row or ("error" in row and "rival" not in row):
            verdict = "not judged" if not judged else "met" if row.get("met") else "MISSED"
            verdict = "not measured: " + row["error"] if "error" in row else verdict
            against = f", {row['rival']}: {row.get('ratio', '?')}, asked {row['at_least']}" if "at_least" in row else ""
            print(f"{verdict}: {row['what']}{against}")
    absent = sorted({row["rival"] for row in timed if row.get("error") == "not installed"})
    if absent:
        print(f"not installed: {', '.join(absent)}; `make rivals` collects them in a folder to carry (bench/README.md)")
    if wrong:
        print("numerically wrong: " + "; ".join(f"{row['name']} ({row['error']})" for row in wrong))
    if left:
        print(f"not finished: {', '.join(left)}; run again with --only {' '.join(left)}")
    failed = any((judged and row.get("met") is False) or ("error" in row and "rival" not in row) for row in timed)
    return int(bool(wrong) or bool(left) or failed)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--interpret", action="store_true", help="tiny, on the CPU, in Triton's interpreter")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so many minutes")
    parser.add_argument("--out", type=Path, help="folder of the results, by default zoo/kernels/timings")
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--numerics-only", action="store_true", help="check and do not time")
    kind.add_argument("--timings-only", action="store_true", help="time and do not check")
    parser.add_argument("--section", choices=SECTIONS, help=argparse.SUPPRESS)
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.exit(run_section(given) if given.section else run_sections(given))


if __name__ == "__main__":
    main()
