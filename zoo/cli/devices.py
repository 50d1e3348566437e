"""Commands about devices: what is known of them, and what the one at hand can do."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from zoo.cli.output import console, print_json, print_table
from zoo.errors import ZooError
from zoo.quantity import format_quantity


def list_devices(as_json: bool) -> None:
    """Print the devices whose figures are shipped."""
    from zoo.hardware.profile import load_profile, profile_names

    found = [load_profile(name) for name in profile_names()]
    if as_json:
        print_json([_facts(profile) for profile in found])
        return
    rows = [
        (
            profile.name,
            profile.title,
            f"{format_quantity(profile.rate('bfloat16'), 'flops')}/s",
            f"{format_quantity(profile.bandwidth, 'bytes')}/s",
            format_quantity(profile.memory, "bytes"),
            profile.source,
        )
        for profile in found
    ]
    print_table("", ("name", "device", "bfloat16", "bandwidth", "memory", "figures"), rows, right=(2, 3, 4))


def show_device(name: str, as_json: bool) -> None:
    """Print what is known of a device, as the file that says so."""
    from zoo.hardware.profile import load_profile

    profile = load_profile(name)
    if as_json:
        print_json(_facts(profile))
        return
    console().print(profile.as_yaml(), end="", markup=False, highlight=False, soft_wrap=True)
    for source in profile.sources:
        console().print(f"# {source}", markup=False, highlight=False, soft_wrap=True)


def probe_device(device: str, threads: int | None, out: Path | None, as_json: bool) -> None:
    """Measure a device of this machine and print or write its file."""
    from zoo.device import resolve_device
    from zoo.hardware.probe import probe

    found = probe(resolve_device(device, threads))
    if out is not None:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found.as_yaml(), encoding="utf-8")
        except OSError as error:
            raise ZooError(f"cannot write {out}: {error.strerror or error}") from None
    if as_json:
        print_json(_facts(found))
    else:
        console().print(found.as_yaml(), end="", markup=False, highlight=False, soft_wrap=True)


def _facts(profile: Any) -> dict[str, Any]:
    return {name: value for name, value in asdict(profile).items() if value is not None}
