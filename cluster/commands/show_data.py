"""What a person sees of the commands over data: counts as they go, what was found, what to type next."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from cluster.console import PLAIN_EVERY_S, duration, show_lines, show_table

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from cluster.data import Written
    from cluster.mining import MiningResult
    from data_services.mining.report import Example
    from data_services.statistics import SourceStats

_WIDTH = 96
_CLASSES_SHOWN = 20


class Counts:
    """Takes (what, done, of) and shows it: a bar with its ETA on a terminal, elsewhere a line every few seconds."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._began: dict[str, tuple[float, int]] = {}
        self._printed_at = -PLAIN_EVERY_S

    def __enter__(self) -> Counts:
        if self._console.is_terminal:
            from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn()
            self._bars = Progress(*columns, console=self._console)
            self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: TracebackType | None) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, of: int) -> None:
        if self._bars is not None:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what)
            self._bars.update(self._tasks[what], completed=done, total=of)
            return
        now = self._clock()
        began, first = self._began.setdefault(what, (now, done))
        if now - self._printed_at < PLAIN_EVERY_S and done < of:
            return
        self._printed_at = now
        left = (of - done) * (now - began) / (done - first) if done > first else None
        eta = f" · ETA {duration(left)}" if left and done < of else ""
        self._console.print(f"{what} {done:,}/{of:,}{eta}", highlight=False, soft_wrap=True)


def show_mined(console: Console, found: MiningResult) -> None:
    """Figures, a sample, where the source is and how a recipe names it."""
    report = found.report
    show_lines(
        console,
        f"{report.rows:,} rows, {report.queries:,} queries, {report.documents:,} documents",
        *([f"{report.replaced:,} hard negatives of the source were candidates like others"] if report.replaced else []),
        *([f"{report.without:,} queries have no negative; their rows train without"] if report.without else []),
    )
    show_table(console, ("negatives", "queries"), ([str(n), f"{q:,}"] for n, q in report.negatives_a_query.items()))
    shown = {name: values for name, values in report.scores.items() if values}
    show_table(
        console,
        ("score", *next(iter(shown.values()), {})),
        ([name, *(f"{v:.4f}" for v in values.values())] for name, values in shown.items()),
    )
    fates = ([name.replace("_", " "), f"{share:.2%}"] for name, share in report.fates.items())
    show_table(console, ("candidates", "share"), fates)
    for example in report.examples:
        _show_example(console, example)
    nextshow_lines(console, found.folder, found.keys)


def nextshow_lines(console: Console, folder: object, keys: Mapping[str, str]) -> None:
    """Where the written source is, and how a recipe names it."""
    show_lines(console, str(folder), "", "in a recipe:", "  data:", "    sources:", f"      - path: {folder}")
    show_lines(console, *(f"        {key}: {field}" for key, field in keys.items()))


def _show_example(console: Console, example: Example) -> None:
    console.print(f"[bold]{escape(_short(example.query))}[/]", highlight=False, soft_wrap=True)
    for sign, documents in (("+", example.positives), ("-", example.negatives)):
        show_lines(console, *(f"  {sign} {score:.4f}  {_short(text)}" for score, text in documents))
    console.print()


def _short(text: str) -> str:
    return textwrap.shorten(text, _WIDTH, placeholder=" …")


def show_stats(console: Console, found: SourceStats, unit: str) -> None:
    """Every figure of a source. unit: what its tokens are."""
    left_out = sum(found.quarantined.values())
    show_lines(console, f"{found.rows:,} rows" + (f", {left_out:,} more quarantined" if left_out else ""))
    show_lines(console, *(f"  {n:,} × {reason}" for reason, n in found.quarantined.items()))
    texts = ([side, f"{it['texts']:,}", f"{it['unique']:,}"] for side, it in found.texts.items())
    show_table(console, ("side", "items", "unique"), texts)
    rows = [
        [side, what, *(f"{v:,.2f}" if what == "seconds" else f"{v:,.0f}" for v in it.values())]
        for side, of in found.lengths.items()
        for what, it in of.items()
    ]
    names = next(iter(next(iter(found.lengths.values())).values()))
    show_table(console, ("side", "length in", *names), [[unit if c == "tokens" else c for c in row] for row in rows])
    for name, counts in found.a_row.items():
        show_lines(console, f"{name} of a row: " + ", ".join(f"{n} in {rows:,} rows" for n, rows in counts.items()))
    for name, classes in found.classes.items():
        show_table(console, (name, "rows", "share"), shares_of(_commonest(classes)))
    show_lines(console, f"duplicates: {found.duplicates['exact']:,} exact, {found.duplicates['near']:,} near")
    if found.contaminated is not None:
        held = found.contaminated
        show_lines(console, f"in the evaluation source: {held['exact']:,} exactly, {held['near']:,} nearly")
    for row in found.examples:
        show_lines(console, "", f"{row['id']}: {_short(row['query'])}")
        show_lines(console, *(f"  + {_short(text)}" for text in row["positives"]))
        show_lines(console, *(f"  - {_short(text)}" for text in row["negatives"]))


def show_written(console: Console, done: Written, sides: bool = False) -> None:
    """What became of the rows, and how a recipe names the result. sides: it has splits."""
    show_table(console, ("side" if sides else "rows", "rows" if sides else "", "share"), shares_of(done.counts))
    nextshow_lines(console, done.folder, ({"split": next(iter(done.counts))} if sides else {}) | done.keys)


def show_clustered(console: Console, done: Written) -> None:
    """How large the clusters are, and how a recipe fills its batches from them."""
    show_lines(console, "texts of a cluster: " + ", ".join(f"{name} {texts:,}" for name, texts in done.counts.items()))
    nextshow_lines(console, done.folder, done.keys)
    show_lines(console, "    neighbours: true")


def _commonest(classes: Mapping[str, int]) -> dict[str, int]:
    """The classes, the commonest first as given, less than all where there are many."""
    shown = list(classes.items())[:_CLASSES_SHOWN]
    others = sum(classes.values()) - sum(rows for _, rows in shown)
    return dict(shown) | ({f"{len(classes) - len(shown):,} others": others} if others else {})


def shares_of(counts: Mapping[str, int]) -> list[list[str]]:
    """[[name, count, share]], as given."""
    total = max(sum(counts.values()), 1)
    return [[escape(name), f"{count:,}", f"{count / total:.2%}"] for name, count in counts.items()]
