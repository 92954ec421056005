"""What every chart stands on: scales, ticks, axes, and the figure around them, as inline SVG for `evaluation/page.py`.

Text keeps a legible size: a chart in a narrow column gets larger letters (`page.STYLE`), so labels are placed in em.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

COLOURS = 6
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 22, 44

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


def number(value: float) -> str:
    """As short as it can be read: four digits, no exponent for common sizes, k, M, G and T for large ones."""
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    for unit, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if unit <= abs(value) < 1e15:
            return f"{value / unit:.4g} {name}"
    return f"{value:.2g}"


def scales_of(points: Sequence[Point], log_x: bool = False) -> tuple[Scale, Scale]:
    """Of x and of y, with a little room above and below."""
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    spare = (max(ys) - min(ys)) * 0.06 or abs(max(ys)) * 0.1 or 1.0
    x = Scale(min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1, LEFT, WIDTH - RIGHT, log_x and min(xs) > 0)
    return x, Scale(min(ys) - spare, max(ys) + spare, HEIGHT - BOTTOM, TOP)


def frame(x: Scale, y: Scale | None, x_label: str, y_label: str, base: float = HEIGHT - BOTTOM) -> str:
    """The axis at the height `base` with its ticks, lines across at y's, both names. y: None: it has no numbers."""
    parts = [f'<line class="axis" x1="{x.begin}" x2="{x.end}" y1="{base}" y2="{base}"/>']
    for at, height in ((at, y(at)) for at in y.ticks()) if y else ():
        parts.append(f'<line class="grid" x1="{x.begin}" x2="{x.end}" y1="{height:.1f}" y2="{height:.1f}"/>')
        parts.append(f'<text x="{x.begin - 8}" y="{height:.1f}" dy=".35em" text-anchor="end">{number(at)}</text>')
    for at in x.ticks():
        parts.append(f'<text x="{x(at):.1f}" y="{base}" dy="1.3em" text-anchor="middle">{number(at)}</text>')
    middle = (x.begin + x.end) / 2
    parts.append(f'<text x="{middle}" y="{base}" dy="2.6em" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="strong" x="{x.begin}" y="{TOP}" dy="-.7em">{escape(y_label)}</text>')
    return "".join(parts)


def legend_of(names: Sequence[str]) -> str:
    items = (f'<span><i style="background: var(--s{i})"></i>{escape(name)}</span>' for i, name in enumerate(names))
    return f'<div class="legend">{"".join(items)}</div>'


def svg(inner: str, height: float, label: str, *, wide: bool = False) -> str:
    """wide: it scrolls where there is no room; else it shrinks and its letters grow."""
    kind = "wide" if wide else "fits"
    return f'<svg class="{kind}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">{inner}</svg>'


def figure(inner: str, caption: str) -> str:
    told = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{inner}{told}</figure>"


def empty(caption: str) -> str:
    """What stands in the place of a chart of nothing."""
    return figure('<p class="soft">nothing to show yet</p>', caption)


def short(text: str, most: int) -> str:
    return text if len(text) <= most else "…" + text[-most + 1 :]
