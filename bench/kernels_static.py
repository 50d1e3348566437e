"""Compiles every kernel with every shipped configuration to machine code for each architecture, without a GPU.

    python -m bench.kernels_static [--write] [--only FOLDER] [--architecture sm_90] [--jobs 2]

What is compiled is what the kernels' cases launch: `bench.launches` says which of it. Registers, spills, shared memory
and tensor-core instructions are compared with `bench/results/kernels_static.json`, which `--write` replaces. Fails
where a kernel got worse or is missing, or where a rule is broken: shared memory within the chip's limit, no spills in
the forward kernels of attention, recurrence and delta rule, `wgmma` in every kernel with matrix products in half
precision on sm_90, and at most 30 seconds to compile a primitive's forward and backward pass for a call. Seconds of a
call are of processor time, for compiling is the work of one thread; nothing comes out of a cache.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bench.launches import Launch

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "bench" / "results" / "kernels_static.json"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that a block can have."""
UNSPILLED = ("attention_forward", "attention_decode", "recurrence_", "delta_")
"""Beginnings of the names of kernels whose forward parts must not spill."""
TENSOR_CORES = {"wgmma": r"\bwgmma\.mma_async\b", "tcgen05": r"\btcgen05\.mma\b", "mma": r"\bmma\.sync\b"}
"""Instructions of the tensor cores, as PTX spells them."""
FIGURES = ("registers", "spills", "shared")
MOST_SECONDS = 30
COLD_ARCHITECTURE = "sm_90"

Row = dict[str, Any]


def spent() -> float:
    """Seconds of processor time of this process and of those that it waited for, such as the assembler."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def start() -> None:
    """Make a process of the pool ready: nothing is found in a cache, and no line numbers are kept for debuggers."""
    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=os.environ["TMPDIR"])
    from triton import knobs

    knobs.compilation.disable_line_info = True


def compiled(module: str, kernel: str, architecture: str, specialization: str) -> tuple[Row, float]:
    """The row of a launch, and the seconds that its compilation took."""
    from triton.runtime import driver

    from bench.launches import StandIn

    driver.set_active(StandIn(architecture))  # type: ignore[arg-type]
    function = getattr(import_module(module), kernel)
    started = spent()
    found = function.preload(specialization)
    seconds = spent() - started
    return {**usage(found.asm["cubin"]), "shared": found.metadata.shared, **products(found.asm["ptx"])}, seconds


def usage(binary: bytes) -> Row:
    """Registers of a thread, and bytes of what did not fit them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", said)}
    return {"registers": found["REG"], "spills": found["STACK"]}


def products(code: str) -> Row:
    """The kind of tensor-core instructions and their number."""
    counts = {name: len(re.findall(pattern, code)) for name, pattern in TENSOR_CORES.items()}
    return {"tensor": "+".join(name for name in counts if counts[name]) or "none", "products": sum(counts.values())}


def names(launches: Iterable[Launch]) -> dict[str, Launch]:
    """Kernel, architecture, dtype, case and configuration; and the flags that tell apart what shares all these."""
    groups: dict[str, list[Launch]] = {}
    for one in launches:
        call = one.call
        name = f"{one.kernel} {call.architecture} {call.dtype} {call.case} {one.configuration}"
        groups.setdefault(name, []).append(one)
    found: dict[str, Launch] = {}
    for name, same in groups.items():
        differing = [flag for flag in same[0].arguments if len({one.arguments[flag] for one in same}) > 1]
        for one in same:
            found[" ".join((name, *(f"{flag}={one.arguments[flag]}" for flag in differing)))] = one
    return found


def complaints(rows: Mapping[str, Row], known: Mapping[str, Row]) -> Iterator[str]:
    """Rules that are broken, and what got worse since the committed table or is in only one of the two."""
    for name, row in rows.items():
        kernel, architecture, dtype, *_ = name.split()
        if row["shared"] > SHARED_LIMIT[architecture]:
            yield f"{name}: {row['shared']:,} bytes of shared memory, the chip has {SHARED_LIMIT[architecture]:,}"
        if kernel.startswith(UNSPILLED) and "backward" not in kernel and row["spills"]:
            yield f"{name}: spills {row['spills']} bytes in a forward kernel"
        if architecture == "sm_90" and dtype != "float32" and row["products"] and "wgmma" not in row["tensor"]:
            yield f"{name}: matrix products by {row['tensor']} and not by wgmma"
        if name not in known:
            yield f"{name}: not in the committed table"
            continue
        for figure in FIGURES:
            if row[figure] > known[name][figure] * 1.1 + 8:
                yield f"{name}: {figure} {known[name][figure]:,} before, {row[figure]:,} now"
    for name in known:
        if name not in rows:
            yield f"{name}: in the committed table, but no longer compiled"


