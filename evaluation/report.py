"""Tables of results and of gates: for a terminal through rich, and as plain lines for logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from evaluation.gates import shown

if TYPE_CHECKING:
    from rich.table import Table

    from evaluation.compare import Comparison
    from evaluation.gates import GateResult

_BASELINE = "bm25"
_NAMES = {
    _BASELINE: "BM25",
    "bm25_tuned": "BM25 tuned",
    "ndcg": "nDCG",
    "mrr": "MRR",
    "map": "MAP",
    "ap": "AP",
    "f1": "F1",
}

Cells = tuple[list[str], list[list[str]]]


def results_table(rows: Mapping[str, Mapping[str, float]], title: str | None = None) -> Table:
    """{model: {metric: value}} as a rich table: a row for each model, a column for each metric.

    Where a row "bm25" stands, a last column has the difference to it in the first metric. ValueError where a
    row lacks a metric that the first row has.
    """
    return _rich(results_cells(rows), title)


def results_text(rows: Mapping[str, Mapping[str, float]]) -> str:
    """The same as plain lines."""
    return _plain(results_cells(rows))


def gate_table(result: GateResult) -> Table:
    """gate, required, got, and by how much, as a rich table."""
    return _rich(_gates(result), None)


def gate_text(result: GateResult) -> str:
    """The same as plain lines."""
    return _plain(_gates(result))


def comparison_table(found: Comparison) -> Table:
    """A row a task: both scores, B less A with its 95 % interval and p, and on how many queries B is better, worse."""
    return _rich(comparison_cells(found), found.suite)


def comparison_text(found: Comparison) -> str:
    """The same as plain lines."""
    return _plain(comparison_cells(found))


def comparison_cells(found: Comparison) -> Cells:
    """Header and rows of `comparison_table`."""
    header = ["task", "metric", "A", "B", "B − A", "95 % interval", "p", "wins", "losses", "ties"]
    body = []
    for task in found.tasks:
        row = [task.task, label(task.metric), f"{task.a:.4f}", f"{task.b:.4f}", f"{task.b - task.a:+.4f}"]
        if task.difference is not None and task.p is not None:
            interval = f"[{task.difference.low:+.4f}, {task.difference.high:+.4f}]"
            row += [interval, f"{task.p:.2g}", str(task.wins), str(task.losses), str(task.ties)]
        body.append(row + [""] * (len(header) - len(row)))
    return header, body


def results_cells(rows: Mapping[str, Mapping[str, float]]) -> Cells:
    """Header and rows of `results_table`."""
    metrics = list(next(iter(rows.values()))) if rows else []
    lacking = [(model, metric) for model, row in rows.items() for metric in metrics if metric not in row]
    if lacking:
        raise ValueError(f"row {lacking[0][0]!r} of the results has no {lacking[0][1]!r}")
    header = ["model", *(label(metric) for metric in metrics)]
    body = [[label(model), *(f"{row[metric]:.4f}" for metric in metrics)] for model, row in rows.items()]
    if _BASELINE in rows:
        header.append(f"{label(metrics[0])} − BM25")
        for cells, (model, row) in zip(body, rows.items(), strict=True):
            difference = row[metrics[0]] - rows[_BASELINE][metrics[0]]
            cells.append("" if model == _BASELINE else f"{difference:+.4f}")
    return header, body


def _gates(result: GateResult) -> Cells:
    header = ["gate", "required", "got", "by", ""]
    return header, [
        [
            row.gate,
            shown(row.required),
            shown(row.got),
            "" if row.margin is None else f"{row.margin:+.4f}",
            "passed" if row.passed else "FAILED",
        ]
        for row in result.rows
    ]


def label(key: str) -> str:
    """A metric or model as it is written: "ndcg@10" is nDCG@10."""
    family, at, cutoff = key.partition("@")
    return _NAMES.get(family, family) + at + cutoff


def _rich(cells: Cells, title: str | None) -> Table:
    from rich.table import Table

    header, body = cells
    table = Table(title=title)
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in body:
        table.add_row(*row)
    return table


def _plain(cells: Cells) -> str:
    header, body = cells
    widths = [max(len(row[i]) for row in (header, *body)) for i in range(len(header))]
    return "\n".join(_line(row, widths) for row in (header, *body))


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    first, *others = (
        cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
    )
    return "  ".join([first, *others]).rstrip()
