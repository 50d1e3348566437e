"""Rooflines as pictures: points where the figures put them, nothing on top of each other, nothing from outside."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise

import pytest

from zoo.errors import ZooError
from zoo.hardware.picture import Part, Picture, drawn, picture, scaled
from zoo.hardware.picture_svg import svg
from zoo.hardware.profile import load_profile

H100 = load_profile("h100")
PARTS = [
    Part("linear", "forward", 4e12, 4e9, 5e-3),
    Part("linear", "forward", 2e12, 2e9, 2.5e-3),
    Part("attention", "forward", 1e12, 5e8, 1.2e-3),
    Part("norm", "forward", 1e9, 1e9, 4e-4),
    Part("linear", "decode", 1e10, 1e10, 4e-3),
    Part("norm", "decode", 1e6, 1e6, 4e-4),
    Part("embedding", "decode", 0, 1e6, 4e-6),
]
CROWD = [Part(f"kind {index}", "forward", 1e9 * (1 + index / 50), 1e9, 1e-3) for index in range(12)]


def example(parts: list[Part] = PARTS, dtype: str = "bf16") -> Picture:
    return picture("a model", parts, H100, dtype)


def plotted(lines: list[str]) -> list[str]:
    """The rows of the plot without ticks, and without the names of roofs."""
    return [re.sub(r"\S+ [\d.]+[TP]FLOP/s", lambda name: " " * len(name[0]), line[7:]) for line in lines[2:21]]


def test_parts_of_a_kind_are_one_point() -> None:
    found = example()
    assert found.ridge == pytest.approx(989e12 / 3.35e12) and found.phases == ("forward", "decode")
    assert [(point.kind, point.phase) for point in found.points] == [
        ("linear", "forward"),
        ("attention", "forward"),
        ("norm", "forward"),
        ("linear", "decode"),
        ("norm", "decode"),
    ]
    linear = found.points[0]
    assert (linear.intensity, linear.rate) == (6e12 / 6e9, pytest.approx(6e12 / 7.5e-3))
    assert linear.share == pytest.approx(7.5 / (7.5 + 1.2 + 0.4)) and found.still == ("embedding",)
    bounds = {(point.kind, point.phase): found.bound(point) for point in found.points}
    assert bounds["linear", "forward"] == "arithmetic" and bounds["linear", "decode"] == "memory"
    assert bounds["norm", "decode"] == "overhead"


def test_everything_lies_inside_the_axes() -> None:
    for found in (example(), example(CROWD), example(dtype="float64")):
        for point in found.points:
            assert 0 <= found.x.place(point.intensity) <= 1 and 0 <= found.y.place(point.rate) <= 1
        assert 0 < found.x.place(found.ridge) < 1
        assert all(0 < found.y.place(peak) < 1 for peak in found.roofs.values())
        assert found.x.value(found.x.place(found.ridge)) == pytest.approx(found.ridge)
    assert example().roofs == {"int8": 1979e12, "bfloat16": 989e12, "float32": 66.9e12}
    # float64 runs at the rate of the dtype below which it falls back.
    assert example(dtype="float64").roofs["float64"] == H100.rate("float64")


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("width", [10, 56, 64, 80, 200])
def test_letters_stand_at_their_figures(plain: bool, width: int) -> None:
    found = example()
    lines = drawn(found, width, plain=plain).splitlines()
    wide = max(56, min(width, 80))
    assert max(map(len, lines)) <= wide and (not plain or all(line.isascii() for line in lines))
    plot, columns = plotted(lines), wide - 7
    for point, letter in zip(found.points, "ABCac"):
        ((row, column),) = [(row, line.index(letter)) for row, line in enumerate(plot) if letter in line]
        x, y = column / (columns - 1), 1 - row / 18
        assert abs(x - found.x.place(point.intensity)) < 2.5 / columns
        assert abs(y - found.y.place(point.rate)) < 2 / 19
        (figures,) = [line for line in lines if line.startswith(f"{letter} {point.kind}")]
        assert scaled(point.intensity) in figures and f"{point.share:.0%}" in figures
    assert lines[-1] == "without arithmetic: embedding"
    assert any("ridge 295" in line and "FLOP/byte" in line for line in lines)


def test_the_roof_is_drawn_up_to_the_ridge_and_flat_from_there() -> None:
    plot = plotted(drawn(example(), plain=True).splitlines())
    heights = {}
    for row, line in enumerate(plot):
        for column, character in enumerate(line):
            if character in "/-":
                heights[column] = min(row, heights.get(column, 99))
    found = example()
    flat = round(found.x.place(found.ridge) * 72)
    assert all(before >= after for (_, before), (_, after) in pairwise(sorted(heights.items())))
    assert len({row for column, row in heights.items() if column > flat}) == 1
    assert heights[max(heights)] == round((1 - found.y.place(found.peak)) * 18)
    assert heights[0] == round((1 - found.y.place(10.0**found.x.low * found.bandwidth)) * 18)


def test_letters_do_not_cover_each_other() -> None:
    plot = "".join(plotted(drawn(example(CROWD), plain=True).splitlines()))
    assert set("ABCDEFGHIJKL") <= set(plot)
    assert drawn(picture("größer", PARTS, H100, "bf16"), plain=True).startswith("gr??er\n")


SVG = "{http://www.w3.org/2000/svg}"


def test_marks_of_the_svg_stand_at_their_figures() -> None:
    found = example()
    root = ET.fromstring(svg(found))
    marks = {}
    for group in root.iter(f"{SVG}g"):
        title = group.findtext(f"{SVG}title", "")
        circle, path = group.find(f"{SVG}circle"), group.find(f"{SVG}path")
        if circle is not None:
            marks[title.split(":")[0]] = (float(circle.attrib["cx"]), float(circle.attrib["cy"]))
        elif path is not None:
            x, top, half = map(float, re.findall(r"[\d.]+", path.attrib["d"])[:3])
            marks[title.split(":")[0]] = (x, top + half)
    assert len(marks) == len(found.points)
    for point in found.points:
        x, y = marks[f"{point.kind}, {point.phase}"]
        assert x == pytest.approx(76 + found.x.place(point.intensity) * 700, abs=0.2)
        assert y == pytest.approx(496 - found.y.place(point.rate) * 412, abs=0.2)


@pytest.mark.parametrize("parts", [PARTS, CROWD], ids=["example", "crowd"])
def test_no_text_of_the_svg_covers_another(parts: list[Part]) -> None:
    boxes = []
    for text in ET.fromstring(svg(example(parts))).iter(f"{SVG}text"):
        if "transform" in text.attrib:
            continue
        x, y, wide = float(text.attrib["x"]), float(text.attrib["y"]), len(text.text or "") * 6.0
        left = x - {"start": 0.0, "middle": wide / 2, "end": wide}[text.attrib["text-anchor"]]
        assert left >= 0 and left + wide <= 800 and 0 < y < 560
        boxes.append((left, y - 10, left + wide, y + 1, text.text))
    for one, other in combinations(boxes, 2):
        apart = one[2] <= other[0] or other[2] <= one[0] or one[3] <= other[1] or other[3] <= one[1]
        assert apart, (one, other)


def test_the_svg_stands_alone_and_follows_the_page() -> None:
    hostile = picture("<a> & 'b'", [Part('<x> & "y"', "forward", 1e9, 1e9, 1e-3)], H100, "bf16")
    for found in (example(), hostile):
        text = svg(found)
        root = ET.fromstring(text)
        assert root.tag == f"{SVG}svg" and root.attrib["aria-label"].startswith(found.title)
        assert not re.search(r"href|url\(|@import|<script|<image|<use", text)
        assert text.count("http") == 1 and "prefers-color-scheme: dark" in text
        assert "attainable rate, FLOP/s" in text and "arithmetic intensity, FLOP/byte" in text
    assert '<x> & "y"' in [each.text for each in ET.fromstring(svg(hostile)).iter(f"{SVG}text")]


def test_numbers_have_prefixes() -> None:
    assert [scaled(value) for value in (0.01, 0.25, 1, 999, 1000, 1.234e13, 1e18, 1e22)] == [
        "0.01",
        "0.25",
        "1",
        "999",
        "1k",
        "12.3T",
        "1E",
        "10000E",
    ]


def test_what_cannot_be_drawn_is_an_error() -> None:
    with pytest.raises(ZooError, match="no part does any arithmetic"):
        example([Part("embedding", "forward", 0, 1, 1)])
    with pytest.raises(ZooError, match=r"norm of decode does 1 operations with 0 bytes in 1s"):
        example([Part("norm", "decode", 1, 0, 1)])
    with pytest.raises(ZooError, match="unknown dtype"):
        example(dtype="int4")
    assert math.isfinite(example().x.place(1))
