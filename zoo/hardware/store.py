"""Where calibrations are kept and found: one JSON file each, shipped with the package or in the user's cache folder.

A calibration belongs to a device with its threads and software (`Device.id`) and a dtype. `cpu` and `cuda` mean this
machine's; others are asked for by the name of their profile or by file.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from zoo.accounting import ALIASES
from zoo.device import Device, resolve_device
from zoo.errors import ZooError, did_you_mean
from zoo.hardware.predictor import Predictor, load_predictor
from zoo.latency import default_folder


def folder() -> Path:
    """Where this user's calibrations are: `~/.cache/zoo/devices`, see `zoo.latency.default_folder`."""
    return default_folder() / "devices"


def calibration_path(device: Device, dtype: str) -> Path:
    """The file of a device's calibration in a dtype."""
    return folder() / f"{device.id}-{ALIASES.get(dtype, dtype)}.json"


def log_path(device: Device, dtype: str) -> Path:
    """The log of a calibration that is under way or was interrupted."""
    return calibration_path(device, dtype).with_suffix(".log.jsonl")


def calibrations() -> Iterator[tuple[Path, Predictor]]:
    """All calibrations that can be read, the user's first; others are left out."""
    shipped = Path(str(files("zoo.hardware"))) / "calibrations"
    for place in (folder(), shipped):
        for path in sorted(place.glob("*.json")) if place.is_dir() else []:
            try:
                yield path, load_predictor(path)
            except ZooError:
                continue


def find_predictor(name: str, dtype: str = "float32", threads: int | None = None) -> Predictor:
    """The calibration of this machine's `cpu` or `cuda`, of a stored or shipped name, or of a file.

    Raises `ZooError` where there is none, with the command that makes one or the nearest name.
    """
    dtype = ALIASES.get(dtype, dtype)
    if name.endswith(".json"):
        return load_predictor(Path(name))
    if name.partition(":")[0] in ("cpu", "cuda"):
        return _of_this_machine(resolve_device(name, threads), dtype)
    found = list(calibrations())
    for _, predictor in found:
        if predictor.profile.name == name and predictor.dtype == dtype:
            return predictor
    names = sorted({predictor.profile.name for _, predictor in found})
    others = [predictor.dtype for _, predictor in found if predictor.profile.name == name]
    if others:
        raise ZooError(f"{name} was calibrated in {', '.join(others)}, not in {dtype}")
    raise ZooError(f"no calibration of a device {name!r}{did_you_mean(name, ['cpu', 'cuda', *names])}")


def _of_this_machine(device: Device, dtype: str) -> Predictor:
    path = calibration_path(device, dtype)
    if path.exists():
        return load_predictor(path)
    for _, predictor in calibrations():
        if predictor.device == device.id and predictor.dtype == dtype:
            return predictor
    options = f" --device {device.name}" if device.name != "cpu" else ""
    options += f" --dtype {dtype}" if dtype != "float32" else ""
    raise ZooError(
        f"{device} has no calibration in {dtype}; `zoo device calibrate{options} --threads {device.threads}` makes one "
        "in five minutes"
    )
