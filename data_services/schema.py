"""The records and batches that travel between rooms, the base of every typed config, and the errors.

Shape legend, used throughout the project:

    W  workers                      b  queries on this worker       B  queries of the global batch
    d  documents on this worker     T  tokens of a ragged list      D  dimension of an embedding
    n  texts (or rows) of a chunk   L  padded length of a chunk     K  queue rows over all workers

On a worker, document j < b is a positive of query j; after those come further positives, then hard negatives.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from data_services.items import Item as Item
from data_services.items import Kinds as Kinds
from data_services.items import Media as Media
from data_services.items import item_id as item_id
from data_services.items import text_id as text_id
from data_services.ragged import Inputs as Inputs
from data_services.ragged import Ragged as Ragged


class Section(BaseModel):
    """Base of every config section: unknown keys are errors, values don't change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class UsageError(ValueError):
    """Wrong usage or configuration: one sentence that names the key, file or row and the remedy (exit 2)."""


class RunError(RuntimeError):
    """A run that failed for a reason outside the code, a full disk say: one sentence (exit 1)."""


class Refused(RuntimeError):
    """A gate said no: one sentence that says which and by how much (exit 3)."""


class Undecodable(ValueError):
    """A text, or other field, that can't be decoded or tokenised, the same on every try: one sentence that says why.

    Raised by a `Tokenize`. The row goes to the run's quarantine and its batch is one row shorter.
    """


class Column:
    """Column names of a stored record (Parquet). Every source is brought to these.

    id           string        the source's own, else a hash of query and positives: equal rows share it
    query        string        the query text
    positives    list<string>  one or more texts that answer the query
    negatives    list<string>  hard negatives, may be empty
    query_id     int64         stable 64-bit hash of the query text (`item_id`)
    positive_ids list<int64>   stable hashes of the positives, in their order
    negative_ids list<int64>   stable hashes of the negatives, in their order

    A side that is no text holds binary or struct in the place of string, see `items`.

    What a source may have besides; null in every row where it hasn't:

    positive_scores list<float32>  how well each positive answers the query: a teacher's score, a graded relevance
    negative_scores list<float32>  the same of the negatives
    weight          float32        of the record in a loss's means, not negative
    frequency       float32        how often the positives are drawn, 1 as usual; above 0
    label, task, language, modality
                    int64          classes (`class_id`); UNKNOWN in a row that has none
    cluster         int64          of rows that are alike, near numbers nearly so: the plan's, it enters no batch
    """

    ID, QUERY, POSITIVES, NEGATIVES = "id", "query", "positives", "negatives"
    QUERY_ID, POSITIVE_IDS, NEGATIVE_IDS = "query_id", "positive_ids", "negative_ids"
    POSITIVE_SCORES, NEGATIVE_SCORES = "positive_scores", "negative_scores"
    WEIGHT, FREQUENCY = "weight", "frequency"
    LABEL, TASK, LANGUAGE, MODALITY, CLUSTER = "label", "task", "language", "modality", "cluster"
    NEEDED = (QUERY, POSITIVES, NEGATIVES, QUERY_ID, POSITIVE_IDS, NEGATIVE_IDS)
    CLASSES = (LABEL, TASK, LANGUAGE, MODALITY, CLUSTER)
    OPTIONAL = (POSITIVE_SCORES, NEGATIVE_SCORES, WEIGHT, FREQUENCY, *CLASSES)


UNKNOWN = -(2**63)
"""A class or query that isn't known: it equals nothing. `text_id` gives it with probability 2^-64."""


