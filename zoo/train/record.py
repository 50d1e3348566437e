"""The history of a run on the disk: `metrics.csv`, and TensorBoard events where they were asked for."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from zoo.errors import ZooError
from zoo.train.checkpoint import replacing

COLUMNS: tuple[str, ...] = (
    "step",
    "train_loss",
    "auxiliary_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "seconds",
    "valid_loss",
    "valid_accuracy",
    "valid_bits_per_byte",
)


class Record:
    """Appends rows to `folder/metrics.csv`. Rows after `step`, of a run that died past its checkpoint, are dropped."""

    def __init__(self, folder: Path, *, step: int, tensorboard: bool) -> None:
        self.path = folder / "metrics.csv"
        rows = _rows_until(self.path, step)
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self._file = self.path.open("a", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._events = _events(folder / "tensorboard", step) if tensorboard else None

    def write(self, step: int, **values: float) -> None:
        """One row; columns without a value stay empty."""
        try:
            self._writer.writerow({"step": step} | {name: f"{value:.7g}" for name, value in values.items()})
            self._file.flush()
        except OSError as error:
            raise ZooError(f"cannot write {self.path}: {error.strerror or error}") from error
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Close the files."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def _rows_until(path: Path, step: int) -> list[dict[str, str]]:
    if step == 0 or not path.exists():
        return []
    with path.open(newline="") as file:
        # A process that was killed may have left half a row at the end.
        rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit() and None not in row.values()]
    return [
        {name: row[name] for name in COLUMNS} for row in rows if set(row) == set(COLUMNS) and int(row["step"]) <= step
    ]


def _events(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ZooError("tensorboard=true needs TensorBoard: pip install zoo-nas[tensorboard]") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
