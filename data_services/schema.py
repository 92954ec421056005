"""The records and batches that travel between rooms, the base of every typed config, and the errors.

Shape legend, used throughout the project:

    W  workers                      b  queries on this worker       B  queries of the global batch
    d  documents on this worker     T  tokens of a ragged list      D  dimension of an embedding
    n  texts (or rows) of a chunk   L  padded length of a chunk     K  queue rows over all workers

On a worker, document j < b is the positive of query j; documents b..d-1 are hard negatives.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values don't change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class UsageError(ValueError):
    """Wrong usage or configuration: one sentence that names the key, file or row and the remedy (exit 2)."""


class RunError(RuntimeError):
    """A run that failed for a reason outside the code, a full disk say: one sentence (exit 1)."""


class Refused(RuntimeError):
    """A gate said no: one sentence that says which and by how much (exit 3)."""


class Column:
    """Column names of a stored record (Parquet). Every source is brought to these.

    id           string        unique in its source
    query        string        the query text
    positives    list<string>  one or more texts that answer the query
    negatives    list<string>  hard negatives, may be empty
    query_id     int64         stable 64-bit hash of the query text (`text_id`)
    positive_ids list<int64>   stable hashes of the positives, in their order
    negative_ids list<int64>   stable hashes of the negatives, in their order
    """

    ID, QUERY, POSITIVES, NEGATIVES = "id", "query", "positives", "negatives"
    QUERY_ID, POSITIVE_IDS, NEGATIVE_IDS = "query_id", "positive_ids", "negative_ids"


def text_id(text: str) -> int:
    """Stable signed 64-bit id of a text: equal texts are the same query or document everywhere."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


@dataclass(frozen=True)
class Ragged:
    """Token lists of different lengths, end to end. values [T] int32; offsets [n+1] int64, offsets[0] == 0."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each text."""
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, indices: np.ndarray) -> Ragged:
        """The texts at `indices` [m], in that order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(self.offsets[:-1][indices], lengths) + within], offsets)

    def padded(self, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, L] int64, mask [n, L] int64), padded on the right to the longest text."""
        width = int(self.lengths.max(initial=1))
        mask = (np.arange(width) < self.lengths[:, None]).astype(np.int64)
        ids = np.full((len(self), width), pad, np.int64)
        ids[mask.astype(bool)] = self.values
        return ids, mask

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | np.ndarray]) -> Ragged:
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        values = np.concatenate([np.asarray(x, np.int32) for x in lists]) if lists else np.zeros(0, np.int32)
        return cls(values.astype(np.int32), offsets)

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        offsets = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))]).astype(np.int64)
        return cls(np.concatenate([p.values for p in parts]), offsets)


@dataclass(frozen=True)
class Batch:
    """One worker's share of global batch `step`.

    step           number of the global batch, from 0
    global_queries B, queries of the global batch over all workers
    queries        Ragged of b texts
    documents      Ragged of d texts, the positives of the queries first
    query_ids      [b] int64, `text_id` of each query
    document_ids   [d] int64, `text_id` of each document
    rows           [b] int64, the row's number in the plan's sources (source << 40 | row)
    chunks         indices into queries followed by documents (0..b+d-1), each of similar lengths and under
                   the token budget; together every index once; the same number on every worker (a chunk may
                   be empty)
    """

    step: int
    global_queries: int
    queries: Ragged
    documents: Ragged
    query_ids: np.ndarray
    document_ids: np.ndarray
    rows: np.ndarray
    chunks: tuple[np.ndarray, ...]

    @property
    def tokens(self) -> int:
        """Tokens of this worker's texts."""
        return len(self.queries.values) + len(self.documents.values)

    @property
    def padded_tokens(self) -> int:
        """Tokens the model computes for them, padding included."""
        lengths = np.concatenate([self.queries.lengths, self.documents.lengths])
        return sum(len(chunk) * int(lengths[chunk].max()) for chunk in self.chunks if len(chunk))


class Tokenize(Protocol):
    """Texts of one field ("query" or "document") to token lists: prompt, truncation and special tokens in."""

    def __call__(self, texts: Sequence[str], field: str) -> Ragged: ...


class Encoder(Protocol):
    """Texts of one field to unit vectors [n, D] float32 on the CPU, in the order of the texts."""

    def encode(self, texts: Sequence[str], field: str) -> np.ndarray: ...


class BatchStream(Protocol):
    """Global batches from `start` on, this worker's share of each, in order."""

    def __call__(self, start: int) -> Iterator[Batch]: ...
