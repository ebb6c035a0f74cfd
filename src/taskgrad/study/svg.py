"""Line charts, grouped bars and heat maps as SVG text, readable on light and dark backgrounds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
svg{font-family:system-ui,-apple-system,"Segoe UI",sans-serif;--ink:#24292f;--dim:#6e7781;--grid:#d8dee4;--paper:#fff;
--c0:#57606a;--c1:#0969da;--c2:#bc4c00;--c3:#1a7f37;--c4:#a475f9;--low:#cf222e;--high:#0969da}
@media (prefers-color-scheme:dark){svg{--ink:#e6edf3;--dim:#9198a1;--grid:#3d444d;--paper:#0d1117;
--c0:#b1bac4;--c1:#58a6ff;--c2:#f0883e;--c3:#56d364;--c4:#d2a8ff;--low:#ff7b72;--high:#58a6ff}}
text{fill:var(--ink);font-size:12px}.dim{fill:var(--dim);font-size:11px}.title{font-size:14px;font-weight:600}
.grid{stroke:var(--grid);stroke-width:1}.line{fill:none;stroke-width:2;stroke-linejoin:round}
.end{text-anchor:end}.mid{text-anchor:middle}.halo{paint-order:stroke;stroke:var(--paper);stroke-width:4px}
"""
"""CSS of every figure; colours c0 .. c4 and the dark variants of all."""

_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 16, 66, 40


@dataclass(frozen=True)
class Series:
    """A named line or group of bars; `values` may hold None for gaps. `color` is the number of a colour in `STYLE`."""

    name: str
    values: Sequence[float | None]
    color: int
    dashed: bool = False


