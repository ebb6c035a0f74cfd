"""Draw what a step costs against the number of tasks, from a `step-cpu.json` of `python -m benchmarks.step`.

python -m benchmarks.cost_picture benchmarks/results/step-cpu.json docs/cost.svg
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from taskgrad.study import svg

_COLORS = {  # of what gives a Gram of tasks; of two ways of one library the cheaper
    "sketch": 1,
    "exact_gram": 3,
    "T sub-batches": 0,
    "T backwards": 0,
    "TorchJD autojac": 2,
    "TorchJD autogram": 2,
    "Opacus hooks": 4,
    "vmap(grad)": 4,
    "ghost dot-product": 0,
}
_OURS = ("sketch", "exact_gram")
_WIDTH, _HEIGHT = 468.0, 330.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 40.0, 162.0, 36.0, 40.0
_LINE = 14.0  # between two names
_TICKS = (1, 1.5, 2, 3, 5, 10, 20, 50, 100)


@dataclass(frozen=True)
class _Frame:
    """From (tasks, ratio) to places, both logarithmic."""

    tasks: tuple[float, float]
    ratios: tuple[float, float]

    def x(self, tasks: float) -> float:
        return _LEFT + _part(tasks, self.tasks) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, ratio: float) -> float:
        return _HEIGHT - _BOTTOM - _part(ratio, self.ratios) * (_HEIGHT - _TOP - _BOTTOM)


def picture(result: dict[str, Any]) -> str:
    """A panel a width at which several numbers of tasks were measured, all on one scale.

    Raises ValueError without any.
    """
    widths: dict[int, list[dict[str, Any]]] = {}
    for case in result["cases"].values():
        widths.setdefault(case["setting"]["width"], []).append(case)
    panels = {width: cases for width, cases in widths.items() if len({c["setting"]["tasks"] for c in cases}) > 1}
    if not panels:
        raise ValueError("result must hold cases with different numbers of tasks at one width")
    lines = {width: _lines(cases) for width, cases in panels.items()}
    points = [point for found in lines.values() for line in found.values() for point in line]
    tasks, ratios = [t for t, _ in points], [r for _, r in points]
    top = next((tick for tick in _TICKS if tick >= max(ratios)), max(ratios))
    frame = _Frame((min(tasks), max(tasks)), (min(0.95, *ratios), max(top, 2)))
    content = []
    for number, (width, cases) in enumerate(sorted(panels.items())):
        size = cases[0]["parameters"] / 1e6
        title = f"Whole step, in plain steps: {size:.1f} M parameters"
        content.append(svg.shifted(_panel(title, frame, lines[width]), 8 + number * (_WIDTH + 8), 8))
    return svg.document("".join(content), len(panels) * (_WIDTH + 8) + 8, _HEIGHT + 16)


def _lines(cases: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """(tasks, ratio) of every variant that was timed, in order of tasks."""
    found: dict[str, list[tuple[float, float]]] = {}
    for case in sorted(cases, key=lambda c: c["setting"]["tasks"]):
        for name in _COLORS:
            if (ratio := case["variants"].get(name, {}).get("ratio")) is not None:
                found.setdefault(name, []).append((case["setting"]["tasks"], ratio))
    return found


def _panel(title: str, frame: _Frame, lines: dict[str, list[tuple[float, float]]]) -> str:
    right = _WIDTH - _RIGHT
    parts = [f'<text class="title" x="8" y="18">{escape(title)}</text>']
    for tick in _TICKS:
        if not frame.ratios[0] <= tick <= frame.ratios[1]:
            continue
        y, dark = frame.y(tick), ' style="stroke:var(--dim)" stroke-dasharray="3 4"' if tick == 1 else ""
        parts.append(f'<line class="grid"{dark} x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="dim end" x="{_LEFT - 6:g}" y="{y + 4:.1f}">{tick:g}</text>')
    for tasks in sorted({tasks for line in lines.values() for tasks, _ in line}):
        x, y = frame.x(tasks), _HEIGHT - _BOTTOM + 18
        parts.append(f'<text class="dim mid" x="{x:.1f}" y="{y:g}">{tasks:g}</text>')
    parts.append(f'<text class="dim mid" x="{(_LEFT + right) / 2:g}" y="{_HEIGHT - 4:g}">tasks</text>')
    names = sorted(lines, key=lambda name: frame.y(lines[name][-1][1]))
    places = _spread([frame.y(lines[name][-1][1]) for name in names])
    for name, place in zip(names, places, strict=True):
        parts.append(_line(name, frame, lines[name], place))
    return "".join(parts)


def _line(name: str, frame: _Frame, line: list[tuple[float, float]], place: float) -> str:
    """The line, its points, and its name at the height of ``place``."""
    ours, color = name in _OURS, f"var(--c{_COLORS[name]})"
    spots = [(frame.x(tasks), frame.y(ratio)) for tasks, ratio in line]
    width, weight = (3, ' font-weight="600"') if ours else (1.5, "")
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
    parts = [f'<polyline class="line" style="stroke:{color};stroke-width:{width}" points="{points}"/>']
    parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{width:g}" fill="{color}"/>' for x, y in spots]
    (x, y), right = spots[-1], _WIDTH - _RIGHT
    leader = f"{x + 4:.1f},{y:.1f} {right + 8:g},{place:.1f}"
    parts.append(f'<polyline class="grid" fill="none" style="stroke:{color};stroke-opacity:.5" points="{leader}"/>')
    last = line[-1][1]
    label = f"{name} {last:.{2 if last < 3 else 1 if last < 10 else 0}f}"
    parts.append(f'<text style="fill:{color}"{weight} x="{right + 12:g}" y="{place + 4:.1f}">{escape(label)}</text>')
    return "".join(parts)


def _spread(places: Sequence[float]) -> list[float]:
    """Ascending places, moved apart to be ``_LINE`` from each other and inside the panel."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + _LINE if moved else _TOP))
    limit = _HEIGHT - 8.0
    for i in range(len(moved) - 1, -1, -1):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - _LINE
    return moved


def _part(value: float, ends: tuple[float, float]) -> float:
    low, high = ends
    return math.log(value / low) / math.log(high / low)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("result", type=Path, help="step-cpu.json")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    args = parser.parse_args()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    args.picture.write_text(picture(json.loads(args.result.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
