"""Predicted against measured, as a part of the report: a table and a plot for each latency of the finalists."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from zoo.quantity import format_quantity
from zoo.search.finalists import interval

WIDTH, HEIGHT = 460.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 14.0, 12.0, 46.0
WIDE = 8.0
"""The ratio of the largest to the smallest value from which axes are logarithmic."""

Row = Mapping[str, Any]


def section(finalists: Mapping[str, Any] | None, terms: Sequence[Row]) -> str:
    """The part of the page; empty without finalists. `terms` as results.json has them."""
    if finalists is None:
        return ""
    bounds = {term["figure"]: term["high"] for term in terms}
    parts = ["<h2>Predicted against measured</h2>"]
    for figure in finalists["figures"]:
        name = figure["figure"]
        rows = [row for row in finalists["rows"] if row["figure"] == name]
        timed = [row for row in rows if row["measured"] is not None]
        plot = f"<div>{_plot(timed, name, bounds.get(name))}</div>" if timed else ""
        parts.append(
            f'<p class="note">{escape(figure["sentence"])}</p>'
            f'<section class="card agreement">{plot}<div class="scroll">{_table(rows)}</div></section>'
        )
    return "\n".join(parts)


def _table(rows: Iterable[Row]) -> str:
    heads = ("trial", "predicted", "90% interval", "measured", "off by")
    head = "".join(f'<th scope="col"{_number(at)}>{text}</th>' for at, text in enumerate(heads))
    body = "".join(_line(row) for row in rows)
    return f"<table><thead><tr>{head}<td></td></tr></thead><tbody>{body}</tbody></table>"


def _number(column: int) -> str:
    return ' class="number"' if column else ""


def _line(row: Row) -> str:
    measured, tags = row["measured"], []
    if measured is not None:
        kind = "tag" if row["inside"] else "tag plain"
        tags.append(f'<span class="{kind}">{"inside" if row["inside"] else "outside"}</span>')
        if row["meets"] is False:
            tags.append('<span class="tag plain">over the budget</span>')
    cells = (
        format_quantity(row["predicted"], "time"),
        interval(row["low"], row["high"]),
        "–" if measured is None else format_quantity(measured, "time"),
        "–" if measured is None else f"{row['predicted'] / measured - 1:+.1%}",
    )
    numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in cells)
    said = escape(row["reason"]) if row["reason"] else " ".join(tags)
    return f'<tr><th scope="row">{row["number"]}</th>{numbers}<td>{said}</td></tr>'


class _Axis:
    """A scale that both axes share, so that the diagonal is where predictions are right."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        self.log = high > WIDE * low > 0
        if self.log:
            self.low, self.high = low / 1.15, high * 1.15
        else:
            margin = 0.06 * (high - low) or 0.1 * high or 1.0
            self.low, self.high = max(low - margin, 0.0), high + margin

    def share(self, value: float) -> float:
        """Where a value stands, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def x(self, value: float) -> float:
        return LEFT + self.share(value) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - self.share(value) * (HEIGHT - TOP - BOTTOM)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [step * 10.0**power for power in powers for step in (1, 2, 5)]
        else:
            raw = (self.high - self.low) / 5
            base = 10.0 ** math.floor(math.log10(raw))
            step = base * next(factor for factor in (1, 2, 5, 10) if factor * base >= raw)
            found = [step * count for count in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]
        return [tick for tick in found if self.low <= tick <= self.high]


def _plot(rows: Sequence[Row], name: str, bound: float | None) -> str:
    """Each finalist as a point above its prediction, with the interval as a line; the diagonal; the budget, dashed."""
    highs = [row["high"] for row in rows if row["high"] is not None]
    axis = _Axis([value for row in rows for value in (row["predicted"], row["measured"], row["low"])] + highs)
    low, high = axis.low, axis.high
    parts = []
    for tick in axis.ticks():
        x, y, text = axis.x(tick), axis.y(tick), escape(format_quantity(tick, "time"))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{text}</text>')
    parts.append(
        f'<line class="cross" x1="{axis.x(low):.1f}" y1="{axis.y(low):.1f}" '
        f'x2="{axis.x(high):.1f}" y2="{axis.y(high):.1f}"/>'
    )
    if bound is not None and low <= bound <= high:
        x, y = axis.x(bound), axis.y(bound)
        parts.append(f'<line class="bound" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text class="bound" x="{LEFT + 6}" y="{y - 5:.1f}">budget</text>')
    for row in rows:
        x, y = axis.x(row["predicted"]), axis.y(row["measured"])
        top = TOP if row["high"] is None else axis.y(row["high"])
        title = f"trial {row['number']}: {format_quantity(row['measured'], 'time')} measured"
        parts.append(f'<line class="span" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{axis.y(row["low"]):.1f}"/>')
        parts.append(
            f'<circle class="dot{" front" if row["inside"] else " outside"}" cx="{x:.1f}" cy="{y:.1f}" r="5">'
            f"<title>{escape(title)}</title></circle>"
        )
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">predicted</text>')
    parts.append(f'<text x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">measured</text>')
    about = escape(f"{name}: predicted across, measured up")
    return f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img" aria-label="{about}">{"".join(parts)}</svg>'
