"""What a person sees: a live line on a terminal, plain lines elsewhere, tables, hits, what to type next."""

from __future__ import annotations

import shlex
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from cluster.paths import home

if TYPE_CHECKING:
    from rich.live import Live

    from cluster.data_plan import PlannedBatch
    from cluster.doctor import Diagnosis, Finding
    from cluster.embedding import EmbeddingResult
    from cluster.models import QueryResult, SavedStep
    from cluster.registry import Move, Version
    from evaluation.compare import Comparison
    from evaluation.stored import StoredEvaluation, TaskResult

PLAIN_EVERY_S = 5.0
_MARKS = {"ok": "[green]ok[/]", "warning": "[yellow]warning[/]", "problem": "[red]problem[/]"}
_FIGURES = (
    ("loss", "loss", "{:.4f}"),
    ("pairs_per_s", "pairs/s", "{:,.0f}"),
    ("tokens_per_s", "tokens/s", "{:,.0f}"),
    ("queue_age", "queue age", "{:.1f}"),
    ("texts_per_s", "texts/s", "{:,.0f}"),
)


class Progress:
    """Takes the events of a run (`on_progress`) and shows them; use it as a context.

    {"kind": "phase", "text"}, {"kind": "note", "text"}, {"kind": "parts", "finished", "parts"} of a conversion,
    {"kind": "table", "title", "rows": {model: {metric: value}}} and {"kind": "step", "step", "steps", "loss",
    "pairs_per_s", "tokens_per_s", "queue_age", "eta_s"}, where "unit" says what is counted if not steps.
    On a terminal the newest step is one live line; otherwise there is a line at most every PLAIN_EVERY_S
    seconds, and one for the first and the last step.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live: Live | None = None
        self._printed_at = -PLAIN_EVERY_S
        self._parts_began: tuple[float, int] | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._end_live()

    def __call__(self, event: Mapping[str, Any]) -> None:
        kind = event["kind"]
        if kind == "step":
            self._step(event)
            return
        if kind == "parts":
            self.parts(event["finished"], event["parts"])
            return
        self._end_live()
        if kind == "table":
            self._console.print(table(event["rows"], self._console, event.get("title")), soft_wrap=True)
        else:
            self._console.print(escape(event["text"]), style="bold" if kind == "phase" else None, highlight=False)

    def _step(self, event: Mapping[str, Any]) -> None:
        line, now = step_line(event), self._clock()
        if self._console.is_terminal:
            if self._live is None:
                from rich.live import Live

                self._live = Live(console=self._console, refresh_per_second=4)
                self._live.start()
            self._live.update(Text(line))
        elif now - self._printed_at >= PLAIN_EVERY_S or event["step"] >= event["steps"]:
            self._printed_at = now
            self._console.print(line, highlight=False, soft_wrap=True)

    def parts(self, finished: int, parts: int) -> None:
        """Finished parts of a conversion, with the time that is left; nothing of a single one, or of what was there."""
        now = self._clock()
        began, before = self._parts_began = self._parts_began or (now, finished)
        left = (parts - finished) * (now - began) / (finished - before) if finished > before else None
        if parts > 1 and before < parts:
            self._step({"unit": "part", "step": finished, "steps": parts, "eta_s": left})
        if finished == parts:
            self._parts_began = None
            self._end_live()

    def _end_live(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def step_line(event: Mapping[str, Any]) -> str:
    """`step 120/300 · loss 0.4312 · 1,204 pairs/s · …`; figures that the event lacks are left out."""
    parts = [f"{event.get('unit', 'step')} {event['step']}/{event['steps']}"]
    for key, label, form in _FIGURES:
        if event.get(key) is not None:
            shown = form.format(event[key])
            parts.append(f"{shown} {label}" if label.endswith("/s") else f"{label} {shown}")
    if event.get("eta_s") is not None:
        parts.append(f"ETA {duration(event['eta_s'])}")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """45 s, 3:05, 1:02:03"""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, hours = whole // 60 % 60, whole // 3600
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"


def table(rows: Mapping[str, Mapping[str, float]], console: Console, title: str | None) -> Table | str:
    """Results for a terminal as a table, otherwise as plain lines."""
    from evaluation.report import results_table, results_text

    if console.is_terminal:
        return results_table(rows, title)
    return f"{title}\n{results_text(rows)}" if title else results_text(rows)


def show_table(console: Console, header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Boxed on a terminal; elsewhere columns that a script can read, never cut at a width."""
    if console.is_terminal:
        shown = Table()
        for name in header:
            shown.add_column(name, overflow="fold")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)
        return
    cells = [list(header), *([Text.from_markup(c).plain for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        console.print(line.rstrip(), markup=False, highlight=False, soft_wrap=True)


def show_lines(console: Console, *lines: str) -> None:
    """As they are: no markup, no colours, never cut at a width."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def show_trained(console: Console, result: Mapping[str, Any], root: Path) -> None:
    """The last lines of a training: where everything is and what to type next. root: the run's home."""
    registered, aliases = result["model_name"], ", ".join(result["aliases"])
    where = {
        "run": result["run_id"],
        "checkpoint": result["checkpoint"],
        "model": result["export"],
        "registered": f"{registered} version {result['model_version']} ({aliases})",
        "gate": result["gate"],
    }
    for name, value in where.items():
        console.print(f"{name:11}{value}", highlight=False, soft_wrap=True, markup=False)
    console.print()
    console.print("next", style="bold")
    from cluster.tracking import tracking_uri

    elsewhere = f"export GYRE_HOME={shlex.quote(str(root))}" if root != home() else None
    for line in filter(
        None,
        (
            elsewhere,
            *_queries(f"models:/{registered}@candidate", Path(result["export"])),
            f"gyre models {registered}",
            f"gyre report {result['run_id']}",
            f"mlflow ui --backend-store-uri {tracking_uri(root)}",
        ),
    ):
        console.print(f"  {line}", highlight=False, soft_wrap=True, markup=False)


def _queries(model: str, export: Path) -> Iterator[str]:
    """What to ask a model, by what it encodes."""
    from cluster.models.folder import kinds_of

    kinds = kinds_of(export)
    if kinds == ("text",):
        yield f'gyre query "parse a date from a string" --model {model}'
    elif "image" in kinds:
        yield f'gyre query "WHAT THE PICTURE SHOWS" --over FOLDER --model {model}'
        yield f"gyre query --image PICTURE.png --over FOLDER --model {model}"


def show_evaluation(console: Console, found: StoredEvaluation) -> None:
    """A table for each task with what it says of its texts, then where the evaluation is stored."""
    from cluster.evidence.evaluating import rows_of

    result = found.result
    for name, task in result.tasks.items():
        counts = ", ".join(f"{count:,} {side}" for side, count in task.counts.items())
        console.print(table(rows_of(result, name), console, f"{name} ({task.kind}): {counts}"), soft_wrap=True)
        show_lines(console, *_about(task, result.geometry.get(name, {})))
        console.print()
    for probe, told in result.bias.items():
        show_lines(console, f"bias {probe}: effect {told['effect']:+.2f}, p {told['p']:.2g}")
    show_lines(console, f"stored  {found.folder}", f"next    gyre report {result.id}")


def _about(task: TaskResult, geometry: Mapping[str, float]) -> Iterator[str]:
    """What a table of scores doesn't show."""
    parts = {name: scores[task.main] for name, scores in task.slices.items() if task.main in scores}
    if parts:
        yield f"{task.main} of " + ", ".join(f"{name} {score:.4f}" for name, score in parts.items())
    for side, held in (task.contamination or {}).items():
        yield f"training data holds {held.exact} of {held.texts} {side}, and nearly {held.near} more"
    if geometry:
        yield "geometry: " + ", ".join(f"{name} {value:.3f}" for name, value in geometry.items())


def show_embedding(console: Console, found: EmbeddingResult) -> None:
    """What there is now, where, and how to read it."""
    corpus, earlier = found.corpus, found.corpus.rows - found.encoded
    show_lines(
        console,
        f"{corpus.rows:,} vectors of {corpus.dimensions} dimensions, {corpus.dtype}, metric {corpus.metric}"
        + (f"; {earlier:,} of them were there" if earlier else ""),
        str(corpus.folder),
        "next: pyarrow.parquet.read_table of its files, or in Python",
        "  from data_services.embed import EmbeddedCorpus",
        f"  EmbeddedCorpus.open(Path({str(corpus.folder)!r})).vectors(0, 10)",
    )


def show_versions(console: Console, versions: list[Version]) -> None:
    if not versions:
        console.print("no model is registered yet; `gyre train recipes/quickstart.yaml` makes one")
        return
    rows = []
    for v in versions:
        trained = v.scores.get("heldout", {}).get("trained", {})
        scores = ", ".join(f"{name} {value:.4f}" for name, value in list(trained.items())[:2])
        rows.append([v.name, str(v.version), ", ".join(v.aliases), scores, v.run_id[:12]])
    show_table(console, ("model", "version", "aliases", "held-out scores", "run"), rows)


def show_lineage(console: Console, versions: list[Version]) -> None:
    """Where each version comes from, and how it became champion. Fingerprints are cut; --json has them whole."""
    for v in versions:
        lines = [f"{part:12}{value if part == 'parent' else value[:40]}" for part, value in v.lineage.items()]
        if (promoted := v.promotion) is not None:
            over = f", over its gate: {promoted['override']}" if promoted.get("override") else ""
            before = f", after version {promoted['previous']}" if promoted.get("previous") else ""
            lines.append(f"{'champion':12}by {promoted['by']} at {promoted['at']}{before}{over}")
        if v.signed_off_by:
            lines.append(f"{'signed by':12}{', '.join(v.signed_off_by)}")
        show_lines(console, "", f"{v.name} version {v.version}", *(f"  {line}" for line in lines))


def show_comparison(console: Console, found: Comparison) -> None:
    """The table, the queries that changed most of each task, and how to read it."""
    from evaluation.report import comparison_table, comparison_text

    console.print(f"A  {found.a} ({found.evaluations[0]})", highlight=False, soft_wrap=True, markup=False)
    console.print(f"B  {found.b} ({found.evaluations[1]})", highlight=False, soft_wrap=True, markup=False)
    if console.is_terminal:
        console.print(comparison_table(found))
    else:
        show_lines(console, comparison_text(found))
    for task in found.tasks:
        if task.changed:
            show_lines(console, "", f"{task.task}: the queries that changed most ({task.metric}, A to B)")
            show_lines(console, *(f"  {c.b - c.a:+.4f}  {c.a:.4f} to {c.b:.4f}  {task.shown(c)}" for c in task.changed))


def show_move(console: Console, moved: Move) -> None:
    before = f"; before it: version {moved.previous}" if moved.previous is not None else ""
    console.print(f"{moved.name}: champion is version {moved.version}{before}", highlight=False)
    if moved.override:
        show_lines(console, f"a gate said no; recorded: {moved.override}")


def show_hits(console: Console, found: QueryResult, lines: int = 12) -> None:
    for place, hit in enumerate(found.hits, 1):
        console.print(f"[bold]{place}. {escape(hit.name)}[/]  {hit.score:.3f}", highlight=False, soft_wrap=True)
        if not hit.text:
            continue
        text = hit.text.split("\n")
        shown = "\n".join([*text[:lines], *(["…"] if len(text) > lines else [])])
        console.print(textwrap.indent(shown, "   "), markup=False, highlight=console.is_terminal)
        console.print()


def show_planned(console: Console, planned: PlannedBatch, characters: int = 60) -> None:
    """The rows, so many characters of each text, and what the batch is as a whole."""

    def short(text: str) -> str:
        return escape(textwrap.shorten(text, characters, placeholder=" …"))

    header = ("source", "row", "id", "worker", "tokens", "query", "positive")
    rows = (
        (escape(r.source), f"{r.row}", escape(r.id), f"{r.worker}", f"{r.tokens}", short(r.query), short(r.positive))
        for r in planned.rows
    )
    show_table(console, header, rows)
    weights = ", ".join(f"{name} {weight:.3g}" for name, weight in planned.weights.items())
    by_worker = " + ".join(map(str, planned.tokens))
    shared = f"{planned.duplicates} rows share their query or a positive with one before: the loss masks them"
    show_lines(
        console,
        f"step {planned.step} of {planned.steps}: {len(planned.rows)} rows; weights: {weights}",
        f"{sum(planned.tokens)} tokens, by worker {by_worker}",
        shared if planned.duplicates else "no two rows share their query or a positive",
        *(f"cluster {number}: {rows} rows" for number, rows in planned.clusters.items()),
    )


def show_diagnosis(console: Console, found: Diagnosis) -> None:
    versions = ((name, version or "not installed") for name, version in found.versions.items())
    show_table(console, ("package", "version"), versions)
    console.print(f"{found.cores} cores, {found.memory_gib:.1f} GiB memory", highlight=False)
    show_findings(console, found.findings)


def show_findings(console: Console, findings: Iterable[Finding]) -> None:
    rows = [(f.what, _MARKS[f.verdict], escape(f.value), escape(f.remedy)) for f in findings]
    show_table(console, ("what", "", "found", "what to do"), rows)


def show_checkpoints(console: Console, saved: list[SavedStep]) -> None:
    if not saved:
        console.print("no committed checkpoint")
        return
    rows = []
    for s in saved:
        state = f"[red]{escape(s.damage)}[/]" if s.damage else "[green]whole[/]"
        rows.append([str(s.step), str(s.world_size), f"{s.size_bytes / 1e6:.1f} MB", state, escape(str(s.folder))])
    show_table(console, ("step", "workers", "size", "state", "folder"), rows)
