"""Rows that are there twice, exactly or nearly, and rows that an evaluation source holds too.

Exact is by text id. Near is the Jaccard similarity of the sets of three words in a row, estimated by MinHash (Broder
1997, "On the resemblance and containment of documents") and found by locality-sensitive hashing, with datasketch: a few
in a hundred pairs just above the threshold are missed.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_services.items import TEXT
from data_services.schema import Column
from data_services.store import StoredSource

if TYPE_CHECKING:
    from datasketch import MinHash

By = Literal["query", "document", "pair"]
"""What makes two rows the same: the query, all positives, or both."""

Progress = Callable[[int, int], None]
"""(rows done, of)"""

_PERMUTATIONS = 128
_WORDS = 3
_WORD = re.compile(r"\w+|[^\w\s]")
# The index looks further down than the threshold, so that few pairs above it are missed; the estimate then decides.
_FURTHER = 0.15
_SMALLEST_THRESHOLD = 0.3


def shingles(text: str) -> set[bytes]:
    """Every three words in a row, in lower case; of a shorter text all of it."""
    words = [word.encode() for word in _WORD.findall(text.lower())]
    return {b" ".join(words[i : i + _WORDS]) for i in range(max(len(words) - _WORDS + 1, 1))}


def signatures(texts: Sequence[str]) -> Iterator[MinHash]:
    """The MinHash of each text; equal in every process."""
    from datasketch import MinHash

    yield from MinHash.generator(map(shingles, texts), num_perm=_PERMUTATIONS, hashfunc=zlib.crc32)


class NearIndex:
    """Numbered signatures, and which of them are near a further one. threshold: similarity from which on it is."""

    def __init__(self, threshold: float) -> None:
        from datasketch import MinHashLSH

        self._threshold = threshold
        self._lsh = MinHashLSH(max(threshold - _FURTHER, _SMALLEST_THRESHOLD), _PERMUTATIONS)
        self._values: dict[int, np.ndarray] = {}

    def add(self, number: int, signature: MinHash) -> None:
        self._lsh.insert(number, signature, check_duplication=False)
        self._values[number] = signature.hashvalues

    def nearest(self, signature: MinHash) -> int | None:
        """The most similar one, of equal ones the first; None where none is near."""
        found = self._lsh.query(signature)
        near = {n: float(np.mean(self._values[n] == signature.hashvalues)) for n in found}
        best = min(near, key=lambda n: (-near[n], n), default=None)
        return best if best is not None and near[best] >= self._threshold else None


@dataclass(frozen=True)
class Duplicates:
    """first [rows] int64: the row that a row repeats, itself where it repeats none.

    keep [rows] bool: neither repeats another nor is in the evaluation source
    exact, near: rows that repeat another so; contaminated: rows that the evaluation source holds, "exact" and "near",
    which are compared with no other. rows = kept + exact + near + contaminated
    """

    first: np.ndarray
    keep: np.ndarray
    exact: int
    near: int
    contaminated: dict[str, int] | None = None


def find_duplicates(
    source: StoredSource,
    by: By = "pair",
    threshold: float | None = 0.8,
    against: StoredSource | None = None,
    on_progress: Progress = lambda done, of: None,
) -> Duplicates:
    """Every row that repeats an earlier one, which stays. threshold: None looks for exact ones only.

    A row is near another where the texts of `by`, end to end, are; it is compared with rows that stay, so that a row
    that is near none that stays is never left out. It is in the evaluation source where its query is one of the
    queries there or one of its positives one of the documents, exactly or nearly. Of images and sounds, and of items of
    parts, only exact repetitions are found.
    """
    if any(its.kinds != TEXT for its in (source, against) if its is not None):
        threshold = None
    index = NearIndex(threshold) if threshold is not None else None
    elsewhere = Contamination(against, threshold) if against is not None else None
    first, keep = np.arange(source.rows), np.ones(source.rows, bool)
    seen: dict[tuple[int, ...], int] = {}
    exact = near = row = 0
    contaminated: dict[str, int] = {"exact": 0, "near": 0}
    for table in _tables(source, index is not None):
        rows = table.to_pylist()
        signed = signatures([row_text(r, by) for r in rows]) if index is not None else iter(())
        held = elsewhere.held(rows) if elsewhere is not None else [None] * len(rows)
        for record, how in zip(rows, held, strict=True):
            signature = next(signed, None)
            if how is not None:
                contaminated[how] += 1
                keep[row] = False
            elif (same := seen.setdefault(row_key(record, by), row)) != row:
                exact += 1
                first[row], keep[row] = first[same], False
            elif index is not None and signature is not None:
                nearest = index.nearest(signature)
                if nearest is None:
                    index.add(row, signature)
                else:
                    near += 1
                    first[row], keep[row] = nearest, False
            row += 1
        on_progress(row, source.rows)
    return Duplicates(first, keep, exact, near, contaminated if against is not None else None)


class Contamination:
    """The queries and documents of an evaluation source."""

    def __init__(self, source: StoredSource, threshold: float | None) -> None:
        self._ids: dict[str, set[int]] = {Column.QUERY: set(), Column.POSITIVES: set()}
        self._near = {side: NearIndex(threshold) for side in self._ids} if threshold is not None else {}
        for table in _tables(source, threshold is not None):
            for record in table.to_pylist():
                for side, ids, texts in _sides(record):
                    new = [(i, t) for i, t in zip(ids, texts, strict=True) if i not in self._ids[side]]
                    self._ids[side].update(i for i, _ in new)
                    if self._near:
                        for (i, _), signature in zip(new, signatures([t for _, t in new]), strict=True):
                            self._near[side].add(i, signature)

    def held(self, records: Sequence[dict[str, Any]]) -> list[str | None]:
        """ "exact", "near" or None of each record."""
        return [self._held(record) for record in records]

    def _held(self, record: dict[str, Any]) -> str | None:
        if any(i in self._ids[side] for side, ids, _ in _sides(record) for i in ids):
            return "exact"
        for side, _, texts in _sides(record) if self._near else ():
            if any(self._near[side].nearest(signature) is not None for signature in signatures(texts)):
                return "near"
        return None


def _sides(record: dict[str, Any]) -> Iterator[tuple[str, list[int], list[str]]]:
    """(side, ids, texts) of the query and of the positives; "" where only ids were read."""
    positives = record[Column.POSITIVE_IDS]
    yield Column.QUERY, [record[Column.QUERY_ID]], [record.get(Column.QUERY, "")]
    yield Column.POSITIVES, positives, record.get(Column.POSITIVES, [""] * len(positives))


def row_key(record: dict[str, Any], by: By) -> tuple[int, ...]:
    """Equal of two rows exactly where they are the same; positives in any order."""
    query = (record[Column.QUERY_ID],) if by != "document" else ()
    return query + (tuple(sorted(set(record[Column.POSITIVE_IDS]))) if by != "query" else ())


def row_text(record: dict[str, Any], by: By) -> str:
    """The texts of `by`, end to end."""
    query = [record[Column.QUERY]] if by != "document" else []
    return "\n".join(query + (record[Column.POSITIVES] if by != "query" else []))


def _tables(source: StoredSource, texts: bool) -> Iterator[pa.RecordBatch]:
    """texts: whether more is read than ids"""
    columns = [Column.QUERY_ID, Column.POSITIVE_IDS, *((Column.QUERY, Column.POSITIVES) if texts else ())]
    for path in source.files:
        yield from pq.ParquetFile(path).iter_batches(columns=columns)