def document(content: str, width: float, height: float) -> str:
    """A complete SVG document of the given size around `content`."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" role="img"><style>{STYLE}</style>'
        f'<rect width="{width:g}" height="{height:g}" fill="var(--paper)"/>{content}</svg>'
    )


def shifted(content: str, x: float, y: float) -> str:
    """`content` moved by (x, y)."""
    return f'<g transform="translate({x:g} {y:g})">{content}</g>'


def line_chart(
    title: str,
    x: Sequence[float],
    series: Sequence[Series],
    *,
    width: float = 460,
    height: float = 280,
    x_label: str = "step",
    y_max: float | None = None,
    percent: bool = False,
    log: bool = False,
    mark: float | None = None,
) -> str:
    """Lines over a common `x`. `log`: logarithmic y, values at or below 0 become gaps; `mark`: a dashed level."""
    known = [v for s in series for v in s.values if v is not None and (v > 0 or not log)]
    if log:
        low = math.floor(math.log10(min(known))) if known else -1
        high = max(low + 1, math.ceil(math.log10(max(known)))) if known else 0
        ticks = [10.0**e for e in range(low, high + 1)]
    else:
        top = y_max if y_max is not None else max([*known, mark or 0.0, 1e-9]) * 1.05
        ticks = _ticks(min([0.0, *known]), top)
    frame = _Frame(width, height, (min(x, default=0), max(x, default=1)), (ticks[0], ticks[-1]), log)
    parts = [_heading(title, series), _y_axis(frame, ticks, percent)]
    first, last = frame.x_range
    # The last step is always named, round numbers only where they leave it room.
    named = [tick for tick in _ticks(first, last) if tick >= first and last - tick > 0.1 * last]
    parts.extend(
        f'<text class="dim mid" x="{frame.x(tick):.1f}" y="{height - 22:g}">{_short(tick)}</text>'
        for tick in (*named, last)
    )
    parts.append(f'<text class="dim mid" x="{(width + _LEFT) / 2:g}" y="{height - 6:g}">{escape(x_label)}</text>')
    if mark is not None:
        parts.append(
            f'<line class="grid" style="stroke:var(--dim)" stroke-dasharray="3 4" x1="{_LEFT}" x2="{width - _RIGHT:g}" '
            f'y1="{frame.y(mark):.1f}" y2="{frame.y(mark):.1f}"/>'
        )
    for s in series:
        for stretch in _stretches(x, s.values, log):
            points = " ".join(f"{frame.x(px):.1f},{frame.y(py):.1f}" for px, py in stretch)
            dash = ' stroke-dasharray="6 4"' if s.dashed else ""
            parts.append(f'<polyline class="line" style="stroke:var(--c{s.color})"{dash} points="{points}"/>')
    return "".join(parts)


def bar_chart(
    title: str,
    groups: Sequence[str],
    series: Sequence[Series],
    *,
    width: float = 460,
    height: float = 280,
    y_max: float = 1.0,
    percent: bool = True,
    marks: Sequence[float] | None = None,
) -> str:
    """Bars of all series side by side for each group, their values above, and at `marks` a dashed level per group."""
    frame = _Frame(width, height, (0, len(groups)), (0, y_max), False)
    parts = [_heading(title, series), _y_axis(frame, _ticks(0, y_max), percent)]
    step = frame.x(1) - frame.x(0)
    bar = step * 0.78 / len(series)
    for g, group in enumerate(groups):
        start = frame.x(g) + step * 0.11
        if marks is not None:
            y = frame.y(marks[g])
            parts.append(
                f'<line class="grid" style="stroke:var(--ink)" stroke-dasharray="3 3" x1="{frame.x(g) + 3:.1f}" '
                f'x2="{frame.x(g + 1) - 3:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
            )
        for i, s in enumerate(series):
            value = s.values[g]
            if value is None:
                continue
            x, y = start + i * bar, frame.y(value)
            label = f"{100 * value:.0f}" if percent else _short(value)
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y:.1f}" width="{bar - 2:.1f}" height="{max(frame.y(0) - y, 0):.1f}" rx="2" '
                f'fill="var(--c{s.color})"/>'
                f'<text class="dim mid halo" x="{x + bar / 2:.1f}" y="{y - 4:.1f}">{label}</text>'
            )
        parts.append(f'<text class="mid" x="{frame.x(g + 0.5):.1f}" y="{height - 20:g}">{escape(group)}</text>')
    return "".join(parts)


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float | None]],
    *,
    width: float = 460,
    height: float = 280,
    row_label: str = "",
    column_label: str = "",
) -> str:
    """Signed numbers in coloured cells: red below 0, blue above, full colour at 1 and beyond."""
    left, top = 92.0, 74.0
    cell_w, cell_h = (width - left - _RIGHT) / len(columns), (height - top - 12) / len(rows)
    parts = [f'<text class="title" x="8" y="20">{escape(title)}</text>']
    parts.append(f'<text class="dim" x="8" y="{top - 10:g}">{escape(row_label)}</text>')
    parts.append(f'<text class="dim mid" x="{(left + width - _RIGHT) / 2:g}" y="42">{escape(column_label)}</text>')
    for c, column in enumerate(columns):
        parts.append(
            f'<text class="dim mid" x="{left + (c + 0.5) * cell_w:.1f}" y="{top - 10:g}">{escape(column)}</text>'
        )
    for r, row in enumerate(rows):
        y = top + r * cell_h
        parts.append(f'<text class="end" x="{left - 8:g}" y="{y + cell_h / 2 + 4:.1f}">{escape(row)}</text>')
        for c, value in enumerate(values[r]):
            color = "low" if value is not None and value < 0 else "high"
            strength = 0.0 if value is None else min(1.0, abs(value)) * 0.75
            x = left + c * cell_w
            shown = "–" if value is None else f"{value:+.2f}" if abs(value) < 10 else f"{value:+.0f}"
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{cell_w - 2:.1f}" height="{cell_h - 2:.1f}" rx="3" '
                f'fill="var(--{color})" fill-opacity="{strength:.2f}" stroke="var(--grid)"/>'
                f'<text class="mid" x="{x + cell_w / 2:.1f}" y="{y + cell_h / 2 + 4:.1f}">{shown}</text>'
            )
    return "".join(parts)


@dataclass(frozen=True)
class _Frame:
    """Maps data to picture coordinates."""

    width: float
    height: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, value: float) -> float:
        low, high = self.x_range
        return _LEFT + (value - low) / max(high - low, 1e-12) * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_range
        if self.log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        part = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.height - _BOTTOM - part * (self.height - _TOP - _BOTTOM)


def _heading(title: str, series: Sequence[Series]) -> str:
    parts = [f'<text class="title" x="8" y="20">{escape(title)}</text>']
    x = 8.0
    for s in series:
        dash = ' stroke-dasharray="4 3"' if s.dashed else ""
        parts.append(
            f'<line x1="{x:g}" x2="{x + 16:g}" y1="38" y2="38" style="stroke:var(--c{s.color})" '
            f'stroke-width="4"{dash}/>'
            f'<text class="dim" x="{x + 21:g}" y="42">{escape(s.name)}</text>'
        )
        x += 34 + 6.3 * len(s.name)
    return "".join(parts)


def _y_axis(frame: _Frame, ticks: Sequence[float], percent: bool) -> str:
    parts = []
    for tick in ticks:
        y = frame.y(tick)
        label = f"{100 * tick:.3g}%" if percent else _short(tick)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{frame.width - _RIGHT:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="dim end" x="{_LEFT - 6}" y="{y + 4:.1f}">{label}</text>'
        )
    return "".join(parts)


def _stretches(x: Sequence[float], y: Sequence[float | None], positive: bool) -> list[list[tuple[float, float]]]:
    """The points between gaps."""
    out: list[list[tuple[float, float]]] = [[]]
    for px, py in zip(x, y, strict=True):
        if py is None or (positive and py <= 0):
            out.append([])
        else:
            out[-1].append((px, py))
    return [stretch for stretch in out if stretch]


def _ticks(low: float, high: float) -> list[float]:
    """About five round numbers from at or below `low` to at or above `high`."""
    raw = max(high - low, 1e-12) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(m * size for m in (1, 2, 2.5, 5, 10) if m * size >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
