"""The nearest documents of each query by inner product: faiss over shards of the corpus, merged exactly.

Legend: q queries of a block, n documents, D dimension, k nearest that are asked for.

A shard is a range of document rows. Each gives its k best with scores summed in float64 (`vectors.dots`), ties by
position; the k best of all shards' bests are the k best of the corpus, however it was cut.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import Field

from data_services.mining.vectors import Vectors, dots
from data_services.schema import Section

_ROWS_AT_ONCE = 1 << 16  # documents mapped at once
# faiss compares sums in float32, whose last digits depend on how it cuts the product: so many more are fetched, and
# the float64 sums settle which are the k best.
_SPARE = 8
_ROUNDING = 2e-6  # of such a float32 sum, as a share of the largest score where that is above 1
_NOTHING = -1


class SearchConfig(Section):
    """How the nearest documents are found."""

    index: Literal["flat", "ivf"] = Field("flat", description="flat: exact; ivf: only the nearest cells are searched")
    cells: int | None = Field(None, ge=1, description="ivf: cells of a shard; none: 4 √rows")
    probes: int = Field(32, ge=1, description="ivf: cells searched for each query")
    shard_rows: int = Field(1 << 20, ge=1, description="documents of a shard, an index of which one worker holds")
    query_block: int = Field(4096, ge=1, description="queries searched at once")


class Search(Protocol):
    """(positions [q, k] int64, scores [q, k] float32), best first; -1 and -inf where there are fewer documents."""

    def __call__(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class Shard:
    """Documents start … stop-1. An ivf index lies beside the documents' vectors, built once."""

    queries: Vectors
    documents: Vectors
    start: int
    stop: int
    config: SearchConfig

    def __call__(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._nearest(np.arange(first, min(stop, self.queries.rows)), k, k + _SPARE)

    def _nearest(self, of: np.ndarray, k: int, fetched: int) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest of queries `of` [q], chosen from the `fetched` that faiss puts first."""
        queries, fetched = self.queries.take(of), min(fetched, self.stop - self.start)
        found = self._cells(queries, fetched) if self.config.index == "ivf" else self._flat(queries, fetched)
        flat = found.ravel()
        there, scores = flat >= 0, np.full(len(flat), -np.inf, np.float32)
        scores[there] = dots(self.queries, np.repeat(of, fetched)[there], self.documents, flat[there])
        exact = scores.reshape(found.shape)
        positions, kept = best(found, exact, k)
        if self.config.index == "flat" and k <= fetched < self.stop - self.start:
            # No gap behind the k-th: among as many equals (one text in other case, say) the first have to be found.
            tied = kept[:, -1] - exact.min(axis=1) <= _ROUNDING * np.abs(exact).max(axis=1).clip(min=1)
            if tied.any():
                positions[tied], kept[tied] = self._nearest(of[tied], k, 4 * fetched)
        return positions, kept

    def _flat(self, queries: np.ndarray, k: int) -> np.ndarray:
        """[q, k] positions, exact but for the last digits of float32."""
        import faiss

        parts = []
        for at in range(self.start, self.stop, _ROWS_AT_ONCE):
            block = self.documents.block(at, min(at + _ROWS_AT_ONCE, self.stop))
            scores, rows = faiss.knn(queries, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT)
            parts.append((rows + at, scores))
        return merge(parts, k)[0]

    def _cells(self, queries: np.ndarray, k: int) -> np.ndarray:
        """[q, k] positions from the nearest cells; -1 where those hold fewer."""
        import faiss

        cells = min(self.config.cells or max(int(4 * (self.stop - self.start) ** 0.5), 1), self.stop - self.start)
        path = self.documents.path.with_name(f"ivf-{cells}-{self.start}-{self.stop}.faiss")
        if not path.exists():
            self._build(path, cells)
        index: Any = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        index.nprobe = self.config.probes
        rows = index.search(queries, k)[1]
        return np.where(rows < 0, _NOTHING, rows + self.start)

    def _build(self, path: Path, cells: int) -> None:
        import faiss

        index = faiss.index_factory(self.documents.dimensions, f"IVF{cells},Flat", faiss.METRIC_INNER_PRODUCT)
        step = max((self.stop - self.start) // (64 * cells), 1)  # faiss wants 39 to 256 training vectors a cell
        index.train(np.ascontiguousarray(self.documents.block(self.start, self.stop)[::step]))
        for at in range(self.start, self.stop, _ROWS_AT_ONCE):
            index.add(self.documents.block(at, min(at + _ROWS_AT_ONCE, self.stop)))
        making = path.with_suffix(f".{uuid.uuid4().hex}")
        faiss.write_index(index, str(making))
        making.replace(path)


def shards(queries: Vectors, documents: Vectors, config: SearchConfig, workers: int = 1) -> list[Shard]:
    """The corpus in equal shards, `config.shard_rows` rows each at most, a multiple of `workers` of them."""
    least = -(-documents.rows // config.shard_rows)
    count = min(-(-least // workers) * workers, documents.rows)
    edges = np.linspace(0, documents.rows, count + 1).astype(int).tolist()
    return [Shard(queries, documents, a, b, config) for a, b in itertools.pairwise(edges)]


@dataclass(frozen=True)
class LocalSearch:
    """All shards one after another in this process."""

    shards: Sequence[Shard]

    def __call__(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        return merge([shard(first, stop, k) for shard in self.shards], k)


class ClusterSearch:
    """The shards dealt to Ray actors. They share the files of the vectors; a lost actor starts anew and is asked again.

    workers: actors; cpus: of each.
    """

    def __init__(self, shards: Sequence[Shard], workers: int, cpus: float = 1) -> None:
        import ray

        actor = ray.remote(num_cpus=cpus, max_restarts=-1, max_task_retries=-1)(_Worker)
        dealt = [LocalSearch(shards[i::workers]) for i in range(min(workers, len(shards)))]
        self._actors: list[Any] = [actor.remote(search) for search in dealt]

    def __call__(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        import ray

        return merge(ray.get([actor.search.remote(first, stop, k) for actor in self._actors]), k)


class _Worker:
    def __init__(self, search: LocalSearch) -> None:
        self._search = search

    def search(self, first: int, stop: int, k: int) -> tuple[np.ndarray, np.ndarray]:
        return self._search(first, stop, k)


def merge(parts: Sequence[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best of several (positions [q, ·], scores [q, ·])."""
    return best(np.concatenate([p for p, _ in parts], axis=1), np.concatenate([s for _, s in parts], axis=1), k)


def best(positions: np.ndarray, scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best columns of each row, best first, equal scores by position, filled up with -1 and -inf."""
    order = np.lexsort((positions, -scores), axis=1)[:, :k]
    fill = ((0, 0), (0, k - order.shape[1]))
    return (
        np.pad(np.take_along_axis(positions, order, 1), fill, constant_values=_NOTHING),
        np.pad(np.take_along_axis(scores, order, 1), fill, constant_values=-np.inf),
    )
