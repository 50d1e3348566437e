"""Commands that print facts: list, show, validate, schema, cost, kernels. None needs torch unless it times a model."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.bounds import mesh_facts
from zoo.cli.output import METRIC_DIMENSIONS, console, print_json, print_table, shown
from zoo.cli.predictions import Prediction, predicted, prediction_facts, print_predictions
from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from zoo.accounting import Tally, Workload
    from zoo.blocks.model import Spec
    from zoo.cli.bounds import Drawing, OnMesh
    from zoo.component import Component
    from zoo.errors import Problem
    from zoo.hardware.roofline import Bounded
    from zoo.search.program import Decision

BOUNDS = ("arithmetic", "memory", "launches")
HEADLINE = ("params", "active_params", "flops", "decode_flops", "weights", "state", "memory")
"""Figures that `zoo show` prints for a spec."""


def list_entries(pattern: str, role: str | None, as_json: bool) -> None:
    """Print components and shipped specs whose names match a shell pattern."""
    from zoo.docs import summary
    from zoo.registry import Role, components
    from zoo.spec.document import spec_names

    kinds = [*(str(known) for known in Role), "spec"]
    if role is not None and role not in kinds:
        raise ZooError(f"unknown role {role!r}{did_you_mean(role, kinds)}")
    rows = [
        {"role": str(entry.role), "type": entry.type, "summary": summary(entry)}
        for entry in components()
        if role in (None, str(entry.role)) and fnmatchcase(entry.type, pattern)
    ]
    if role in (None, "spec"):
        names = [name for name in spec_names() if fnmatchcase(name, pattern)]
        rows += [{"role": "spec", "type": name, "summary": _spec_summary(name)} for name in names]
    if as_json:
        print_json(rows)
    elif not rows:
        raise ZooError(f"nothing matches {pattern!r}")
    else:
        print_table("", ("role", "name", "what it is"), ([row["role"], row["type"], row["summary"]] for row in rows))


def _spec_summary(name: str) -> str:
    from zoo.spec.document import read

    value = read(name).source.entries.get("summary")
    return str(value.value) if value is not None else ""


def show_entry(name: str, canonical: bool, as_json: bool) -> None:
    """Explain a component, or print a spec or space."""
    from zoo.registry import components
    from zoo.spec.document import SUFFIXES, locate, spec_names

    found = [entry for entry in components() if entry.type == name]
    if not found and Path(name).suffix not in SUFFIXES and not Path(name).is_file():
        known = [*spec_names(), *(entry.type for entry in components())]
        if name not in known:
            raise ZooError(f"neither a component nor a spec is called {name!r}{did_you_mean(name, known)}")
    if not found:
        _show_file(locate(name), canonical, as_json)
    elif as_json:
        print_json([_facts(entry) for entry in found])
    else:
        for entry in found:
            _show_component(entry)


def _facts(component: type[Component]) -> dict[str, Any]:
    from dataclasses import asdict

    from zoo.component import Component as Base
    from zoo.docs import field_docs
    from zoo.spec.document import brief

    docs = field_docs(component)
    fields = []
    for name, field in component.model_fields.items():
        default = None if field.is_required() else field.default
        fields.append(
            {
                "name": name,
                "required": field.is_required(),
                "default": brief(default) if isinstance(default, Base) else default,
                "description": docs.get(name, ""),
            }
        )
    return {
        "type": component.type,
        "role": str(component.role),
        "description": inspect.cleandoc(component.__doc__ or ""),
        "fields": fields,
        "traits": asdict(component.traits),
        "sources": component.entry.sources,
        "catalogue": component.entry.catalogue,
        "module": component.__module__,
    }


def _show_component(component: type[Component]) -> None:
    facts, out = _facts(component), console()
    out.print(f"{facts['type']}  ({facts['role']}, {facts['module']})", style="bold")
    out.print(facts["description"])
    rows = [
        (field["name"], "needed" if field["required"] else _default(field["default"]), field["description"])
        for field in facts["fields"]
    ]
    if rows:
        print_table("", ("field", "default", "what it is"), rows)
    for source in facts["sources"]:
        out.print(f"source: {source}")


def _default(value: Any) -> str:
    return "-" if value is None else _written(value)


def _show_file(path: Path, canonical: bool, as_json: bool) -> None:
    from zoo.accounting import metrics
    from zoo.spec.check import is_open
    from zoo.spec.document import canonical as canonical_form
    from zoo.spec.document import dump, finished, read

    problems: list[Problem] = []
    template = read(path, problems)
    if is_open(template):
        _show_space(path, as_json)
        return
    spec = finished(template, problems)
    if as_json:
        print_json({"hash": spec.hash, "canonical": canonical_form(spec), "metrics": metrics(spec)})
        return
    print(dump(spec.fill() if canonical else spec), end="")
    figures = metrics(spec)
    console().print("  ".join([f"hash {spec.hash}", *(f"{key} {shown(key, figures[key])}" for key in HEADLINE)]))


def _show_space(path: Path, as_json: bool) -> None:
    from zoo.search.space import load_space

    space = load_space(path)
    space.validate()
    size = space.size()
    facts = [{"name": decision.name, "kind": decision.kind, **_values(decision)} for decision in space.decisions]
    if as_json:
        print_json({"hash": space.hash, "size": size, "decisions": facts})
        return
    print(f"{path}: a space of {'infinitely many' if size is None else f'{size:,}'} points")
    print_table(
        "",
        ("decision", "kind", "values"),
        ((decision.name, decision.kind, _shown_values(decision)) for decision in space.decisions),
    )


def _values(decision: Decision) -> dict[str, Any]:
    """The options of a choice, or the ends of a range."""
    if decision.kind == "choice":
        return {"values": list(decision.labels)}
    step = {"step": decision.step} if decision.kind == "int" else {}
    return {"low": decision.low, "high": decision.high, **step, "log": decision.log}


def _shown_values(decision: Decision) -> str:
    """The values of a decision as a spec writes them: `a, null, 2`, or `2..6, step 2`."""
    if decision.kind == "choice":
        return ", ".join(_written(label) for label in decision.labels)
    step = f", step {decision.step}" if decision.step > 1 else ""
    return f"{decision.low}..{decision.high}{step}{', logarithmic' if decision.log else ''}"


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def validate_all(names: list[str], as_json: bool) -> int:
    """Check files; returns the exit code, 1 if anything is wrong."""
    from zoo.spec.check import check, spec_files
    from zoo.spec.document import specs_folder

    results = [check(name) for name in spec_files(names or [specs_folder()])]
    wrong = sum(1 for result in results if result.problems)
    if as_json:
        print_json([{"file": r.name, "kind": r.kind, "problems": [_problem(p) for p in r.problems]} for r in results])
        return int(wrong > 0)
    for result in results:
        if result.problems:
            print("\n".join(str(problem) for problem in result.problems))
        elif names:
            print(f"{result.name}: a valid {result.kind}")
    if not results:
        raise ZooError(f"no specs in {', '.join(map(str, names))}")
    if len(results) > 1 or not names:
        print(f"{len(results) - wrong} of {len(results)} are valid")
    return int(wrong > 0)


def _problem(problem: Any) -> dict[str, Any]:
    mark = problem.mark
    place = {} if mark is None else {"file": mark.file, "line": mark.line, "column": mark.column}
    return {"path": problem.path, "message": problem.message, **place}


def write_schema(out: Path | None) -> None:
    """Print the JSON Schema, or write it to a file and say how an editor finds it."""
    import json

    from zoo.spec.schema import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        sys.stdout.write(text)
        return
    out.write_text(text, encoding="utf-8")
    print(f"wrote {out}; begin a spec with\n# yaml-language-server: $schema={out}")


def print_cost(
    name: str,
    batch: int,
    seq: int | None,
    past: int | None,
    dtype: str,
    weights: str | None,
    layers: bool,
    detail: bool,
    device: str | None,
    bound_by: str | None,
    as_json: bool,
    drawing: Drawing | None,
    mesh: OnMesh | None,
    predict_on: str | None,
) -> None:
    """Print all analytic figures of a spec, on request for each part, its times on a device, measured or at least.

    With a drawing also the roofline as a picture, and with a mesh the least times on that; in `detail` what parameters,
    weights and states are made of.
    """
    from zoo.accounting import Workload, figures, parts
    from zoo.breakdown import breakdown
    from zoo.spec.document import load

    spec = load(name)
    work = Workload(batch, seq, past, dtype).at(spec.context)
    tallies = [(path, component, tally) for path, component, tally in parts(spec.fill(), work)]
    total = figures(_sum(tally for _, _, tally in tallies), work)
    if weights is not None:
        total |= _stored(spec, work, weights, total)
    measured = {} if device is None else dict(_measured(spec, work, device))
    least = {} if bound_by is None else _rooflines(spec, work, bound_by)
    prediction = Prediction([], {}) if predict_on is None else predicted(spec, work, predict_on)
    meshes = {} if mesh is None else mesh.costs(spec, work)
    picture = "" if drawing is None else drawing.draw(spec, work)
    if as_json:
        rows = [{"path": path, "type": part.type, **figures(tally, work)} for path, part, tally in tallies]
        facts = {"spec": name, "workload": _fields(work), "metrics": total, "parts": rows, "measured": measured}
        bounds = {"roofline": {phase: _bounds(parts) for phase, parts in least.items()}, "mesh": mesh_facts(meshes)}
        print_json({**facts, "detail": breakdown(spec, work), **bounds, **prediction_facts(prediction)})
        return
    if layers:
        columns = ("params", "flops", "traffic", "state", "activations")
        print_table(
            "",
            ("part", "what", *columns),
            (
                (path, _what(part), *(shown(key, figures(tally, work)[key]) for key in columns))
                for path, part, tally in tallies
            ),
            right=range(2, 7),
        )
    stored = "" if weights is None else f", weights in {weights}"
    title = (
        f"{spec.name or name}: batch {work.batch}, {work.seq} tokens, decoding behind {work.past}, {work.dtype}{stored}"
    )
    rows = [(key, shown(key, value), f"{value:,.0f}") for key, value in total.items() if key in METRIC_DIMENSIONS]
    print_table(title, ("counted", "", "exactly"), rows, right=(1, 2))
    if detail:
        _print_detail(breakdown(spec, work))
    if least:
        from zoo.quantity import format_quantity

        times = [
            (phase, *(format_quantity(seconds, "time") for seconds in _bounds(parts).values()))
            for phase, parts in least.items()
        ]
        title = f"at least, on {bound_by} (roofline: a bound, not a forecast)"
        print_table(title, ("", "in all", *(f"bound by {name}" for name in BOUNDS)), times, right=(1, 2, 3, 4))
    if predict_on is not None:
        print_predictions(prediction, predict_on, layers)
    if picture:
        print(picture)
    if mesh is not None:
        mesh.show(meshes)
    if measured:
        from zoo.quantity import format_quantity

        times = [
            (phase, *(format_quantity(row[key], "time") for key in ("seconds", "low", "high")))
            for phase, row in measured.items()
        ]
        print_table(f"measured on {device}", ("", "median", "5%", "95%"), times, right=(1, 2, 3))


def _stored(spec: Spec, work: Workload, format: str, total: Mapping[str, float]) -> dict[str, float]:
    """The figures that change where matrices are stored in another format than the workload's."""
    from zoo.breakdown import quantised_traffic, stored_weights

    weights = stored_weights(spec, format, kept=work.dtype).bytes
    memory = total["memory"] - total["weights"] + weights
    return {"weights": weights, "memory": memory, "decode_traffic": quantised_traffic(spec, work, format)}


