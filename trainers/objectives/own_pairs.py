"""Similarities that no worker need ask another for: of a query and the documents of its own record."""

from __future__ import annotations

from torch import Tensor

from trainers.objectives.embedded import Embedded, wide
from trainers.objectives.similarity import InnerProduct, Keyed, MaxSim, Similarity


def similarity_of(embedded: Embedded) -> Similarity:
    """Of vectors the inner product, of token vectors the sum of maxima."""
    return InnerProduct() if embedded.pooled else MaxSim()


def own_positives(embedded: Embedded, score: Similarity) -> Tensor:
    """[b] similarity of each query and its positive."""
    positives = Keyed(wide(embedded.positives), embedded.document_keys[: len(embedded.queries)])
    return score.of_pairs(Keyed(wide(embedded.queries), embedded.query_keys), positives)


def own_similarities(embedded: Embedded, score: Similarity | None = None) -> Tensor:
    """[d] similarity of each document and the query that it belongs to."""
    owners, score = embedded.owners, score or similarity_of(embedded)
    queries = Keyed(wide(embedded.queries)[owners], embedded.query_keys[owners])
    return score.of_pairs(queries, Keyed(wide(embedded.documents), embedded.document_keys))
