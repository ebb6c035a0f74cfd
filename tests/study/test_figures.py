from __future__ import annotations

import math
from xml.etree import ElementTree

import pytest

from taskgrad.study import svg


def parsed(content: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg.document(content, 460, 280))


def polylines(root: ElementTree.Element) -> list[list[tuple[float, ...]]]:
    found = root.iter("{http://www.w3.org/2000/svg}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.attrib["points"].split()] for line in found]


def test_lines_have_gaps_where_values_are_unknown() -> None:
    series = [svg.Series("a", [1.0, None, 2.0, 3.0], 0)]
    lines = polylines(parsed(svg.line_chart("title", [0, 1, 2, 3], series)))
    assert [len(line) for line in lines] == [1, 2]
    assert lines[1][0][1] > lines[1][1][1], "a larger value is drawn higher"


def test_log_scale_drops_what_it_cannot_show() -> None:
    series = [svg.Series("a", [1e-3, -1.0, 1e-1, 1e-2], 0)]
    lines = polylines(parsed(svg.line_chart("title", [0, 1, 2, 3], series, log=True)))
    (low,), (top, middle) = lines
    assert top[1] < middle[1] < low[1]
    assert math.isclose(low[1] - middle[1], middle[1] - top[1], abs_tol=0.2)


@pytest.mark.parametrize("values", [[], [None, None], [0.0, 0.0]])
def test_charts_of_nothing(values: list[float | None]) -> None:
    for log in (False, True):
        parsed(svg.line_chart("t", list(range(len(values))), [svg.Series("a", values, 0)], log=log))


def test_names_are_escaped() -> None:
    root = parsed(svg.bar_chart("<&>", ["a<b"], [svg.Series("x&y", [0.5], 1)]))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"<&>", "a<b", "x&y", "50"} <= set(texts)


def test_marks_are_levels_of_their_groups() -> None:
    series = [svg.Series("x", [0.5, 0.5], 0), svg.Series("y", [0.25, 1.0], 1)]
    root = parsed(svg.bar_chart("t", ["a", "b"], series, marks=[0.25, 0.5]))
    marks = [line.attrib for line in root.iter("{http://www.w3.org/2000/svg}line") if "stroke-dasharray" in line.attrib]
    bars = [bar.attrib for bar in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    # level with the top of the bar of the same value, and as wide as its group
    assert [float(mark["y1"]) for mark in marks] == [float(bars[1]["y"]), float(bars[2]["y"])]
    for mark, first, last in zip(marks, bars[::2], bars[1::2], strict=True):
        assert mark["y1"] == mark["y2"]
        assert float(mark["x1"]) <= float(first["x"])
        assert float(mark["x2"]) >= float(last["x"]) + float(last["width"])


def test_heat_map_tells_sign_and_gap() -> None:
    root = parsed(svg.heat_map("t", ["a"], ["x", "y", "z"], [[-0.5, 0.5, None]]))
    cells = [r.attrib["fill"] for r in root.iter("{http://www.w3.org/2000/svg}rect")][1:]
    assert cells == ["var(--low)", "var(--high)", "var(--high)"]
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"-0.50", "+0.50", "–"} <= set(texts)
