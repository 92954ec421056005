"""Vectors of a text table on disk, float32 row by row, read in blocks so that memory stays bounded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_services.embedding.corpus import EmbeddedCorpus, renamed, write_whole

_PAIRS_AT_ONCE = 512  # both sides in float64 stay in a core's cache


@dataclass(frozen=True)
class Vectors:
    """A file of n vectors; pickles as its path. Blocks are mapped while they are used, and no longer."""

    path: Path
    rows: int
    dimensions: int

    def block(self, start: int, stop: int) -> np.ndarray:
        """[m, D] float32, rows start … stop-1, read-only."""
        shape = (min(stop, self.rows) - start, self.dimensions)
        return np.memmap(self.path, np.float32, "r", offset=4 * self.dimensions * start, shape=shape)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """[m, D] float32."""
        return np.asarray(self.block(0, self.rows)[rows])


def dots(queries: Vectors, of: np.ndarray, documents: Vectors, to: np.ndarray) -> np.ndarray:
    """[m] float32, the inner products of queries `of` [m] with documents `to` [m].

    Summed in float64: the same number for a pair wherever it is computed, so that neither the cutting into blocks
    nor the number of workers decides an order.
    """
    scores = np.empty(len(of), np.float32)
    for at in range(0, len(of), _PAIRS_AT_ONCE):
        part = slice(at, at + _PAIRS_AT_ONCE)
        rows = queries.take(of[part]).astype(np.float64), documents.take(to[part]).astype(np.float64)
        scores[part] = np.einsum("md,md->m", *rows)
    return scores


def kept(path: Path, embedded: Callable[[Path], EmbeddedCorpus]) -> Vectors:
    """The vectors in the file `path`; the first time from an embedding, which goes when the file is whole.

    embedded  makes, or finishes, the embedding in the folder that it is given
    """
    about = path.with_suffix(".json")
    if not about.exists():
        corpus = embedded(path.with_suffix(""))
        with renamed(path) as making, making.open("wb") as file:
            for start in range(0, corpus.rows, corpus.shard_rows):
                file.write(np.ascontiguousarray(corpus.vectors(start, start + corpus.shard_rows)).data)
        write_whole(about, {"rows": corpus.rows, "dimensions": corpus.dimensions})
        shutil.rmtree(corpus.folder)
    return Vectors(path, **json.loads(about.read_text()))
