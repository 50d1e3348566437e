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


def threads_here(name: str) -> dict[str, int]:
    """The ids of a device of this machine, and the threads that each stands for."""
    device = resolve_device(name)
    counts = range(1, device.cores + 1) if device.kind == "cpu" else (device.threads,)
    return {resolve_device(name, threads).id: threads for threads in counts}


class OtherDtypeError(ZooError):
    """A device that was calibrated, but not in the dtype that is asked for."""


def find_predictor(name: str, dtype: str = "float32", threads: int | None = None) -> Predictor:
    """The calibration of this machine's `cpu` or `cuda`, of a stored or shipped name, or of a file.

    Raises `ZooError` where there is none, with the command that makes one or the nearest name.
    """
    dtype = ALIASES.get(dtype, dtype)
    if name.endswith(".json"):
        found = load_predictor(Path(name))
        if found.dtype != dtype:
            raise ZooError(f"{name}: calibrated in {found.dtype}, not in {dtype}")
        return found
    if name.partition(":")[0] in ("cpu", "cuda"):
        return _of_this_machine(resolve_device(name, threads), dtype)
    stored = list(calibrations())
    for _, predictor in stored:
        if predictor.profile.name == name and predictor.dtype == dtype:
            return predictor
    names = sorted({predictor.profile.name for _, predictor in stored})
    others = [predictor.dtype for _, predictor in stored if predictor.profile.name == name]
    if others:
        raise OtherDtypeError(f"{name} was calibrated in {', '.join(others)}, not in {dtype}")
    raise ZooError(f"no calibration of a device {name!r}{did_you_mean(name, ['cpu', 'cuda', *names])}")


def _of_this_machine(device: Device, dtype: str) -> Predictor:
    path = calibration_path(device, dtype)
    if path.exists():
        found = load_predictor(path)
        if (found.device, found.dtype) != (device.id, dtype):
            raise ZooError(
                f"{path}: the calibration of {found.profile.name} ({found.device}) in {found.dtype}, where that of "
                f"{device} ({device.id}) in {dtype} belongs; ask for it by its file"
            )
        return found
    stored = {(found.device, found.dtype): found for _, found in calibrations()}
    if (device.id, dtype) in stored:
        return stored[device.id, dtype]
    options = f" --device {device.name}" if device.name != "cpu" else ""
    options += f" --dtype {dtype}" if dtype != "float32" else ""
    others = [threads for other, threads in threads_here(device.name).items() if (other, dtype) in stored]
    hint = f"; it has one for --threads {' or '.join(map(str, others))}" if others else ""
    raise ZooError(
        f"{device} has no calibration in {dtype}{hint}; `zoo device calibrate{options} --threads {device.threads}` "
        "makes one in five minutes"
    )
