"""What a device can do at best, from a small file: `zoo/hardware/profiles` has those that are shipped.

    name: h200
    kind: cuda
    source: published
    peak: {float32: 66.9TFLOP, bfloat16: 989TFLOP}     # a second
    bandwidth: 4.8TB                                   # a second
    memory: 141GB
    launch: 4us

All but `title`, `cache`, `link`, `fingerprint` and `sources` have to be there. A file that is incomplete or contradicts
itself is a `SpecError` with the line and column of everything that is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Literal

from zoo.accounting import ALIASES, ELEMENT_BYTES
from zoo.errors import Problem, SpecError, ZooError, did_you_mean
from zoo.quantity import EXAMPLES, Dimension, exact_quantity, format_quantity, parse_quantity
from zoo.spec.source import parse_yaml, read_text
from zoo.spec.tree import Tree

Kind = Literal["cpu", "cuda"]

QUANTITIES: Mapping[str, Dimension] = {
    "bandwidth": "bytes",
    "memory": "bytes",
    "launch": "time",
    "cache": "bytes",
    "link": "bytes",
}
"""Fields that are quantities; rates are per second."""
REQUIRED = ("name", "kind", "source", "peak", "bandwidth", "memory", "launch")
TEXTS = ("name", "title", "kind", "source", "fingerprint")
CHOICES = {"kind": ("cpu", "cuda"), "source": ("published", "probed")}
RATES = (*ELEMENT_BYTES, "int8")


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Peak figures of a device.

    peak: operations a second of matrix products, by dtype. bandwidth: bytes a second between memory and processor.
    memory, cache: bytes. launch: seconds that an operation takes however small it is. link: bytes a second to another
    device, each way; None if there is none. source: where the figures come from; `published` ones are not reached in
    practice. fingerprint: the `Device.id` of the machine that was probed.
    """

    name: str
    title: str
    kind: Kind
    source: Literal["published", "probed"]
    peak: Mapping[str, float]
    bandwidth: float
    memory: float
    launch: float
    cache: float | None = None
    link: float | None = None
    fingerprint: str | None = None
    sources: tuple[str, ...] = field(default=())

    def rate(self, dtype: str) -> float:
        """Operations a second in a dtype; for one without a rate that of float32, of which float64 gets half.

        Half precision is computed in float32 where a device has no instructions for it, and no device computes more
        than half as many numbers that are twice as wide.
        """
        name = ALIASES.get(dtype, dtype)
        if name not in RATES:
            raise ZooError(f"unknown dtype {dtype!r}{did_you_mean(dtype, [*RATES, *ALIASES])}")
        if name in self.peak:
            return self.peak[name]
        return self.peak["float32"] / 2 if name == "float64" else self.peak["float32"]

    def as_yaml(self) -> str:
        """The file that loads to this profile."""
        rates = ", ".join(f"{name}: {_said(rate, 'flops')}" for name, rate in self.peak.items())
        lines = [f"name: {_quoted(self.name)}", f"title: {_quoted(self.title)}"]
        lines += [f"kind: {self.kind}", f"source: {self.source}", f"peak: {{{rates}}}"]
        for name, dimension in QUANTITIES.items():
            value = getattr(self, name)
            if value is not None:
                lines.append(f"{name}: {_said(value, dimension)}")
        if self.fingerprint is not None:
            lines.append(f"fingerprint: {_quoted(self.fingerprint)}")
        if self.sources:
            lines += ["sources:", *(f"- {_quoted(source)}" for source in self.sources)]
        return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """A text as YAML takes it whatever is in it: JSON's strings are YAML's."""
    return json.dumps(text, ensure_ascii=False)


def _said(value: float, dimension: Dimension) -> str:
    """A quantity with as many digits as a measurement has."""
    return exact_quantity(float(f"{value:.4g}"), dimension)


def profile_names() -> list[str]:
    """The names of the shipped profiles."""
    folder = files("zoo.hardware") / "profiles"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_profile(name: str | Path) -> Profile:
    """The profile of a shipped name or a file; a `ZooError` names the nearest if there is none."""
    text = str(name)
    if text in profile_names():
        file = files("zoo.hardware") / "profiles" / f"{text}.yaml"
        return parse_profile(file.read_text(encoding="utf-8"), f"{text}.yaml")
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        return parse_profile(read_text(path), text)
    raise ZooError(f"unknown device {text!r}{did_you_mean(text, profile_names())}")


