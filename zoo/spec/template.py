"""Documents with everything that is left open: holes, variables, arithmetic and repeated layers.

A document is compiled once into a template. Choosing a value for every hole, `Template.fill` gives an ordinary tree of
nodes; with no holes there is nothing to choose. The language:

- `vars: {d: 64}` names values; `$d` stands for one, `$(4 * d)` computes with them. The model's own `width` and
  `context` are names too.
- A hole is a mapping `{choice: [...]}`, `{choice: {name: value, ...}}`, `{int: [low, high]}` (with `step`, `log`) or
  `{float: [low, high]}` (with `log`). With a `name` it is decided once wherever that name stands; so is a hole in
  `vars`. Any other is decided anew for each layer that it is repeated in.
- `{repeat: n, of: layer}` or `{repeat: n, of: [...]}` in a list, or in place of one, repeats.
- `overrides: {"7::8": {...}, "-1": {...}}` beside `layers` is laid on the layers that the slices pick, in order.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from zoo.errors import Mark, Problem, SpecError, ZooError, did_you_mean, nearest
from zoo.expression import Expression, ExpressionError, is_expression, parse
from zoo.spec.source import shortened
from zoo.spec.tree import BROKEN, HOLE_KINDS, REPLACE, Scalar, Tree, merge, walk

MAX_LAYERS = 4096
MAX_VALUES = 100_000
MAX_WHOLE = 2**53
"""Largest end of a range: beyond it whole numbers and the floats that samplers compute with differ."""
MAX_NAMES = 50
PATTERN = ("repeat", "of")
_BESIDE_HOLES = ("name", "step", "log")
NAMED_FIELDS = ("width", "context")
"""Fields of the model that expressions may use by name."""

Choose = Callable[["Hole", str], Any]
"""Decides a hole at a path: an option's label, or a number of its range."""


@dataclass(frozen=True, slots=True, eq=False)
class Leaf:
    """A value that is fixed."""

    value: Tree


@dataclass(frozen=True, slots=True, eq=False)
class Formula:
    """A value that follows from variables."""

    expression: Expression
    mark: Mark | None


@dataclass(frozen=True, slots=True, eq=False)
class Option:
    """One value of a choice. `label` is what a point of the space holds for it: the value itself if it is a scalar."""

    label: Scalar
    part: Part


@dataclass(frozen=True, slots=True, eq=False)
class Hole:
    """A value to be decided: one of `options`, or a number from `low` to `high`."""

    kind: str
    options: tuple[Option, ...] = ()
    low: float = 0
    high: float = 0
    step: int = 1
    log: bool = False
    name: str | None = None
    mark: Mark | None = None

    def labels(self) -> Sequence[Any]:
        """Every value that it can take, those of a range unlisted; empty for a range of real numbers."""
        if self.kind == "choice":
            return tuple(option.label for option in self.options)
        if self.kind == "int":
            return range(int(self.low), int(self.high) + 1, self.step)
        return ()

    def option(self, label: Any) -> Option | None:
        """The option that a label names; types count, so that 1 and true stay apart."""
        for option in self.options:
            if option.label == label and type(option.label) is type(label):
                return option
        return next((option for option in self.options if option.label == label), None)

    def admits(self, value: Any) -> bool:
        """Whether a point may hold `value` for it."""
        if self.kind == "choice":
            return self.option(value) is not None
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        on_grid = self.kind == "float" or (value == int(value) and (int(value) - int(self.low)) % self.step == 0)
        return self.low <= value <= self.high and on_grid


@dataclass(frozen=True, slots=True, eq=False)
class Fields:
    """A mapping with open values inside."""

    entries: dict[str, Part]
    source: Tree


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """An item of a pattern is there if the `count` at `path` is above `index`."""

    count: Part
    path: str
    index: int