DETAIL = {
    "parts": ("parameters in", "count"),
    "axes": ("parameters with an axis", "count"),
    "weights": ("weights stored in", "bytes"),
    "state": ("state", "bytes"),
}
"""What a table of `--detail` is about, and the dimension of its numbers."""


def _print_detail(found: Mapping[str, Mapping[str, int]]) -> None:
    from zoo.quantity import format_quantity

    for name, (title, dimension) in DETAIL.items():
        rows = [(key, format_quantity(value, dimension), f"{value:,}") for key, value in found[name].items()]  # type: ignore[arg-type]
        if rows:
            print_table("", (title, "", "exactly"), rows, right=(1, 2))


def _rooflines(spec: Spec, work: Workload, name: str) -> dict[str, list[Bounded]]:
    """The least times on a device, by phase."""
    from zoo.hardware.profile import load_profile
    from zoo.hardware.roofline import roofline

    profile = load_profile(name)
    found = {"forward": roofline(spec, work, profile, "forward")}
    if getattr(spec.head, "kind", "") == "language_model":
        found["decode"] = roofline(spec, work, profile, "decode")
    return found


def _bounds(parts: list[Bounded]) -> dict[str, Any]:
    """Seconds in all, and those of the parts that each thing bounds."""
    bound = {name: sum(part.seconds for part in parts if part.bound == name) for name in BOUNDS}
    return {"seconds": sum(part.seconds for part in parts), **bound}


