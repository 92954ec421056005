"""Exact search over vectors that are in memory.

Legend: q queries, n documents, D dimension, k ranked documents of each query.

Ties: equal scores are ordered by document position, everywhere. Similarities are summed in float64 and
compared in float32, so that the order in which a library adds doesn't decide between equal documents.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_services.schema import RunError

_QUERY_BLOCK, _DOCUMENT_BLOCK = 256, 8192  # scores held at once: 16 MiB in float64


def rank(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Exact search by dot product: queries [q, D] against documents [n, D].

    Returns positions [q, k] int64 and their scores [q, k] float32, best first, ties by position; -1 and -inf
    where n < k. Memory beside the input is a block of scores, whatever q and n. RunError on NaN or infinity.
    """
    if queries.shape[1] != documents.shape[1]:
        raise ValueError(f"queries have dimension {queries.shape[1]} (axis 1), documents {documents.shape[1]}")
    refuse_nan(queries, "query")
    refuse_nan(documents, "document")
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
            refuse_nan(vectors, f"token of a {name}'s")
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
        columns = top_columns(row, k)
        found, best = best_first(columns, np.take_along_axis(row, columns, 1), k)
        ids[i], scores[i] = found[0], best[0]
    return ids, scores


def _best(queries: np.ndarray, documents: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    ids = np.zeros((len(queries), 0), np.int64)
    scores = np.zeros((len(queries), 0), np.float32)
    wide = queries.astype(np.float64)
    for at in range(0, len(documents), _DOCUMENT_BLOCK):
        block = (wide @ documents[at : at + _DOCUMENT_BLOCK].T.astype(np.float64)).astype(np.float32)
        columns = top_columns(block, k)
        # Earlier blocks hold the smaller positions: columns stay ordered by position, which settles ties.
        ids = np.concatenate([ids, columns + at], axis=1)
        scores = np.concatenate([scores, np.take_along_axis(block, columns, 1)], axis=1)
        columns = top_columns(scores, k)
        ids, scores = np.take_along_axis(ids, columns, 1), np.take_along_axis(scores, columns, 1)
    return best_first(ids, scores, k)


def top_columns(scores: np.ndarray, k: int) -> np.ndarray:
    """Columns [q, min(k, n)] of each row's k largest scores, ascending; of equal scores the leftmost."""
    rows, n = scores.shape
    if n <= k:
        return np.broadcast_to(np.arange(n), (rows, n))
    threshold = np.partition(scores, n - k, axis=1)[:, n - k, None]
    above, tied = scores > threshold, scores == threshold
    room = k - above.sum(axis=1, keepdims=True)
    return np.nonzero(above | (tied & (np.cumsum(tied, axis=1) <= room)))[1].reshape(rows, k)


def best_first(ids: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns ordered by position to columns ordered by falling score, filled up to k with -1 and -inf."""
    order = np.argsort(-scores, axis=1, kind="stable")
    fill = ((0, 0), (0, k - ids.shape[1]))
    return (
        np.pad(np.take_along_axis(ids, order, 1), fill, constant_values=-1),
        np.pad(np.take_along_axis(scores, order, 1), fill, constant_values=-np.inf),
    )


def refuse_nan(vectors: np.ndarray, side: str) -> None:
    broken = ~np.isfinite(vectors).all(axis=1)
    if broken.any():
        raise RunError(
            f"{int(broken.sum())} of {len(vectors)} {side} vectors hold NaN or infinity, the first at row "
            f"{int(np.argmax(broken))}: the model has diverged, or its weights are damaged"
        )
