"""Retrieval metrics, computed by trec_eval (through ir-measures), one value for each query.

Legend: q queries, k ranked documents of each. A ranking is an array of document positions [q, k], best first,
-1 where nothing more was retrieved.

trec_eval sorts a run by score and breaks ties by the documents' names. It never sees a tie here: the order of
a ranking is final, and is handed over as strictly falling scores.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_services.schema import UsageError

# Järvelin & Kekäläinen 2002 (binary gains, log2 discount); reciprocal rank of the first relevant document,
# zero beyond the cutoff; share of a query's relevant documents among the first k.
_MEASURES = {"ndcg": "nDCG", "mrr": "RR", "recall": "R"}


def metric_names(k: int = 10, recall_at: Sequence[int] = ()) -> tuple[str, ...]:
    """The metrics of every table, at cutoff k: ndcg@k, mrr@k, recall@1, those of further cutoffs up to k, recall@k."""
    further = (f"recall@{cutoff}" for cutoff in sorted(recall_at))
    return tuple(dict.fromkeys((f"ndcg@{k}", f"mrr@{k}", "recall@1", *further, f"recall@{k}")))


def parse_metric(name: str) -> tuple[str, int]:
    """ "ndcg@10" to ("ndcg", 10); a UsageError naming the nearest known metric for anything else."""
    found = re.fullmatch(r"([a-z]+)@([1-9]\d*)", name)
    if found and found[1] in _MEASURES:
        return found[1], int(found[2])
    known = metric_names()
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
    raise UsageError(f"metric {name!r} is not known: did you mean {near!r}? (ndcg@N, mrr@N and recall@N exist)")


def per_query(ranking: np.ndarray, relevant: Sequence[set[int]], metrics: Sequence[str]) -> dict[str, np.ndarray]:
    """Each metric's value for each query: {name: [q] float64}, in the order of `metrics`.

    ranking [q, k] document positions, best first, -1 after the last; relevant: q sets of document positions,
    none empty. ValueError where the ranking is shorter than a metric's cutoff or names a document twice.
    """
    import ir_measures

    _check(ranking, relevant, metrics)
    measures: dict[Any, str] = {}
    for name in metrics:
        family, cutoff = parse_metric(name)
        measures[getattr(ir_measures, _MEASURES[family]) @ cutoff] = name
    qrels = {str(i): {str(d): 1 for d in positions} for i, positions in enumerate(relevant)}
    run = {str(i): _falling_scores(row) for i, row in enumerate(ranking.tolist())}
    values = {name: np.zeros(len(ranking)) for name in metrics}
    for result in ir_measures.iter_calc(list(measures), qrels, run):
        values[measures[result.measure]][int(result.query_id)] = result.value
    return values


def _falling_scores(row: list[int]) -> dict[str, float]:
    return {str(d): float(len(row) - rank) for rank, d in enumerate(row) if d >= 0}


def _check(ranking: np.ndarray, relevant: Sequence[set[int]], metrics: Sequence[str]) -> None:
    if len(ranking) != len(relevant):
        raise ValueError(f"ranking has {len(ranking)} queries (axis 0), relevant has {len(relevant)}")
    deepest = max(parse_metric(name)[1] for name in metrics)
    if ranking.shape[1] < deepest:
        raise ValueError(f"ranking has {ranking.shape[1]} documents (axis 1), the deepest metric needs {deepest}")
    in_order = np.sort(ranking, axis=1)
    twice = (in_order[:, 1:] == in_order[:, :-1]) & (in_order[:, 1:] >= 0)
    if twice.any():
        raise ValueError(f"ranking names a document twice for query {int(np.argwhere(twice)[0, 0])}")
