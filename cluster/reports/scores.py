"""The pages of a stored evaluation and of a comparison of two."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from cluster.console import duration
from cluster.evidence.evaluating import rows_of
from evaluation.axes import number
from evaluation.compare import Comparison, QueryChange, TaskComparison
from evaluation.distributions import interval_chart
from evaluation.excerpts import Excerpt
from evaluation.page import example, item, page, paragraph, section, table, tiles
from evaluation.report import comparison_cells, label, results_cells
from evaluation.significance import paired_bootstrap
from evaluation.stored import Excerpts, PerQuery, StoredEvaluation, TaskResult

EXAMPLES, HITS = 5, 3


def evaluation_page(found: StoredEvaluation) -> str:
    """HTML."""
    result = found.result
    mains = {f"{label(task.main)}, {name}": f"{task.metrics[task.main]:.4f}" for name, task in result.tasks.items()}
    made = paragraph(f"Evaluation {result.id} of {result.made}; it took {duration(result.seconds)}.")
    sections = [section("Scores", tiles(mains), made)]
    sections += [_task(found, name, task) for name, task in result.tasks.items()]
    if result.bias:
        rows = [[probe, f"{told['effect']:+.2f}", f"{told['p']:.2g}"] for probe, told in result.bias.items()]
        sections.append(section("Association tests", table(["probe", "effect", "p"], rows)))
    facts = {
        "model's files": result.model_fingerprint[:16],
        "dimensions": str(result.dim),
        "suite": f"{result.suite}, {result.suite_fingerprint[:16]}",
        "training data": (result.training_data or "not known")[:32],
    }
    sections.append(
        section("What was measured", table(["of", "fingerprint or figure"], [[k, v] for k, v in facts.items()]))
    )
    return page(f"{result.model} on {result.suite}", sections, f"{len(result.tasks)} tasks")


def _task(found: StoredEvaluation, name: str, task: TaskResult) -> str:
    counts = ", ".join(f"{count:,} {side}" for side, count in task.counts.items())
    per_query = found.per_query(name, task.main)
    blocks = [paragraph(f"{task.kind}: {counts}"), table(*results_cells(rows_of(found.result, name)))]
    if told := _interval(per_query, task.main):
        blocks.append(paragraph(told))
    if parts := {part: scores[task.main] for part, scores in task.slices.items() if task.main in scores}:
        blocks.append(table(["part of the queries", label(task.main)], [[p, f"{v:.4f}"] for p, v in parts.items()]))
    for side, held in (task.contamination or {}).items():
        blocks.append(
            paragraph(f"Training data holds {held.exact} of {held.texts} {side}, and nearly {held.near} more.")
        )
    if geometry := found.result.geometry.get(name):
        rows = [[figure.replace("_", " "), number(value)] for figure, value in geometry.items()]
        blocks.append(table(["geometry", "value"], rows))
    return section(name, *blocks, *_extremes(per_query, task.main, found.excerpts(name)))


def _interval(per_query: PerQuery, metric: str) -> str:
    """What the choice of queries leaves open; empty of a metric that is no mean over at least two."""
    scores = per_query.scores.get(metric, np.zeros(0))
    if len(scores) < 2:
        return ""
    of = paired_bootstrap(scores, np.zeros(len(scores)))
    return f"{label(metric)} of the model: {of.difference:.4f}, 95 % interval {of.low:.4f} … {of.high:.4f} (bootstrap)."


def _extremes(per_query: PerQuery, metric: str, excerpts: Excerpts) -> Iterable[str]:
    """The queries with the lowest and the highest scores, where they are known by their texts and were ranked."""
    if not per_query.hits or not excerpts.queries:
        return
    order = np.argsort(per_query.scores[metric], kind="stable").tolist()
    most = min(EXAMPLES, len(order) // 2)
    yield paragraph("Worst and best queries:")
    for row in [*order[:most], *order[::-1][:most]]:
        id = per_query.query_ids[row]
        asked = _item(f"{label(metric)} {per_query.scores[metric][row]:.4f}", id, excerpts.queries)
        yield example(asked, _hits("hit", per_query.hits[row], excerpts.documents))


def comparison_page(found: Comparison) -> str:
    """HTML."""
    rows = {
        task.task: (task.difference.low, task.difference.difference, task.difference.high)
        for task in found.tasks
        if task.difference is not None
    }
    caption = "B less A: 95 % intervals of a paired bootstrap over the queries; right of 0, B is better."
    whose = table(
        ["", "model", "evaluation"], [["A", found.a, found.evaluations[0]], ["B", found.b, found.evaluations[1]]]
    )
    summary = section(
        "B held against A", whose, table(*comparison_cells(found)), interval_chart(rows, "B − A", caption=caption)
    )
    changes = [_changed(task) for task in found.tasks if task.changed]
    return page(f"{found.b} against {found.a}", [summary, *changes], f"suite {found.suite}")


def _changed(task: TaskComparison) -> str:
    told = f"{task.wins} queries are better in B, {task.losses} worse, {task.ties} equal. Those that changed most:"
    return section(task.task, paragraph(told), *(_change(task, change) for change in task.changed))


def _change(task: TaskComparison, change: QueryChange) -> str:
    moved = f"{label(task.metric)} {change.a:.4f} to {change.b:.4f}, {change.b - change.a:+.4f}"
    asked = _item(moved, change.query_id, task.excerpts.queries)
    sides = (("A", change.hits_a), ("B", change.hits_b))
    return example(asked, *(_hits(f"{side}: hit", hits, task.excerpts.documents) for side, hits in sides))


def _hits(what: str, ids: Iterable[str], shown: Mapping[str, Excerpt]) -> list[str]:
    return [_item(f"{what} {place}", id, shown) for place, id in enumerate(list(ids)[:HITS], 1)]


def _item(what: str, id: str, shown: Mapping[str, Excerpt]) -> str:
    """By its id where nothing is known of it."""
    its = shown.get(id, Excerpt(id))
    return item(f"{what} · {id}" if id in shown and len(id) <= 24 else what, its.text, its.picture)
