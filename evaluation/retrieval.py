"""Retrieval: exact search over vectors, BM25 as the baseline, and one way to score both.

Legend: q queries, n documents, D dimension, k ranked documents of each query.

Ties: equal scores are ordered by document position, everywhere. Similarities are summed in float64 and
compared in float32, so that the order in which a library adds doesn't decide between equal documents.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_services.schema import Encoder, Item, RunError, Section, UsageError
from evaluation.metrics import metric_names, per_query

_QUERY_BLOCK, _DOCUMENT_BLOCK = 256, 8192  # scores held at once: 16 MiB in float64


class BM25Config(Section):
    """`evaluation.bm25:` the baseline's parameters (Robertson & Zaragoza 2009, Lucene's variant).

    Of (1.2, 0.75), (0.9, 0.4) and (1.5, 0.75) the defaults are the best on the built-in corpus's validation
    split; docs/evaluation.md has the figures, and how much further a tuned BM25 goes.
    """

    k1: float = Field(1.5, ge=0, description="how late a term's repetitions stop counting")
    b: float = Field(0.75, ge=0, le=1, description="how much long documents are held against their terms")
    stop_words: bool = Field(False, description="leave out Lucene's 33 English stop words")


_BM25 = BM25Config()


class PoolConfig(Section):
    """What a model is scored on, where it isn't laid out as the first of `data.sources`."""

    path: str = Field(min_length=1, description="as in data.sources")
    query: str | None = Field(None, min_length=1, description="field of the query; none: as the layout has it")
    positive: str | None = Field(None, min_length=1, description="field of the positives; none: as the layout has it")


class EvaluationConfig(Section):
    """`evaluation:` what a run is measured on. The held-out split is scored once, at the end of a run."""

    pool: str | PoolConfig | None = Field(
        None,
        description="source of queries and documents: a path, with fields as the first of `data.sources` has them, or "
        "{path, query, positive}; None: the first of `data.sources`",
    )
    validation: str | None = Field("validation", description="split that gates and choices look at; null: none")
    heldout: str | None = Field("heldout", description="split of the final table; null: none")
    k: int = Field(10, ge=1, description="cutoff of ndcg@k, mrr@k and recall@k")
    recall_at: list[int] = Field([], description="further cutoffs of recall, below k")
    both_ways: bool = Field(False, description="rows also for the way back: documents that look for their queries")
    prompts: list[str] = Field(
        [],
        description="rows also for zero-shot classification of the documents, whose classes are the queries: the mean "
        "vector of these prompts, with {} in the place of the query",
    )
    bm25: BM25Config = _BM25
    bm25_tuned: BM25Config | None = Field(None, description="a second baseline row, with parameters of your own")

    @field_validator("prompts")
    @classmethod
    def _have_a_place(cls, prompts: list[str]) -> list[str]:
        if without := next((prompt for prompt in prompts if prompt.count("{}") != 1), None):
            raise ValueError(f"{without!r} needs {{}} once, where the query goes")
        return prompts

    @model_validator(mode="after")
    def _within_k(self) -> EvaluationConfig:
        if self.recall_at and not 1 <= min(self.recall_at) <= max(self.recall_at) <= self.k:
            raise ValueError(f"recall_at {self.recall_at} goes beyond 1 … k = {self.k}; raise k or leave them out")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return metric_names(self.k, self.recall_at)


@dataclass(frozen=True)
class Scores:
    """metrics: mean over the queries; per_query: {name: [q] float64}, for `significance.paired_bootstrap`."""

    metrics: dict[str, float]
    per_query: dict[str, np.ndarray]


def evaluate_retrieval(
    ranking: np.ndarray,
    relevant: Sequence[set[int]],
    metrics: Sequence[str] = metric_names(),
    *,
    scores: np.ndarray | None = None,
    queries: Sequence[Item] | None = None,
) -> Scores:
    """Score a ranking [q, k] of document positions (best first, -1 after the last) against the relevant ones.

    With `scores` [q, k] the columns may stand in any order: they are sorted by falling score, equal ones by
    position. UsageError names the query (and quotes it from `queries`) that has no relevant document.
    """
    if not relevant:
        raise UsageError("there is no query to evaluate: the split is empty, or the source has no such split")
    for i, positions in enumerate(relevant):
        if not positions:
            query = queries[i] if queries else None
            text = f" ({query[:60]!r})" if isinstance(query, str) else ""
            raise UsageError(f"query {i}{text} has no relevant document: give it a positive or leave it out")
    if scores is not None:
        by_position = np.argsort(ranking, axis=1)
        falling = np.argsort(-np.take_along_axis(scores, by_position, 1), axis=1, kind="stable")
        ranking = np.take_along_axis(ranking, np.take_along_axis(by_position, falling, 1), 1)
    values = per_query(ranking, relevant, metrics)
    return Scores({name: float(x.mean()) for name, x in values.items()}, values)


