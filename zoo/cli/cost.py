"""`zoo cost`: what a spec is counted to take, and its times on devices by every source that was asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.bounds import mesh_facts
from zoo.cli.output import METRIC_DIMENSIONS, console, print_json, print_table, shown
from zoo.cli.times import (
    BOUNDS,
    bounded,
    bounds,
    held_facts,
    least_times,
    measured,
    predicted,
    print_times,
    time_facts,
)
from zoo.errors import ZooError, did_you_mean
from zoo.quantity import format_quantity

if TYPE_CHECKING:
    from zoo.accounting import Workload
    from zoo.blocks.model import Spec
    from zoo.cli.bounds import Drawing, OnMesh
    from zoo.component import Component
    from zoo.device import Device
    from zoo.hardware.predictor import Predictor
    from zoo.hardware.profile import Profile

DETAIL = {
    "parts": ("parameters in", "count"),
    "axes": ("parameters with an axis", "count"),
    "weights": ("weights stored in", "bytes"),
    "state": ("state", "bytes"),
}
"""What a table of `--detail` is about, and the dimension of its numbers."""


@dataclass(frozen=True, slots=True)
class Sources:
    """Who tells times: a device's peak figures, a calibration and the name it was asked for by, this machine.

    notes: why not another.
    """

    profile: Profile | None = None
    predictor: Predictor | None = None
    name: str = "cpu"
    machine: Device | None = None
    notes: tuple[str, ...] = ()

    @classmethod
    def asked(
        cls,
        device: str | None,
        threads: int | None,
        dtype: str,
        *,
        roofline: str | None,
        predict: bool,
        measure: bool,
        mesh: bool,
    ) -> Sources:
        """Those that the options of `zoo cost` ask for, which are checked against each other.

        A device by itself is answered for by the best that is known of it without running anything: its calibration in
        the dtype, else its roofline.
        """
        from zoo.device import is_here, resolve_device
        from zoo.hardware.profile import load_profile

        name = "cpu" if device is None else device
        alone = device is not None and not (predict or measure or mesh)
        if threads is not None and not ((alone or predict or measure) and is_here(name)):
            raise ZooError("--threads is about times on this machine: with --device cpu, --predict or --measure")
        if alone and roofline is not None:
            raise ZooError(f"--roofline names a device itself; with --device {device} give --predict or --measure too")
        if alone:
            return cls._best(name, dtype, threads)
        predictor = None
        if predict:
            from zoo.hardware.store import find_predictor

            predictor = find_predictor(name, dtype, threads)
        return cls(
            load_profile(roofline) if roofline is not None else None,
            predictor,
            name,
            resolve_device(name, threads) if measure else None,
        )

    @classmethod
    def _best(cls, device: str, dtype: str, threads: int | None) -> Sources:
        """A device's calibration, else its peak figures."""
        from zoo.device import is_here, resolve_device
        from zoo.hardware.profile import load_profile, profile_names
        from zoo.hardware.store import OtherDtypeError, calibrations, find_predictor

        if is_here(device):
            resolve_device(device, threads)
        try:
            return cls(predictor=find_predictor(device, dtype, threads), name=device)
        except ZooError as error:
            if device in profile_names() or Path(device).suffix in (".yaml", ".yml"):
                notes = (str(error),) if isinstance(error, OtherDtypeError) else ()
                return cls(profile=load_profile(device), notes=notes)
            if is_here(device):
                raise ZooError(f"{error}; --measure times this model alone") from None
            if device.endswith(".json"):
                raise
            known = ["cpu", "cuda", *profile_names(), *(found.profile.name for _, found in calibrations())]
            raise ZooError(f"unknown device {device!r}{did_you_mean(device, known)}") from None

    @property
    def roof(self) -> Profile | None:
        """The peak figures to draw a model under."""
        return self.profile or (self.predictor.profile if self.predictor is not None else None)

    def refuse(self, weights: str) -> None:
        """Raises `ZooError` where a source cannot tell what weights stored in another format change."""
        if self.predictor is not None or self.machine is not None:
            raise ZooError(
                f"models are timed with their weights in --dtype; --weights {weights} goes with counts, --roofline and "
                "--mesh"
            )


