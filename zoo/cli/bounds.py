"""What `zoo cost` says of devices that are not there, beyond the sums: times on a mesh, and rooflines as pictures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, destination, print_table
from zoo.errors import ZooError
from zoo.quantity import format_quantity

if TYPE_CHECKING:
    from zoo.accounting import Workload
    from zoo.blocks.model import Spec
    from zoo.hardware.mesh import MeshCost, Placement
    from zoo.hardware.picture import Part
    from zoo.hardware.profile import Profile

SHOWN = 6
"""Layouts of a phase that a table shows."""


@dataclass(frozen=True, slots=True)
class OnMesh:
    """What was asked about a mesh: which chips, how many, and the dtype of weights."""

    device: str
    mesh: str
    weights: str | None

    @classmethod
    def asked(cls, device: str | None, mesh: str | None, weights: str | None, here: bool) -> OnMesh | None:
        """The options of `zoo cost`, checked against each other."""
        from zoo.hardware.profile import profile_names

        if mesh is None:
            return None
        if here:
            raise ZooError("--device names the chips of --mesh, or the device that is timed; ask for one at a time")
        if device in (None, "cpu"):
            raise ZooError(f"--mesh needs --device: {', '.join(profile_names())}, or the file of another one")
        return cls(device, mesh, weights)

    def costs(self, spec: Spec, work: Workload) -> dict[str, MeshCost]:
        """The times of all layouts, by phase."""
        from zoo.hardware.mesh import mesh_cost, parse_mesh
        from zoo.hardware.profile import load_profile

        profile, sizes = load_profile(self.device), parse_mesh(self.mesh)
        found = {"prefill": mesh_cost(spec, work, profile, sizes, "prefill", weights=self.weights)}
        if _generates(spec):
            found["decode"] = mesh_cost(spec, work, profile, sizes, "decode", weights=self.weights)
        return found

    def show(self, found: dict[str, MeshCost]) -> None:
        """The best layouts of each phase, and how many chips hold the model where these do not."""
        for phase, cost in found.items():
            print_table(
                f"{phase}, at least, on {cost.chips} x {self.device} (closed form: a bound, not a forecast)",
                ("layout", "states", "in all", "FLOPs", "weights", "state", "link", "MFU"),
                (_row(one) for one in cost.placements[:SHOWN]),
                right=range(2, 8),
            )
            print(f"{_held(cost)}\n")


@dataclass(frozen=True, slots=True)
class Drawing:
    """What was asked about a picture of a device's roofline: on the terminal, in a file, or both."""

    profile: Profile
    shown: bool
    plain: bool
    svg: Path | None

    @classmethod
    def asked(
        cls, profile: Profile | None, picture: bool | None, plain: bool, svg: Path | None, as_json: bool
    ) -> Drawing | None:
        """The options of `zoo cost`, checked against each other."""
        given = {"--picture": picture, "--plain": plain, "--svg": svg}
        named = next((option for option, value in given.items() if value), None)
        if profile is None:
            if named is not None:
                raise ZooError(f"{named} is about the picture of a roofline; give --device or --roofline too")
            return None
        if svg is not None:
            destination(svg)
        if as_json and (picture or plain):
            raise ZooError(f"{named} is about the terminal, where --json prints; use --svg for the picture")
        shown = sys.stdout.isatty() if picture is None else picture
        return cls(profile, shown and not as_json, plain, svg)

    def draw(self, spec: Spec, work: Workload, weights: str | None) -> str:
        """A device's roofline with a model's operators on it: the file, if asked for, and the terminal's lines."""
        if not self.shown and self.svg is None:
            return ""
        from zoo.accounting import ALIASES
        from zoo.hardware.picture import drawn, picture
        from zoo.hardware.picture_svg import svg

        stored = f", weights in {weights}" if weights else ""
        title = f"{spec.name or 'model'} on {self.profile.title}, {ALIASES.get(work.dtype, work.dtype)}{stored}"
        found = picture(title, _parts(spec, work, self.profile, weights), self.profile, work.dtype)
        if self.svg is not None:
            self.svg.write_text(svg(found), encoding="utf-8")
        plain = self.plain or "utf" not in (sys.stdout.encoding or "").lower()
        return drawn(found, console().width, plain=plain) if self.shown else ""


def mesh_facts(found: dict[str, MeshCost]) -> dict[str, Any]:
    """Times on a mesh for scripts, the best layout of a phase first."""
    return {
        phase: {"chips": cost.chips, "enough": cost.enough, "layouts": [_facts(one) for one in cost.placements]}
        for phase, cost in found.items()
    }


def _facts(one: Placement) -> dict[str, Any]:
    figures = {"seconds": one.seconds, **asdict(one), "utilisation": one.utilisation}
    layout = figures.pop("layout")
    return {"weights": one.layout.weights, "attention": one.layout.attention, **layout, **figures}


def _row(one: Placement) -> tuple[str, ...]:
    times = (one.seconds, one.compute, one.weight_load, one.state_load, one.communication)
    return (
        one.layout.weights,
        f"batch {one.layout.sequences}" if one.layout.attention == "batch" else "heads",
        *(format_quantity(seconds, "time") for seconds in times),
        f"{one.utilisation:.0%}",
    )


def _held(cost: MeshCost) -> str:
    """Whether the best layout fits, and what would."""
    holds = f"each chip holds {format_quantity(cost.best.memory, 'bytes')}"
    if cost.best.fits:
        return holds
    return f"{holds}, which does not fit; {f'{cost.enough} chips' if cost.enough else 'no number of chips'} would do"


def _generates(spec: Spec) -> bool:
    """Whether there is a decoding step."""
    return getattr(spec.head, "kind", "") == "language_model"


def _parts(spec: Spec, work: Workload, device: Profile, weights: str | None) -> Iterator[Part]:
    """Every operator of a forward pass and, for language models, of a decoding step, in the least time it takes."""
    from zoo.accounting import places
    from zoo.hardware.picture import Part
    from zoo.hardware.roofline import least_seconds, operators

    for place in places(spec.fill(), work):
        for phase in ("forward", "decode") if _generates(spec) else ("forward",):
            for piece in operators(place, work, phase, weights):
                # The peak is that of matrix products, beside which other arithmetic does not count.
                operations = (piece.computed() or piece.pointwise) * piece.calls
                seconds = least_seconds([piece], device, work.dtype)
                yield Part(piece.kind, phase, operations, piece.traffic * piece.calls, seconds)
