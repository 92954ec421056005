"""A corpus to vectors on disk, over any number of workers, restartable.

A shard is a fixed range of rows, encoded by one worker in batches that depend on its texts alone, written under
another name and renamed: whoever writes it, and when, it has the same bytes (on the same hardware with the same
versions and threads). A run that finds shards goes on with the others. `embedding.corpus` says which files there are.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_services.embedding.corpus import (
    COMMITTED,
    DIMENSIONS,
    MADE_OF,
    MAKING,
    MANIFEST,
    METRIC,
    RANGES,
    EmbeddedCorpus,
    write_whole,
)
from data_services.embedding.texts import SourceTexts, Texts
from data_services.embedding.workers import OnRay, Workers, in_process
from data_services.embedding.writer import EmbedConfig, EncoderFactory, Job
from data_services.schema import RunError, UsageError

__all__ = ["EmbedConfig", "EmbeddedCorpus", "OnRay", "SourceTexts", "Texts", "Workers", "embed", "in_process"]

FORMAT = 1
_LOCK, _SHARDS = ".lock", "vectors-*.parquet"

Progress = Callable[[int, int], None]
"""Takes (rows that have their vectors, rows)."""


def embed(
    texts: Texts,
    encoder: EncoderFactory,
    out: Path,
    config: EmbedConfig | None = None,
    *,
    model: str = "",
    workers: Workers | None = None,
    on_progress: Progress = lambda done, rows: None,
) -> EmbeddedCorpus:
    """The vectors of all texts in the folder `out`, which a run that was killed may have begun.

    encoder  called once a worker; its `encode` gets a shard's texts at once and batches them. Kept prefixes have
             length one again, unless its attribute `unit_vectors` says that its vectors don't
    model    fingerprint of what encodes
    workers  none: this process

    Raises UsageError where `out` is something else or was begun with another model, data or config; RunError where
    the disk is full, the vectors hold NaN, or another process writes there.
    """
    config = config or EmbedConfig()
    if not len(texts):
        raise UsageError("there is no text to embed")
    made_of = _made_of(texts, config, model)
    digest = hashlib.blake2b(json.dumps(made_of).encode(), digest_size=16).hexdigest()
    job = Job(texts, encoder, out, config, digest)
    with _alone(out):
        _agree(out, made_of)
        if not (out / COMMITTED).exists():
            _write_shards(job, workers or in_process, on_progress)
            write_whole(out / COMMITTED, {"rows": len(texts), **_of_vectors(job.shard(0))})
    on_progress(len(texts), len(texts))
    return EmbeddedCorpus.open(out)


def _made_of(texts: Texts, config: EmbedConfig, model: str) -> dict[str, Any]:
    settings = config.model_dump() | {"shard_rows": config.rows_a_shard(len(texts))}
    return {"format": FORMAT, "model": model, "data": texts.fingerprint, "rows": len(texts), **settings}


def _agree(out: Path, made_of: dict[str, Any]) -> None:
    """Writes what the folder is made of; UsageError with what differs where it has shards that are made otherwise."""
    if not any(out.glob(_SHARDS)) or not (out / MANIFEST).exists():
        (out / RANGES).unlink(missing_ok=True)
        write_whole(out / MANIFEST, made_of)
    there = json.loads((out / MANIFEST).read_text())
    differs = [f"{key} was {there.get(key)!r}, is {new!r}" for key, new in made_of.items() if there.get(key) != new]
    if differs:
        raise UsageError(f"{out} was begun otherwise: {'; '.join(differs)}. Finish it as begun, or name a new folder")


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder for this process: made where it isn't there, refused where it is something else."""
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / _LOCK).exists())):
        raise UsageError(f"{out} is there already and no embedding; name a new folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("w")
    except OSError as error:
        raise RunError(f"{out} can't be written: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process embeds into {out}; let it finish") from error
        for path in out.glob(f"{MAKING}*"):  # of a run that was killed
            path.unlink(missing_ok=True)
        yield


def _write_shards(job: Job, run: Workers, on_progress: Progress) -> None:
    rows = [stop - start for start, stop in map(job.rows_of, range(math.ceil(len(job.texts) / job.shard_rows)))]
    missing = [number for number in range(len(rows)) if not _whole(job, number, rows[number])]
    done = sum(rows) - sum(rows[number] for number in missing)
    on_progress(done, len(job.texts))
    for number in run(job, missing):
        done += rows[number]
        on_progress(done, len(job.texts))


def _of_vectors(shard: Path) -> dict[str, Any]:
    about = pq.read_schema(shard).metadata
    return {"dimensions": int(about[DIMENSIONS.encode()]), "metric": about[METRIC.encode()].decode()}


def _whole(job: Job, number: int, rows: int) -> bool:
    """Whether the shard is there, of this job."""
    try:
        found = pq.read_metadata(job.shard(number))
    except (OSError, pa.ArrowInvalid):
        return False
    return found.num_rows == rows and (found.metadata or {}).get(MADE_OF.encode()) == job.made_of.encode()