def print_cost(
    name: str,
    work: Workload,
    sources: Sources,
    *,
    weights: str | None,
    layers: bool | None,
    detail: bool,
    drawing: Drawing | None,
    mesh: OnMesh | None,
    as_json: bool,
) -> None:
    """Print all analytic figures of a spec, with `layers` those of each part, its times by every source, and memory.

    With a drawing also the roofline as a picture, and with a mesh the least times on that; in `detail` what parameters,
    weights and states are made of. Tables of times have a row for each part unless `layers` is false.
    """
    from zoo.accounting import Tally, figures, parts
    from zoo.breakdown import breakdown
    from zoo.spec.document import load

    spec = load(name)
    work = work.at(spec.context)
    tallies = list(parts(spec.fill(), work))
    total = figures(sum((tally for _, _, tally in tallies), Tally()), work)
    if weights is not None:
        sources.refuse(weights)
        total |= _stored(spec, work, weights, total)
    least = {} if sources.profile is None else bounded(spec, work, sources.profile, weights)
    told = None if sources.predictor is None else predicted(spec, work, sources.predictor, sources.name)
    timed = None if sources.machine is None else measured(spec, work, sources.machine, layers is not False)
    meshes = {} if mesh is None else mesh.costs(spec, work)
    picture = "" if drawing is None else drawing.draw(spec, work, weights)
    if as_json:
        rows = [{"path": path, "type": part.type, **figures(tally, work)} for path, part, tally in tallies]
        facts = {"spec": name, "workload": {**asdict(work), "weights": weights or work.dtype}, "metrics": total}
        facts["parts"] = rows
        facts |= {"detail": breakdown(spec, work), "mesh": mesh_facts(meshes)}
        facts["roofline"] = {
            phase: {**bounds(found), "parts": [{"path": each.path, "seconds": each.seconds} for each in found]}
            for phase, found in least.items()
        }
        facts["predicted"] = [] if told is None else time_facts(told)
        facts["predicted_memory"] = {} if told is None else held_facts(told)
        facts["notes"] = [*sources.notes, *(() if told is None else told.notes)]
        facts["measured"] = [] if timed is None else time_facts(timed)
        print_json(facts)
        return
    if layers:
        columns = ("params", "flops", "traffic", "state", "activations")
        table = [
            (path, _what(part), *(shown(key, figures(tally, work)[key]) for key in columns))
            for path, part, tally in tallies
        ]
        print_table("", ("part", "what", *columns), table, right=range(2, 7))
    stored = "" if weights is None else f", weights in {weights}"
    title = (
        f"{spec.name or name}: batch {work.batch}, {work.seq} tokens, decoding behind {work.past}, {work.dtype}{stored}"
    )
    counted = [(key, shown(key, value), f"{value:,.0f}") for key, value in total.items() if key in METRIC_DIMENSIONS]
    print_table(title, ("counted", "", "exactly"), counted, right=(1, 2))
    if detail:
        _print_detail(breakdown(spec, work))
    for note in sources.notes:
        console().print(note)
    if sources.profile is not None:
        print_times(least_times(least, sources.profile), layers is not False)
        times = [
            (phase, *(format_quantity(seconds, "time") for name, seconds in bounds(found).items() if name in BOUNDS))
            for phase, found in least.items()
        ]
        print_table("", ("", *(f"bound by {name}" for name in BOUNDS)), times, right=(1, 2, 3))
    for found in (told, timed):
        if found is not None:
            print_times(found, layers is not False)
    if picture:
        print(picture)
    if mesh is not None:
        mesh.show(meshes)


def _stored(spec: Spec, work: Workload, format: str, total: Mapping[str, float]) -> dict[str, float]:
    """The figures that change where matrices are stored in another format than the workload's."""
    from zoo.breakdown import quantised_traffic, stored_weights

    weights = stored_weights(spec, format, kept=work.dtype).bytes
    memory = total["memory"] - total["weights"] + weights
    return {"weights": weights, "memory": memory, "decode_traffic": quantised_traffic(spec, work, format)}


def _print_detail(found: Mapping[str, Mapping[str, int]]) -> None:
    for name, (title, dimension) in DETAIL.items():
        rows = [(key, format_quantity(value, dimension), f"{value:,}") for key, value in found[name].items()]  # type: ignore[arg-type]
        if rows:
            print_table("", (title, "", "exactly"), rows, right=(1, 2))


def _what(component: Component) -> str:
    inside: list[Any] = [getattr(component, name, None) for name in ("mixer", "channel")]
    named = [part.type for part in inside if part is not None]
    return " + ".join(named) or component.type
