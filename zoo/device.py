"""The machine that figures were measured on: what it is, and a short id that changes when timings would."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from zoo.errors import ZooError, nearest

_CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True, slots=True)
class Device:
    """A processor or GPU with the software that runs on it.

    name: as torch takes it, `cpu` or `cuda:0`. processor: the model that the system reports. cores: processors that
    this process may use, or streaming multiprocessors. threads: CPU threads that an operator uses. memory: bytes, None
    where the system does not say. torch, python: versions; for a GPU the former includes CUDA's.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    processor: str
    cores: int
    threads: int
    memory: int | None
    torch: str
    python: str

    @property
    def id(self) -> str:
        """Twelve hexadecimal digits over everything but the name and the odd megabytes: equal GPUs share them."""
        facts = asdict(self) | {"name": None, "memory": None if self.memory is None else round(self.memory / 2**30)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    def __str__(self) -> str:
        units = "cores" if self.kind == "cpu" else "multiprocessors"
        memory = "" if self.memory is None else f", {self.memory / 2**30:.0f} GiB"
        return f"{self.name}: {self.processor}, {self.cores} {units}, {self.threads} threads{memory}"


def is_here(name: str) -> bool:
    """Whether a name is that of a device of this machine, as torch says it, whether or not there is one."""
    return re.fullmatch(r"cpu|cuda(:[0-9]{1,3})?", name) is not None


def device_name(text: str) -> str:
    """`cpu`, `cuda` or `cuda:N` if `text` has that form, whether or not this machine has it; else `ZooError`."""
    if is_here(text):
        return text
    kind, colon, index = text.partition(":")
    best = "cuda" if kind.lower() == "gpu" else nearest(kind, ("cpu", "cuda"))
    if best == "cuda" and colon and index.isdecimal():
        best = f"cuda:{int(index)}"
    hint = f"; did you mean {best!r}?" if best else "; known: cpu, cuda, cuda:N"
    raise ZooError(f"unknown device {text!r}{hint}")


def resolve_device(name: str, threads: int | None = None) -> Device:
    """The device of this machine with that name, used with `threads` CPU threads (`default_threads()`).

    Raises `ZooError` for an unknown name and for a GPU that is not there. Only a GPU needs torch to be imported.
    """
    threads = default_threads() if threads is None else threads
    if threads < 1:
        raise ZooError(f"a device needs at least one thread, found {threads}")
    return _cpu(threads) if device_name(name) == "cpu" else _cuda(name, threads)


def fingerprint() -> Device:
    """The processor of this machine with its default number of threads."""
    return resolve_device("cpu")


def default_threads() -> int:
    """`OMP_NUM_THREADS` if it is set to a positive number, else all processors that this process may use."""
    wanted = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else _cores()


def _cpu(threads: int) -> Device:
    return Device(
        name="cpu",
        kind="cpu",
        processor=_processor(),
        cores=_cores(),
        threads=threads,
        memory=_memory(),
        torch=metadata.version("torch"),
        python=platform.python_version(),
    )


def _cuda(name: str, threads: int) -> Device:
    import torch

    if torch.version.cuda is None and torch.version.hip is None:
        raise ZooError(f"no device {name!r}: the installed torch {torch.__version__} is built without CUDA; use 'cpu'")
    if not torch.cuda.is_available():
        raise ZooError(f"no device {name!r}: torch finds no usable GPU on this machine; use 'cpu'")
    index = int(name.partition(":")[2] or torch.cuda.current_device())
    count = torch.cuda.device_count()
    if index >= count:
        have = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise ZooError(f"no device {name!r}: this machine has {have}")
    properties = torch.cuda.get_device_properties(index)
    return Device(
        name=f"cuda:{index}",
        kind="cuda",
        processor=properties.name,
        cores=properties.multi_processor_count,
        threads=threads,
        memory=properties.total_memory,
        torch=f"{metadata.version('torch')} CUDA {torch.version.cuda or torch.version.hip}",
        python=platform.python_version(),
    )


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    """The processor's model; with family and model number on x86, where clouds report a generic name."""
    fields: dict[str, str] = {}
    try:
        for line in _CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    except OSError:
        pass
    if name := fields.get("model name"):
        numbers = [f"{key} {fields[key]}" for key in ("cpu family", "model") if key in fields]
        return f"{name} ({', '.join(numbers)})" if numbers else name
    if "CPU part" in fields:
        parts = (fields.get("CPU implementer", ""), fields["CPU part"])
        return " ".join(filter(None, (platform.machine(), *parts)))
    if platform.system() == "Darwin" and (name := _sysctl("machdep.cpu.brand_string")):
        return name
    return platform.processor() or platform.machine() or "unknown processor"


def _sysctl(key: str) -> str:
    try:
        done = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
