"""A shard of an embedding: read, encoded and written by one worker."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic

from data_services.embedding.corpus import (
    DIMENSIONS,
    MADE_OF,
    METRIC,
    RANGES,
    read_ranges,
    renamed,
    shard_file,
    write_whole,
)
from data_services.embedding.quantise import Dtype, is_ranged, quantise, ranges_of
from data_services.embedding.texts import Field, Named, Texts
from data_services.schema import Encoder, Item, RunError, Section, UsageError

_SAMPLED_ROWS, _SAMPLE_RUNS = 8192, 64
_SMALLEST_SHARD, _LARGEST_SHARD = 1024, 1 << 15

EncoderFactory = Callable[[], Encoder]


class EmbedConfig(Section):
    """What is stored of each text."""

    field: Field = pydantic.Field("document", description="side of the model that encodes, with its prompt")
    dtype: Dtype = pydantic.Field("fp32", description="type of a stored vector")
    dimensions: int | None = pydantic.Field(None, gt=0, description="leading dimensions that are kept; none: all")
    shard_rows: int | None = pydantic.Field(
        None, gt=0, description="rows of a file; none: about a 64th, 1,024 to 32,768"
    )

    def rows_a_shard(self, rows: int) -> int:
        return self.shard_rows or min(max(1 << (rows // 64).bit_length(), _SMALLEST_SHARD), _LARGEST_SHARD)


@dataclass(frozen=True)
class Job:
    """One embedding, as its workers know it. made_of: a digest of the manifest, which every shard carries."""

    texts: Texts
    encoder: EncoderFactory
    out: Path
    config: EmbedConfig
    made_of: str

    @property
    def shard_rows(self) -> int:
        return self.config.rows_a_shard(len(self.texts))

    def shard(self, number: int) -> Path:
        return shard_file(self.out, number)

    def rows_of(self, number: int) -> tuple[int, int]:
        return number * self.shard_rows, min((number + 1) * self.shard_rows, len(self.texts))


class Writer:
    """Writes shards in one process; the encoder is made once, for the first one."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def shard(self, number: int) -> int:
        job = self._job
        start, stop = job.rows_of(number)
        ids, texts = job.texts.read(start, stop)
        vectors = self._vectors(texts)
        stored = quantise(vectors, job.config.dtype, self._ranges)
        columns: dict[str, pa.Array] = {"id": pa.array(ids)}
        if isinstance(job.texts, Named):
            columns["name"] = pa.array(job.texts.names(start, stop), pa.string())
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(stored.ravel()), stored.shape[1])
        about = {DIMENSIONS: str(vectors.shape[1]), METRIC: self._metric, MADE_OF: job.made_of}
        table = pa.table(columns, metadata=about)
        with renamed(job.shard(number)) as making:
            pq.write_table(table, making, row_group_size=len(table), compression="none", use_dictionary=False)
        return number

    def sample(self) -> None:
        """Writes the ranges of int8 and uint8, unless they are there, from rows that the number of rows decides."""
        path, texts = self._job.out / RANGES, self._job.texts
        if path.exists() or not is_ranged(self._job.config.dtype):
            return
        runs = 1 if len(texts) <= _SAMPLED_ROWS else _SAMPLE_RUNS
        length, sampled = min(len(texts), _SAMPLED_ROWS) // runs, list[Item]()
        for first in np.linspace(0, len(texts) - length, runs).astype(np.int64).tolist():
            sampled += texts.read(first, first + length)[1]
        write_whole(path, ranges_of(self._vectors(sampled)).tolist())

    @cached_property
    def _ranges(self) -> np.ndarray | None:
        return read_ranges(self._job.out / RANGES) if is_ranged(self._job.config.dtype) else None

    @cached_property
    def _encoder(self) -> Encoder:
        return self._job.encoder()

    @property
    def _metric(self) -> str:
        return "cosine" if getattr(self._encoder, "unit_vectors", True) else "dot"

    def _vectors(self, texts: Sequence[Item]) -> np.ndarray:
        """[n, D] float32 in the dimensions that are kept."""
        vectors = np.asarray(self._encoder.encode(texts, self._job.config.field), np.float32)
        if vectors.ndim != 2 or len(vectors) != len(texts):
            raise RunError(f"the model gave {list(vectors.shape)} for {len(texts)} texts; a vector for each is needed")
        if not np.isfinite(vectors).all():
            raise RunError("the model's vectors hold NaN or infinity: its weights are damaged")
        kept = self._job.config.dimensions
        if kept is None:
            return vectors
        if kept > vectors.shape[1]:
            raise UsageError(f"dimensions is {kept}, but the model's vectors have {vectors.shape[1]}: lower it")
        vectors = np.ascontiguousarray(vectors[:, :kept])
        if self._metric == "cosine":
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return vectors