def parse_profile(text: str, file: str = "<text>") -> Profile:
    """The profile that a YAML text describes."""
    tree = parse_yaml(text, file)
    reader = _Reader(tree)
    found = reader.profile()
    if reader.problems or found is None:
        raise SpecError(reader.problems)
    return found


class _Reader:
    """Takes the fields of a file and collects what is wrong with them."""

    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.problems: list[Problem] = []

    def profile(self) -> Profile | None:
        if not isinstance(self.tree.value, dict):
            self.note("", "expected a mapping from names to figures", self.tree)
            return None
        known = (*TEXTS, "peak", *QUANTITIES, "sources")
        for key in self.tree.entries:
            if key not in known:
                self.problems.append(
                    Problem(key, f"unknown key {key!r} of a device{did_you_mean(key, known)}", self.tree.key_place(key))
                )
        for key in REQUIRED:
            if key not in self.tree.entries:
                self.note(key, "required", self.tree)
        texts = {key: self.text(key) for key in TEXTS if key in self.tree.entries}
        quantities = {
            key: self.quantity(key, self.tree.entries[key], dimension)
            for key, dimension in QUANTITIES.items()
            if key in self.tree.entries
        }
        peak = dict(self.rates())
        sources = tuple(self.sources())
        self.contradictions(quantities, peak)
        if self.problems:
            return None
        return Profile(
            **{"title": texts["name"], **texts},  # type: ignore[arg-type]
            **quantities,  # type: ignore[arg-type]
            peak=peak,
            sources=sources,
        )

    def note(self, path: str, message: str, node: Tree) -> None:
        self.problems.append(Problem(path, message, node.mark))

    def text(self, key: str) -> str:
        node = self.tree.entries[key]
        value = node.value
        if not isinstance(value, str) or not value:
            self.note(key, f"expected a text; got {value!r}", node)
            return ""
        choices = CHOICES.get(key)
        if choices is not None and value not in choices:
            self.note(key, f"expected {' or '.join(choices)}; got {value!r}{did_you_mean(value, choices)}", node)
        return value

    def quantity(self, path: str, node: Tree, dimension: Dimension) -> float:
        value = node.value
        try:
            if not isinstance(value, str) or not any(map(str.isalpha, value)):
                raise ZooError(f"expected a number with a unit, {EXAMPLES[dimension]}; got {value!r}")
            found = parse_quantity(str(value), dimension)
            if not (math.isfinite(found) and found > 0):
                raise ZooError(f"expected a number above zero; got {value}")
        except ZooError as error:
            self.note(path, str(error), node)
            return math.nan
        return found

    def sources(self) -> Iterator[str]:
        node = self.tree.entries.get("sources", Tree([]))
        if not isinstance(node.value, list):
            self.note("sources", f"expected a list of texts; got {node.value!r}", node)
        for index, item in enumerate(node.items):
            if not isinstance(item.value, str):
                self.note(f"sources.{index}", f"expected a text; got {item.value!r}", item)
            yield str(item.value)

    def rates(self) -> Iterator[tuple[str, float]]:
        node = self.tree.entries.get("peak", Tree({}))
        if not node.entries and "peak" in self.tree.entries:
            self.note("peak", "expected rates by dtype, such as {float32: 1TFLOP}", node)
        for name, item in node.entries.items():
            if name not in RATES:
                message = f"unknown dtype {name!r}{did_you_mean(name, RATES)}"
                self.problems.append(Problem(f"peak.{name}", message, node.key_place(name)))
            yield name, self.quantity(f"peak.{name}", item, "flops")

    def contradictions(self, quantities: Mapping[str, float], peak: Mapping[str, float]) -> None:
        for small, large in (("cache", "memory"), ("link", "bandwidth")):
            if quantities.get(small, 0.0) >= quantities.get(large, math.inf):
                shown = [format_quantity(quantities[key], "bytes") for key in (small, large)]
                message = f"{small} of {shown[0]} and {large} of {shown[1]} contradict each other"
                self.note(small, message, self.tree.entries[small])
        if "float32" not in peak and "peak" in self.tree.entries:
            self.note("peak", "a rate for float32 is required; others fall back to it", self.tree.entries["peak"])
        if peak.get("float64", 0.0) > peak.get("float32", math.inf):
            self.note("peak.float64", "faster than float32", self.tree.entries["peak"].entries["float64"])