def class_id(value: str | int) -> int:
    """Stable signed 64-bit id of a class: a number stands for itself, a name for its `text_id`."""
    return text_id(value) if isinstance(value, str) else int(value)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Queries with the documents of their records, tokenised, and what is known of each. One global `step`'s.

    queries        Ragged of b texts; Inputs where a tower reads more than tokens, or there are several towers
    documents      the same of d texts: a positive of query j at j < b, then further positives, then hard negatives
    query_ids      [b] int64, `text_id` of each query
    document_ids   [d] int64, `text_id` of each document
    owners         [d] int64, the query (0..b-1) from whose record a document is; j at j < b
    relations      [d] int8, of a document to its owner: 1 it answers, -1 it doesn't
    rows           [b] int64, the row's number in the plan's sources (source << 40 | row)
    prompt_tokens  [b+d] int64, how many leading tokens of each query, then of each document, are its prompt

    None where no source of the run has the column:

    scores         [d] float32, how well a document answers its owner; NaN: not known
    weights        [b] float32 of each query's record in the means; 1 where its source has none
    frequencies    [b] float32 of each query's positives, 1 as usual and where its source has none
    labels, tasks, languages, modalities
                   [b] int64 classes of each query's record; UNKNOWN equals nothing

    None unless the run has a teacher of vectors and a loss that compares them:

    teacher_queries, teacher_documents
                   [b, D'] and [d, D'] float32, what the teacher makes of the whole stored texts
    """

    OF_QUERIES: ClassVar = (
        "query_ids", "rows", "weights", "frequencies", "labels", "tasks", "languages", "modalities", "teacher_queries"
    )  # fmt: skip
    OF_DOCUMENTS: ClassVar = ("document_ids", "owners", "relations", "scores", "teacher_documents")

    step: int
    queries: Ragged
    documents: Ragged
    query_ids: np.ndarray
    document_ids: np.ndarray
    owners: np.ndarray
    relations: np.ndarray
    rows: np.ndarray
    prompt_tokens: np.ndarray
    scores: np.ndarray | None = None
    weights: np.ndarray | None = None
    frequencies: np.ndarray | None = None
    labels: np.ndarray | None = None
    tasks: np.ndarray | None = None
    languages: np.ndarray | None = None
    modalities: np.ndarray | None = None
    teacher_queries: np.ndarray | None = None
    teacher_documents: np.ndarray | None = None

    def __post_init__(self) -> None:
        b, d = len(self.queries), len(self.documents)
        wanted = dict.fromkeys(self.OF_QUERIES, b) | dict.fromkeys(self.OF_DOCUMENTS, d) | {"prompt_tokens": b + d}
        for name, rows in wanted.items():
            column = getattr(self, name)
            if column is not None and len(column) != rows:
                raise ValueError(f"{name} has {len(column)} rows on axis 0, {rows} are needed (b = {b}, d = {d})")

    @property
    def answers(self) -> np.ndarray:
        """[d] int64, id of the query that a document answers; UNKNOWN of a hard negative."""
        return np.where(self.relations > 0, self.query_ids[self.owners], UNKNOWN)


SOURCE_SHIFT = 40
"""One of `Batch.rows` is source << SOURCE_SHIFT | row."""

SIDES = {"queries": 1, "documents": 2}
"""Bits of `Batch.chunk_sides`."""


@dataclass(frozen=True, kw_only=True)
class Batch(Pairs):
    """One worker's share of a global batch.

    global_queries B, queries of the global batch over all workers
    chunks         indices into queries followed by documents (0..b+d-1), each of similar lengths and under
                   the token budget; together every index once; the same number on every worker (a chunk may
                   be empty)
    chunk_towers   [chunks] which tower encodes each chunk, the same on every worker; None: there is one
    chunk_sides    [chunks] whether any worker's chunk of that tower has queries, documents (`SIDES`); None: as above
    """

    global_queries: int
    chunks: tuple[np.ndarray, ...]
    chunk_towers: np.ndarray | None = None
    chunk_sides: np.ndarray | None = None

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
    """Items of one field ("query" or "document") to what a model reads of them: prompt, truncation and special tokens
    in."""

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Ragged:
        """Token lists; `Inputs` where there is more than tokens.

        tasks: the class of each item, where a task may have a prompt of its own.

        Raises Undecodable where one of the items can't be decoded or tokenised; it is then called with fewer.
        """
        ...

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        """Leading tokens of the field's (and task's) texts that are their prompt."""
        ...


class Encoder(Protocol):
    """Items of one field to unit vectors [n, D] float32 on the CPU, in the order of the items."""

    def encode(self, texts: Sequence[Item], field: str) -> np.ndarray: ...


class BatchStream(Protocol):
    """Global batches from `start` on, this worker's share of each, in order."""

    def __call__(self, start: int) -> Iterator[Batch]: ...
