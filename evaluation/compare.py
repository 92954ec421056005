"""Two stored evaluations on the same suite, task by task and query by query."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_services.schema import UsageError
from evaluation.excerpts import Excerpt
from evaluation.significance import Difference, paired_bootstrap, paired_randomisation
from evaluation.stored import Excerpts, PerQuery, StoredEvaluation, TaskResult

_SAME = 1e-12  # two scores of one query that differ by less are a tie


@dataclass(frozen=True)
class QueryChange:
    """A query whose score changed, with the ids of the best documents before and after."""

    query_id: str
    a: float
    b: float
    hits_a: tuple[str, ...]
    hits_b: tuple[str, ...]


@dataclass(frozen=True)
class TaskComparison:
    """One task: the metric of both, b less a.

    difference, p    of b − a, bootstrap and randomisation; None where the metric is no mean over at least 2 queries
    wins, losses, ties   queries on which b is better, worse, equal
    changed          the queries that changed most, the largest change first
    excerpts         what these queries and their hits show, by id
    """

    task: str
    metric: str
    a: float
    b: float
    difference: Difference | None
    p: float | None
    wins: int
    losses: int
    ties: int
    changed: tuple[QueryChange, ...]
    excerpts: Excerpts = field(default_factory=Excerpts)

    def shown(self, change: QueryChange) -> str:
        """A line for a changed query: the beginning of its text, else its id."""
        text = self.excerpts.queries.get(change.query_id, Excerpt()).text
        return " ".join(text.split())[:80] or change.query_id


@dataclass(frozen=True)
class Comparison:
    """a and b as the models were named; evaluations: the ids of what was compared."""

    a: str
    b: str
    suite: str
    evaluations: tuple[str, str]
    tasks: tuple[TaskComparison, ...]

    @property
    def id(self) -> str:
        return "..".join(self.evaluations)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare(a: StoredEvaluation, b: StoredEvaluation, metric: str | None = None, changed: int = 10) -> Comparison:
    """Every task of the suite by its main metric, or by `metric`, with the `changed` queries that changed most.

    UsageError where the two were evaluated on other suites, or a task lacks the metric.
    """
    check_same_suite(a, b)
    tasks = tuple(compare_task(a, b, task, metric, changed) for task in a.result.tasks)
    return Comparison(a.result.model, b.result.model, a.result.suite, (a.result.id, b.result.id), tasks)


def check_same_suite(a: StoredEvaluation, b: StoredEvaluation) -> None:
    """UsageError where the scores of two evaluations can't be held against each other."""
    one, other = a.result, b.result
    if one.suite_fingerprint != other.suite_fingerprint or one.tasks.keys() != other.tasks.keys():
        raise UsageError(
            f"{one.model} was evaluated on {one.suite} ({one.id}) and {other.model} on {other.suite} ({other.id}), "
            "whose tasks, settings or texts differ: evaluate both on the same suite"
        )


def compare_task(
    a: StoredEvaluation,
    b: StoredEvaluation,
    task: str,
    metric: str | None = None,
    changed: int = 10,
    confidence: float = 0.95,
) -> TaskComparison:
    """One task of two evaluations on the same suite; see `compare`. confidence: of the two-sided interval."""
    name = metric or a.result.tasks[task].main
    one, other = (_metric(e.result.tasks[task], task, name) for e in (a, b))
    before, after = a.per_query(task, name), b.per_query(task, name)
    if list(before.query_ids) != list(after.query_ids):
        raise UsageError(f"{a.result.id} and {b.result.id} have other queries of {task}: evaluate again")
    scores_a, scores_b = (side.scores.get(name, np.zeros(0)) for side in (before, after))
    moved = scores_b - scores_a
    enough = len(moved) > 1
    changes = tuple(_changes(before, after, name, changed))
    ids, hits = [c.query_id for c in changes], [id for c in changes for id in (*c.hits_a, *c.hits_b)]
    of_a, of_b = (side.excerpts(task).of(ids, hits) for side in (a, b))
    excerpts = Excerpts({**of_b.queries, **of_a.queries}, {**of_b.documents, **of_a.documents})
    return TaskComparison(
        task=task,
        metric=name,
        a=one,
        b=other,
        difference=paired_bootstrap(scores_b, scores_a, confidence=confidence) if enough else None,
        p=paired_randomisation(scores_b, scores_a) if enough else None,
        wins=int((moved > _SAME).sum()),
        losses=int((moved < -_SAME).sum()),
        ties=int((np.abs(moved) <= _SAME).sum()),
        changed=changes,
        excerpts=excerpts,
    )


def _metric(task: TaskResult, name: str, metric: str) -> float:
    if metric not in task.metrics:
        raise UsageError(f"task {name} has no metric {metric!r}; it has {', '.join(sorted(task.metrics))}")
    return task.metrics[metric]


def _changes(before: PerQuery, after: PerQuery, metric: str, most: int) -> list[QueryChange]:
    if not len(before.query_ids):
        return []
    a, b = before.scores[metric], after.scores[metric]
    order = np.argsort(-np.abs(b - a), kind="stable")[:most]

    def hits(side: PerQuery, row: int) -> tuple[str, ...]:
        return tuple(side.hits[row]) if side.hits else ()

    return [
        QueryChange(before.query_ids[i], float(a[i]), float(b[i]), hits(before, i), hits(after, i))
        for i in map(int, order)
        if abs(b[i] - a[i]) > _SAME
    ]
