"""Rows to clusters by k-means over the vectors of one of their texts; near clusters have near numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_services.mining.texts import TextTable
from data_services.mining.vectors import Vectors
from data_services.rewrite import replaced, rewrite
from data_services.schema import Column, UsageError
from data_services.store import StoredSource

Side = Literal["query", "document"]

MOST_CLUSTERS = 10_000  # their distances to each other, which order them, are held at once
_ROWS_AT_ONCE = 1 << 16
_TRAINED_ON = 256  # vectors a cluster at most
_ROUNDS = 20


def cluster(vectors: Vectors, clusters: int, seed: int = 0) -> np.ndarray:
    """[n] int64 the cluster, 0 … clusters-1, of each of n vectors: that of the nearest centroid.

    Spherical k-means (faiss) on a sample of 256 vectors a cluster. The numbers are the leaves of a dendrogram of the
    centroids in its order (average linkage), so that neighbouring numbers are near each other. Raises UsageError where
    there are fewer vectors than clusters.
    """
    import faiss

    if vectors.rows < clusters:
        raise UsageError(f"{clusters} clusters can't be made of {vectors.rows} texts: ask for fewer")
    step = max(vectors.rows // (_TRAINED_ON * clusters), 1)
    sample = vectors.take(np.arange(0, vectors.rows, step))
    means = faiss.Kmeans(
        vectors.dimensions,
        clusters,
        niter=_ROUNDS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=_TRAINED_ON,
    )
    means.train(sample)
    found = np.asarray(means.centroids)
    centroids = found[_by_nearness(found)]
    nearest = [
        faiss.knn(vectors.block(at, at + _ROWS_AT_ONCE), centroids, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]
        for at in range(0, vectors.rows, _ROWS_AT_ONCE)
    ]
    return np.concatenate(nearest)


def _by_nearness(centroids: np.ndarray) -> np.ndarray:
    """[k] the centroids [k, D] in the order of the leaves of their dendrogram."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    return leaves_list(linkage(centroids, "average")) if len(centroids) > 1 else np.zeros(1, np.int64)


def write_clustered(source: StoredSource, texts: TextTable, side: Side, numbers: np.ndarray, folder: Path) -> None:
    """The source's rows with the cluster of their query, or of their first positive.

    texts    the queries, or the positives, of the source
    numbers  [texts] int64 the cluster of each
    """

    def with_cluster(table: pa.Table, _: int) -> pa.Table:
        of_row = table.column(Column.QUERY_ID)
        if side == "document":
            of_row = pc.list_element(table.column(Column.POSITIVE_IDS), 0)
        return replaced(table, Column.CLUSTER, pa.array(numbers[texts.positions(of_row.to_numpy())]))

    rewrite(source, folder, with_cluster)
