"""Retrieval: the best documents of a whole corpus; reranking: the order of each query's own candidates.

Equal scores are ordered by position: in retrieval that of the document in the corpus, in reranking by a hash of the
text, so that a model which scores all candidates alike is not paid for the order of its data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_services.items import Item, item_id
from data_services.schema import UsageError, text_id
from evaluation.geometry import drawn, figures
from evaluation.metrics import Grades, depth_needed, per_query
from evaluation.retrieval import BM25Config, bm25
from evaluation.stored import PerQuery
from evaluation.tasks.base import Task, TaskScores, means, refuse_empty
from evaluation.vectors import Side, Vectors, unit_length

HITS = 10


@dataclass(frozen=True)
class Retrieval(Task):
    """q queries against n documents; `grades` of each query by document position, above 0 relevant."""

    query_ids: Sequence[str]
    queries: Sequence[Item]
    document_ids: Sequence[str]
    documents: Sequence[Item]
    grades: Sequence[Grades]
    lexical: BM25Config
    kind: ClassVar[str] = "retrieval"

    def __post_init__(self) -> None:
        refuse_empty(self.name, queries=self.queries, documents=self.documents)
        for query, text, grades in zip(self.query_ids, self.queries, self.grades, strict=True):
            if not any(grade > 0 for grade in grades.values()):
                raise UsageError(
                    f"task {self.name}: query {query!r} ({str(text)[:60]!r}) has no relevant document: judge one, "
                    "or set unanswered: leave_out"
                )
            if any(grade != int(grade) for grade in grades.values()):
                raise UsageError(f"task {self.name}: query {query!r} has a grade that is no whole number")

    def sides(self) -> Mapping[str, Sequence[Item]]:
        return {"queries": self.queries, "documents": self.documents}

    @property
    def asked_texts(self) -> Sequence[str]:
        texts = [query for query in self.queries if isinstance(query, str)]
        return texts if len(texts) == len(self.queries) else ()

    def asked_items(self) -> Mapping[str, Item]:
        return dict(zip(self.query_ids, self.queries, strict=True))

    def found_items(self) -> Mapping[str, Item]:
        return dict(zip(self.document_ids, self.documents, strict=True))

    def geometry(self, vectors: Vectors) -> dict[str, float]:
        """`geometry.figures` of the queries and documents, as the model gives them or scaled to length 1."""
        pairs = [(q, d) for q, grades in enumerate(self.grades) for d, grade in grades.items() if grade > 0]
        some = [pairs[i] for i in drawn(len(pairs))]

        def of(texts: Sequence[Item], rows: Sequence[int], side: Side) -> np.ndarray:
            return unit_length(vectors.of([texts[row] for row in rows], side))

        return figures(
            of(self.queries, drawn(len(self.queries)), "query"),
            of(self.documents, drawn(len(self.documents)), "document"),
            (of(self.queries, [q for q, _ in some], "query"), of(self.documents, [d for _, d in some], "document")),
        )

    def content(self) -> Any:
        graded = [sorted((self.document_ids[d], grade) for d, grade in grades.items()) for grades in self.grades]
        sides = (self.query_ids, self.queries), (self.document_ids, self.documents)
        told = [[list(names), [x if isinstance(x, str) else item_id(x) for x in items]] for names, items in sides]
        return [*told, graded]

    def score(self, vectors: Vectors) -> TaskScores:
        return self._scores(vectors.nearest(self.queries, self.documents, self._depth)[0])

    def baselines(self) -> dict[str, TaskScores]:
        if not all(isinstance(item, str) for item in (*self.queries, *self.documents)):
            return {}
        return {"bm25": self._scores(bm25(self.queries, self.documents, self._depth, self.lexical)[0])}

    @property
    def _depth(self) -> int:
        return max(HITS, depth_needed(self.metrics, self.grades))

    def _scores(self, ranking: np.ndarray) -> TaskScores:
        scores = per_query(ranking, self.grades, self.metrics)
        hits = [[self.document_ids[d] for d in row[:HITS] if d >= 0] for row in ranking.tolist()]
        return self.asked(means(scores), PerQuery(self.query_ids, scores, hits))


@dataclass(frozen=True)
class Reranking(Task):
    """q queries, each with candidates: {text: relevant}, one relevant and one not at least."""

    query_ids: Sequence[str]
    queries: Sequence[str]
    candidates: Sequence[Mapping[str, bool]]
    lexical: BM25Config
    kind: ClassVar[str] = "reranking"

    def __post_init__(self) -> None:
        refuse_empty(self.name, queries=self.queries)
        for query, candidates in zip(self.query_ids, self.candidates, strict=True):
            if set(candidates.values()) != {True, False}:
                lacks = "relevant" if True not in candidates.values() else "irrelevant"
                raise UsageError(f"task {self.name}: query {query!r} has no {lacks} candidate: nothing can be ordered")

    def sides(self) -> dict[str, Sequence[str]]:
        return {"queries": self.queries, "documents": self._documents}

    @property
    def asked_texts(self) -> Sequence[str]:
        return self.queries

    def asked_items(self) -> Mapping[str, Item]:
        return dict(zip(self.query_ids, self.queries, strict=True))

    def found_items(self) -> Mapping[str, Item]:
        return {_name(text): text for text in self._documents}

    def content(self) -> Any:
        return [list(self.query_ids), list(self.queries), [sorted(c.items()) for c in self.candidates]]

    def score(self, vectors: Vectors) -> TaskScores:
        return self._scores(vectors.ordered(self.queries, self._documents, self._positions))

    def baselines(self) -> dict[str, TaskScores]:
        """BM25 with the frequencies of all candidates; those that share no term with the query come last."""
        found = bm25(self.queries, self._documents, len(self._documents), self.lexical)[0]
        orders = []
        for row, own in zip(found, self._positions, strict=True):
            place = {int(d): rank for rank, d in enumerate(row) if d >= 0}
            orders.append(np.array(sorted(own, key=lambda d: (place.get(d, len(row)), own.index(d)))))
        return {"bm25": self._scores(orders)}

    @property
    def _documents(self) -> list[str]:
        return list(dict.fromkeys(text for candidates in self.candidates for text in candidates))

    @property
    def _positions(self) -> list[list[int]]:
        """Of each query's candidates among the documents, by the hash of their text."""
        at = {text: i for i, text in enumerate(self._documents)}
        return [[at[text] for text in sorted(candidates, key=text_id)] for candidates in self.candidates]

    def _scores(self, orders: Sequence[np.ndarray]) -> TaskScores:
        documents = self._documents
        grades = [
            {d: float(candidates[documents[d]]) for d in order.tolist()}
            for order, candidates in zip(orders, self.candidates, strict=True)
        ]
        width = max(max(map(len, orders)), depth_needed(self.metrics, grades))
        ranking = np.full((len(orders), width), -1)
        for row, order in zip(ranking, orders, strict=True):
            row[: len(order)] = order
        scores = per_query(ranking, grades, self.metrics)
        hits = [[_name(documents[d]) for d in order[:HITS]] for order in orders]
        return self.asked(means(scores), PerQuery(self.query_ids, scores, hits))


def _name(text: str) -> str:
    """The id of a candidate, which its data doesn't name."""
    return f"{text_id(text) % 2**64:016x}"