def bm25_rows(
    queries: Sequence[Item], documents: Sequence[Item], relevant: Sequence[set[int]], config: EvaluationConfig
) -> dict[str, Scores]:
    """The lexical baselines of a table of texts: "bm25", and "bm25_tuned" where the recipe gives its parameters."""
    variants = {"bm25": config.bm25} | ({"bm25_tuned": config.bm25_tuned} if config.bm25_tuned else {})
    rankings = {name: bm25(queries, documents, config.k, variant)[0] for name, variant in variants.items()}
    names = config.metrics
    return {name: evaluate_retrieval(r, relevant, names, queries=queries) for name, r in rankings.items()}


def evaluate_encoder(
    encoder: Encoder,
    queries: Sequence[Item],
    documents: Sequence[Item],
    relevant: Sequence[set[int]],
    k: int = 10,
    recall_at: Sequence[int] = (),
) -> Scores:
    """Embed both sides with any `Encoder`, a user's own too, rank by inner product, score at cutoff k.

    An encoder that `gives_tokens` ranks by the sum of maxima over its `encode_tokens`.
    """
    if not documents:
        raise UsageError("there is no document to rank: the pool is empty")
    if getattr(encoder, "gives_tokens", False):
        late: TokenEncoder = encoder  # type: ignore[assignment]
        found = late.encode_tokens(queries, "query"), late.encode_tokens(documents, "document")
        ranking, _ = rank_tokens(*found, k)
    else:
        ranking, _ = rank(_encode(encoder, queries, "query"), _encode(encoder, documents, "document"), k)
    return evaluate_retrieval(ranking, relevant, metric_names(k, recall_at), queries=queries)


class TokenEncoder(Protocol):
    """Texts of one field to token vectors [m, D] float32 each, for late interaction."""

    def encode_tokens(self, texts: Sequence[Item], field: str) -> list[np.ndarray]: ...


def _encode(encoder: Encoder, texts: Sequence[Item], field: str) -> np.ndarray:
    vectors = np.asarray(encoder.encode(texts, field))
    if vectors.ndim != 2 or len(vectors) != len(texts):
        raise RunError(f"the encoder gave {vectors.shape} for {len(texts)} {field} texts: give one row for each")
    _refuse_nan(vectors, field)
    if not getattr(encoder, "unit_vectors", True):
        return vectors
    length = np.linalg.norm(vectors.astype(np.float64), axis=1)
    off = np.abs(length - 1) > 1e-2  # bf16 vectors are within 4e-3
    if off.any():
        row = int(np.argmax(off))
        raise RunError(f"the encoder's {field} vector {row} has length {length[row]:.3g}: normalise to unit length")
    return vectors


def _refuse_nan(vectors: np.ndarray, field: str) -> None:
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        raise RunError(
            f"{int(broken.sum())} of {len(vectors)} {field} vectors hold NaN or infinity, the first at row "
            f"{int(np.argmax(broken))}: the model has diverged, or its weights are damaged"
        )


