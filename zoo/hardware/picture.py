"""A roofline as a picture: what is drawn, on logarithmic axes, and the drawing of it with characters.

Operations per byte lie on x, operations a second on y. A device's roof rises with its bandwidth up to the ridge, where
the peak of the dtype takes over; a part of a model lies on it where nothing but these two holds it back, below it
where its launches do (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785).
"""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from textwrap import shorten
from typing import Literal

from zoo.accounting import ALIASES
from zoo.errors import ZooError
from zoo.hardware.profile import Profile
from zoo.quantity import format_quantity, plain_number


@dataclass(frozen=True, slots=True)
class Part:
    """Work of one kind in one phase: floating point operations, bytes moved, and seconds, measured or predicted."""

    kind: str
    phase: str
    operations: float
    bytes: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Point:
    """Where the parts of a kind lie: operations per byte and a second, and their share of the time of their phase."""

    kind: str
    phase: str
    intensity: float
    rate: float
    share: float


@dataclass(frozen=True, slots=True)
class Axis:
    """A logarithmic axis over whole decades, from `10**low` to `10**high`."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Where a value lies, 0 at the low end and 1 at the high one."""
        return (math.log10(value) - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        return 10 ** (self.low + place * (self.high - self.low))

    def decades(self, most: int) -> Iterator[float]:
        """Powers of ten for ticks, at most `most`, evenly apart."""
        step = math.ceil((self.high - self.low + 1) / most)
        yield from (10.0**power for power in range(self.low, self.high + 1, step))


@dataclass(frozen=True, slots=True)
class Picture:
    """A roofline ready to be drawn.

    peak: of the dtype that was asked for; roofs: the peaks of all, by the dtypes that have it. phases: in order; points
    in that order, and in each by their share of the time. still: kinds without arithmetic, which have no place.
    """

    title: str
    peak: float
    bandwidth: float
    roofs: Mapping[str, float]
    phases: tuple[str, ...]
    points: tuple[Point, ...]
    still: tuple[str, ...]
    x: Axis
    y: Axis

    @property
    def ridge(self) -> float:
        """Operations per byte from which on arithmetic is the bound."""
        return self.peak / self.bandwidth

    def roof(self, intensity: float, peak: float | None = None) -> float:
        """The operations a second that a device can reach."""
        return min(self.peak if peak is None else peak, intensity * self.bandwidth)

    def bound(self, point: Point) -> Literal["overhead", "memory", "arithmetic"]:
        """What takes most of the time: overhead where less than half of what the roof allows is reached."""
        if point.rate < self.roof(point.intensity) / 2:
            return "overhead"
        return "memory" if point.intensity < self.ridge else "arithmetic"


def picture(title: str, parts: Iterable[Part], device: Profile, dtype: str) -> Picture:
    """The roofline of a device with the parts of a model on it, those of a kind and phase as one point.

    Raises `ZooError` if no part does arithmetic, or one that does takes no time or moves no bytes.
    """
    sums: dict[tuple[str, str], tuple[float, float, float]] = {}
    for part in parts:
        sofar = sums.get((part.phase, part.kind), (0.0, 0.0, 0.0))
        sums[part.phase, part.kind] = (
            sofar[0] + part.operations,
            sofar[1] + part.bytes,
            sofar[2] + part.seconds,
        )
    phases = tuple(dict.fromkeys(phase for phase, _ in sums))
    whole = {phase: sum(seconds for (other, _), (*_, seconds) in sums.items() if other == phase) for phase in phases}
    points = []
    for (phase, kind), (operations, moved, seconds) in sums.items():
        if operations and not (moved > 0 and seconds > 0):
            raise ZooError(f"{kind} of {phase} does {operations:g} operations with {moved:g} bytes in {seconds:g}s")
        if operations:
            points.append(
                Point(kind.replace("_", " "), phase, operations / moved, operations / seconds, seconds / whole[phase])
            )
    if not points:
        raise ZooError("nothing to draw: no part does any arithmetic")
    points.sort(key=lambda point: (phases.index(point.phase), -point.share))
    peak = device.rate(dtype)
    ridge = peak / device.bandwidth
    ridges = [rate / device.bandwidth for rate in device.peak.values()]
    intensities = [ridge / 10, ridge * 10, *ridges, *(point.intensity for point in points)]
    x = Axis(_decade(min(intensities), down=True), _decade(max(intensities), down=False))
    rates = [peak, *device.peak.values(), *(point.rate for point in points), 10**x.low * device.bandwidth]
    return Picture(
        title=title,
        peak=peak,
        bandwidth=device.bandwidth,
        roofs=_roofs(device, dtype),
        phases=phases,
        points=tuple(points),
        still=tuple(dict.fromkeys(kind for (_, kind), (operations, *_) in sums.items() if not operations)),
        x=x,
        y=Axis(_decade(min(rates), down=True), _decade(max(rates), down=False)),
    )


def _decade(value: float, *, down: bool) -> int:
    """The power of ten at the end of an axis that leaves some room for marks and names beyond a value."""
    return math.floor(math.log10(value / 1.5)) if down else math.ceil(math.log10(value * 2))


def _roofs(device: Profile, dtype: str) -> dict[str, float]:
    """Peaks by the names of their dtypes, the highest first; that of the dtype asked for by its name alone."""
    names: dict[float, list[str]] = {}
    for name, rate in device.peak.items():
        names.setdefault(rate, []).append(name)
    # One without a rate of its own runs at that of a wider one.
    names[device.rate(dtype)] = [ALIASES.get(dtype, dtype)]
    return {", ".join(names[rate]): rate for rate in sorted(names, reverse=True)}


def scaled(value: float) -> str:
    """A number with a prefix and three digits: `1k`, `2.5T`, `0.01`."""
    power = min(6, max(0, math.floor(math.log10(value) / 3 + 1e-9))) if value > 0 else 0
    return f"{plain_number(float(f'{value / 1000**power:.3g}'))}{['', 'k', 'M', 'G', 'T', 'P', 'E'][power]}"


def drawn(found: Picture, width: int = 80, *, plain: bool = False) -> str:
    """The picture and its legend in lines of at most `width` characters, which is kept within 56 and 80.

    `plain` uses ASCII alone, braille draws finer. Upper case letters are the parts of the first phase, lower case those
    of the second.
    """
    width = max(56, min(width, 80))
    canvas = _Canvas(found, width - _GUTTER, 19, plain)
    for peak in found.roofs.values():
        if peak != found.peak:
            canvas.line(lambda x, peak=peak: found.roof(x, peak), start=peak / found.bandwidth, dotted=True)
    canvas.line(found.roof)
    letters = dict(zip(found.points, _letters(found)))
    for point, letter in letters.items():
        canvas.mark(point.intensity, point.rate, letter)
    for name, peak in found.roofs.items():
        canvas.name(f"{name} {format_quantity(peak, 'flops')}/s", peak, below=peak == found.peak)
    canvas.fall(found.ridge, found.peak)
    lines = [shorten(found.title, width, placeholder=" ..."), *canvas.lines(), *_legend(found, letters, width)]
    text = "\n".join(line.rstrip() for line in lines) + "\n"
    return text.encode("ascii", "replace").decode() if plain else text


_GUTTER = 7
"""Columns for the ticks of y."""


def _letters(found: Picture) -> Iterator[str]:
    """A letter for each point, the same for a kind in all phases but for its case."""
    kinds = list(dict.fromkeys(point.kind for point in found.points))
    cases = (string.ascii_uppercase, string.ascii_lowercase, string.digits)
    for point in found.points:
        case = cases[min(found.phases.index(point.phase), len(cases) - 1)]
        yield case[kinds.index(point.kind) % len(case)]


def _legend(found: Picture, letters: Mapping[Point, str], width: int) -> Iterator[str]:
    """What the letters stand for, and the figures of each."""
    for phase in found.phases:
        points = [point for point in found.points if point.phase == phase]
        if not points:
            continue
        longest = min(max(len(phase) + 2, *(len(point.kind) for point in points)), width - 43)
        yield f"  {phase:<{longest}}  {'FLOP/byte':>10}  {'FLOP/s':>8}  {'time':>5}  bound by"
        for point in points:
            yield (
                f"{letters[point]} {point.kind[:longest]:<{longest}}  {scaled(point.intensity):>10}  "
                f"{scaled(point.rate):>8}  {point.share:>5.0%}  {found.bound(point)}"
            )
    if found.still:
        yield shorten(f"without arithmetic: {', '.join(found.still)}", width, placeholder=" ...")


class _Canvas:
    """Characters of a plot, lines on them drawn as braille dots or, if plain, as ASCII."""

    def __init__(self, found: Picture, columns: int, rows: int, plain: bool) -> None:
        self.found, self.columns, self.rows, self.plain = found, columns, rows, plain
        self.across, self.down = (1, 1) if plain else (2, 4)
        self.dots: dict[tuple[int, int], int] = {}
        self.texts: dict[tuple[int, int], str] = {}

    def dot(self, x: int, y: int, character: str) -> None:
        """A dot at fine coordinates, counted from the left and the top."""
        cell = (x // self.across, y // self.down)
        if not (0 <= cell[0] < self.columns and 0 <= cell[1] < self.rows):
            return
        bits = ord(character) if self.plain else _BRAILLE[y % 4][x % 2]
        self.dots[cell] = bits if self.plain else self.dots.get(cell, 0) | bits

    def height(self, value: float) -> int:
        return round((1 - self.found.y.place(value)) * (self.rows * self.down - 1))

    def column(self, value: float) -> int:
        return round(self.found.x.place(value) * (self.columns * self.across - 1))

    def line(self, of: Callable[[float], float], *, start: float = 0.0, dotted: bool = False) -> None:
        """A function of x from `start` on, without gaps where it is steep."""
        last = None
        fine = self.columns * self.across
        for x in range(fine):
            value = self.found.x.value(x / (fine - 1))
            if value < start:
                continue
            y = self.height(of(value))
            steps = [y] if last is None or last == y else range(y, last)
            if not dotted or x % (2 * self.across) == 0:
                for step in steps:
                    self.dot(x, step, "." if dotted else "-" if last == y else "/")
            last = y

    def fall(self, x: float, y: float) -> None:
        """A dotted line from a place down to the axis."""
        top = self.height(y)
        for step in range(top + self.down, self.rows * self.down, 2 if self.down > 1 else 1):
            self.dot(self.column(x), step, ":")

    def mark(self, x: float, y: float, letter: str) -> None:
        """A letter at a place, or in the nearest one that is free."""
        cell = (self.column(x) // self.across, self.height(y) // self.down)
        near = sorted(
            ((column, row) for column in range(self.columns) for row in range(self.rows)),
            key=lambda other: (abs(other[0] - cell[0]) + 2 * abs(other[1] - cell[1]), other[0] < cell[0], other),
        )
        free = next((other for other in near if other not in self.texts), cell)
        self.texts[free] = letter

    def name(self, text: str, y: float, *, below: bool) -> None:
        """A name at the right end of a flat line, on one side of it or, where there is no room, on the other."""
        row = self.height(y) // self.down
        for at in (row + 1, row - 1) if below else (row - 1, row + 1):
            for start in range(self.columns - len(text), self.columns // 2, -1):
                cells = [(column, at) for column in range(start - 2, start + len(text) + 2)]
                if at >= 0 and not any(cell in self.texts or cell in self.dots for cell in cells):
                    self.texts |= {(start + index, at): letter for index, letter in enumerate(text)}
                    return

    def lines(self) -> Iterator[str]:
        """The plot with its axes."""
        side, corner, tick, floor = ("|", "+", "+", "-") if self.plain else ("│", "└", "┤", "─")
        labels = {self.height(value) // self.down: scaled(value) for value in self.found.y.decades(self.rows)}
        yield f"{'FLOP/s':>{_GUTTER - 1}}"
        for row in range(self.rows):
            label = labels.get(row, "")
            cells = (self._cell(column, row) for column in range(self.columns))
            yield f"{label:>{_GUTTER - 2}} {tick if label else side}{''.join(cells)}"
        ticks = {self.column(value) // self.across: scaled(value) for value in self.found.x.decades(self.columns // 6)}
        joint = "+" if self.plain else "┴"
        bottom = (joint if column in ticks else floor for column in range(self.columns))
        yield f"{' ' * (_GUTTER - 1)}{corner}{''.join(bottom)}"
        yield _laid({_GUTTER + column: label for column, label in ticks.items()}, _GUTTER + self.columns)
        ridge = f"{'^' if self.plain else '▲'} ridge {scaled(self.found.ridge)}"
        at, title = self.column(self.found.ridge) // self.across, "FLOP/byte"
        aside = 0 if at + len(ridge) + len(title) > self.columns else self.columns
        yield _laid({_GUTTER + at + len(ridge) // 2: ridge, _GUTTER + aside: title}, _GUTTER + self.columns)

    def _cell(self, column: int, row: int) -> str:
        if (column, row) in self.texts:
            return self.texts[column, row]
        bits = self.dots.get((column, row), 0)
        return " " if not bits else chr(bits) if self.plain else chr(0x2800 + bits)


_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""The bit of each dot of a braille character, by row and column."""


def _laid(labels: Mapping[int, str], width: int) -> str:
    """Texts centred at columns of one line, those left out that would overlap an earlier one."""
    line = [" "] * width
    for column, text in labels.items():
        start = max(0, min(column - len(text) // 2, width - len(text)))
        if all(cell == " " for cell in line[max(0, start - 1) : start + len(text) + 1]):
            line[start : start + len(text)] = text
    return "".join(line)
