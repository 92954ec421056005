"""A teacher's scores and vectors of a run's texts: computed before training, once a content, read with each batch.

    HOME/teachers/<teacher>/query, document   vectors by `text_id`        } `ContentCache`s; the teacher's part of the
                            pair              scores by `pair_ids`        } name is the fingerprint of what computes

What is there for a text is never computed again, whichever source, split or run has it; a text that changed has another
id. A batch that shows a view of a text has what the teacher says of the whole.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, model_validator

from data_services.assemble import GlobalBatch
from data_services.content_cache import ContentCache
from data_services.draws import mix
from data_services.embedding.corpus import EmbeddedCorpus
from data_services.embedding.texts import Field as Side
from data_services.mining.texts import IDS, TextTable, write_texts
from data_services.mining.vectors import Vectors
from data_services.schema import Column, RunError, Section, UsageError
from data_services.store import StoredSource

COLUMNS: dict[Side, list[str]] = {"query": [Column.QUERY], "document": [Column.POSITIVES, Column.NEGATIVES]}
PAIRS_OF_A_PART = 1 << 16  # what a killed run has to score again at most
_PARTS_OF_A_RUN = 64  # every batch looks into all of them
_ROWS_AT_ONCE = 1 << 14

Predict = Callable[[Sequence[str], Sequence[str]], Sequence[float] | np.ndarray]
"""The scores of queries [n] and documents [n], pair by pair."""

Progress = Callable[[str, int, int], None]
"""(what, done, of)"""


class EmbeddingFolders(Section):
    """Embeddings that `gyre embed` wrote, by one model."""

    queries: str = Field(description="of all queries of the sources: gyre embed … --field query")
    documents: str = Field(description="of all positives and hard negatives of the sources")


class TeacherConfig(Section):
    """`data.teacher:` what scores each query's documents in the place of fields of the sources. One of these."""

    model: str | None = Field(
        None, min_length=1, description="a MODEL: its vectors of all texts; scores are their inner products"
    )
    embeddings: EmbeddingFolders | None = Field(None, description="the same from vectors that are stored")
    cross_encoder: str | None = Field(
        None, min_length=1, description="a folder or hub id that Sentence Transformers loads; it reads pairs"
    )
    path: str | None = Field(
        None,
        min_length=1,
        description="module:function of yours: takes lists of queries and of documents, gives a score of each pair",
    )

    @model_validator(mode="after")
    def _one(self) -> TeacherConfig:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"name one teacher, not {len(given)}: {', '.join(type(self).model_fields)}")
        return self

    @property
    def gives_vectors(self) -> bool:
        """Of each text, not only a score of each pair."""
        return self.model is not None or self.embeddings is not None


@dataclass(frozen=True)
class Teacher:
    """What a teacher says of the texts of a run, read from its folder.

    pairs    it scores pairs; else it has vectors, whose inner products are the scores
    vectors  batches carry its vectors too, not their inner products alone
    """

    folder: Path
    pairs: bool
    vectors: bool = False

    def taught(self, batch: GlobalBatch) -> GlobalBatch:
        """The batch with the teacher's scores, and its vectors where they are wanted; RunError where it lacks some."""
        queries, documents = batch.query_ids, batch.document_ids
        if self.pairs:
            scores = ContentCache(self.folder / "pair").take(pair_ids(queries[batch.owners], documents))[:, 0]
            return replace(batch, scores=scores)
        of_queries = ContentCache(self.folder / "query").take(queries)
        of_documents = ContentCache(self.folder / "document").take(documents)
        batch = replace(batch, scores=np.einsum("md,md->m", of_queries[batch.owners], of_documents))
        return replace(batch, teacher_queries=of_queries, teacher_documents=of_documents) if self.vectors else batch


