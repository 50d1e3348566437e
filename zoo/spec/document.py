"""Spec files: reading them with everything they extend, printing them, and what identifies a spec.

A spec is named by a path or by a name; names are those of the files in the package's `specs` folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.component import Component, Role, Scope, defaults, slots
from zoo.errors import Problem, SpecError, ZooError, did_you_mean, nearest_file
from zoo.memo import memoized
from zoo.spec.construct import ROOT, construct, said
from zoo.spec.source import parse_yaml, read_text, scalar, shortened
from zoo.spec.template import Template, compile_document
from zoo.spec.tree import BROKEN, Tree, merge, settled, tree

if TYPE_CHECKING:
    from zoo.blocks.model import Spec

MAX_EXTENDS = 16
SUFFIXES = (".yaml", ".yml")
METADATA = ("zoo", "name", "summary", "sources", "catalogue", "published", "kernels")
"""Fields of the root that say something about an architecture or how it is computed, and are no part of it."""
_HOLDERS = (Role.MODEL, Role.BODY, Role.STAGE, Role.LAYER)
_ROOT_MARKERS = (".git", "pyproject.toml")


def specs_folder() -> Path:
    """Where the shipped specs are: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "specs"
    return inside if inside.is_dir() else package.parent / "specs"


def spec_names() -> list[str]:
    """Names of the shipped specs and spaces."""
    folder = specs_folder()
    return sorted(file.relative_to(folder).with_suffix("").as_posix() for file in folder.rglob("*.yaml"))


