"""Retrieval metrics, computed by trec_eval (through ir-measures), one value for each query.

Legend: q queries, k ranked documents of each. A ranking is an array of document positions [q, k], best first,
-1 where nothing more was retrieved.

trec_eval sorts a run by score and breaks ties by the documents' names. It never sees a tie here: the order of
a ranking is final, and is handed over as strictly falling scores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence, Set
from typing import Any

import numpy as np

from data_services.schema import UsageError

# Järvelin & Kekäläinen 2002 with linear gains and log2 discount; mean over a query's relevant documents of the
# precision at each, those beyond the cutoff counted as zero; reciprocal rank of the first relevant document, zero
# beyond the cutoff; share of a query's relevant documents among the first k; share of the first k that is relevant.
_MEASURES = {"ndcg": "nDCG", "map": "AP", "mrr": "RR", "recall": "R", "precision": "P"}
# Precision at as many documents as the query has relevant ones.
R_PRECISION = "r_precision"

Grades = Mapping[int, float]
"""{document position: grade}; above 0 is relevant, and nDCG's gain. Whole numbers."""


def metric_names(k: int = 10, recall_at: Sequence[int] = ()) -> tuple[str, ...]:
    """The metrics of every table, at cutoff k: ndcg@k, mrr@k, recall@1, those of further cutoffs up to k, recall@k."""
    further = (f"recall@{cutoff}" for cutoff in sorted(recall_at))
    return tuple(dict.fromkeys((f"ndcg@{k}", f"mrr@{k}", "recall@1", *further, f"recall@{k}")))


def ranking_metrics(k: int = 10) -> tuple[str, ...]:
    """The metrics of a suite's ranking tasks, where it names none."""
    return (f"ndcg@{k}", f"map@{k}", f"mrr@{k}", "recall@1", f"recall@{k}", f"precision@{k}", R_PRECISION)


def parse_metric(name: str) -> tuple[str, int]:
    """ "ndcg@10" to ("ndcg", 10), "r_precision" to ("r_precision", 0); a UsageError with the nearest known metric."""
    if name == R_PRECISION:
        return name, 0
    found = re.fullmatch(r"([a-z]+)@([1-9]\d*)", name)
    if found and found[1] in _MEASURES:
        return found[1], int(found[2])
    near = difflib.get_close_matches(name, ranking_metrics(), n=1, cutoff=0.0)[0]
    families = ", ".join(f"{family}@N" for family in _MEASURES)
    raise UsageError(f"metric {name!r} is not known: did you mean {near!r}? ({families} and {R_PRECISION} exist)")


def depth_needed(metrics: Sequence[str], relevant: Sequence[Set[int] | Grades]) -> int:
    """How many documents a ranking must have for these metrics to be exact."""
    deepest = max((parse_metric(name)[1] for name in metrics), default=0)
    return max([deepest, *map(relevant_count, relevant)]) if R_PRECISION in metrics else deepest


def per_query(
    ranking: np.ndarray, relevant: Sequence[Set[int] | Grades], metrics: Sequence[str]
) -> dict[str, np.ndarray]:
    """Each metric's value for each query: {name: [q] float64}, in the order of `metrics`.

    ranking [q, k] document positions, best first, -1 after the last; relevant: of each query the set of its
    documents, or their grades; none without a relevant one. ValueError where the ranking is shorter than a metric
    needs, names a document twice, or a grade is no whole number.
    """
    import ir_measures

    _check(ranking, relevant, metrics)
    measures: dict[Any, str] = {}
    for name in metrics:
        family, cutoff = parse_metric(name)
        measure = ir_measures.Rprec if name == R_PRECISION else getattr(ir_measures, _MEASURES[family]) @ cutoff
        measures[measure] = name
    qrels = {str(i): _judged(grades) for i, grades in enumerate(relevant)}
    run = {str(i): _falling_scores(row) for i, row in enumerate(ranking.tolist())}
    values = {name: np.zeros(len(ranking)) for name in metrics}
    for result in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[result.measure]][int(result.query_id)] = result.value
    return values


def _judged(relevant: Set[int] | Grades) -> dict[str, int]:
    if not isinstance(relevant, Mapping):
        return {str(d): 1 for d in relevant}
    if any(grade != int(grade) for grade in relevant.values()):
        raise ValueError("a grade is no whole number, which trec_eval needs")
    return {str(d): int(grade) for d, grade in relevant.items()}


def relevant_count(relevant: Set[int] | Grades) -> int:
    """Documents that a query has: those of the set, or those graded above 0."""
    if isinstance(relevant, Mapping):
        return sum(grade > 0 for grade in relevant.values())
    return len(relevant)


def _falling_scores(row: list[int]) -> dict[str, float]:
    return {str(d): float(len(row) - rank) for rank, d in enumerate(row) if d >= 0}


def _check(ranking: np.ndarray, relevant: Sequence[Set[int] | Grades], metrics: Sequence[str]) -> None:
    if len(ranking) != len(relevant):
        raise ValueError(f"ranking has {len(ranking)} queries (axis 0), relevant has {len(relevant)}")
    deepest = depth_needed(metrics, relevant)
    if ranking.shape[1] < deepest:
        raise ValueError(f"ranking has {ranking.shape[1]} documents (axis 1), the deepest metric needs {deepest}")
    in_order = np.sort(ranking, axis=1)
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if twice.any():
        raise ValueError(f"ranking names a document twice for query {int(np.argwhere(twice)[0, 0])}")
