"""Pairs of two kinds, images and texts say: both ways of retrieval, zero-shot classification, a baseline of pixels.

Legend: q queries, n documents, D dimension, P values of a thumbnail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_services.schema import Encoder, Item, UsageError
from evaluation.metrics import Grades
from evaluation.retrieval import (
    EvaluationConfig,
    Scores,
    TokenEncoder,
    bm25,
    evaluate_encoder,
    evaluate_retrieval,
)
from evaluation.search import rank

BACK, BY_PROMPTS = " back", " by prompts"  # behind a model's name in a table
PIXELS = "nearest pixels"


def every_way(
    name: str,
    encoder: Encoder,
    queries: Sequence[Item],
    documents: Sequence[Item],
    relevant: Sequence[Grades],
    config: EvaluationConfig,
) -> dict[str, Scores]:
    """Rows of a model: queries that look for documents and, as `config` asks, the way back and by prompts.

    Zero-shot classification by prompts takes the queries as the names of classes and gives each document the nearest
    one's, recall@1 being its accuracy (Radford et al. 2021, "Learning transferable visual models from natural language
    supervision", section 3.1.4). UsageError where the queries are no texts.
    """
    rows = {name: evaluate_encoder(encoder, queries, documents, relevant, config.k, config.recall_at)}
    back = reversed_relevance(relevant, len(documents))
    if config.both_ways:
        way_back = _Turned(encoder)
        rows[name + BACK] = evaluate_encoder(way_back, documents, queries, back, config.k, config.recall_at)
    if config.prompts:
        ranking = _by_prompts(encoder, queries, documents, config)
        rows[name + BY_PROMPTS] = evaluate_retrieval(ranking, back, config.metrics)
    return rows


def reversed_relevance(relevant: Sequence[Grades], documents: int) -> list[dict[int, float]]:
    """[n] of each document the queries that it answers, with the grades. UsageError where it answers none."""
    back: list[dict[int, float]] = [{} for _ in range(documents)]
    for query, grades in enumerate(relevant):
        for document, grade in grades.items():
            back[document][query] = grade
    alone = next((document for document, its in enumerate(back) if not its), None)
    if alone is not None:
        raise UsageError(f"document {alone} answers no query: the way back can't be scored, set both_ways to false")
    return back


class _Turned:
    """An encoder whose documents look for queries."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self.gives_tokens = getattr(encoder, "gives_tokens", False)
        self.unit_vectors = getattr(encoder, "unit_vectors", True)

    def encode(self, texts: Sequence[Item], field: str) -> np.ndarray:
        return self._encoder.encode(texts, _OTHER[field])

    def encode_tokens(self, texts: Sequence[Item], field: str) -> list[np.ndarray]:
        late: TokenEncoder = self._encoder  # type: ignore[assignment]
        return late.encode_tokens(texts, _OTHER[field])


_OTHER = {"query": "document", "document": "query"}


def _by_prompts(
    encoder: Encoder, queries: Sequence[Item], documents: Sequence[Item], config: EvaluationConfig
) -> np.ndarray:
    """[n, k] classes of each document, best first."""
    names = [query for query in queries if isinstance(query, str)]
    if len(names) < len(queries):
        raise UsageError("evaluation.prompts needs queries that are texts, the names of classes; remove it")
    vectors = np.mean([encoder.encode([p.format(name) for name in names], "query") for p in config.prompts], axis=0)
    classes = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return rank(encoder.encode(documents, "document"), classes.astype(np.float32), config.k)[0]


def pixel_rows(
    queries: Sequence[Item],
    documents: np.ndarray,
    relevant: Sequence[Grades],
    known_queries: Sequence[Item],
    known_documents: np.ndarray,
    config: EvaluationConfig,
) -> dict[str, Scores]:
    """What no learning gives: a query takes the training query nearest by BM25, whose picture looks for the nearest.

    documents [n, P], known_documents [m, P]  thumbnails, of training in step with `known_queries` [m]

    The way back: a picture takes the nearest of training, whose text looks by BM25. A query that shares no word with
    any in training, or a picture with a text of no shared word, finds nothing.
    """
    nearest = bm25(queries, known_queries, 1)[0][:, 0]
    found = nearest >= 0
    ranking = np.full((len(queries), config.k), -1, np.int64)
    ranking[found] = rank(_unit(known_documents[nearest[found]]), _unit(documents), config.k)[0]
    rows = {PIXELS: evaluate_retrieval(ranking, relevant, config.metrics)}
    if config.both_ways:
        like = rank(_unit(documents), _unit(known_documents), 1)[0][:, 0]
        named = bm25([known_queries[i] for i in like], queries, config.k)[0]
        back = reversed_relevance(relevant, len(documents))
        rows[PIXELS + BACK] = evaluate_retrieval(named, back, config.metrics)
    return rows


def _unit(thumbnails: np.ndarray) -> np.ndarray:
    """Without their mean and of length one; a picture of one colour is the zero vector."""
    centred = thumbnails - thumbnails.mean(axis=1, keepdims=True)
    return (centred / np.maximum(np.linalg.norm(centred, axis=1, keepdims=True), 1e-6)).astype(np.float32)