def rank(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by dot product: queries [q, D] against documents [n, D].

    Returns positions [q, k] int64 and their scores [q, k] float32, best first, ties by position; -1 and -inf
    where n < k. Memory beside the input is a block of scores, whatever q and n. RunError on NaN or infinity.
    """
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries have dimension {queries.shape[1]} (axis 1), documents {documents.shape[1]}")
    _refuse_nan(queries, "query")
    _refuse_nan(documents, "document")
    ranked = [_best(queries[at : at + _QUERY_BLOCK], documents, k) for at in range(0, len(queries), _QUERY_BLOCK)]
    ids, scores = zip(*ranked, strict=True) if ranked else ([np.zeros((0, k), int)], [np.zeros((0, k), np.float32)])
    return np.concatenate(ids), np.concatenate(scores)


def rank_tokens(
    queries: Sequence[np.ndarray], documents: Sequence[np.ndarray], k: int
) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by the sum, over a query's tokens [m, D], of the largest inner product with a document's [l, D].

    Results as of `rank`. A document without tokens scores 0. RunError on NaN or infinity.
    """
    for side, name in ((queries, "query"), (documents, "document")):
        for vectors in side:
            _refuse_nan(vectors, f"token of a {name}'s")
    ids = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    lengths = np.array([len(tokens) for tokens in documents])
    some = np.flatnonzero(lengths)
    everything = np.concatenate([documents[int(i)] for i in some]) if len(some) else None
    begins = np.concatenate([[0], np.cumsum(lengths[some])[:-1]]).astype(int)
    for i, tokens in enumerate(queries):
        row = np.zeros((1, len(documents)), np.float32)
        if everything is not None and len(tokens):
            row[0, some] = np.maximum.reduceat(tokens @ everything.T, begins, axis=1).sum(0)
        columns = _top_columns(row, k)
        found, best = _best_first(columns, np.take_along_axis(row, columns, 1), k)
        ids[i], scores[i] = found[0], best[0]
    return ids, scores


def _best(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    wide = queries.astype(np.float64)
    for at in range(0, len(documents), _DOCUMENT_BLOCK):
        block = (wide @ documents[at : at + _DOCUMENT_BLOCK].T.astype(np.float64)).astype(np.float32)
        columns = _top_columns(block, k)
        # Earlier blocks hold the smaller positions: columns stay ordered by position, which settles ties.
        ids = np.concatenate([ids, columns + at], axis=1)
        scores = np.concatenate([scores, np.take_along_axis(block, columns, 1)], axis=1)
        columns = _top_columns(scores, k)
        ids, scores = np.take_along_axis(ids, columns, 1), np.take_along_axis(scores, columns, 1)
    return _best_first(ids, scores, k)


def _top_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns [q, min(k, n)] of each row's k largest scores, ascending; of equal scores the leftmost."""
    rows, n = scores.shape
    if n <= k:
        return np.broadcast_to(np.arange(n), (rows, n))
    threshold = np.partition(scores, n - k, axis=1)[:, n - k, None]
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(axis=1, keepdims=True)
    return np.nonzero(above | (tied & (np.cumsum(tied, axis=1) <= room)))[1].reshape(rows, k)


def _best_first(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns ordered by position to columns ordered by falling score, filled up to k with -1 and -inf."""
    order = np.argsort(-scores, axis=1, kind="stable")
    fill = ((0, 0), (0, k - ids.shape[1]))
    return (
        np.pad(np.take_along_axis(ids, order, 1), fill, constant_values=-1),
        np.pad(np.take_along_axis(scores, order, 1), fill, constant_values=-np.inf),
    )


_WORD = re.compile(r"[^\W_]+")
_INSIDE_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=[A-Za-z])(?=[0-9])|(?<=[0-9])(?=[A-Za-z])")


def terms(text: Item, leave_out: Collection[str] = ()) -> list[str]:
    """Lower-case terms of prose or code: identifiers are split at case, digits, underscores and punctuation.

    "HTTPServer.readLine_2" gives http, server, read, line, 2.
    """
    assert isinstance(text, str), "BM25 reads texts"
    parts = (part.lower() for word in _WORD.findall(text) for part in _INSIDE_WORD.split(word))
    return [part for part in parts if part not in leave_out]


def bm25(
    queries: Sequence[Item], documents: Sequence[Item], k: int, config: BM25Config = _BM25
) -> tuple[np.ndarray, np.ndarray]:
    """BM25 over `terms`: positions [q, k] int64 and scores [q, k] float32, best first, ties by position.

    A document that shares no term with the query is not retrieved: -1 and -inf. UsageError where no document
    has a term. Lucene's variant, by bm25s (Lù 2024, arXiv 2407.03618).
    """
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN

    leave_out = frozenset(STOPWORDS_EN if config.stop_words else ())
    document_terms = [terms(text, leave_out) for text in documents]
    # A sorted vocabulary: bm25s would number a set of strings, whose order changes from process to process.
    vocabulary = {term: i for i, term in enumerate(sorted({t for ts in document_terms for t in ts}))}
    if not vocabulary:
        raise UsageError("BM25 has nothing to search: no document holds a word")
    index = bm25s.BM25(k1=config.k1, b=config.b, method="lucene", dtype="float64", backend="numpy")
    index.index(([[vocabulary[t] for t in ts] for ts in document_terms], vocabulary), show_progress=False)
    ids = np.full((len(queries), k), -1, np.int64)
    scores = np.full((len(queries), k), -np.inf, np.float32)
    for i, query in enumerate(queries):
        known = [vocabulary[t] for t in terms(query, leave_out) if t in vocabulary]
        row = index.get_scores_from_ids(known).astype(np.float32)[None]
        columns = _top_columns(row, k)
        found, best = _best_first(columns, np.take_along_axis(row, columns, 1), k)
        ids[i], scores[i] = np.where(best > 0, found, -1)[0], np.where(best > 0, best, -np.inf)[0]
    return ids, scores
