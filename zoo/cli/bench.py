"""The command that measures a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, destination, print_json, print_table
from zoo.errors import ZooError
from zoo.quantity import Dimension, format_quantity

if TYPE_CHECKING:
    from zoo.device import Device
    from zoo.hardware.predictor import Predictor
    from zoo.train.bench import Listener


def bench_model(
    name: str,
    device: str,
    batch: int,
    seq: str | None,
    past: str | None,
    dtype: str,
    phases: str,
    predict: bool,
    bound_by: str | None,
    threads: int | None,
    repeats: int,
    out: Path | None,
    as_json: bool,
) -> int:
    """Measure a spec and say what came out; returns the exit code."""
    import zoo
    from zoo.device import resolve_device
    from zoo.hardware.predictor import PredictedLatency
    from zoo.hardware.profile import load_profile
    from zoo.hardware.store import find_predictor
    from zoo.spec.document import load
    from zoo.train.bench import Request, bench, facts, fixed_tokens, plan

    spec = load(name)
    request = Request(
        batch=batch,
        seq=_lengths("--seq", seq),
        past=_lengths("--past", past),
        dtype=dtype,
        phases=tuple(phase.strip() for phase in phases.split(",")),
        repeats=repeats,
    )
    profile = None if bound_by is None else load_profile(bound_by)
    machine = resolve_device(device, threads)
    plan(spec, machine, request, profile=profile)
    calibrated = find_predictor(machine.name, dtype, threads) if predict else None
    predictor = None if calibrated is None else PredictedLatency(calibrated)
    if out is not None:
        destination(out)
    with _live(spec.name or name) as progress:
        report = bench(spec, machine, request, profile=profile, predictor=predictor, progress=progress)
    drift = None if calibrated is None or report.interrupted else _drift(calibrated, machine)
    unit = "tokens" if fixed_tokens(spec.fill()) is None else "images"
    found = {
        "spec": spec.name or name,
        "hash": spec.hash,
        "batch": batch,
        "dtype": dtype,
        "unit": unit,
        "device": {"id": machine.id, **asdict(machine)},
        "versions": {"zoo": zoo.__version__, "torch": machine.torch, "python": machine.python},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "roofline": bound_by,
        "drift": drift,
        "rows": facts(report, profile, dtype),
        "notes": report.notes,
        "interrupted": report.interrupted,
    }
    if out is not None:
        out.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if as_json:
        print_json(found)
    else:
        _print(found, f"{found['spec']}: batch {batch}, {dtype}, on {machine}")
    return 130 if report.interrupted else 0


def _drift(predictor: Predictor, machine: Device) -> float | None:
    """How many times slower the machine is than when it was calibrated."""
    from zoo.hardware.stopwatch import DeviceStopwatch

    return predictor.drift(DeviceStopwatch(machine).sentinel())


def _lengths(option: str, text: str | None) -> tuple[int, ...]:
    """The lengths that an option lists, each once, in order."""
    if text is None:
        return ()
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts):
        raise ZooError(f"{option}: expected lengths such as 128,512; got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


@contextmanager
def _live(title: str) -> Iterator[Listener]:
    """Shows what is being measured, where there is a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    terminal = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(None), TimeElapsedColumn())
    with Progress(*columns, console=terminal, transient=True, disable=not terminal.is_terminal) as bars:
        task = bars.add_task(title, total=None)

        def show(done: int, items: int, name: str) -> None:
            bars.update(task, total=items, completed=done, description=f"{title}  {name}")

        yield show


def _print(found: dict[str, Any], title: str) -> None:
    rows = found["rows"]
    if rows:
        # A title inside a table would be wrapped at the table's width.
        console().print(title)
        _print_measured(rows, found["unit"])
        if any(row["predicted"] is not None for row in rows):
            _print_predicted(rows)
        if found["roofline"]:
            _print_least(rows, found["roofline"])
        _print_memory(rows)
    failures = [f"{_called(row)}: {row['failure']}" for row in rows if row["failure"] is not None]
    interrupted = ["interrupted: what is missing was not measured"] if found["interrupted"] else []
    drifted: list[str] = []
    if found["drift"] is not None:
        drifted.append(
            f"for the same as when it was calibrated, the machine now takes {found['drift']:.2f} times as long"
        )
    for line in (*found["notes"], *drifted, *failures, *interrupted):
        console().print(line)


def _called(row: dict[str, Any]) -> str:
    return f"{row['phase']} {row['past' if row['phase'] == 'decode' else 'seq']}"


def _print_measured(rows: list[dict[str, Any]], unit: str) -> None:
    columns = ["measured", "median", "25%", "75%", f"{unit}/s", "FLOP/s", "memory"]
    table = [
        [
            _called(row),
            _time(row["median"]) if row["failure"] is None else "no memory",
            _time(row["low"]),
            _time(row["high"]),
            _shown(row["per_second"], "count"),
            _shown(row["flops_per_second"], "flops"),
            _bytes(row["memory"]),
        ]
        for row in rows
    ]
    print_table("", columns, table, right=range(1, len(columns)))


def _print_predicted(rows: list[dict[str, Any]]) -> None:
    """Predicted times, each with its interval and its ratio to what was measured."""
    table = [[_called(row), *_forecast(row["predicted"], "seconds", "time", row["median"])] for row in rows]
    print_table("", ["time / measured", "predicted", "from", "to", "ratio"], table, right=range(1, 5))


def _print_least(rows: list[dict[str, Any]], bound_by: str) -> None:
    """Least times on a device, each with its ratio to what was measured, and the share of the peak that was reached."""
    table = [
        [_called(row), _time(row["bound"]), _ratio(row["bound"], row["median"]), _percent(row["share_of_peak"])]
        for row in rows
    ]
    print_table("", ["time / measured", f"least on {bound_by}", "ratio", "of peak"], table, right=range(1, 4))


def _print_memory(rows: list[dict[str, Any]]) -> None:
    """Counted and predicted bytes that are held at once, each with its ratio to what was measured."""
    predicting = any(row["predicted_memory"] is not None for row in rows)
    columns = ["memory / measured", "counted", "ratio"]
    columns += ["predicted", "from", "to", "ratio"] if predicting else []
    table = []
    for row in rows:
        cells = [_called(row), _bytes(row["counted_memory"]), _ratio(row["counted_memory"], row["memory"])]
        if predicting:
            cells += _forecast(row["predicted_memory"], "bytes", "bytes", row["memory"])
        table.append(cells)
    print_table("", columns, table, right=range(1, len(columns)))


def _forecast(found: dict[str, Any] | None, name: str, dimension: Dimension, measured: float | None) -> list[str]:
    """A prediction, the ends of its interval, and its ratio to what was measured."""
    if found is None:
        return [""] * 4
    ends = (format_quantity(found[end], dimension) if found[end] else "unknown" for end in ("low", "high"))
    return [format_quantity(found[name], dimension), *ends, _ratio(found[name], measured)]


def _ratio(value: float | None, measured: float | None) -> str:
    if value is None or not measured:
        return ""
    ratio = value / measured
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.2g}"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def _time(seconds: float | None) -> str:
    return _shown(seconds, "time")


def _bytes(size: float | None) -> str:
    return _shown(size, "bytes")


def _shown(value: float | None, dimension: Dimension) -> str:
    return "" if value is None else format_quantity(value, dimension)
