"""Charts for `evaluation/page.py`, as inline SVG: lines, bars, points, parallel coordinates. Every mark says what it is
when pointed at. Colours are the page's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 14, 40

Point = tuple[float, float]


@dataclass(frozen=True)
class Scale:
    """Values low … high on pixels begin … end, evenly or by their logarithm."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return self.begin + (at - low) / ((high - low) or 1.0) * (self.end - self.begin)

    def ticks(self, most: int = 6) -> list[float]:
        """Round values inside, at most so many."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**d for d in decades for m in (1, 2, 5) if self.low <= m * 10.0**d <= self.high]
            return found if len(found) <= most else found[:: -(-len(found) // most)]
        span = (self.high - self.low) or 1.0
        size = 10.0 ** math.floor(math.log10(span / most))
        step = next(m * size for m in (1, 2, 2.5, 5, 10) if span / (m * size) <= most)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def line_chart(
    series: Mapping[str, Sequence[Point]], x_label: str, y_label: str, *, caption: str = "", log_x: bool = False
) -> str:
    """Up to six named series as coloured lines with a legend; more, as faint lines with their names on pointing."""
    points = [p for line in series.values() for p in line]
    if not points:
        return _figure('<p class="soft">nothing to show yet</p>', caption)
    x, y = _scales(points, log_x)
    few = len(series) <= COLOURS
    marks = []
    for number, (name, line) in enumerate(series.items()):
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in line)
        style = f'class="mark" style="stroke: var(--s{number})"' if few else 'class="mark faint"'
        title = f"<title>{escape(name)}</title>"
        if len(line) > 1:
            marks.append(f'<polyline points="{path}" {style}>{title}</polyline>')
        colour = f"var(--s{number})" if few else "var(--soft)"
        px, py = line[-1]
        marks.append(
            f'<circle cx="{x(px):.1f}" cy="{y(py):.1f}" r="3" class="dot" style="fill: {colour}">{title}</circle>'
        )
    legend = _legend(list(series)) if few and len(series) > 1 else ""
    return _figure(
        _svg(_axes(x, y, x_label, y_label) + "".join(marks), HEIGHT, f"{y_label} over {x_label}") + legend, caption
    )


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
        return _figure('<p class="soft">nothing to show yet</p>', caption)
    x, y = _scales(list(points.values()), log_x)
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
    return _figure(_svg(_axes(x, y, x_label, y_label) + "".join(marks), HEIGHT, f"{y_label} over {x_label}"), caption)


def bar_chart(values: Mapping[str, float], *, caption: str = "", unit: str = "") -> str:
    """Horizontal bars from zero, in the order given, each with its name and value."""
    row, names = 26, 210
    most = max(map(abs, values.values()), default=1.0) or 1.0
    marks = []
    for i, (name, value) in enumerate(values.items()):
        y, length = i * row + 4, abs(value) / most * (WIDTH - names - 90)
        marks.append(
            f'<text class="strong" x="{names - 8}" y="{y + 13}" text-anchor="end">{escape(_short(name, 32))}'
            f"<title>{escape(name)}</title></text>"
            f'<rect x="{names}" y="{y}" width="{max(length, 1):.1f}" height="18" rx="2" style="fill: var(--s0)"/>'
            f'<text x="{names + length + 8:.1f}" y="{y + 13}">{number(value)}{escape(unit)}</text>'
        )
    return _figure(_svg("".join(marks), len(values) * row + 6, caption or "bars"), caption)


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
        return _figure('<p class="soft">nothing to show yet</p>', caption)
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
    return _figure(_svg("".join(marks) + "".join(lines), height, f"settings and {score}"), caption)


def number(value: float) -> str:
    """As short as it can be read: four digits, no exponent for common sizes."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.2g}"


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
        f'<text x="{x - 6:.1f}" y="{scale(at) + 4:.1f}" text-anchor="end">{escape(_short(text, 10))}</text>'
        for at, text in ticks
    )
    name = f'<text class="strong" x="{x:.1f}" y="16" text-anchor="middle">{escape(_short(axis.name, 18))}</text>'
    return f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{scale.begin}" y2="{scale.end}"/>{labels}{name}'


def _scales(points: Sequence[Point], log_x: bool) -> tuple[Scale, Scale]:
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    spare = (max(ys) - min(ys)) * 0.06 or abs(max(ys)) * 0.1 or 1.0
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT, log_x and min(xs) > 0)
    return x, Scale(min(ys) - spare, max(ys) + spare, HEIGHT - BOTTOM, TOP)


def _axes(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    base = HEIGHT - BOTTOM
    parts = [f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>']
    for at in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(at):.1f}" y2="{y(at):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{number(at)}</text>')
    parts += [f'<text x="{x(at):.1f}" y="{base + 16}" text-anchor="middle">{number(at)}</text>' for at in x.ticks()]
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{base + 34}" text-anchor="middle">{escape(x_label)}</text>'
    )
    parts.append(f'<text class="strong" x="{LEFT}" y="8">{escape(y_label)}</text>')
    return "".join(parts)


def _legend(names: Sequence[str]) -> str:
    items = (f'<span><i style="background: var(--s{i})"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def _svg(inner: str, height: int, label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def _figure(inner: str, caption: str) -> str:
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{inner}</div>{told}</figure>'


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-most + 1 :]
