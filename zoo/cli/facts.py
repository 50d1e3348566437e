"""Commands that print facts: list, show, validate, schema, kernels. None needs torch."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.cli.output import console, print_json, print_table, shown
from zoo.errors import ZooError, did_you_mean

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from zoo.component import Component
    from zoo.errors import Problem
    from zoo.search.program import Decision

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
