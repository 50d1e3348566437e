"""Compiles every kernel with every shipped configuration to machine code for each architecture, without a GPU.

    python -m bench.kernels_static [--write] [--only PRIMITIVE] [--jobs 2]

A driver that launches nothing stands in for CUDA's, so that whole operators run, forward and backward, and each launch
is compiled as it would be on the device. Registers, spills, shared memory and tensor-core instructions are read from
the binary and compared with `bench/results/kernels_static.json`, which `--write` replaces. Fails where a kernel got
worse, or where a rule is broken: shared memory within the chip's limit, no spills in the forward kernels of attention
and of the recurrence, and `wgmma` in every kernel with matrix products in half precision on sm_90.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "bench" / "results" / "kernels_static.json"
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
"""Bytes of shared memory that a block can have."""
UNSPILLED = ("attention_forward", "recurrence_", "delta_")
"""Beginnings of the names of kernels whose forward parts must not spill."""
TENSOR_CORES = {"HGMMA": "wgmma", "UTCHMMA": "tcgen05", "UTCQMMA": "tcgen05", "HMMA": "mma"}
"""Instructions of the tensor cores, and what they are called in the table."""
FIGURES = ("registers", "spills", "shared")

Row = dict[str, Any]


class StandIn:
    """What Triton asks of a CUDA driver, answered for a device that is not there."""

    def __init__(self, architecture: str) -> None:
        from triton.backends.compiler import GPUTarget

        self.architecture = architecture
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self.rows: dict[str, Row] = {}
        self.label = ""
        self.utils = self

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        # Triton keeps what it compiled by device.
        return int(self.target.arch)

    def get_current_stream(self, device: int) -> int:
        del device
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        del device
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132}

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        del source, metadata
        return lambda *args: None

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        del device
        self.rows[f"{name} {self.label}"] = {"shared": shared, **measured(binary)}
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        del module


def measured(binary: bytes) -> Row:
    """Registers, bytes of spilled registers per thread, and tensor-core instructions of a binary."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)

        def said(*command: str) -> str:
            return subprocess.run([*command, str(file)], capture_output=True, text=True, check=True).stdout

        usage = said(str(tools / "cuobjdump"), "--dump-resource-usage")
        code = said(str(tools / "nvdisasm"), "-c")
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in TENSOR_CORES}
    kinds = {TENSOR_CORES[name] for name, count in counts.items() if count}
    return {
        "registers": found["REG"],
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", code)),
        "tensor": "+".join(sorted(kinds)) or "none",
        "dots": sum(counts.values()),
    }


def compiled(architecture: str, home: str) -> dict[str, Row]:
    """A row for each kernel of a primitive's folder in each configuration, as the cases launch it."""
    import torch
    from triton.runtime import driver

    from zoo.kernels.case import Draw, cases
    from zoo.kernels.launch import Launches, configured, without_gpu
    from zoo.testing.kernels import outcome

    stand_in = StandIn(architecture)
    driver.set_active(stand_in)  # type: ignore[arg-type]
    launches = Launches(home)
    for case in (case for case in cases() if home == _home(case.primitive)):
        for dtype in case.dtypes:
            inputs = case.inputs(Draw("large", dtype, blank=True))
            for index, indices in enumerate(launches.trials(case.kernels, architecture)):
                stand_in.label = f"{architecture} {str(dtype).removeprefix('torch.')} {case.name} {index}"
                with without_gpu(architecture), configured(**indices), torch.random.fork_rng():
                    outcome(case, inputs, "triton")
    return stand_in.rows


def _home(primitive: str) -> str:
    from zoo.kernels.dispatch import HOMES

    return HOMES[primitive]


def task(given: tuple[str, str]) -> dict[str, Row]:
    with tempfile.TemporaryDirectory() as cache, open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.environ["TRITON_CACHE_DIR"] = cache
        with contextlib.redirect_stdout(nowhere):
            return compiled(*given)


def complaints(rows: Mapping[str, Row], known: Mapping[str, Row]) -> Iterator[str]:
    """Rules that are broken, and what got worse since the committed table."""
    for name, row in rows.items():
        kernel, architecture, dtype, *_ = name.split()
        if row["shared"] > SHARED_LIMIT[architecture]:
            yield f"{name}: {row['shared']:,} bytes of shared memory, the chip has {SHARED_LIMIT[architecture]:,}"
        if kernel.startswith(UNSPILLED) and "backward" not in kernel and row["spills"]:
            yield f"{name}: {row['spills']} spill instructions in a forward kernel"
        if architecture == "sm_90" and dtype != "float32" and row["dots"] and "wgmma" not in row["tensor"]:
            yield f"{name}: matrix products by {row['tensor']} and not by wgmma"
        before = known.get(name)
        for figure in FIGURES if before is not None else ():
            assert before is not None
            if row[figure] > before[figure] * 1.1 + 8:
                yield f"{name}: {figure} {before[figure]:,} before, {row[figure]:,} now"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the committed table")
    parser.add_argument("--only", help="one folder below zoo/kernels, such as pointwise")
    parser.add_argument("--architecture", help="one architecture, such as sm_90")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    given = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["OMP_NUM_THREADS"] = "1"
    from zoo.kernels.dispatch import HOMES
    from zoo.kernels.launch import ARCHITECTURES

    homes = [home for home in dict.fromkeys(HOMES.values()) if (ROOT / "zoo" / "kernels" / home / "cases.py").exists()]
    tasks = [
        (architecture, home)
        for home in homes
        for architecture in ARCHITECTURES
        if given.only in (None, home) and given.architecture in (None, architecture)
    ]
    started = time.monotonic()
    rows: dict[str, Row] = {}
    with ProcessPoolExecutor(given.jobs, max_tasks_per_child=1) as pool:
        for (architecture, home), found in zip(tasks, pool.map(task, tasks), strict=True):
            rows |= found
            print(f"{home} {architecture}: {len(found)} kernels, {time.monotonic() - started:.0f} s", flush=True)
    for name, row in sorted(rows.items()):
        print(f"{name:100} " + "  ".join(f"{key} {value}" for key, value in row.items()))
    known: dict[str, Row] = json.loads(COMMITTED.read_text())["kernels"] if COMMITTED.exists() else {}
    wrong = list(complaints(rows, known))
    print("\n".join(wrong) or "every rule is kept")
    if given.write:
        from importlib.metadata import version

        kept = {} if given.only is None and given.architecture is None else known
        table = {"triton": version("triton"), "seconds": round(time.monotonic() - started), "kernels": kept | rows}
        COMMITTED.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
