"""Retrieval: what a run is measured on, BM25 as the baseline, and one way to score both.

Legend: q queries, n documents, D dimension, k ranked documents of each query.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence, Set
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import Field, field_validator, model_validator

from data_services.schema import Encoder, Item, Section, UsageError
from evaluation.metrics import Grades, metric_names, per_query, relevant_count
from evaluation.search import best_first, rank, rank_tokens, top_columns
from evaluation.vectors import encode


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
    every_steps: int | None = Field(
        None, ge=1, description="score the validation split after every so many steps, beside training; null: never"
    )
    best_by: str | None = Field(
        None, description="metric of these scores by which the best model is exported; null: the last one is"
    )
    patience: int | None = Field(
        None, ge=1, description="end training after so many scores without a better one; null: train to the end"
    )
    heldout: str | None = Field("heldout", description="split of the final table; null: none")
    k: int = Field(10, ge=1, description="cutoff of ndcg@k, mrr@k and recall@k")
    recall_at: list[int] = Field([], description="further cutoffs of recall, below k")
    both_ways: bool = Field(False, description="rows also for the way back: documents that look for their queries")
    prompts: list[str] = Field(
        [],
        description="rows also for zero-shot classification of the documents, whose classes are the queries: the mean "
        "vector of these prompts, with {} in the place of the query",
    )
    geometry: bool = Field(
        False,
        description="result.json also says what the vectors of each model look like: how near pairs are, how even each "
        "side lies, the gap between the two",
    )
    classes: str | None = Field(
        None,
        min_length=1,
        description="field of the pool's rows: result.json also says how well a linear probe and the nearest "
        "neighbours tell it by an item's vector",
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

    @model_validator(mode="after")
    def _watched_by_what_is_measured(self) -> EvaluationConfig:
        known = self.metrics
        if self.every_steps is not None and self.validation is None:
            raise ValueError("every_steps scores the validation split: name it in `validation`")
        if self.best_by is not None and self.every_steps is None:
            raise ValueError("best_by chooses among the models of every_steps, which is empty: set it")
        if self.patience is not None and self.best_by is None:
            raise ValueError("patience counts scores without a better one: name the metric in `best_by`")
        if self.best_by is not None and self.best_by not in known:
            near = difflib.get_close_matches(self.best_by, known, n=1, cutoff=0.0)[0]
            raise ValueError(
                f"best_by is {self.best_by!r}, which k = {self.k} doesn't measure: did you mean {near!r}? "
                f"There are {', '.join(known)}"
            )
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        return metric_names(self.k, self.recall_at)

    def watches(self, step: int, steps: int) -> bool:
        """Whether the weights after `step` of `steps` steps are scored beside training; the last are at its end."""
        return self.every_steps is not None and step % self.every_steps == 0 and step < steps


@dataclass(frozen=True)
class Scores:
    """metrics: mean over the queries; per_query: {name: [q] float64}, for `significance.paired_bootstrap`; ranking:
    [q, k] document positions, best first, -1 after the last."""

    metrics: dict[str, float]
    per_query: dict[str, np.ndarray]
    ranking: np.ndarray


def evaluate_retrieval(
    ranking: np.ndarray,
    relevant: Sequence[Set[int] | Grades],
    metrics: Sequence[str] = metric_names(),
    *,
    scores: np.ndarray | None = None,
    queries: Sequence[Item] | None = None,
) -> Scores:
    """Score a ranking [q, k] of document positions (best first, -1 after the last) against the relevant ones.

    relevant: of each query the set of its documents, or their grades. With `scores` [q, k] the columns may stand in
    any order: they are sorted by falling score, equal ones by position. UsageError names the query
    (and quotes it from `queries`) that has no relevant document.
    """
    if not relevant:
        raise UsageError("there is no query to evaluate: the split is empty, or the source has no such split")
    for i, positions in enumerate(relevant):
        if not relevant_count(positions):
            query = queries[i] if queries else None
            text = f" ({query[:60]!r})" if isinstance(query, str) else ""
            raise UsageError(f"query {i}{text} has no relevant document: give it a positive or leave it out")
    if scores is not None:
        by_position = np.argsort(ranking, axis=1)
        falling = np.argsort(-np.take_along_axis(scores, by_position, 1), axis=1, kind="stable")
        ranking = np.take_along_axis(ranking, np.take_along_axis(by_position, falling, 1), 1)
    values = per_query(ranking, relevant, metrics)
    return Scores({name: float(x.mean()) for name, x in values.items()}, values, ranking)


def bm25_rows(
    queries: Sequence[Item], documents: Sequence[Item], relevant: Sequence[Set[int] | Grades], config: EvaluationConfig
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
    relevant: Sequence[Set[int] | Grades],
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
        ranking, _ = rank(encode(encoder, queries, "query"), encode(encoder, documents, "document"), k)
    return evaluate_retrieval(ranking, relevant, metric_names(k, recall_at), queries=queries)


class TokenEncoder(Protocol):
    """Texts of one field to token vectors [m, D] float32 each, for late interaction."""

    def encode_tokens(self, texts: Sequence[Item], field: str) -> list[np.ndarray]: ...


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
        columns = top_columns(row, k)
        found, best = best_first(columns, np.take_along_axis(row, columns, 1), k)
        ids[i], scores[i] = np.where(best > 0, found, -1)[0], np.where(best > 0, best, -np.inf)[0]
    return ids, scores
