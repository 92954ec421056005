"""Charts for `evaluation/page.py`, as inline SVG: lines, bars, points, parallel coordinates. Every mark says what it is
when pointed at. Colours are the page's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from evaluation.axes import (
    COLOURS,
    HEIGHT,
    WIDTH,
    Point,
    Scale,
    empty,
    figure,
    frame,
    legend_of,
    number,
    scales_of,
    short,
    svg,
)

DOTTED = 12  # points of a line that are shown each


def line_chart(
    series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, caption: str = "", log_x: bool = False
) -> str:
    """Up to six named series as coloured lines with a legend; more, as faint lines with their names on pointing."""
    points = [p for line in series.values() for p in line]
    if not points:
        return empty(caption)
    x, y = scales_of(points, log_x)
    few = len(series) <= COLOURS
    marks = []
    for place, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in line)
        style = f'class="mark" style="stroke: var(--s{place})"' if few else 'class="mark faint"'
        title = f"<title>{escape(name)}</title>"
        if len(line) > 1:
            marks.append(f'<polyline points="{path}" {style}>{title}</polyline>')
        colour = f"var(--s{place})" if few else "var(--soft)"
        for px, py in line if few and len(line) <= DOTTED else line[-1:]:
            marks.append(
                f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3" class="dot" style="fill: {colour}">{title}</circle>'
            )
    names = legend_of(list(series)) if few and len(series) > 1 else ""
    drawing = svg(frame(x, y, x_label, y_label) + "".join(marks), HEIGHT, f"{y_label} over {x_label}")
    return figure(drawing + names, caption)


def point_chart(
    points: Mapping[str, Point],
    x_label: str,
    y_label: str,
    *,
    strong: Sequence[str] = (),
    caption: str = "",
    log_x: bool = False,
) -> str:
    """Named points; those in `strong` stand out and have their names beside them."""
    if not points:
        return empty(caption)
    x, y = scales_of(list(points.values()), log_x)
    marks = []
    for name, (px, py) in sorted(points.items(), key=lambda item: item[0] in strong):
        colour, at = ("var(--s1)" if name in strong else "var(--s0)"), (x(px), y(py))
        marks.append(
            f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="5" class="dot" style="fill: {colour}">'
            f"<title>{escape(name)}: {number(px)}, {number(py)}</title></circle>"
        )
        if name in strong:
            side = 'text-anchor="end"' if at[0] > WIDTH * 0.85 else ""
            marks.append(f'<text class="strong" {side} x="{at[0] + (-8 if side else 8):.1f}" y="{at[1] - 6:.1f}">')
            marks.append(f"{escape(name)}</text>")
    return figure(svg(frame(x, y, x_label, y_label) + "".join(marks), HEIGHT, f"{y_label} over {x_label}"), caption)


def path_chart(points: Sequence[Point], names: Sequence[str], x_label: str, y_label: str, *, caption: str = "") -> str:
    """A way through points in their order, each with its name on pointing; the first and the last have theirs beside
    them."""
    if not points:
        return empty(caption)
    x, y = scales_of(points)
    path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
    marks = [f'<polyline points="{path}" class="mark" style="stroke: var(--s0)"/>']
    for place, ((px, py), name) in enumerate(zip(points, names, strict=True)):
        end = place in (0, len(points) - 1)
        colour = "var(--s1)" if end else "var(--s0)"
        told = f"<title>{escape(name)}: {number(px)}, {number(py)}</title>"
        size = 5 if end else 2.5
        marks.append(
            f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="{size}" class="dot" style="fill: {colour}">{told}</circle>'
        )
        if end:
            left = x(px) > WIDTH * 0.7
            side = 'text-anchor="end"' if left else ""
            marks.append(f'<text class="strong" {side} x="{x(px) + (-9 if left else 9):.1f}" y="{y(py):.1f}"')
            marks.append(f' dy=".35em">{escape(name)}</text>')
    return figure(svg(frame(x, y, x_label, y_label) + "".join(marks), HEIGHT, f"{y_label} and {x_label}"), caption)


def bar_chart(values: Mapping[str, float], *, caption: str = "", unit: str = "") -> str:
    """Horizontal bars from zero, in the order given, each with its name and value."""
    row, names = 26, 210
    most = max(map(abs, values.values()), default=1.0) or 1.0
    marks = []
    for i, (name, value) in enumerate(values.items()):
        y, length = i * row + 4, abs(value) / most * (WIDTH - names - 90)
        marks.append(
            f'<text class="strong" x="{names - 8}" y="{y + 13}" text-anchor="end">{escape(short(name, 32))}'
            f"<title>{escape(name)}</title></text>"
            f'<rect x="{names}" y="{y}" width="{max(length, 1):.1f}" height="18" rx="2" style="fill: var(--s0)"/>'
            f'<text x="{names + length + 8:.1f}" y="{y + 13}">{number(value)}{escape(unit)}</text>'
        )
    return figure(svg("".join(marks), len(values) * row + 6, caption or "bars", wide=True), caption)


@dataclass(frozen=True)
class Axis:
    """An axis of parallel coordinates. choices: names in order where it isn't a number."""

    name: str
    log: bool = False
    choices: tuple[str, ...] = ()


