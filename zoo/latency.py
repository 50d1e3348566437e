"""Latency by measurement: time the model itself, and remember what was timed.

`LatencySource` is what a search asks; `MeasuredLatency` answers by building the model and timing it.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeVar

from zoo.device import Device

if TYPE_CHECKING:
    import torch

Phase = Literal["forward", "decode"]
Case = Callable[[], object]
Clock = Callable[[], float]

SpecT = TypeVar("SpecT")
SpecT_contra = TypeVar("SpecT_contra", contravariant=True)

_MOST_ROUNDS = 50
_FEWEST_ROUNDS = 2
_MOST_SETTLING = 1000
_LONG = 1.0
_CONFIDENT = 1.645


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of each timed run of one case, in the order of the runs.

    paces: of each, how long the same other work took right before and behind it, where there was such; see `measure`.
    """

    runs: tuple[float, ...]
    paces: tuple[float, ...] = ()

    def at(self, pace: float) -> Timing:
        """The runs as they would be if the other work took `pace` seconds around each."""
        pairs = zip(self.runs, self.paces, strict=True)
        return Timing(tuple(run * pace / mine if mine else run for run, mine in pairs))

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    @property
    def low(self) -> float:
        """The lower quartile."""
        return self.quantile(0.25)

    @property
    def high(self) -> float:
        """The upper quartile."""
        return self.quantile(0.75)

    def quantile(self, q: float) -> float:
        """The value that a share `q` of the runs does not exceed, interpolated between neighbours."""
        ordered = sorted(self.runs)
        position = q * (len(ordered) - 1)
        index = min(int(position), len(ordered) - 2) if len(ordered) > 1 else 0
        following = ordered[min(index + 1, len(ordered) - 1)]
        return ordered[index] + (position - index) * (following - ordered[index])

    def interval(self, q: float) -> tuple[float, float]:
        """Runs between which the quantile `q` of all possible runs lies, with 90% confidence.

        The number of runs below the quantile is binomial, whatever the distribution of the runs: the interval reaches
        from rank `nq - 1.645 sqrt(nq(1 - q))` to rank `nq + 1.645 sqrt(nq(1 - q))`.
        """
        ordered = sorted(self.runs)
        count = len(ordered)
        spread = _CONFIDENT * math.sqrt(count * q * (1 - q))
        low = max(0, math.floor(count * q - spread))
        high = min(count - 1, math.ceil(count * q + spread))
        return min(ordered[low], self.quantile(q)), max(ordered[high], self.quantile(q))


def measure(
    cases: Mapping[str, Case],
    *,
    device: Device,
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 0.2,
    max_seconds: float = 10.0,
    threads: int | None = None,
    clock: Clock = time.perf_counter,
    settle: float = 0.0,
    pace: Case | None = None,
) -> dict[str, Timing]:
    """Time calls without arguments against each other on one device.

    After `warmup` calls of each case, rounds follow in which every case runs once, every other round in reverse order
    (ABBA), so that drift of the machine meets all cases alike. There are at least `repeats` rounds, more until each
    case has run for `min_seconds` (up to 50 times `repeats`), fewer (but two) if one has run for `max_seconds`. Where
    `settle` is above zero, untimed runs of the same case for that many seconds, one at least, come before each timed
    one, so that caches hold what they hold for a model that runs alone; but for a case that takes over a second, which
    sees to that itself.

    `pace`, if given, is short work that is timed between all others, warm: what it takes before and behind a run, as
    the geometric mean, says how fast the machine was meanwhile. On a shared machine whose speed changes by a quarter
    from one second to the next, runs divided by it stray a third as far.

    Runs are without gradients and without garbage collection, on `threads` CPU threads (the device's). On a GPU the
    time is that between two events on its stream, elsewhere `clock` gives it, in seconds.
    """
    if not cases:
        return {}
    import torch

    run = _timer(device, clock)
    runs: dict[str, list[float]] = {name: [] for name in cases}
    paces: dict[str, list[float]] = {name: [] for name in cases}
    spent, last = dict.fromkeys(cases, 0.0), dict.fromkeys(cases, 0.0)
    with torch.inference_mode(), pinned_threads(threads or device.threads), _without_garbage_collection():
        for name, case in cases.items():
            warming = 0.0
            for _ in range(warmup):
                last[name] = run(case)
                warming += last[name]
                if warming >= max_seconds:
                    break
        rounds, before = 0, _warm(run, pace)
        while rounds < _FEWEST_ROUNDS or (
            max(spent.values()) < max_seconds
            and (rounds < repeats or (min(spent.values()) < min_seconds and rounds < _MOST_ROUNDS * repeats))
        ):
            for name in cases if rounds % 2 == 0 else reversed(list(cases)):
                if last[name] < _LONG:
                    _settled(run, cases[name], settle)
                seconds = last[name] = run(cases[name])
                runs[name].append(seconds)
                spent[name] += seconds
                if pace is not None:
                    behind = _warm(run, pace)
                    paces[name].append(math.sqrt(before * behind))
                    before = behind
            rounds += 1
    return {name: Timing(tuple(times), tuple(paces[name])) for name, times in runs.items()}


