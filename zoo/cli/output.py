"""How facts are printed: tables for people, JSON for scripts."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ZooError

if TYPE_CHECKING:
    from rich.console import Console

METRIC_DIMENSIONS = {
    "params": "count",
    "active_params": "count",
    "embedding_params": "count",
    "weights": "bytes",
    "flops": "flops",
    "train_flops": "flops",
    "decode_flops": "flops",
    "pointwise": "flops",
    "traffic": "bytes",
    "train_traffic": "bytes",
    "decode_traffic": "bytes",
    "state": "bytes",
    "state_token": "bytes",
    "activations": "bytes",
    "memory": "bytes",
    "train_memory": "bytes",
    "train_memory_checkpointed": "bytes",
}


def console() -> Console:
    """The terminal, without markup so that names with brackets print as they are."""
    from rich.console import Console

    return Console(markup=False, highlight=False, emoji=False)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    json.dump(value, sys.stdout, indent=2, ensure_ascii=False, default=str)
    print()


def destination(path: Path) -> Path:
    """A file that can be written, which is made sure of before the work whose results it is to hold."""
    if path.is_dir():
        raise ZooError(f"cannot write {path}: it is a folder; give a file in it")
    if not path.parent.is_dir():
        raise ZooError(f"cannot write {path}: there is no folder {path.parent}; make it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ZooError(f"cannot write {path}: permission denied")
    return path


def print_table(
    title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """A table as wide as the terminal; `right` are the columns of numbers. Neither these nor the names in the first
    column are ever broken; other texts are.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(columns):
        number = index in right
        table.add_column(name, justify="right" if number else "left", overflow="fold", no_wrap=number or not index)
    for row in rows:
        table.add_row(*row)
    console().print(table)


def shown(metric: str, value: float) -> str:
    """A metric for people, with its unit."""
    from zoo.quantity import format_quantity

    return format_quantity(value, METRIC_DIMENSIONS[metric])  # type: ignore[arg-type]
