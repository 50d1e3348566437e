"""Whether a spec file is right: it loads, its parts fit, and its counts are those that were published."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from zoo.accounting import metrics
from zoo.errors import Problem, SpecError, ZooError
from zoo.spec.document import SUFFIXES, finished, read
from zoo.spec.template import Template

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

FIGURES = {"total_parameters": "params", "active_parameters": "active_params"}
"""Published figures and the metrics that they are compared with."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What became of a file: a spec or a space, unknown where it cannot be read, and what is wrong with it."""

    name: str
    kind: Literal["spec", "space", "unknown"]
    problems: tuple[Problem, ...]
    spec: Spec | None = None


def spec_files(names: Iterable[str | Path]) -> Iterator[Path | str]:
    """The spec files that names stand for: a folder for all `.yaml` and `.yml` files below it."""
    for name in names:
        path = Path(name)
        if path.is_dir():
            yield from sorted(file for file in path.rglob("*") if file.suffix in SUFFIXES)
        else:
            yield name


def is_open(template: Template) -> bool:
    """Whether a document has holes."""
    from zoo.spec.template import Fields, Formula, Hole, Items, Leaf, Part

    def holes(part: Part) -> bool:
        if isinstance(part, Leaf | Formula):
            return False
        if isinstance(part, Hole):
            return True
        if isinstance(part, Fields):
            return any(map(holes, part.entries.values()))
        assert isinstance(part, Items)
        return any(holes(item.part) or any(holes(guard.count) for guard in item.guards) for item in part.items)

    return holes(template.root) or any(map(holes, template.variables.values()))


def check(name: str | Path) -> Checked:
    """Check one file or shipped spec; nothing is raised for what is wrong with its content."""
    found: list[Problem] = []
    kind: Literal["spec", "space", "unknown"] = "unknown"
    try:
        template = read(name, found)
        kind = "space" if is_open(template) else "spec"
        if kind == "space":
            from zoo.search.space import Space

            if found:
                raise SpecError(found)
            Space.from_template(template).validate()
            return Checked(str(name), kind, ())
        spec = finished(template, found)
        return Checked(str(name), kind, tuple(unpublished(spec, template)), spec)
    except SpecError as error:
        return Checked(str(name), kind, error.problems)
    except ZooError as error:
        return Checked(str(name), kind, (Problem("", str(error)),))


def unpublished(spec: Spec, template: Template | None = None) -> Iterator[Problem]:
    """Published figures that the counted ones do not agree with."""
    if spec.published is None:
        return
    counted = metrics(spec)
    tolerance = getattr(spec.published, "tolerance", 0.0)
    for field, metric in FIGURES.items():
        stated = getattr(spec.published, field, None)
        if stated is not None and abs(counted[metric] - stated) > tolerance * stated:
            mark = None if template is None else template.source.place(f"published.{field}")
            off = (counted[metric] - stated) / stated
            yield Problem(
                f"published.{field}", f"{stated:,} are published, {counted[metric]:,} counted ({off:+.2%})", mark
            )