def parallel_coordinates(
    axes: Sequence[Axis],
    rows: Mapping[str, Mapping[str, float | str]],
    score: str,
    *,
    best: str = "",
    caption: str = "",
) -> str:
    """A line for each named row through its value on each axis, the better its `score` the stronger; `best` stands out.

    Axes that a row has no value for are left out of its line. `score` is the last axis.
    """
    every = [*axes, Axis(score)]
    if not rows:
        return empty(caption)
    height, top, bottom = 340, 34, 320
    across = Scale(0, max(len(every) - 1, 1), 70, WIDTH - 50)
    scales = [_axis_scale(axis, rows, bottom, top) for axis in every]
    order = sorted(rows, key=lambda name: (name == best, float(rows[name][score])))
    marks = []
    for rank, name in enumerate(order):
        values = rows[name]
        at = [
            (across(i), scale(_position(axis, values[axis.name])))
            for i, (axis, scale) in enumerate(zip(every, scales, strict=True))
            if axis.name in values
        ]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in at)
        share = 100 * rank / max(len(order) - 1, 1)
        style = (
            'class="mark" style="stroke: var(--s1)"' if name == best else f'class="scale" style="--share: {share:.0f}%"'
        )
        told = ", ".join(f"{key} {_told(value)}" for key, value in values.items())
        marks.append(f'<polyline points="{path}" {style}><title>{escape(f"{name}: {told}")}</title></polyline>')
    lines = [_upright(axis, scale, across(i)) for i, (axis, scale) in enumerate(zip(every, scales, strict=True))]
    return figure(svg("".join(marks) + "".join(lines), height, f"settings and {score}", wide=True), caption)


def _told(value: float | str) -> str:
    return value if isinstance(value, str) else number(value)


def _position(axis: Axis, value: float | str) -> float:
    return float(axis.choices.index(str(value))) if axis.choices else float(value)


def _axis_scale(axis: Axis, rows: Mapping[str, Mapping[str, float | str]], begin: float, end: float) -> Scale:
    if axis.choices:
        return Scale(-0.25, len(axis.choices) - 0.75, begin, end)
    values = [float(row[axis.name]) for row in rows.values() if axis.name in row] or [0.0, 1.0]
    low, high = min(values), max(values)
    return Scale(low, high if high > low else low + (abs(low) or 1.0), begin, end, axis.log and low > 0)


def _upright(axis: Axis, scale: Scale, x: float) -> str:
    ticks = [(float(i), name) for i, name in enumerate(axis.choices)] or [(v, number(v)) for v in scale.ticks(5)]
    labels = "".join(
        f'<text x="{x - 6:.1f}" y="{scale(at) + 4:.1f}" text-anchor="end">{escape(short(text, 10))}</text>'
        for at, text in ticks
    )
    name = f'<text class="strong" x="{x:.1f}" y="16" text-anchor="middle">{escape(short(axis.name, 18))}</text>'
    return f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.begin}" y2="{scale.end}"/>{labels}{name}'
