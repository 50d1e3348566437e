"""What a benchmark writes: its rows, on which machine, when, and with which versions."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "numpy", "pydantic", "optuna", "lightning", "transformers", "zoo-nas")


def arguments(description: str) -> argparse.Namespace:
    """The options that all benchmarks share: `--json FILE`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    return parser.parse_args()


def machine() -> dict[str, Any]:
    """The processor, the load that others put on it, and versions."""
    from zoo.device import fingerprint

    device = fingerprint()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": device.processor,
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }


def publish(title: str, rows: Sequence[Mapping[str, Any]], file: Path | None) -> bool:
    """Print rows as a table, write them with the machine's facts, and tell whether every required figure is met."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for name in rows[0]:
        table.add_column(name, justify="left" if isinstance(rows[0][name], str) else "right")
    for row in rows:
        table.add_row(*(_shown(value) for value in row.values()))
    Console().print(table)
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"title": title, **machine(), "rows": list(rows)}, indent=2) + "\n")
    return all(row.get("met", True) for row in rows)


def finish(met: bool) -> None:
    """End with exit code 1 if a required figure is not met."""
    sys.exit(0 if met else 1)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
