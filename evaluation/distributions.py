"""Charts of distributions and of uncertain figures for `evaluation/page.py`: histograms, intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from evaluation.axes import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    empty,
    figure,
    frame,
    legend_of,
    number,
    short,
    svg,
)

_ROW = 34


def histogram_chart(
    counts: Mapping[str, Sequence[int]], low: float, high: float, x_label: str, *, caption: str = ""
) -> str:
    """Several histograms over the same equal bins from low to high, each as shares of its own; empty ends are cut."""
    seen = [i for shares in counts.values() for i, count in enumerate(shares) if count]
    if not seen:
        return empty(caption)
    first, last = min(seen), max(seen) + 1
    size = (high - low) / len(next(iter(counts.values())))
    x = Scale(low + first * size, low + last * size, LEFT, WIDTH - RIGHT)
    shares = {name: [count / max(1, sum(its)) for count in its] for name, its in counts.items()}
    y = Scale(0, max(map(max, shares.values())) * 1.04, HEIGHT - BOTTOM, TOP)
    marks = []
    for place, (name, its) in enumerate(shares.items()):
        corners = [(edge, its[i]) for i in range(first, last) for edge in (low + i * size, low + (i + 1) * size)]
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in corners)
        ends = f"{x(corners[0][0]):.1f},{y(0):.1f} {path} {x(corners[-1][0]):.1f},{y(0):.1f}"
        style = f'class="area" style="fill: var(--s{place}); stroke: var(--s{place})"'
        marks.append(f'<polygon points="{ends}" {style}><title>{escape(name)}</title></polygon>')
    drawing = svg(frame(x, y, x_label, "share of each") + "".join(marks), HEIGHT, f"histogram of {x_label}")
    return figure(drawing + legend_of(list(counts)), caption)


def interval_chart(rows: Mapping[str, tuple[float, float, float]], x_label: str, *, caption: str = "") -> str:
    """A row each: low, the figure, high; a line at 0. Those that 0 lies outside of stand out."""
    if not rows:
        return empty(caption)
    ends = [0.0, *(value for row in rows.values() for value in row)]
    spare = (max(ends) - min(ends)) * 0.05 or 1.0
    names, base = 230, len(rows) * _ROW + TOP
    x = Scale(min(ends) - spare, max(ends) + spare, names, WIDTH - RIGHT)
    marks = [f'<line class="zero" x1="{x(0):.1f}" x2="{x(0):.1f}" y1="{TOP - 8}" y2="{base}"/>']
    for place, (name, (low, value, high)) in enumerate(rows.items()):
        y = TOP + (place + 0.5) * _ROW
        colour = "var(--s2)" if low > 0 else "var(--s5)" if high < 0 else "var(--soft)"
        told = f"<title>{escape(name)}: {number(value)}, {number(low)} to {number(high)}</title>"
        marks.append(
            f'<text class="strong" x="{names - 10}" y="{y}" dy=".35em" text-anchor="end">'
            f"{escape(short(name, 24))}</text>"
            f'<line class="mark" style="stroke: {colour}" x1="{x(low):.1f}" x2="{x(high):.1f}" y1="{y}" y2="{y}"/>'
            f'<circle cx="{x(value):.1f}" cy="{y}" r="5" class="dot" style="fill: {colour}">{told}</circle>'
        )
    height = base + BOTTOM
    return figure(svg(frame(x, None, x_label, "", base) + "".join(marks), height, x_label), caption)
