"""Which of some texts, a suite's say, training data holds: as they are, or nearly.

Near is the Jaccard similarity of the sets of three words in a row (`near_duplicates.shingles`), counted, not estimated:
the texts looked for are few, so each training text is held against those that share a shingle with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pyarrow.parquet as pq

from data_services.near_duplicates import Progress, shingles
from data_services.schema import Column
from data_services.store import StoredSource

THRESHOLD = 0.8
NOT_HELD, NEAR, EXACT = 0, 1, 2


class TextIndex:
    """Distinct texts to look for. held [n] int8: NOT_HELD, NEAR or EXACT, by what has been shown so far."""

    def __init__(self, texts: Iterable[str], threshold: float = THRESHOLD) -> None:
        self.texts = list(dict.fromkeys(texts))
        self._at = {text: i for i, text in enumerate(self.texts)}
        self._threshold = threshold
        self._sizes = np.zeros(len(self.texts), np.int64)
        self._holding: dict[bytes, list[int]] = {}
        for i, text in enumerate(self.texts):
            own = shingles(text)
            self._sizes[i] = len(own)
            for shingle in own:
                self._holding.setdefault(shingle, []).append(i)
        self.held = np.zeros(len(self.texts), np.int8)

    def show(self, text: str) -> None:
        """Marks the text that this one is, and those that it is near."""
        if (same := self._at.get(text)) is not None:
            self.held[same] = EXACT
        own = shingles(text)
        known = [shingle for shingle in own if shingle in self._holding]
        # No text shares more than these, so that a text with fewer is near none.
        if len(known) < self._threshold * len(own):
            return
        shared = Counter(i for shingle in known for i in self._holding[shingle])
        for i, count in shared.items():
            if count >= self._threshold * (len(own) + self._sizes[i] - count):
                self.held[i] = max(self.held[i], NEAR)

    def counts(self, texts: Sequence[str]) -> tuple[int, int, int]:
        """(distinct, exact, near) of some of the texts looked for."""
        held = self.held[[self._at[text] for text in dict.fromkeys(texts)]]
        return len(held), int((held == EXACT).sum()), int((held == NEAR).sum())


def look_through(
    index: TextIndex, sources: Sequence[StoredSource], on_progress: Progress = lambda done, of: None
) -> None:
    """Shows the index every query and positive of the sources, each distinct text of a block once."""
    done, rows = 0, sum(source.rows for source in sources)
    for source in sources:
        for texts, count in _blocks(source):
            for text in texts:
                index.show(text)
            done += count
            on_progress(done, rows)


def _blocks(source: StoredSource) -> Iterator[tuple[set[str], int]]:
    for path in source.files:
        for batch in pq.ParquetFile(path).iter_batches(columns=[Column.QUERY, Column.POSITIVES]):
            rows = batch.to_pylist()
            yield {text for row in rows for text in (row[Column.QUERY], *row[Column.POSITIVES])}, len(rows)