@dataclass(frozen=True, slots=True, eq=False)
class Item:
    """An item of a list: its part, where it stands (`[3]`), and what must hold for it to be there."""

    part: Part
    suffix: str
    guards: tuple[Guard, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Items:
    """A list with open values inside."""

    items: tuple[Item, ...]
    mark: Mark | None


Part = Leaf | Formula | Hole | Fields | Items


@dataclass(frozen=True, slots=True, eq=False)
class Template:
    """A compiled document: its root, and its variables."""

    root: Fields
    variables: dict[str, Part] = field(default_factory=dict)

    @property
    def source(self) -> Tree:
        return self.root.source

    def fill(self, choose: Choose) -> Tree:
        """The document with every hole decided by `choose`; a `SpecError` tells of expressions without a value."""
        return Filling(self, choose).document()

    def closed(self, problems: list[Problem] | None = None) -> Tree:
        """The document of a template that should have no holes.

        Each hole is a problem, and takes its first value so that the rest can be checked. Problems are added to
        `problems`, or without it raised as a `SpecError`.
        """
        found: list[Problem] = []

        def refuse(hole: Hole, path: str) -> Any:
            message = "a hole, but a finished spec is needed here; `zoo search` fills holes, or write a value"
            found.append(Problem(path, message, hole.mark))
            return hole.options[0].label if hole.options else int(hole.low) if hole.kind == "int" else hole.low

        filling = Filling(self, refuse)
        document = filling.part(self.root, "")
        _add([*found, *filling.problems], problems)
        return document


class Filling:
    """One pass over a template that turns parts into trees, deciding holes as they are met."""

    def __init__(self, template: Template, choose: Choose) -> None:
        self.template = template
        self.choose = choose
        self.values: dict[str, Tree] = {}
        self.open: list[str] = []
        self.extents: dict[int, tuple[Tree, int, int]] = {}
        self.problems: list[Problem] = []

    def document(self) -> Tree:
        """The whole document."""
        result = self.part(self.template.root, "")
        if self.problems:
            raise SpecError(self.problems)
        return result

    def part(self, part: Part, path: str) -> Tree:
        if isinstance(part, Leaf):
            return part.value
        if isinstance(part, Formula):
            return self.formula(part, path)
        if isinstance(part, Hole):
            return self.hole(part, path)
        if isinstance(part, Fields):
            entries = {key: self.part(item, f"{path}.{key}" if path else key) for key, item in part.entries.items()}
            return part.source.with_entries(entries)
        return Tree([self.part(item.part, path + item.suffix) for item in self.present(part)], part.mark)

    def present(self, sequence: Items) -> Iterator[Item]:
        """The items whose guards hold."""
        for item in sequence.items:
            if all(self.count(guard) > guard.index for guard in item.guards):
                yield item

    def count(self, guard: Guard) -> int:
        value = self.part(guard.count, guard.path).value
        return value if isinstance(value, int) and not isinstance(value, bool) else 0

    def hole(self, hole: Hole, path: str) -> Tree:
        if hole.name is not None and hole.name in self.values:
            return self.values[hole.name]
        path = hole.name or path
        chosen = self.choose(hole, path)
        if hole.kind == "choice":
            option = hole.option(chosen)
            assert option is not None, (path, chosen)
            tail = "" if not isinstance(option.label, str) else f".{option.label}"
            result = self.part(option.part, path + tail)
        else:
            result = Tree(chosen, hole.mark)
        if hole.name is not None:
            self.values[hole.name] = result
        return result

    def formula(self, formula: Formula, path: str) -> Tree:
        try:
            names = {name: self.variable(name, formula) for name in formula.expression.names}
            if any(item.value is BROKEN for item in names.values()):
                return Tree(BROKEN, formula.mark)
            if formula.expression.text[1:] in names:
                return names[formula.expression.text[1:]]
            value = formula.expression.evaluate({name: item.plain() for name, item in names.items()})
        except ExpressionError as error:
            self.problems.append(Problem(path, error.message, _shift(formula.mark, error.column)))
            return Tree(BROKEN, formula.mark)
        return Tree(value, formula.mark)

    def variable(self, name: str, formula: Formula) -> Tree:
        """The value of a name, computed when first asked for; complained about once."""
        if name in self.values:
            return self.values[name]
        variables = self.template.variables
        part = variables.get(name) or (self.template.root.entries.get(name) if name in NAMED_FIELDS else None)
        text, column = formula.expression.text, formula.expression.columns[name]
        if part is None:
            known = [*variables, *(field for field in NAMED_FIELDS if field in self.template.root.entries)]
            raise ExpressionError(f"unknown name {name!r}{did_you_mean(name, known)}", text, column)
        if name in self.open:
            circle = " -> ".join([*self.open[self.open.index(name) :], name])
            raise ExpressionError(f"{name!r} is defined by itself: {circle}", text, column)
        if len(self.open) == MAX_NAMES:
            raise ExpressionError(f"{name!r} stands behind {MAX_NAMES} names that rest on each other", text, column)
        self.open.append(name)
        try:
            value = self.part(part, name)
        finally:
            self.open.pop()
        size, height = _extent(value, self.extents)
        too_large = size > MAX_VALUES or height > MAX_NAMES
        self.values[name] = Tree(BROKEN, formula.mark) if too_large else value
        if too_large:
            message = f"{name!r} holds more than {MAX_VALUES} values or {MAX_NAMES} levels, with all names written out"
            raise ExpressionError(message, text, column)
        return value


def compile_document(source: Tree, problems: list[Problem] | None = None) -> Template:
    """The template of a document whose `extends` is resolved.

    What is wrong with its patterns is added to `problems`, or without it raised as a `SpecError`.
    """
    compiler = _Compiler(source)
    entries = {key: item for key, item in source.entries.items() if key != "vars"}
    root = Fields({key: compiler.part(item, key) for key, item in entries.items()}, source.with_entries(entries))
    _add(compiler.problems, problems)
    return Template(root, compiler.variables)


def _add(found: list[Problem], problems: list[Problem] | None) -> None:
    if problems is not None:
        problems += found
    elif found:
        raise SpecError(found)


class _Compiler:
    """Turns trees into parts; equal places give the same part, so that repeated layers share theirs."""

    def __init__(self, source: Tree) -> None:
        self.problems: list[Problem] = []
        self.parts: dict[int, tuple[Tree, Part]] = {}
        self.variables: dict[str, Part] = {}
        declared = source.entries.get("vars")
        if declared is not None and not isinstance(declared.value, dict):
            self.complain("vars", "expected a mapping from names to values", declared.mark)
        self.declared = declared.entries if declared is not None else {}
        self.declared = self._without_circles(self.declared)
        self.named = {name: source.entries[name] for name in NAMED_FIELDS if name in source.entries} | self.declared
        self.unfolding: list[Tree] = []
        self.open: list[str] = []
        for name, item in self.declared.items():
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                place = declared.key_place(name) if declared is not None else None
                self.complain(f"vars.{name}", f"{name!r} is no name: letters, digits and _ only", place)
            part = self.part(item, f"vars.{name}")
            self.variables[name] = replace(part, name=name) if isinstance(part, Hole) else part

    def _without_circles(self, declared: dict[str, Tree]) -> dict[str, Tree]:
        """The variables, those that are defined by themselves broken and complained about, used or not."""
        behind = {name: _names_in(item) for name, item in declared.items()}
        circular: set[str] = set()
        done: set[str] = set()
        for start in declared:
            trail = {} if start in done else {start: iter(behind[start])}
            while trail:
                last, links = next(reversed(trail.items()))
                name, mark = next(links, (None, None))
                if name is None:
                    done.add(last)
                    del trail[last]
                elif name in trail:
                    names = [*trail]
                    circle = names[names.index(name) :]
                    if circular.isdisjoint(circle):
                        text = " -> ".join([*circle, name])
                        self.complain(f"vars.{last}", f"{name!r} is defined by itself: {shortened(text, 200)}", mark)
                    circular.update(circle)
                elif name in behind and name not in done:
                    trail[name] = iter(behind[name])
        return {name: Tree(BROKEN, item.mark) if name in circular else item for name, item in declared.items()}

    def complain(self, path: str, message: str, mark: Mark | None) -> None:
        self.problems.append(Problem(path, message, mark))

    def part(self, node: Tree, path: str) -> Part:
        known = self.parts.get(id(node))
        if known is None:
            known = self.parts[id(node)] = (node, self._part(node, path))
        return known[1]

    def _part(self, node: Tree, path: str) -> Part:
        if isinstance(node.value, str) and node.value.startswith("$"):
            return self._formula(node, path)
        if isinstance(node.value, list):
            return self._sequence(node, path)
        if not isinstance(node.value, dict):
            return Leaf(node)
        if any(kind in node.value for kind in HOLE_KINDS):
            return self._hole(node, path)
        if "repeat" in node.value or "of" in node.value:
            return self._sequence(Tree([node], node.mark), path, alone=True)
        if (key := _meant_as_hole(node)) is not None:
            message = f"unknown key {key!r} of a hole{did_you_mean(key, HOLE_KINDS)}"
            self.complain(f"{path}.{key}", message, node.key_place(key))
            return Leaf(Tree(BROKEN, node.mark))
        entries = {key: item for key, item in node.value.items() if key != "overrides" or "layers" not in node.value}
        parts = {
            key: self._layers(node, f"{path}.{key}") if key == "layers" else self.part(item, f"{path}.{key}")
            for key, item in entries.items()
        }
        closed = {key: part.value for key, part in parts.items() if isinstance(part, Leaf)}
        if len(closed) == len(parts):
            return Leaf(node.with_entries(closed))
        return Fields(parts, node.with_entries(entries))

    def _formula(self, node: Tree, path: str) -> Part:
        text = str(node.value)
        if not is_expression(text):
            return Leaf(Tree(text[1:], node.mark))
        try:
            return Formula(parse(text), node.mark)
        except ExpressionError as error:
            self.complain(path, error.message, _shift(node.mark, error.column))
            return Leaf(Tree(BROKEN, node.mark))

    def _sequence(self, node: Tree, path: str, *, alone: bool = False) -> Part:
        return self._items(list(self._expand(node, path, alone)), path, node.mark)

    def _items(self, found: list[tuple[Tree, str, tuple[Guard, ...]]], path: str, mark: Mark | None) -> Part:
        """A list of compiled items, closed if nothing in it is open."""
        items = [Item(self.part(item, path + suffix), suffix, guards) for item, suffix, guards in found]
        closed = [item.part.value for item in items if isinstance(item.part, Leaf) and not item.guards]
        return Leaf(Tree(closed, mark)) if len(closed) == len(items) else Items(tuple(items), mark)

    def _layers(self, holder: Tree, path: str) -> Part:
        """The layers of a stack, with the overrides that stand beside them laid on."""
        node, overrides = holder.entries["layers"], holder.entries.get("overrides")
        if overrides is None:
            return self.part(node, path)
        if isinstance(node.value, str) and isinstance(self._declared(node.value).value, list):
            node = self._declared(node.value)
        alone = not isinstance(node.value, list)
        before = len(self.problems)
        items = list(self._expand(Tree([node], node.mark) if alone else node, path, alone))
        sound = len(self.problems) == before
        fixed = not any(guards for _, _, guards in items)
        for key, change in overrides.entries.items():
            place = overrides.key_place(key)
            where = path.removesuffix("layers") + f"overrides.{key}"
            try:
                picked = range(len(items))[_slice(key)]
            except ZooError as error:
                self.complain(where, str(error), place)
                continue
            if not fixed and _counts_from_end(key):
                self.complain(where, "counts from the end, but the number of layers is still open", place)
            elif len(picked) == 0 and fixed and sound:
                self.complain(where, f"picks none of the {len(items)} layers", place)
            change = self._named_tree(change)
            unknown: list[list[Problem]] = []
            for index in picked:
                item, suffix, guards = items[index]
                if isinstance(item.value, str) and item.value.startswith("$") and not _whole(change):
                    message = f"{item.value} is no single layer; only a whole layer with its `type` can replace it"
                    self.complain(where, message, place)
                    break
                missing: list[Problem] = []
                items[index] = (merge(item, change, missing, where), suffix, guards)
                unknown.append(missing)
            for problem in unknown[0] if unknown else ():
                if all(problem in missing for missing in unknown):
                    self.problems.append(problem)
        if not isinstance(overrides.value, dict):
            self.complain(path, "`overrides` must be a mapping from indices or slices to changes", overrides.mark)
        return self._items(items, path, node.mark)

    def _expand(self, node: Tree, path: str, alone: bool) -> Iterator[tuple[Tree, str, tuple[Guard, ...]]]:
        """The items of a list with its patterns written out as often as they can be repeated."""
        total = 0
        for index, item in enumerate(node.items):
            suffix = "" if alone else f"[{index}]"
            for found in self._repeated(item, path, suffix, ()):
                total += 1
                if total > MAX_LAYERS:
                    self.complain(path, f"more than {MAX_LAYERS} items", item.mark)
                    return
                yield found

    def _repeated(
        self, item: Tree, path: str, suffix: str, guards: tuple[Guard, ...]
    ) -> Iterator[tuple[Tree, str, tuple[Guard, ...]]]:
        written, item = item, self._named_tree(item)
        entries = item.entries
        if "repeat" not in entries and "of" not in entries:
            yield item, suffix, guards
            return
        if item in self.unfolding or len(self.unfolding) == MAX_NAMES:
            self.complain(path + suffix, "a pattern that holds itself, or too many others", written.mark)
            return
        self.unfolding.append(item)
        try:
            yield from self._turns(item, path, suffix, guards)
        finally:
            self.unfolding.pop()

    def _turns(
        self, item: Tree, path: str, suffix: str, guards: tuple[Guard, ...]
    ) -> Iterator[tuple[Tree, str, tuple[Guard, ...]]]:
        """The items of a pattern, as often as they can be repeated."""
        entries = item.entries
        meant: set[str | None] = set()
        for key in entries:
            if key not in PATTERN:
                message = f"unknown key {key!r} of a pattern{did_you_mean(key, PATTERN)}"
                self.complain(f"{path}{suffix}.{key}", message, item.key_place(key))
                meant.add(nearest(key, PATTERN))
        missing = [key for key in PATTERN if key not in entries]
        for key in missing:
            if key not in meant:
                self.complain(path + suffix, f"a pattern needs `repeat` and `of`; {key!r} is missing", item.mark)
        if missing:
            yield Tree(BROKEN, item.mark), suffix, guards
            return
        count = self.part(entries["repeat"], f"{path}{suffix}.repeat")
        fixed, most = self._most(count, f"{path}{suffix}.repeat", entries["repeat"].mark)
        body = entries["of"]
        parts = body.items if isinstance(body.value, list) else [body]
        for turn in range(most):
            place = f"{suffix}[{turn}]"
            inside = guards if fixed else (*guards, Guard(count, f"{path}{suffix}.repeat", turn))
            empty = True
            for number, part in enumerate(parts):
                tail = f"[{number}]" if isinstance(body.value, list) else ""
                for found in self._repeated(part, path, place + tail, inside):
                    empty = False
                    yield found
            if empty:
                return

    def _named_tree(self, item: Tree) -> Tree:
        """The mapping that `$name` stands for, so that overrides can be laid on it; anything else as it is."""
        named = self._declared(item.value) if isinstance(item.value, str) else item
        return named if isinstance(named.value, dict) and not set(HOLE_KINDS) & set(named.value) else item

    def _declared(self, text: str) -> Tree:
        """What `vars` says about `$name`, or nothing."""
        return self.declared.get(text[1:], Tree(None)) if text.startswith("$") else Tree(None)

    def _most(self, count: Part, path: str, mark: Mark | None) -> tuple[bool, int]:
        """Whether a count is fixed, and the largest that it can be; a wrong one is 1, so that the rest is checked."""
        try:
            values = list(self._possible(count))
        except ExpressionError as error:
            self.complain(path, error.message, _shift(mark, error.column))
            return True, 1
        except ZooError as error:
            self.complain(path, str(error), mark)
            return True, 1
        if BROKEN in values:
            return True, 1
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                given = "a list" if isinstance(value, list) else "a mapping" if isinstance(value, dict) else repr(value)
                self.complain(path, f"expected a whole number of repetitions; got {given}", mark)
                return True, 1
        if values and max(values) > MAX_LAYERS:
            self.complain(path, f"at most {MAX_LAYERS} repetitions; got {shortened(str(max(values)))}", mark)
            return True, 1
        return len(set(values)) <= 1, max(values, default=0)

    def _possible(self, part: Part, *, ends: bool = True) -> Iterator[Any]:
        """Every value that a number of repetitions can take; with `ends`, of a range of too many only the two ends."""
        if isinstance(part, Leaf):
            yield part.value.value
        elif isinstance(part, Formula):
            yield from self._formula_values(part.expression)
        elif isinstance(part, Hole) and part.kind == "int":
            values = part.labels()
            if len(values) <= MAX_LAYERS:
                yield from values
            elif ends:
                yield from (values[0], values[-1])
            else:
                raise ZooError(f"a range of {len(values):,} values is too large to compute a number of repetitions of")
        elif isinstance(part, Hole) and part.kind == "choice":
            for option in part.options:
                yield from self._possible(option.part, ends=ends)
        else:
            raise ZooError("a number of repetitions is whole; use a number, `int` or `choice`")

    def _formula_values(self, expression: Expression) -> Iterator[Any]:
        """The values of an expression under all values of its names."""
        assignments: list[dict[str, Any]] = [{}]
        for name, column in sorted(expression.columns.items()):
            values = self._name_values(name, expression.text, column)
            if len(assignments) * len(values) > MAX_LAYERS:
                raise ExpressionError("the number of repetitions depends on too many choices", expression.text, column)
            assignments = [{**known, name: value} for known in assignments for value in values]
        for assignment in assignments:
            broken = any(value is BROKEN for value in assignment.values())
            yield BROKEN if broken else expression.evaluate(assignment)

    def _name_values(self, name: str, text: str, column: int) -> list[Any]:
        if name not in self.named:
            raise ExpressionError(f"unknown name {name!r}{did_you_mean(name, self.named)}", text, column)
        if name in self.open:
            circle = " -> ".join([*self.open[self.open.index(name) :], name])
            raise ExpressionError(f"{name!r} is defined by itself: {circle}", text, column)
        if len(self.open) == MAX_NAMES:
            raise ExpressionError(f"{name!r} stands behind {MAX_NAMES} names that rest on each other", text, column)
        self.open.append(name)
        try:
            return list(self._possible(self.part(self.named[name], name), ends=text == f"${name}"))
        finally:
            self.open.pop()

    def _hole(self, node: Tree, path: str) -> Part:
        kinds = [kind for kind in HOLE_KINDS if kind in node.entries]
        kind = kinds[0]
        allowed = {kind, "name"} | ({"step", "log"} if kind == "int" else {"log"} if kind == "float" else set())
        for key in node.entries:
            if key not in allowed:
                message = f"unknown key {key!r} of a {kind} hole{did_you_mean(key, allowed)}"
                self.complain(f"{path}.{key}", message, node.key_place(key))
        name = node.entries["name"].value if "name" in node.entries else None
        if name is not None and not (isinstance(name, str) and name.isidentifier()):
            self.complain(f"{path}.name", f"expected a name; got {name!r}", node.entries["name"].mark)
            name = None
        body = node.entries[kind]
        hole = self._choice(body, path) if kind == "choice" else self._range(kind, node, path)
        return Leaf(Tree(BROKEN, node.mark)) if hole is None else replace(hole, name=name, mark=node.mark)

    def _choice(self, body: Tree, path: str) -> Hole | None:
        given: list[tuple[Scalar | None, Tree]]
        if isinstance(body.value, dict):
            given = list(body.value.items())
        elif isinstance(body.value, list):
            given = [(None, item) for item in body.value]
        else:
            self.complain(path, "expected a list of values, or a mapping from names to values", body.mark)
            return None
        if not given:
            self.complain(path, "a choice needs at least one value", body.mark)
            return None
        labels = [name if name is not None else _label(item) for name, item in given]
        labels = [
            label if _count(labels, label) == 1 else _long_label(item)
            for (_, item), label in zip(given, labels, strict=True)
        ]
        options: list[Option] = []
        for label, (_, item) in zip(labels, given, strict=True):
            if _count([option.label for option in options], label):
                self.complain(path, f"the choice {label!r} stands twice", item.mark)
                continue
            options.append(Option(label, self.part(item, f"{path}.{label}")))
        return Hole("choice", tuple(options))

    def _range(self, kind: str, node: Tree, path: str) -> Hole | None:
        body = node.entries[kind]
        ends = [item.value for item in body.items]
        step = node.entries["step"].value if "step" in node.entries else 1
        log = node.entries["log"].value if "log" in node.entries else False
        whole = kind == "int"
        number = int if whole else (int, float)
        if len(ends) != 2 or any(isinstance(end, bool) or not isinstance(end, number) for end in ends):
            self.complain(path, f"expected `{kind}: [low, high]` with two {'whole ' * whole}numbers", body.mark)
            return None
        low, high = ends
        assert isinstance(low, int | float) and isinstance(high, int | float)
        if whole and max(abs(low), abs(high)) > MAX_WHOLE:
            given = shortened(str(max(low, high, key=abs)))
            self.complain(path, f"the ends of a range are at most {MAX_WHOLE} (2**53); got {given}", body.mark)
            return None
        if low > high:
            self.complain(path, f"the range [{low}, {high}] is empty", body.mark)
            return None
        if isinstance(step, bool) or not isinstance(step, int) or step < 1:
            self.complain(f"{path}.step", f"expected a whole number of at least 1; got {step!r}", node.mark)
            return None
        if not isinstance(log, bool) or (log and (low <= 0 or step != 1)):
            self.complain(f"{path}.log", "a logarithmic range starts above zero and has no step", node.mark)
            return None
        return Hole(kind, low=low, high=high - (high - low) % step if whole else high, step=step, log=log)


def _meant_as_hole(node: Tree) -> str | None:
    """The key of a mapping that holds what a hole holds, and is nearly called like one."""
    key = next((key for key in node.entries if key not in _BESIDE_HOLES), None)
    if key is None or any(other != key and other not in _BESIDE_HOLES for other in node.entries):
        return None
    kind = nearest(key, HOLE_KINDS)
    content = node.entries[key]
    if kind == "choice":
        return key if isinstance(content.value, list | dict) else None
    ends = [item.value for item in content.items]
    return key if kind and len(ends) == 2 and all(isinstance(end, int | float) for end in ends) else None


def _whole(change: Tree) -> bool:
    """Whether what is laid on a layer needs nothing below it."""
    return change.tag == REPLACE or not isinstance(change.value, dict) or "type" in change.value


def _names_in(node: Tree) -> list[tuple[str, Mark | None]]:
    """The names that the expressions inside a value stand on, and where; expressions that cannot be read have none."""
    found: list[tuple[str, Mark | None]] = []
    for _, item in walk(node):
        if isinstance(item.value, str) and item.value.startswith("$"):
            with contextlib.suppress(ExpressionError):
                found += [(name, _shift(item.mark, column)) for name, column in parse(item.value).columns.items()]
    return found


def _extent(node: Tree, known: dict[int, tuple[Tree, int, int]]) -> tuple[int, int]:
    """How many values a tree holds, those that stand at several places counted at each, and how deep it is."""
    if id(node) not in known:
        inside = [_extent(item, known) for item in [*node.entries.values(), *node.items]]
        size, height = 1 + sum(size for size, _ in inside), 1 + max((height for _, height in inside), default=0)
        known[id(node)] = (node, size, height)
    return known[id(node)][1:]


def _slice(text: str) -> slice:
    """Python's indices and slices: `3`, `-1`, `::8`, `2:10:2`."""
    number = "-?[0-9]{1,9}"
    if not re.fullmatch(f"{number}|({number})?:({number})?(:({number})?)?", text):
        raise ZooError(f"expected an index or a slice such as '3', '-1', '2:8' or '::8'; got {text!r}")
    numbers = [int(part) if part else None for part in text.split(":")]
    if len(numbers) > 1:
        if numbers[2:] == [0]:
            raise ZooError("a slice's step must not be zero")
        return slice(*numbers)
    index = numbers[0]
    assert index is not None
    return slice(index, index + 1 if index != -1 else None)


def _counts_from_end(text: str) -> bool:
    return "-" in text


def _label(item: Tree) -> Scalar:
    """What names an option: a scalar itself, else the type of a node, or of its mixer."""
    if not isinstance(item.value, dict | list):
        return None if item.value is BROKEN else item.value
    for key in ("type", "mixer", "channel"):
        inner = item.entries.get(key)
        if inner is not None:
            label = _label(inner)
            return label if isinstance(label, str) else key
    return "option"


def _long_label(item: Tree) -> Scalar:
    """A label that tells apart nodes of one type: the type with its scalar fields."""
    if isinstance(item.value, list) or not isinstance(item.value, dict):
        return _label(item)
    fields = [f"{key}={_brief(value)}" for key, value in item.entries.items() if key != "type"]
    return f"{_label(item)}({','.join(fields)})" if fields else _label(item)


def _brief(item: Tree) -> str:
    return str(_label(item)) if not isinstance(item.value, dict) else str(_long_label(item))


def _count(labels: list[Any], label: Any) -> int:
    return sum(1 for other in labels if other == label and type(other) is type(label))


def _shift(mark: Mark | None, columns: int) -> Mark | None:
    return None if mark is None else Mark(mark.file, mark.line, mark.column + columns, mark.text)