def _sum(tallies: Iterator[Tally]) -> Tally:
    from zoo.accounting import Tally

    return sum(tallies, Tally())


def _fields(work: Workload) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(work)


def _what(component: Component) -> str:
    inside = [getattr(component, name, None) for name in ("mixer", "channel")]
    named = [part.type for part in inside if part is not None]
    return " + ".join(named) or component.type


def print_kernels(device: str, dtype: str, as_json: bool) -> None:
    """Print for each primitive which implementation serves on a device, and why the others do not."""
    from zoo import kernels
    from zoo.accounting import ALIASES

    rows = kernels.explain(device, ALIASES.get(dtype, dtype))
    if as_json:
        print_json([row._asdict() for row in rows])
        return
    table = []
    for primitive in dict.fromkeys(row.primitive for row in rows):
        of_it = [row for row in rows if row.primitive == primitive]
        serving = [row.implementation for row in of_it if row.serves]
        refused = "; ".join(f"{row.implementation}: {row.reason}" for row in of_it if not row.serves)
        table.append((primitive, serving[0] if serving else "nothing", ", ".join(serving[1:]), refused))
    print_table(f"{_where(device)}, {dtype}", ("primitive", "runs", "could serve", "refused"), table)


def _where(device: str) -> str:
    """A device, and what is said about it where it is not there."""
    import torch

    there = not device.startswith("cuda") or torch.cuda.is_available()
    return device if there else f"{device} (none here: as with compute capability 8.0 or newer)"


