"""One self-contained HTML page: no network and no scripts, light and dark, legible on a phone and in print.

A page is a title and sections; a section is a heading and blocks of HTML. What makes blocks escapes all that it is
given. Charts are in `evaluation/charts.py`; they take their colours from the style here, by class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark;
  --page: #fcfcfb; --ink: #1c1b1a; --soft: #63615c; --line: #d9d7d2; --card: #f3f2ef;
  --s0: #2a6fc9; --s1: #c8641b; --s2: #25886b; --s3: #9a4fb0; --s4: #a98600; --s5: #c23b56; --low: #b9cfe9; }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #171716; --ink: #eceae6; --soft: #a3a099; --line: #3c3a37; --card: #222120;
  --s0: #6ba6ef; --s1: #ef9a5c; --s2: #5cc2a2; --s3: #cb8fe0; --s4: #d9bb45; --s5: #f07f94; --low: #2f4a6b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.25rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption, th { color: var(--soft); }
code, pre { font: .875em/1.5 ui-monospace, monospace; }
pre { background: var(--card); border-radius: 6px; padding: .6rem .8rem; white-space: pre-wrap; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .75rem; margin: 1rem 0; }
.tile { background: var(--card); border-radius: 6px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.35rem; line-height: 1.3; font-weight: 600; }
.scroll { overflow-x: auto; margin: .5rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; }
td.number, th.number { text-align: right; white-space: nowrap; }
td { overflow-wrap: normal; }
td:last-child:not(.number) { min-width: 14rem; }
figure { margin: 1rem 0; container-type: inline-size; overflow-x: auto; }
figure:has(.fits) { overflow: visible; }
figcaption { font-size: .875rem; }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 0 2rem; }
.columns figure { min-width: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg.wide { min-width: 38rem; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); paint-order: stroke; stroke: var(--page);
  stroke-width: 3px; stroke-linejoin: round; }
@container (max-width: 36rem) { svg.fits text { font-size: 18px; } svg.fits { margin-bottom: .5rem; } }
@container (max-width: 25rem) { svg.fits text { font-size: 22px; } svg.fits { margin-bottom: 1rem; } }
svg text.strong { fill: var(--ink); }
.axis, .grid { stroke: var(--line); stroke-width: 1; fill: none; }
.mark { fill: none; stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
.faint { stroke: var(--soft); stroke-width: 1; opacity: .4; }
.scale { fill: none; stroke-width: 1.5; stroke: color-mix(in oklab, var(--s0) var(--share), var(--low)); }
.area { fill-opacity: .3; stroke-width: 1.5; stroke-linejoin: round; }
.zero { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 4 4; }
.dot { stroke: var(--page); stroke-width: 1.5; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1rem; font-size: .875rem; }
.example { border-top: 1px solid var(--line); padding: .75rem 0; }
.example .items { display: grid; gap: .6rem; margin-top: .6rem;
  grid-template-columns: repeat(auto-fill, minmax(min(13.5rem, 100%), 1fr)); }
.item { background: var(--card); border-radius: 6px; padding: .5rem .7rem; border-left: 3px solid var(--line);
  font-size: .875rem; min-width: 0; }
.item.right { border-left-color: var(--s2); } .item.wrong { border-left-color: var(--s5); }
.item pre { background: none; padding: 0; margin: .2rem 0 0; max-height: 12em; overflow: hidden; font-size: .8rem; }
.item img { display: block; margin: .3rem 0; max-width: 100%; min-width: 3.5rem; background: #fff; border-radius: 4px; }
.legend i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
@media print { :root { color-scheme: light; } body { max-width: none; padding: 0; font-size: 11pt; }
  figure, tr, .tile, .item { break-inside: avoid; } h2 { break-after: avoid; }
  .scroll, figure { overflow: visible; } svg.wide { min-width: 0; } .columns { grid-template-columns: 1fr 1fr; } }
"""


def page(title: str, sections: Sequence[str], subtitle: str = "") -> str:
    """The whole document. sections: what `section` gives."""
    under = f'<p class="soft">{escape(subtitle)}</p>' if subtitle else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{under}\n" + "\n".join(sections) + "\n</body>\n</html>\n"
    )


def section(heading: str, *blocks: str) -> str:
    return f"<section>\n<h2>{escape(heading)}</h2>\n" + "\n".join(blocks) + "\n</section>"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def command(text: str) -> str:
    """What to type, or a file's text, as it stands."""
    return f"<pre>{escape(text)}</pre>"


def columns(*blocks: str) -> str:
    """Side by side where there is room for two."""
    return f'<div class="columns">{"".join(blocks)}</div>'


def tiles(figures: Mapping[str, str]) -> str:
    """The few figures a reader looks for first: {what: value}."""
    inner = (f'<div class="tile"><b>{escape(value)}</b>{escape(what)}</div>' for what, value in figures.items())
    return f'<div class="tiles">{"".join(inner)}</div>'


def item(what: str, text: str, picture: str = "", right: bool | None = None) -> str:
    """A text or picture (PNG in base64) with a word on what it is; right: whether it answers what was asked."""
    kind = "" if right is None else " right" if right else " wrong"
    image = f'<img alt="{escape(what)}" src="data:image/png;base64,{escape(picture)}">' if picture else ""
    told = f"<pre>{escape(text)}</pre>" if text else ""
    mark = "" if right is None else " ✓" if right else " ✗"
    return f'<div class="item{kind}"><span class="soft">{escape(what)}{mark}</span>{image}{told}</div>'


def example(asked: str, *rows: Sequence[str]) -> str:
    """What was asked, and below it rows of what was found, as `item` gives them."""
    below = (f'<div class="items">{"".join(row)}</div>' for row in rows)
    return f'<div class="example">{asked}{"".join(below)}</div>'


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns whose cells are all numbers are set flush right; a wide table scrolls by itself, not the page."""
    numeric = [all(_is_number(row[i]) for row in rows) and bool(rows) for i in range(len(header))]

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = (' class="number"' if number else "" for number in numeric)
        return "".join(f"<{tag}{k}>{escape(cell)}</{tag}>" for k, cell in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    head = f"<thead><tr>{line(header, 'th')}</tr></thead>"
    return f'<div class="scroll"><table>\n{head}\n<tbody>\n{body}\n</tbody></table></div>'


def _is_number(cell: str) -> bool:
    text = cell.replace(",", "").replace("−", "-").rstrip("%s ")
    try:
        float(text or "0")
    except ValueError:
        return False
    return True