def _warm(run: Callable[[Case], float], case: Case | None) -> float:
    """What a case takes that ran right before; nothing where there is none."""
    if case is None:
        return 0.0
    run(case)
    return run(case)


def _settled(run: Callable[[Case], float], case: Case, seconds: float) -> None:
    """Run a case for that many seconds, but not for ever where the clock does not see it pass."""
    passed = 0.0
    for _ in range(_MOST_SETTLING):
        if passed >= seconds:
            return
        passed += run(case)


@contextlib.contextmanager
def pinned_threads(count: int) -> Iterator[None]:
    """Run torch's CPU operators on `count` threads inside the block."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


_MMAP_MAX, _TRIM_THRESHOLD = -4, -1
"""Parameters of glibc's `mallopt`."""


@contextlib.contextmanager
def kept_memory() -> Iterator[None]:
    """Let glibc keep freed memory inside the block, and give it back behind it; other C libraries are left alone.

    Behind the block glibc's thresholds are fixed near its defaults, and no longer adapt to what the process allocates.

    By default the C library returns large tensors to the system and asks for them anew, depending on what the process
    did before. Page faults then take up to half of a model's time, on virtual machines more, and times of the same
    model differ by as much.
    """
    import ctypes

    try:
        library = ctypes.CDLL(None)
        adjust, trim = library.mallopt, library.malloc_trim
    except (OSError, AttributeError, TypeError):
        yield
        return
    adjust(_MMAP_MAX, 0)
    adjust(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        adjust(_MMAP_MAX, 65536)
        adjust(_TRIM_THRESHOLD, 2**26)
        trim(0)


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _timer(device: Device, clock: Clock) -> Callable[[Case], float]:
    def on_cpu(case: Case) -> float:
        start = clock()
        case()
        return clock() - start

    def on_cuda(case: Case) -> float:
        import torch

        with torch.cuda.device(device.name):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            case()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000

    return on_cpu if device.kind == "cpu" else on_cuda


@dataclass(frozen=True, slots=True)
class Context:
    """What a model is timed on: `seq` tokens in a forward pass, or one token behind `past` others in decoding."""

    batch: int = 1
    seq: int = 1024
    past: int = 1024
    dtype: str = "float32"

    def key(self, phase: Phase) -> str:
        """The part of the context that matters to a phase, as text."""
        tokens = f"seq={self.seq}" if phase == "forward" else f"past={self.past}"
        return f"{phase} batch={self.batch} {tokens} dtype={self.dtype}"


@dataclass(frozen=True, slots=True)
class LatencyFigure:
    """A latency in seconds, the 90% interval in which it lies, and where it comes from."""

    seconds: float
    low: float
    high: float
    source: str
    device: str


class LatencySource(Protocol[SpecT_contra]):
    """Whatever can tell the latency of a spec."""

    def latency(
        self, spec: SpecT_contra, context: Context, phase: Phase = "forward", quantile: float = 0.5
    ) -> LatencyFigure:
        """The quantile of the latencies that repeated calls of the model have."""
        ...


class TimedModel(Protocol):
    """What a model offers to be timed; see `zoo.model.Model`."""

    def to(self, *, device: torch.device, dtype: torch.dtype) -> Self: ...
    def eval(self) -> Self: ...
    def forward_case(self, batch: int, tokens: int) -> Case: ...
    def decode_case(self, batch: int, past: int) -> Case: ...


class MeasuredLatency(Generic[SpecT]):
    """Latency as timed on this machine, at most once for each spec and context.

    build: makes the model of a spec. identify: the spec's hash, which with the device's id and the context is the key
    in `cache`. `options` and `clock` go to `measure`.
    """

    def __init__(
        self,
        device: Device,
        build: Callable[[SpecT], Any],
        identify: Callable[[SpecT], str],
        cache: LatencyCache | None = None,
        *,
        clock: Clock = time.perf_counter,
        **options: Any,
    ) -> None:
        self.device = device
        self._build: Callable[[SpecT], TimedModel] = build
        self._identify = identify
        self._cache = LatencyCache() if cache is None else cache
        self._options = {"clock": clock, **options}

    def latency(self, spec: SpecT, context: Context, phase: Phase = "forward", quantile: float = 0.5) -> LatencyFigure:
        timing = self.timing(spec, context, phase)
        low, high = timing.interval(quantile)
        return LatencyFigure(timing.quantile(quantile), low, high, "measured", self.device.name)

    def timing(self, spec: SpecT, context: Context, phase: Phase = "forward") -> Timing:
        """All timed runs, from the cache if it has them."""
        key = (self.device.id, self._identify(spec), context.key(phase))
        timing = self._cache.get(key)
        if timing is None:
            timing = self._timed(spec, context, phase)
            self._cache.put(key, timing)
        return timing

    def _timed(self, spec: SpecT, context: Context, phase: Phase) -> Timing:
        import torch

        model = self._build(spec).to(device=torch.device(self.device.name), dtype=getattr(torch, context.dtype)).eval()
        with kept_memory():
            with torch.inference_mode(), pinned_threads(self.device.threads):
                if phase == "forward":
                    case = model.forward_case(context.batch, context.seq)
                else:
                    case = model.decode_case(context.batch, context.past)
            return measure({phase: case}, device=self.device, **self._options)[phase]


CacheKey = tuple[str, str, str]


class LatencyCache:
    """Timings on disk, keyed by device id, spec hash and context: one JSON line each in `FOLDER/latency.jsonl`.

    Several processes may share a folder. What one appends the others find when they next miss; the last line of a key
    counts. A line that cannot be read is skipped with a warning; where nothing can be written the cache says so once
    and lasts as long as the process.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._entries: dict[CacheKey, Timing] = {}
        self._offset = 0
        self._complained = False
        try:
            self.path: Path | None = (default_folder() if folder is None else Path(folder)) / "latency.jsonl"
        except RuntimeError as error:
            self.path = None
            self._complain(error)

    def get(self, key: CacheKey) -> Timing | None:
        if key not in self._entries:
            self._read()
        return self._entries.get(key)

    def put(self, key: CacheKey, timing: Timing) -> None:
        self._entries[key] = timing
        if self.path is None:
            return
        line = json.dumps({"device": key[0], "spec": key[1], "context": key[2], "runs": timing.runs}) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _append(self.path, line.encode())
        except OSError as error:
            self._complain(error)

    def _read(self) -> None:
        """Take in the complete lines behind those that were read before."""
        if self.path is None:
            return
        try:
            with self.path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                lines = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._complain(error)
            return
        complete = lines.rfind(b"\n") + 1
        self._offset += complete
        unreadable = 0
        for line in lines[:complete].splitlines():
            entry = _entry(line)
            if entry is None:
                unreadable += 1
            else:
                self._entries[entry[0]] = entry[1]
        if unreadable:
            warnings.warn(f"{self.path}: skipped {unreadable} unreadable lines", stacklevel=3)

    def _complain(self, error: Exception) -> None:
        if not self._complained:
            self._complained = True
            warnings.warn(f"timings are not kept on disk: {error}", stacklevel=3)


def default_folder() -> Path:
    """`$XDG_CACHE_HOME/zoo`, or `~/.cache/zoo` if that is not set to an absolute path."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "zoo"


def _entry(line: bytes) -> tuple[CacheKey, Timing] | None:
    try:
        record = json.loads(line)
        key = (record["device"], record["spec"], record["context"])
        runs = tuple(float(seconds) for seconds in record["runs"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    if not all(isinstance(part, str) for part in key) or not runs or not all(0 <= s < math.inf for s in runs):
        return None
    return key, Timing(runs)


def _append(path: Path, line: bytes) -> None:
    """Append a whole line or nothing, on a line of its own even behind one that a killed process left unfinished."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        _lock(descriptor)
        end = os.lseek(descriptor, 0, os.SEEK_END)
        if end:
            os.lseek(descriptor, end - 1, os.SEEK_SET)
            if os.read(descriptor, 1) != b"\n":
                line = b"\n" + line
        if os.write(descriptor, line) < len(line):
            os.ftruncate(descriptor, end)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Keep other processes out until the file is closed, on systems that can."""
    with contextlib.suppress(ImportError):
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX)