def print_choices(name: str, device: str, dtype: str, batch: int, seq: int | None, as_json: bool) -> None:
    """Print what each call of a model would run on a device, and why not another implementation."""
    from dataclasses import asdict

    from zoo.accounting import ALIASES
    from zoo.choices import choices
    from zoo.spec.document import load

    spec = load(name)
    found = choices(spec, device, ALIASES.get(dtype, dtype), batch=batch, tokens=seq)
    if as_json:
        print_json([asdict(choice) for choice in found])
        return
    table = [
        (
            choice.phase,
            choice.primitive,
            str(choice.count),
            _call_facts(choice.facts),
            choice.runs or "nothing",
            "; ".join(f"{one}: {reason}" for one, reason in choice.refusals.items()),
        )
        for choice in found
    ]
    columns = ("phase", "primitive", "calls", "facts", "runs", "refused")
    print_table(f"{name} on {_where(device)}, {dtype}", columns, table)


def _call_facts(facts: Mapping[str, Any]) -> str:
    """Shapes and flags of a call; flags that are off are left out."""
    shown = (
        name if value is True else f"{name}={value}"
        for name, value in facts.items()
        if value not in (None, False, ()) and (name, value) != ("dilation", 1)
    )
    return " ".join(shown)


def print_kernel_timings(as_json: bool) -> None:
    """Print the recorded timings of kernels on GPUs, each against a public implementation in the same run."""
    import json
    from importlib.resources import files

    folder = files("zoo.kernels") / "timings"
    found = [json.loads(file.read_text(encoding="utf-8")) for file in _json_files(folder)]
    if as_json:
        print_json(found)
        return
    if not found:
        raise ZooError(
            "no timings are recorded with this version; `python -m bench.gpu` makes them, in a checkout on a machine "
            "with an NVIDIA GPU (bench/README.md)"
        )
    for each in found:
        versions = ", ".join(f"{name} {version}" for name, version in each["versions"].items())
        title = f"{each['device']}, {each['date']}: {versions}"
        columns = ("what", "ms", "share", "rival", "ratio", "at least", "verdict")
        print_table(title, columns, map(_timing, each["rows"]), right=(1, 2, 4, 5))
        wrong = [row["name"] for row in each["numerics"] if not row.get("right")]
        console().print(
            f"{len(each['numerics']) - len(wrong)} configurations right, {len(wrong)} wrong", *wrong, sep="\n"
        )


def _timing(row: Mapping[str, Any]) -> tuple[str, ...]:
    """A line of recorded timings: a rival's ratio is its time over ours."""
    verdict = row.get("error", {True: "met", False: "missed"}.get(row.get("met"), ""))  # type: ignore[arg-type]
    shown = (str(row.get(name, "")) for name in ("what", "ms", "share", "rival", "ratio", "at_least"))
    return *shown, verdict


def _json_files(folder: Traversable) -> list[Traversable]:
    inside = folder.iterdir() if folder.is_dir() else ()
    return sorted((file for file in inside if file.name.endswith(".json")), key=lambda file: file.name)


def _measured(spec: Spec, work: Workload, device: str) -> Iterator[tuple[str, dict[str, float]]]:
    """Timings of a forward pass and, for language models, of one decoding step."""
    from zoo.accounting import ALIASES
    from zoo.blocks.model import Spec
    from zoo.device import resolve_device
    from zoo.latency import Context, MeasuredLatency
    from zoo.model import build

    source = MeasuredLatency[Spec](resolve_device(device), build, lambda spec: spec.computation)
    assert work.seq is not None and work.past is not None
    context = Context(work.batch, work.seq, work.past, ALIASES.get(work.dtype, work.dtype))
    phases = ("forward", "decode") if getattr(spec.head, "kind", "") == "language_model" else ("forward",)
    for phase in phases:
        figure = source.latency(spec, context, phase)
        yield phase, {"seconds": figure.seconds, "low": figure.low, "high": figure.high}
