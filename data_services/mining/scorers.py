"""What says how well documents answer queries: vectors, BM25, a guide's vectors, a cross-encoder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from data_services.mining.search import Search, best
from data_services.mining.texts import TextTable
from data_services.mining.vectors import Vectors, dots
from data_services.schema import RunError, UsageError

PairScores = Callable[[Sequence[str], Sequence[str]], np.ndarray]
"""m queries and m documents -> [m] scores of the pairs: a cross-encoder."""


class Scorer(Protocol):
    """Scores of pairs. of, to [m] int64 positions of queries and documents -> [m] float32."""

    def scores(self, of: np.ndarray, to: np.ndarray) -> np.ndarray: ...


@dataclass(frozen=True)
class Guide:
    """A second opinion.

    use  filter: what it scores above the query's hardest positive less `margin` is no negative (Solatorio 2024,
         GISTEmbed, arXiv 2402.16829); rescore: margins, order and written scores are its own
    """

    scorer: Scorer
    use: Literal["filter", "rescore"] = "filter"
    margin: float = 0.0


class Miner(Scorer, Protocol):
    """A scorer that can also search: (positions [q, k], scores [q, k]) of queries first … stop-1."""

    def search(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class VectorScorer:
    """Inner products of the vectors of an encoder."""

    queries: Vectors
    documents: Vectors

    def scores(self, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        return dots(self.queries, of, self.documents, to)


@dataclass(frozen=True)
class VectorMiner(VectorScorer):
    """Searches with an encoder's vectors."""

    searcher: Search

    def search(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self.searcher(first, stop, k)


@dataclass(frozen=True)
class PairScorer:
    """Reads the texts of both sides at once: a cross-encoder."""

    queries: TextTable
    documents: TextTable
    predict: PairScores

    def scores(self, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        if not len(of):
            return np.zeros(0, np.float32)
        given = np.asarray(self.predict(self.queries.take(of), self.documents.take(to)), np.float32)
        if given.shape != of.shape or not np.isfinite(given).all():
            raise RunError(f"the cross-encoder gave {given.shape} for {len(of)} pairs, or NaN: one number for each")
        return given


class BM25Miner:
    """BM25, Lucene's variant, by bm25s (Lù 2024, arXiv 2407.03618). The index is in memory.

    terms  a text's terms: `evaluation.retrieval.terms` splits identifiers
    A document that shares no term with the query is not found.
    """

    def __init__(
        self,
        queries: TextTable,
        documents: TextTable,
        terms: Callable[[str], list[str]],
        k1: float = 1.5,
        b: float = 0.75,
    ) -> None:
        import bm25s

        self._queries, self._terms = queries, terms
        self._vocabulary: dict[str, int] = {}
        number = self._vocabulary.setdefault
        _, texts = documents.read(0, len(documents))
        tokens = [[number(term, len(self._vocabulary)) for term in terms(text)] for text in texts]
        if not self._vocabulary:
            raise UsageError("BM25 has nothing to search: no document holds a word")
        self._index = bm25s.BM25(k1=k1, b=b, method="lucene", dtype="float64", backend="numpy")
        self._index.index((tokens, self._vocabulary), show_progress=False)

    def search(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for row in self._rows(np.arange(first, min(stop, len(self._queries)))):
            at = np.argpartition(-row, k)[:k] if len(row) > k else np.arange(len(row))
            # Of equal scores at the edge the first ones, as everywhere.
            at = np.flatnonzero(row >= row[at].min(initial=np.inf)) if len(at) else at
            scores = np.where(row[at] > 0, row[at], -np.inf)
            found.append(best(np.where(row[at] > 0, at, -1)[None], scores[None], k))
        return np.concatenate([p for p, _ in found]), np.concatenate([s for _, s in found])

    def scores(self, of: np.ndarray, to: np.ndarray) -> np.ndarray:
        unique, inverse = np.unique(of, return_inverse=True)
        order = np.argsort(inverse, kind="stable")
        edges = np.searchsorted(inverse[order], np.arange(len(unique) + 1))
        scores = np.empty(len(of), np.float32)
        for i, row in enumerate(self._rows(unique)):
            part = order[edges[i] : edges[i + 1]]
            scores[part] = row[to[part]]
        return scores

    def _rows(self, queries: np.ndarray):  # type: ignore[no-untyped-def]
        """[n] float32 scores of all documents, one query after another."""
        for text in self._queries.take(queries):
            known = [self._vocabulary[t] for t in self._terms(text) if t in self._vocabulary]
            yield self._index.get_scores_from_ids(known).astype(np.float32)