def slow(cold: Mapping[str, Row]) -> Iterator[str]:
    for name, row in cold.items():
        if row["seconds"] > MOST_SECONDS:
            yield f"{name}: {row['seconds']} s to compile, at most {MOST_SECONDS}"


def shown(row: Row) -> str:
    return "  ".join(f"{key} {value}" for key, value in row.items())


def written(table: Mapping[str, Any]) -> str:
    """JSON with a line for each row."""
    lines = [f' "{key}": {json.dumps(value)}' for key, value in table.items() if not isinstance(value, dict)]
    for key, rows in table.items():
        if isinstance(rows, dict):
            inner = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
            lines.append(f' "{key}": {{\n{inner}\n }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def sweep(folders: Iterable[str], architectures: Iterable[str], jobs: int) -> tuple[dict[str, Row], dict[str, Row]]:
    """The rows of all launches, and the seconds of whole calls."""
    # The only import of torch and Triton in this process, after the environment is set.
    from bench.launches import plan
    from zoo.kernels import case
    from zoo.kernels.dispatch import HOMES

    cases = [one for one in case.cases() if HOMES[one.primitive] in folders]
    waiting: dict[str, Future[tuple[Row, float]]] = {}
    launches: dict[str, Launch] = {}
    calls: dict[tuple[str, str], list[Launch]] = {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start) as pool:
        for architecture in architectures:
            planned = plan(cases, architecture)
            if architecture == COLD_ARCHITECTURE:
                calls = planned.calls
            for name, one in names(planned.launches).items():
                launches[name] = one
                waiting[name] = pool.submit(compiled, one.module, one.kernel, architecture, one.specialization)
        found = {name: future.result() for name, future in waiting.items()}
    seconds = {launches[name].compilation: took for name, (_, took) in found.items()}
    cold: dict[str, Row] = {}
    for (primitive, dtype), of_call in calls.items():
        took = sum(seconds[one.compilation] for one in of_call)
        row = {"case": of_call[0].call.case.name, "compiled": len(of_call), "seconds": round(took, 1)}
        cold[f"{primitive} {dtype}"] = row
    return {name: row for name, (row, _) in found.items()}, cold


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the committed table, or what was compiled of it")
    parser.add_argument("--only", help="one folder below zoo/kernels, such as pointwise")
    parser.add_argument("--architecture", help="one architecture, such as sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile")
    given = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    from zoo.kernels.dispatch import HOMES
    from zoo.kernels.launch import ARCHITECTURES

    folders = [given.only] if given.only else list(dict.fromkeys(HOMES.values()))
    architectures = [given.architecture] if given.architecture else ARCHITECTURES
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TMPDIR"] = folder
        rows, cold = sweep(folders, architectures, given.jobs)
    seconds, processor = round(time.monotonic() - started), round(spent())
    for name, row in sorted(rows.items()):
        print(f"{name:100} {shown(row)}")
    for name, row in cold.items():
        print(f"compiled from nothing: {name:40} {shown(row)}")

    def selected(name: str) -> bool:
        _, architecture, _, case, *_ = name.split()
        return architecture in architectures and HOMES[case.partition("-")[0]] in folders

    table: dict[str, Any] = json.loads(COMMITTED.read_text()) if COMMITTED.exists() else {"kernels": {}, "cold": {}}
    known: dict[str, Row] = table["kernels"]
    before = {name: row for name, row in known.items() if selected(name)}
    wrong = [*complaints(rows, {} if given.write else before), *slow(cold)]
    if given.write:
        wrong = [one for one in wrong if not one.endswith("not in the committed table")]
        whole = (
            {"seconds": seconds, "processor_seconds": processor, "jobs": given.jobs}
            if given.only is None and given.architecture is None
            else {}
        )
        kept = {name: row for name, row in known.items() if name not in before}
        table |= {"triton": version("triton"), **whole, "cold": table["cold"] | cold, "kernels": kept | rows}
        COMMITTED.write_text(written(table))
    print("\n".join(wrong) or "every rule is kept")
    print(f"{len(rows)} compilations in {seconds} s with {given.jobs} processes, {processor} s of processor time")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