def locate(name: str | Path) -> Path:
    """The file that a path or a shipped name stands for."""
    path = Path(name)
    if _is_file(path):
        return path
    shipped = specs_folder() / f"{name}.yaml"
    if isinstance(name, str) and name in spec_names():
        return shipped
    if path.suffix in SUFFIXES:
        here = path.parent if path.parent.is_dir() else Path()
        close = nearest_file(path.name, [file.name for file in here.glob("*.y*ml")])
        raise ZooError(f"{name}: no such file{f'; did you mean {close!r}?' if close else ''}")
    raise ZooError(f"no spec is called {str(name)!r}{did_you_mean(str(name), spec_names())}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than the file system allows
        return False


def read(name: str | Path, problems: list[Problem] | None = None) -> Template:
    """The compiled document of a file or a shipped name, holes and all.

    Every problem is added to `problems`, or without it raised as a `SpecError`.
    """
    path = locate(name)
    return _compiled(read_text(path), str(path), [path], problems)


def read_text_as(text: str, file: str = "<text>", problems: list[Problem] | None = None) -> Template:
    """The compiled document of a text; what it extends is found by name, or from the current folder."""
    return _compiled(text, file, [Path.cwd() / file], problems)


def _compiled(text: str, file: str, files: list[Path], problems: list[Problem] | None) -> Template:
    found: list[Problem] = []
    document = _extended(parse_yaml(text, file, found), files, found)
    template = compile_document(document, found)
    if problems is not None:
        problems += found
    elif found:
        raise SpecError(found)
    return template


def load(name: str | Path) -> Spec:
    """The spec of a file or a shipped name.

    A `SpecError` carries every problem of the document with file, line and column; a hole is one.
    """
    problems: list[Problem] = []
    return finished(read(name, problems), problems)


def parse(text: str, file: str = "<text>") -> Spec:
    """The spec that a YAML text describes."""
    problems: list[Problem] = []
    return finished(read_text_as(text, file, problems), problems)


def finished(template: Template, problems: list[Problem] | None = None) -> Spec:
    """The spec of a template without holes; `problems` are those that are already known."""
    problems = [] if problems is None else problems
    return construct(template.closed(problems), problems)  # type: ignore[return-value]


def as_spec(given: Spec | Mapping[str, Any] | str | Path) -> Spec:
    """A spec from itself, from a mapping, or from a name or path; in each case checked across its fields."""
    if isinstance(given, str | Path):
        return load(given)
    if isinstance(given, Component):
        construct_checks(given)
        return given  # type: ignore[return-value]
    problems: list[Problem] = []
    document = _extended(tree(given), [Path.cwd() / "<mapping>"], problems)
    return finished(compile_document(document, problems), problems)


def construct_checks(spec: Component) -> None:
    """Check a spec that was made in Python across its fields."""
    from zoo.spec.construct import complaints

    filled = spec.fill(spec.root())  # type: ignore[attr-defined]
    problems = [Problem(path, message) for path, message in complaints(filled, "")]
    if problems:
        raise SpecError(problems)


def _extended(document: Tree, files: list[Path], problems: list[Problem]) -> Tree:
    """The document laid on the one that it extends, if any."""
    if not isinstance(document.value, dict):
        raise SpecError([Problem("", "expected a mapping at the top of a spec", document.mark)])
    base = document.entries.get("extends")
    own = {key: item for key, item in document.entries.items() if key != "extends"}
    rest = Tree(own, document.mark, document.keys)
    if base is None or base.value is BROKEN:
        return settled(rest, problems)
    if not isinstance(base.value, str):
        raise SpecError([Problem("extends", f"expected the name or path of a spec; got {said(base)}", base.mark)])
    try:
        path = _base_file(base.value, files)
        text = read_text(path)
    except ZooError as error:
        raise SpecError([*problems, Problem("extends", str(error), base.mark)]) from None
    below = _extended(parse_yaml(text, _shown_path(path, files[0]), problems), [*files, path], problems)
    about = {key: item for key, item in below.entries.items() if key not in METADATA or key == "zoo"}
    return merge(Tree(about, below.mark, below.keys), rest, problems)


def _shown_path(path: Path, first: Path) -> str:
    """A file as messages call it: from the current folder, unless the document that extends it was named otherwise."""
    here = Path.cwd()
    return str(path) if first.is_absolute() or not path.is_relative_to(here) else str(path.relative_to(here))


def _base_file(name: str, files: list[Path]) -> Path:
    """The file that `extends` names, seen from the last of `files`; it must not leave the project nor go in circles."""
    if name in spec_names():
        path = specs_folder() / f"{name}.yaml"
    elif Path(name).suffix in SUFFIXES or name.startswith("."):
        top, folder = _project(files[0].resolve()), files[-1].parent
        path = (folder / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(top):
            raise ZooError(f"{name!r} leaves the project {top}; give a path inside it, or the name of a shipped spec")
        if not _is_file(path):
            known = [file.relative_to(folder).as_posix() for file in (folder / name).parent.glob("*.y*ml")]
            close = nearest_file(name, known)
            raise ZooError(f"no such file: {shortened(name)!r}{f'; did you mean {close!r}?' if close else ''}")
    else:
        hint = "; a path ends in `.yaml`" if "/" in name else did_you_mean(name, spec_names())
        raise ZooError(f"no spec is called {shortened(name)!r}{hint}")
    if any(path.resolve() == file.resolve() for file in files):
        circle = " -> ".join([*(file.name for file in files), path.name])
        raise ZooError(f"extends itself: {circle}")
    if len(files) > MAX_EXTENDS:
        raise ZooError(f"extends more than {MAX_EXTENDS} files in a row")
    return path


def _project(file: Path) -> Path:
    """The folder that a document's paths may not leave: the repository around it, or its own folder."""
    for folder in file.parents:
        if any((folder / marker).exists() for marker in _ROOT_MARKERS):
            return folder
    return file.parent


def canonical(spec: Component) -> dict[str, Any]:
    """Everything that makes the architecture, with each default spelled out, as plain data.

    Names, sources and published figures are left out: they are about the architecture.
    """
    filled = plain(spec.fill(spec.root()))  # type: ignore[attr-defined]
    return {key: value for key, value in filled.items() if key not in METADATA}


def spec_hash(spec: Component) -> str:
    """The identity of an architecture: 16 hexadecimal digits of SHA-256 over all of its parts, with defaults filled in.

    Where an inherited setting was written does not count, only the parts that it reached.
    """
    scope = spec.root()  # type: ignore[attr-defined]
    text = "\n".join(_lines(spec.fill(scope), scope, ""))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _lines(component: Component, scope: Scope, path: str) -> Iterator[str]:
    """A line for each part: its path and its own fields. Those of a layer are computed once for all its places."""
    if component.role is Role.LAYER:
        yield from (path + line for line in _layer_lines(component, scope))
        return
    yield f"{path} {_own(component)}"
    for name, child in component.children(scope).items():
        yield from _lines(child.component, child.scope, f"{path}.{name}")


@memoized()
def _layer_lines(layer: Component, scope: Scope) -> tuple[str, ...]:
    return tuple(f".{path} {_own(part)}" for path, part, _ in layer.walk(scope))


def _own(part: Component) -> str:
    """The fields of a part as JSON; of one that holds layers only those that are no parts themselves."""
    left_out = {*METADATA, *slots(type(part))} if part.role in _HOLDERS else {}
    fields = {name: _plain(getattr(part, name)) for name in type(part).model_fields if name not in left_out}
    return json.dumps({"type": part.type, **fields}, sort_keys=True, separators=(",", ":"))


def plain(component: Component) -> dict[str, Any]:
    """A component as plain data with all fields, its type first."""
    fields = {name: _plain(getattr(component, name)) for name in type(component).model_fields}
    return {"type": component.type, **fields}


def _plain(value: Any) -> Any:
    if isinstance(value, Component):
        return plain(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def brief(component: Component, default_type: str | None = None) -> Any:
    """A component as one would write it: without fields that have their default, a bare type where nothing is left."""
    known, usual = slots(type(component)), defaults(type(component))
    fields: dict[str, Any] = {}
    for name in type(component).model_fields:
        value = getattr(component, name)
        if name in usual and value == usual[name]:
            continue
        slot = known.get(name)
        if isinstance(value, Component):
            fields[name] = brief(value, slot.default if slot else None)
        elif slot is not None and slot.many:
            fields[name] = folded([brief(item, slot.default) for item in value])
        else:
            fields[name] = _plain(value)
    if component.type == default_type:
        return fields
    return {"type": component.type, **fields} if fields else component.type


def folded(items: list[Any]) -> Any:
    """A list with its repetitions as patterns; a list that is one repetition becomes that pattern.

    Of all periods at a place the one that covers most items is taken, the shortest of equals.
    """
    result: list[Any] = []
    index = 0
    while index < len(items):
        period, times = max(_periods(items, index), key=lambda found: (found[0] * (found[1] - 1), -found[0]))
        if times == 1:
            result.append(items[index])
            index += 1
            continue
        unit = items[index : index + period]
        result.append({"repeat": times, "of": unit[0] if period == 1 else folded(unit)})
        index += period * times
    return result[0] if len(result) == 1 and isinstance(result[0], dict) and "repeat" in result[0] else result


def _periods(items: list[Any], start: int) -> Iterator[tuple[int, int]]:
    """Period and number of repetitions of every cycle that begins at `start`."""
    rest = len(items) - start
    yield 1, 1
    for period in range(1, rest // 2 + 1):
        if items[start] != items[start + period]:
            continue
        times = 1
        while items[start : start + period] == items[start + period * times : start + period * (times + 1)]:
            times += 1
        if times > 1:
            yield period, times


def dump(spec: Component) -> str:
    """The spec as YAML that loads to an equal spec."""
    import yaml

    return yaml.dump(brief(spec, ROOT.default), Dumper=_dumper(), sort_keys=False, default_flow_style=None, width=110)


def _dumper() -> type:
    import yaml

    class Dumper(yaml.SafeDumper):
        """Quotes every text that would not come back as the same text."""

        def ignore_aliases(self, data: Any) -> bool:
            return True

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        escaped = "$" + value if value.startswith("$") else value
        quoted = '"' if scalar(escaped) != escaped else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", escaped, style=quoted)

    Dumper.add_representer(str, text)
    return Dumper