def pair_ids(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
    """[n] int64 hashes of pairs of `text_id`s; the order of the two counts."""
    return mix(mix(queries.astype(np.uint64)) + documents.astype(np.uint64)).astype(np.int64)


def teach_vectors(
    sources: Sequence[StoredSource], side: Side, folder: Path, encoded: Callable[[TextTable, Path], Vectors]
) -> int:
    """Makes the vectors of one side's texts that the teacher's folder lacks; how many those were.

    encoded  makes, or finishes, the vectors of a table of texts in the file that it is given
    """
    cache, work = ContentCache(folder / side), folder / f".{side}"
    with cache.alone():
        work.mkdir(exist_ok=True)
        texts = write_texts(work / "texts.arrow", sources, COLUMNS[side], known=cache.has)
        if len(texts):
            vectors = encoded(texts, work / f"{texts.fingerprint}.f32")
            blocks = (vectors.block(at, at + _ROWS_AT_ONCE) for at in range(0, vectors.rows, _ROWS_AT_ONCE))
            cache.add(texts.fingerprint, texts.ids, blocks, vectors.dimensions)
        shutil.rmtree(work)
    return len(texts)


def adopt_vectors(sources: Sequence[StoredSource], side: Side, folder: Path, corpus: EmbeddedCorpus) -> None:
    """Takes a stored embedding as the teacher's vectors; UsageError where it lacks texts of the sources."""
    cache = ContentCache(folder / side)
    ids = np.unique(np.concatenate([ids for _, ids in _ids(sources, COLUMNS[side])]))
    if not cache.has(ids).all():
        every = range(0, corpus.rows, corpus.shard_rows)
        blocks = (corpus.vectors(at, at + corpus.shard_rows) for at in every)
        cache.add("all", corpus.ids(0, corpus.rows), blocks, corpus.dimensions)
    lacks = int((~cache.has(ids)).sum())
    if lacks:
        raise UsageError(
            f"data.teacher.embeddings: {corpus.folder} lacks {lacks:,} of the {len(ids):,} {side} texts of "
            "data.sources; embed them too, or name the model in data.teacher.model"
        )


def teach_pairs(
    sources: Sequence[StoredSource], folder: Path, predict: Predict, on_progress: Progress, part: int = PAIRS_OF_A_PART
) -> int:
    """Scores each query with each positive and hard negative of its rows, as far as the teacher's folder lacks them.

    Returns how many those were. A run that is killed has what it finished, `part` pairs at a time. Raises RunError
    where `predict` gives another number of scores, or one that isn't finite.
    """
    cache = ContentCache(folder / "pair")
    with cache.alone():
        return _score(sources, cache, predict, on_progress, part)


def _score(
    sources: Sequence[StoredSource], cache: ContentCache, predict: Predict, on_progress: Progress, part: int
) -> int:
    wanted = np.unique(np.concatenate([np.zeros(0, np.int64), *(ids for ids, _, _ in _pairs(sources, texts=False))]))
    missing = len(wanted) - int(cache.has(wanted).sum())
    at_once, done = max(part, -(-missing // _PARTS_OF_A_RUN)), 0
    for ids, queries, documents in _parts(_pairs(sources, texts=True), cache, at_once):
        scores = np.asarray(predict(queries, documents), np.float32).reshape(-1, 1)
        if len(scores) != len(ids) or not np.isfinite(scores).all():
            raise RunError(f"the teacher gave {len(scores)} scores for {len(ids)} pairs, or one that isn't finite")
        cache.add(hashlib.blake2b(ids.tobytes(), digest_size=16).hexdigest(), ids, [scores], 1)
        done += len(ids)
        on_progress("scoring pairs by the teacher", done, missing)
    return missing


_Pairs = tuple[np.ndarray, pa.Array, pa.Array]
"""`pair_ids` [n], queries [n], documents [n]."""
_Listed = tuple[np.ndarray, list[str], list[str]]


def _parts(pairs: Iterator[_Pairs], cache: ContentCache, at_once: int) -> Iterator[_Listed]:
    """Those that the cache lacks, each once, about `at_once` at a time."""
    waiting: list[_Pairs] = []
    count = 0

    def gathered() -> _Listed:
        ids, first = np.unique(np.concatenate([ids for ids, _, _ in waiting]), return_index=True)
        texts = (pa.concat_arrays([part[i] for part in waiting]).take(first).to_pylist() for i in (1, 2))
        return ids, *texts

    for ids, queries, documents in pairs:
        lacks = ~cache.has(ids)
        if lacks.any():
            keep = pa.array(lacks)
            waiting.append((ids[lacks], queries.filter(keep), documents.filter(keep)))
            count += int(lacks.sum())
        if count >= at_once:
            yield gathered()
            waiting, count = [], 0
    if waiting:
        yield gathered()


def _pairs(sources: Sequence[StoredSource], texts: bool) -> Iterator[_Pairs]:
    """Each query with each of its row's documents, a row group at a time; without `texts` the ids alone."""
    for table in _tables(sources, [Column.QUERY, Column.POSITIVES, Column.NEGATIVES] if texts else []):
        query_ids, ids = table.column(Column.QUERY_ID).to_numpy(), []
        queries, documents = [pa.array([], pa.string())], [pa.array([], pa.string())]
        for column in COLUMNS["document"]:
            of = table.column(IDS[column])
            owners = np.repeat(np.arange(len(table)), pc.list_value_length(of).to_numpy())
            ids.append(pair_ids(query_ids[owners], pc.list_flatten(of).to_numpy()))
            if texts:
                queries += table.column(Column.QUERY).take(pa.array(owners)).chunks
                documents += pc.list_flatten(table.column(column)).chunks
        yield np.concatenate(ids), pa.concat_arrays(queries), pa.concat_arrays(documents)


def _ids(sources: Sequence[StoredSource], columns: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(column, ids [·] of its texts), a row group at a time."""
    for table in _tables(sources, []):
        for column in columns:
            ids = table.column(IDS[column])
            yield column, (pc.list_flatten(ids) if pa.types.is_list(ids.type) else ids).to_numpy()


def _tables(sources: Sequence[StoredSource], texts: list[str]) -> Iterator[pa.Table]:
    """Every row group of the sources: the id columns, and those of `texts`."""
    for path in (path for source in sources for path in source.files):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            yield file.read_row_group(group, columns=[*IDS.values(), *texts])
