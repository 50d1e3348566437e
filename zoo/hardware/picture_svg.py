"""A roofline as a standalone SVG: it needs nothing beside itself, and follows a light or a dark page."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from textwrap import shorten

from zoo.hardware.picture import Picture, Point, scaled
from zoo.quantity import format_quantity

WIDTH, HEIGHT = 800, 560
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 84, 64
"""Margins around the plot."""
GLYPH, TALL = 6.6, 13.0
"""What a character of a label takes across, as an average over wide ones, and down; labels are placed by it."""
STYLE = """
svg { color-scheme: light dark; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
.paper { fill: #ffffff; } text { fill: #26241f; } .soft { fill: #6d685f; } .title { font-size: 16px; font-weight: 600; }
.grid { stroke: #ebe9e4; } .axis { stroke: #9a958b; } .under { fill: #0b7a63; fill-opacity: 0.05; }
.roof { stroke: #26241f; stroke-width: 2; fill: none; stroke-linejoin: round; }
.other { stroke: #9a958b; stroke-dasharray: 2 4; fill: none; } .ridge { stroke: #9a958b; stroke-dasharray: 5 4; }
.leader { stroke: #9a958b; stroke-width: 0.8; } .mark { stroke: #ffffff; stroke-width: 1.2; }
.p0 { fill: #0b7a63; } .p1 { fill: #b5541c; } .p2 { fill: #5b4fb0; }
@media (prefers-color-scheme: dark) {
  .paper { fill: #141413; } text { fill: #eceae4; } .soft { fill: #a19c92; } .grid { stroke: #272522; }
  .axis, .other, .ridge, .leader { stroke: #6f6b64; } .under { fill: #4fc2a8; fill-opacity: 0.07; }
  .roof { stroke: #eceae4; } .mark { stroke: #141413; }
  .p0 { fill: #4fc2a8; } .p1 { fill: #e39a5c; } .p2 { fill: #a79df0; }
}
"""


def svg(found: Picture) -> str:
    """The picture as the text of an SVG file.

    The larger a mark, the more of its phase's time it takes; it shows its figures when the pointer rests on it.
    """
    plot = _Plot(found)
    body = [*plot.grid(), *plot.roof(), *plot.ridge(), *plot.names(), *plot.marks(), *plot.legend()]
    about = f"{found.title}: {len(found.points)} points under a roof of {scaled(found.peak)}FLOP/s"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
            f'role="img" aria-label="{escape(about)}">',
            f"<style>{STYLE}</style>",
            f'<rect class="paper" width="{WIDTH}" height="{HEIGHT}"/>',
            *body,
            "</svg>\n",
        ]
    )


@dataclass(frozen=True, slots=True)
class _Box:
    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: _Box) -> float:
        """The area that both cover."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across * down if across > 0 and down > 0 else 0.0

    def nearest(self, x: float, y: float) -> tuple[float, float]:
        """The place of the box that is nearest to one outside."""
        return min(max(x, self.left), self.right), min(max(y, self.top), self.bottom)


class _Plot:
    """Places on the page, and what has been drawn so far, so that no label covers another."""

    def __init__(self, found: Picture) -> None:
        self.found = found
        self.points = [
            (point, self.x(point.intensity), self.y(point.rate), 3.5 + 8 * math.sqrt(point.share))
            for point in found.points
        ]
        self.taken = [_Box(x - size, y - size, x + size, y + size) for _, x, y, size in self.points]
        self.written: list[_Box] = []

    def x(self, value: float) -> float:
        return LEFT + self.found.x.place(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.found.y.place(value) * (HEIGHT - TOP - BOTTOM)

    def grid(self) -> Iterator[str]:
        low, right = HEIGHT - BOTTOM, WIDTH - RIGHT
        for value in self.found.x.decades(14):
            x = self.x(value)
            yield f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{low}"/>'
            yield _text(x, low + 18, scaled(value), "soft", "middle")
        for value in self.found.y.decades(14):
            y = self.y(value)
            yield f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>'
            yield _text(LEFT - 8, y + 4, scaled(value), "soft", "end")
        yield f'<path class="axis" fill="none" d="M{LEFT} {TOP}V{low}H{right}"/>'
        yield _text((LEFT + right) / 2, HEIGHT - 22, "arithmetic intensity, FLOP/byte", "", "middle")
        middle = (TOP + low) / 2
        yield (
            f'<text text-anchor="middle" transform="translate(20 {middle}) rotate(-90)">attainable rate, FLOP/s</text>'
        )

    def roof(self) -> Iterator[str]:
        found = self.found
        low, ridge = 10.0**found.x.low, found.ridge
        foot = low * found.bandwidth
        line = f"M{self.x(low):.1f} {self.y(foot):.1f}L{self.x(ridge):.1f} {self.y(found.peak):.1f}H{WIDTH - RIGHT}"
        yield f'<path class="under" d="{line}V{HEIGHT - BOTTOM}H{LEFT}Z"/>'
        for peak in found.roofs.values():
            y, start = self.y(peak), self.x(peak / found.bandwidth)
            if peak > found.peak:
                rise = f"M{self.x(ridge):.1f} {self.y(found.peak):.1f}L{start:.1f} {y:.1f}H{WIDTH - RIGHT}"
                yield f'<path class="other" d="{rise}"/>'
                self.block(self.x(ridge), self.y(found.peak), start, y)
            elif peak < found.peak:
                yield f'<path class="other" d="M{start:.1f} {y:.1f}H{WIDTH - RIGHT}"/>'
            self.block(start, y, WIDTH - RIGHT, y)
        yield f'<path class="roof" d="{line}"/>'
        self.block(self.x(low), self.y(foot), self.x(ridge), self.y(found.peak))
        yield self.slope(foot)

    def slope(self, foot: float) -> str:
        """The name of the sloping part of the roof, above it and turned with it."""
        found = self.found
        across = self.x(found.ridge) - self.x(10.0**found.x.low)
        down = self.y(found.peak) - self.y(foot)
        turn, share = math.degrees(math.atan2(down, across)), 0.62
        x, y = self.x(10.0**found.x.low) + across * share, self.y(foot) + down * share
        text = f"{format_quantity(found.bandwidth, 'bytes')}/s"
        half = len(text) * GLYPH / 2
        self.write(_Box(x - half - 8, y - half * abs(down / across) - 20, x + half, y))
        return (
            f'<text class="soft" text-anchor="middle" transform="translate({x:.1f} {y:.1f}) rotate({turn:.1f})" '
            f'dy="-8">{text}</text>'
        )

    def ridge(self) -> Iterator[str]:
        x, top, low = self.x(self.found.ridge), self.y(self.found.peak), HEIGHT - BOTTOM
        yield f'<line class="ridge" x1="{x:.1f}" y1="{top:.1f}" x2="{x:.1f}" y2="{low}"/>'
        self.block(x, top, x, low)
        text = f"ridge {scaled(self.found.ridge)} FLOP/byte"
        wide = len(text) * GLYPH
        start, anchor = (x - 8, "end") if x + wide + 8 > WIDTH - RIGHT else (x + 8, "start")
        left = start - wide if anchor == "end" else start
        self.write(_Box(left, low - 22, left + wide, low - 4))
        yield _text(start, low - 10, text, "soft", anchor)

    def marks(self) -> Iterator[str]:
        names = [self.label(point.kind, x, y, size, self.style(point)) for point, x, y, size in self.points]
        yield from (leader for leader, _ in names if leader)
        # Small marks over large ones.
        for point, x, y, size in sorted(self.points, key=lambda each: -each[3]):
            yield self.mark(point, x, y, size)
        yield from (text for _, text in names)

    def style(self, point: Point) -> str:
        return f"p{min(self.found.phases.index(point.phase), 2)}"

    def mark(self, point: Point, x: float, y: float, size: float) -> str:
        figures = (
            f"{point.kind}, {point.phase}: {scaled(point.intensity)} FLOP/byte, {scaled(point.rate)}FLOP/s, "
            f"{point.share:.0%} of the time, bound by {self.found.bound(point)}"
        )
        style = f'class="mark {self.style(point)}"'
        return (
            f"<g>{_shape(style, self.found.phases.index(point.phase), x, y, size)}<title>{escape(figures)}</title></g>"
        )

    def legend(self) -> Iterator[str]:
        yield _text(LEFT, 30, shorten(self.found.title, 76, placeholder=" ..."), "title", "start")
        x: float = LEFT
        for index, phase in enumerate(self.found.phases):
            yield _shape(f'class="p{min(index, 2)}"', index, x + 6, 52, 6)
            yield _text(x + 18, 56, phase, "", "start")
            x += 18 + len(phase) * GLYPH + 22
        still = f"; no arithmetic: {', '.join(self.found.still)}" if self.found.still else ""
        yield _text(x, 56, f"the larger, the more of the phase's time{still}", "soft", "start")

    def block(self, x1: float, y1: float, x2: float, y2: float) -> None:
        """Keep labels off a line."""
        self.taken += _along(x1, y1, x2, y2)

    def names(self) -> Iterator[str]:
        """The peak of each flat roof, close to its right end; that of the main roof below it."""
        for name, peak in self.found.roofs.items():
            text, y = f"{name} {format_quantity(peak, 'flops')}/s", self.y(peak)
            sides = (y + 5, y + 14, y - 18) if peak == self.found.peak else (y - 18, y + 5)
            ends = [(WIDTH - RIGHT - 4 - 20 * step, top) for step in range(12) for top in sides]
            where = self.settle([_Box(end - len(text) * GLYPH, top, end, top + TALL) for end, top in ends])
            yield _text(where.right, where.bottom - 3, text, "soft", "end")

    def label(self, text: str, x: float, y: float, size: float, style: str) -> tuple[str, str]:
        """A text close to a mark, and a line from the mark to it if it is far."""
        wide, boxes = len(text) * GLYPH, []
        for ring in range(12):
            for turn in range(16):
                across, down = math.cos(turn * math.pi / 8), math.sin(turn * math.pi / 8)
                gap = size + 5 + 11 * ring
                left = x + across * (gap + wide / 2) - wide / 2
                top = y + down * (gap + TALL / 2) - TALL / 2
                boxes.append(_Box(left, top, left + wide, top + TALL))
        where = self.settle(boxes, lambda box: self.crossed(x, y, box) if _far(x, y, box, size) else 0.0)
        # The text may be narrower than its box, and keeps to the side of the mark.
        at, anchor = (where.left + where.right) / 2, "middle"
        if where.left > x or where.right < x:
            at, anchor = (where.left, "start") if where.left > x else (where.right, "end")
        leader = ""
        if _far(x, y, where, size):
            near = where.nearest(x, y)
            leader = f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{near[0]:.1f}" y2="{near[1]:.1f}"/>'
            self.block(x, y, *near)
        return leader, _text(at, where.bottom - 3, text, style, anchor)

    def crossed(self, x: float, y: float, box: _Box) -> float:
        """How much a line to a box hides of what has been written."""
        return sum(piece.overlap(other) for piece in _along(x, y, *box.nearest(x, y)) for other in self.written)

    def settle(self, boxes: Sequence[_Box], cost: Callable[[_Box], float] = lambda box: 0.0) -> _Box:
        """Take the box that covers least of what is there, texts least of all; of equal ones the first."""

        def covered(box: _Box) -> float:
            inside = box.left >= LEFT + 2 and box.right <= WIDTH - 4 and box.top >= TOP - 20
            beyond = 0 if inside and box.bottom <= HEIGHT - BOTTOM else 1e6
            hidden = sum(box.overlap(other) for other in self.written)
            return beyond + cost(box) + 9 * hidden + sum(box.overlap(other) for other in self.taken)

        where = min(boxes, key=covered)
        self.write(where)
        return where

    def write(self, box: _Box) -> None:
        """Take a box for a text."""
        self.taken.append(box)
        self.written.append(box)


def _along(x1: float, y1: float, x2: float, y2: float) -> list[_Box]:
    """Small boxes that cover a line."""
    count = max(1, int(math.hypot(x2 - x1, y2 - y1) / 6))
    places = ((x1 + (x2 - x1) * step / count, y1 + (y2 - y1) * step / count) for step in range(count + 1))
    return [_Box(x - 1.5, y - 1.5, x + 1.5, y + 1.5) for x, y in places]


def _far(x: float, y: float, box: _Box, size: float) -> bool:
    """Whether a label is so far from its mark that a line has to join them."""
    near = box.nearest(x, y)
    return math.hypot(near[0] - x, near[1] - y) > size + 12


def _text(x: float, y: float, text: str, style: str, anchor: str) -> str:
    named = f' class="{style}"' if style else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _shape(style: str, index: int, x: float, y: float, size: float) -> str:
    """A disc for the first phase, a diamond for the others."""
    if index == 0:
        return f'<circle {style} cx="{x:.1f}" cy="{y:.1f}" r="{size:.1f}"/>'
    half = size * 1.25
    edges = f"l{half:.1f} {half:.1f}l{-half:.1f} {half:.1f}l{-half:.1f} {-half:.1f}Z"
    return f'<path {style} d="M{x:.1f} {y - half:.1f}{edges}"/>'
