"""A search as a person sees it: a live table on a terminal, a line for each check elsewhere, and what came out."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from cluster.console import Progress, duration, show_lines, show_table
from cluster.search.record import TrialRecord
from cluster.search.results import SearchResult
from cluster.search.space import shown

if TYPE_CHECKING:
    from rich.live import Live

ROWS = 15


class SearchProgress(Progress):
    """Takes the events of a search too: {"kind": "trial", "record", "ended", …}, see `Journal`.

    objective  the metric shown
    """

    def __init__(self, console: Console, objective: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self._objective = objective
        self._records: dict[int, TrialRecord] = {}
        self._table: Live | None = None

    def __call__(self, event: Mapping[str, Any]) -> None:
        if event["kind"] != "trial":
            self._end_table()
            super().__call__(event)
            return
        record: TrialRecord = event["record"]
        self._records[record.number] = record
        if not self._console.is_terminal:
            show_lines(self._console, f"{trial_line(record, self._objective)} · {standing(event)}")
            return
        if self._table is None:
            from rich.live import Live

            self._table = Live(console=self._console, refresh_per_second=4)
            self._table.start()
        self._table.update(Group(trials_table(list(self._records.values()), self._objective), Text(standing(event))))

    def __exit__(self, *_: object) -> None:
        self._end_table()
        super().__exit__()

    def _end_table(self) -> None:
        if self._table is not None:
            self._table.stop()
        self._table = None


def trial_line(record: TrialRecord, objective: str) -> str:
    """`trial 7 · completed · step 60/60 · ndcg@10 0.3812 · temperature=0.043 rows=512`"""
    parts = [f"trial {record.number}", record.outcome.state]
    if record.parent:
        parts.append(f"fork of {record.parent.trial} after step {record.parent.step}")
    if record.checks:
        parts += [
            f"step {record.checks[-1].step}/{record.checks[-1].steps}",
            f"{objective} {record.last[objective]:.4g}",
        ]
    if record.outcome.reason:
        parts.append(record.outcome.reason)
    return " · ".join([*parts, shown(record.settings)])


def standing(event: Mapping[str, Any]) -> str:
    eta = f" · ETA {duration(event['eta_s'])}" if event["eta_s"] is not None else ""
    return f"{event['ended']}/{event['trials']} {event['counted']}{eta}"


def trials_table(records: list[TrialRecord], objective: str) -> Table:
    """The newest trials, those that run last."""
    table = Table()
    for name in ("trial", "state", "step", objective, "settings"):
        table.add_column(name, overflow="fold")
    for record in sorted(records, key=lambda r: (not r.ended, r.number))[-ROWS:]:
        step = f"{record.checks[-1].step}/{record.checks[-1].steps}" if record.checks else ""
        value = f"{record.last[objective]:.4f}" if record.checks else ""
        table.add_row(str(record.number), record.outcome.state, step, value, shown(record.settings))
    return table


def show_search(console: Console, found: SearchResult) -> None:
    """The last lines: the best trial, the front, the cost, what to type next."""
    first = next(iter(found.objectives))
    counts = ", ".join(f"{count} {state}" for state, count in found.states.items())
    if len(found.objectives) > 1:
        header = ("trial", *found.objectives, "settings")
        by_number = {record.number: record for record in found.trials}
        rows = ((str(n), *(f"{by_number[n].last[o]:.4g}" for o in found.objectives), shown(by_number[n].settings))
                for n in found.front)  # fmt: skip
        show_table(console, header, rows)
    lines = [f"search     {found.search_id}", f"report     {found.folder}/report.html", f"trials     {counts}"]
    if found.ended_by:
        lines.append(f"ended      {found.ended_by}")
    lines.append(f"cost       {found.worker_seconds:,.0f} worker-seconds in {duration(found.seconds)}")
    for final in found.final:
        lines.append(
            f"final      seed {final['seed']}: held-out {first} {final['heldout'].get(first, float('nan')):.4f}"
        )
    assert found.best is not None, "a search without one raises"
    lines.append(f"best       {trial_line(found.best, first)}")
    more = [f"  gyre search RECIPE --resume {found.search_id}"] if found.ended_by else []
    show_lines(console, *lines, "", "next", f"  {found.command}", *more)
