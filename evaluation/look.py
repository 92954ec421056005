"""What a report shows of models on one split beside their scores: similarities, geometry, queries with their hits.

A run writes it when it is scored, since the vectors are there then; it is small, however large the split.
Legend: q queries, n documents, D dimension, k ranked documents.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from data_services.schema import Item, Section
from evaluation.excerpts import Excerpt, excerpt
from evaluation.geometry import drawn, figures
from evaluation.retrieval import Scores
from evaluation.vectors import Remembered, unit_length

BINS = 80  # of the cosines, -1 … 1
EXAMPLES, HITS = 5, 3
_BLOCK = 512  # queries whose similarities are held at once

Relevant = Sequence[Collection[int]]


class Histogram(Section):
    """Cosines of queries and documents in BINS equal bins from -1 to 1: of pairs, and of all that answer nothing."""

    positives: list[int]
    negatives: list[int]


@dataclass(frozen=True)
class Hit:
    """A document among the best. similarity: the cosine; None of a model of token vectors."""

    item: Excerpt
    right: bool
    similarity: float | None


@dataclass(frozen=True)
class Example:
    """A query, a document that answers it, the best that was found.

    score  of the look's metric
    place  of the first right document in the ranking, from 1; None: not among the k
    """

    query: Excerpt
    answer: Excerpt
    score: float
    place: int | None
    hits: list[Hit]


class Look(Section):
    """Of one split. {model: …} of "untrained" and "trained"; the examples are of the trained one."""

    metric: str = Field(description="by which `best` and `worst` are chosen")
    similarities: dict[str, Histogram] = Field({}, description="empty where a text has a vector for each token")
    geometry: dict[str, dict[str, float]] = Field({}, description="see evaluation/geometry.py; empty as above")
    best: list[Example] = []
    worst: list[Example] = []


def histogram(queries: np.ndarray, documents: np.ndarray, relevant: Relevant) -> Histogram:
    """Of unit vectors [q, D] and [n, D]; of many, those of `geometry.drawn`."""
    rows, columns = drawn(len(queries)), drawn(len(documents))
    at = {document: column for column, document in enumerate(columns)}
    right = np.array([(i, at[d]) for i, row in enumerate(rows) for d in relevant[row] if d in at], int).reshape(-1, 2)
    kept, found = documents[columns], np.zeros((2, BINS), np.int64)
    for begin in range(0, len(rows), _BLOCK):
        cosines = np.clip(queries[rows[begin : begin + _BLOCK]] @ kept.T, -1, 1)
        own = right[(right[:, 0] >= begin) & (right[:, 0] < begin + _BLOCK)] - [begin, 0]
        every, of_pairs = (_counted(x) for x in (cosines, cosines[own[:, 0], own[:, 1]]))
        found += [of_pairs, every - of_pairs]
    return Histogram(positives=found[0].tolist(), negatives=found[1].tolist())


def geometry(queries: np.ndarray, documents: np.ndarray, relevant: Relevant) -> dict[str, float]:
    """`geometry.figures` of unit vectors [q, D] and [n, D] and of their pairs; of many, those that are drawn."""
    pairs = [(query, document) for query, its in enumerate(relevant) for document in sorted(its)]
    asked, answers = np.array([pairs[i] for i in drawn(len(pairs))]).T
    some = queries[drawn(len(queries))], documents[drawn(len(documents))]
    return figures(*some, (queries[asked], documents[answers]))


def look(
    models: Mapping[str, tuple[Remembered, Scores]],
    queries: Sequence[Item],
    documents: Sequence[Item],
    relevant: Relevant,
    metric: str,
) -> Look:
    """models: each with its scores on this task; the last one's queries are shown."""
    similarities, geometries = {}, {}
    sides: tuple[np.ndarray, np.ndarray] | None = None
    for name, (encoder, _) in models.items():
        if encoder.gives_tokens:
            continue
        sides = unit_length(encoder.encode(queries, "query")), unit_length(encoder.encode(documents, "document"))
        similarities[name], geometries[name] = histogram(*sides, relevant), geometry(*sides, relevant)
    *_, (encoder, scores) = models.values()
    chosen = _Chosen(queries, documents, relevant, scores, metric, None if encoder.gives_tokens else sides)
    order = chosen.order()
    most = min(EXAMPLES, (len(order) + 1) // 2)
    best, worst = order[::-1][:most], order[: min(most, len(order) - most)]
    return Look(
        metric=metric,
        similarities=similarities,
        geometry=geometries,
        best=[chosen.example(query) for query in best],
        worst=[chosen.example(query) for query in worst],
    )


@dataclass(frozen=True)
class _Chosen:
    queries: Sequence[Item]
    documents: Sequence[Item]
    relevant: Relevant
    scores: Scores
    metric: str
    sides: tuple[np.ndarray, np.ndarray] | None

    def order(self) -> list[int]:
        """Queries from the worst to the best; of equal scores by how far the answer is above what is wrong."""
        margins = [self._margin(query) for query in range(len(self.queries))]
        return np.lexsort((np.array(margins), self.scores.per_query[self.metric])).tolist()

    def example(self, query: int) -> Example:
        ranked = [document for document in self.scores.ranking[query].tolist() if document >= 0]
        right = self.relevant[query]
        answer = next((document for document in ranked if document in right), min(right))
        hits = [Hit(excerpt(self.documents[d]), d in right, self._cosine(query, d)) for d in ranked[:HITS]]
        return Example(
            query=excerpt(self.queries[query]),
            answer=excerpt(self.documents[answer]),
            score=float(self.scores.per_query[self.metric][query]),
            place=ranked.index(answer) + 1 if answer in ranked else None,
            hits=hits,
        )

    def _margin(self, query: int) -> float:
        if self.sides is None:
            return 0.0
        right = self.relevant[query]
        wrong = next((d for d in self.scores.ranking[query].tolist() if d >= 0 and d not in right), None)
        best = max(self._cosine(query, document) or 0.0 for document in right)
        return best - ((self._cosine(query, wrong) or 0.0) if wrong is not None else -1.0)

    def _cosine(self, query: int, document: int) -> float | None:
        return None if self.sides is None else float(self.sides[0][query] @ self.sides[1][document])


def _counted(cosines: np.ndarray) -> np.ndarray:
    return np.histogram(cosines, bins=BINS, range=(-1, 1))[0]
