"""Sources as Parquet: converted once, addressed by rows, read by row groups.

    home/data/<name>-<key>/           one slot for each source, its fields and this code's version
        stamp.json                    what the source looked like (sizes, times), and the folder that holds it
        <fingerprint>/                one folder for each content, never changed after it appears
            part-00000.parquet …      columns of `Column`, in row groups
            quarantine.parquet        malformed rows: origin, reason, row
            manifest.json             counts, row groups, optional columns, fingerprint, code version

A conversion writes to a folder of its own and renames it at the end: a reader sees all of it or nothing, and
of two conversions at once the first to finish wins. rows in = rows out + rows quarantined.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.records import Malformed, Record
from data_services.schema import Column, RunError, UsageError, text_id

log = logging.getLogger(__name__)

# Raised when the same source would be stored differently.
CODE_VERSION = 2
SCHEMA = pa.schema(
    [
        (Column.ID, pa.string()),
        (Column.QUERY, pa.string()),
        (Column.POSITIVES, pa.list_(pa.string())),
        (Column.NEGATIVES, pa.list_(pa.string())),
        (Column.QUERY_ID, pa.int64()),
        (Column.POSITIVE_IDS, pa.list_(pa.int64())),
        (Column.NEGATIVE_IDS, pa.list_(pa.int64())),
        (Column.POSITIVE_SCORES, pa.list_(pa.float32())),
        (Column.NEGATIVE_SCORES, pa.list_(pa.float32())),
        (Column.WEIGHT, pa.float32()),
        *((name, pa.int64()) for name in Column.CLASSES),
    ]
)
QUARANTINE_SCHEMA = pa.schema([("origin", pa.string()), ("reason", pa.string()), ("row", pa.string())])

GROUP_ROWS = 1024
SMALLEST_GROUP_ROWS = 64
# A smaller source gets smaller row groups, so that shuffling by windows of groups still has groups to choose.
_WANTED_GROUPS = 64
_GROUPS_PER_FILE = 512
_QUARANTINED_CHARACTERS = 2_000
_IDS = (Column.QUERY_ID, Column.POSITIVE_IDS)
_CACHE_BYTES = 256 << 20
_UNFINISHED = ".unfinished-"
_ABANDONED_AFTER_S = 24 * 3600


@dataclass(frozen=True)
class StoredSource:
    """A source in Parquet, addressed by rows 0 … rows-1; pickles as paths and counts.

    row_groups       rows of each row group, through all files
    groups_per_file  row groups of each file
    quarantined      rows left out, by reason
    columns          which of `Column.OPTIONAL` it has; the others are null in every row
    """

    name: str
    folder: Path
    files: tuple[Path, ...]
    row_groups: tuple[int, ...]
    groups_per_file: tuple[int, ...]
    fingerprint: str
    quarantined: dict[str, int]
    columns: frozenset[str] = frozenset()

    @property
    def rows(self) -> int:
        return sum(self.row_groups)

    def read(self, rows: np.ndarray) -> pa.Table:
        """Those rows [m], in that order, repetitions included, as a table of `SCHEMA`.

        Reads whole row groups, and keeps the latest of this process in memory (256 MiB over all sources):
        batches drawn from one window of row groups read each group once. ValueError where a row isn't there.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return SCHEMA.empty_table()
        if rows.min() < 0 or rows.max() >= self.rows:
            wrong = rows[(rows < 0) | (rows >= self.rows)][0]
            raise ValueError(f"row {wrong} is not among the {self.rows} rows of source {self.name}")
        ends = np.cumsum(self.row_groups)
        groups = np.searchsorted(ends, rows, side="right")
        # By group, so that none is copied whole; then back to the order asked for.
        order = np.argsort(groups, kind="stable")
        parts = []
        for group in np.unique(groups):
            start = ends[group] - self.row_groups[group]
            parts.append(self._group(int(group)).take(rows[groups == group] - start))
        return pa.concat_tables(parts).combine_chunks().take(np.argsort(order, kind="stable"))

    def ids(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query_ids [n], positive_ids [p] of all rows end to end, positives [n] of each row) of those row groups.

        Their rows in the order of `groups` and within each as stored. Reads these two columns alone.
        """
        ends = np.cumsum(self.groups_per_file)
        files = np.searchsorted(ends, groups, side="right")
        order = np.argsort(files, kind="stable")
        parts = []
        for file in np.unique(files):
            path, its = (
                self.files[file],
                groups[order][files[order] == file] - (ends[file] - self.groups_per_file[file]),
            )
            reader = pq.ParquetFile(path, metadata=_metadata(path))
            parts.append(reader.read_row_groups(its.tolist(), list(_IDS), use_threads=False))
        table = pa.concat_tables(parts).combine_chunks()
        if len(parts) > 1:  # back to the order asked for
            sizes = np.fromiter((self.row_groups[group] for group in groups), np.int64)
            starts = np.empty_like(sizes)
            starts[order] = np.cumsum(sizes[order]) - sizes[order]
            table = table.take(np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum()))
        queries, positives = (table.column(name).combine_chunks() for name in _IDS)
        lengths = pc.list_value_length(positives).to_numpy(zero_copy_only=False)
        return queries.to_numpy(), positives.flatten().to_numpy(), lengths.astype(np.int64)

    def table(self) -> pa.Table:
        """Every row, in order."""
        return pa.concat_tables([pq.read_table(path, schema=SCHEMA) for path in self.files])

    def _group(self, group: int) -> pa.Table:
        ends = np.cumsum(self.groups_per_file)
        file = int(np.searchsorted(ends, group, side="right"))
        return _CACHE.read(self.files[file], group - int(ends[file] - self.groups_per_file[file]))


class _RowGroupCache:
    """The row groups read last, up to a number of bytes.

    One a process, so that a task which unpickles its source again still finds them. Files never change under
    their name, so nothing goes stale.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._bytes = 0
        self._groups: OrderedDict[tuple[Path, int], pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, group: int) -> pa.Table:
        with self._lock:
            table = self._groups.pop((path, group), None)
            if table is None:
                table = pq.ParquetFile(path, metadata=_metadata(path)).read_row_group(group, use_threads=False)
                self._bytes += table.nbytes
            self._groups[path, group] = table
            while self._bytes > self._limit_bytes and len(self._groups) > 1:
                self._bytes -= self._groups.popitem(last=False)[1].nbytes
        return table


_CACHE = _RowGroupCache(_CACHE_BYTES)


@lru_cache(maxsize=256)
def _metadata(path: Path) -> pq.FileMetaData:
    return pq.read_metadata(path)


def store(
    name: str,
    slot: Path,
    stamp: dict[str, Any] | None,
    records: Callable[[], Iterator[Record | Malformed]],
    columns: Collection[str] = (),
) -> StoredSource:
    """The source in `slot`, converted unless the stamp says that it hasn't changed since.

    stamp    sizes and times of what is read, as JSON; None where only reading tells (it is then always read)
    columns  which of `Column.OPTIONAL` the records have

    Content that was seen before keeps its folder, whatever the stamp. Raises UsageError where there isn't a
    single good row, RunError where the disk is full; nothing is left behind then.
    """
    memo = slot / "stamp.json"
    if stamp is not None and memo.exists():
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp and (slot / known["folder"] / "manifest.json").exists():
            return _load(name, slot / known["folder"])
    slot.parent.mkdir(parents=True, exist_ok=True)
    _sweep(slot.parent)
    unfinished = slot.parent / f"{_UNFINISHED}{uuid.uuid4().hex}"
    unfinished.mkdir()
    try:
        fingerprint = _convert(name, records(), unfinished / "source", columns)
        folder = _publish(unfinished / "source", slot / fingerprint[:16])
        (unfinished / "stamp.json").write_text(json.dumps({"stamp": stamp, "folder": folder.name}))
        (unfinished / "stamp.json").replace(memo)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise RunError(f"no space left on the disk of {slot.parent} while converting source {name}") from error
        raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _load(name, folder)


def _publish(finished: Path, folder: Path) -> Path:
    """Renames a conversion to its place; where another was first, that one stands."""
    folder.parent.mkdir(exist_ok=True)
    try:
        os.rename(finished, folder)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
    return folder


def _sweep(data: Path) -> None:
    """Removes what conversions that were killed left behind, a day after they last wrote."""
    for path in data.glob(f"{_UNFINISHED}*/source"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(path.parent, ignore_errors=True)


def _load(name: str, folder: Path) -> StoredSource:
    manifest = json.loads((folder / "manifest.json").read_text())
    return StoredSource(
        name=name,
        folder=folder,
        files=tuple(folder / file for file in manifest["files"]),
        row_groups=tuple(manifest["row_groups"]),
        groups_per_file=tuple(manifest["groups_per_file"]),
        fingerprint=manifest["fingerprint"],
        quarantined=manifest["quarantined"],
        columns=frozenset(manifest["columns"]),
    )


def _convert(name: str, records: Iterator[Record | Malformed], folder: Path, columns: Collection[str]) -> str:
    """Writes Parquet, quarantine and manifest; the fingerprint of all rows, good and malformed."""
    folder.mkdir()
    digest = hashlib.blake2b(f"{CODE_VERSION}\n".encode(), digest_size=16)
    with _Quarantine(folder / "quarantine.parquet", digest) as quarantine:
        groups_of_files = _write(quarantine.sift(records), folder, digest)
    row_groups = [rows for groups in groups_of_files for rows in groups]
    reasons = quarantine.reasons
    if not row_groups:
        raise UsageError(f"source {name} has no usable row: {quarantine.summary() or 'it is empty'}")
    manifest = {
        "rows_in": sum(row_groups) + reasons.total(),
        "rows_out": sum(row_groups),
        "quarantined": dict(reasons),
        "files": [_file_name(i) for i in range(len(groups_of_files))],
        "groups_per_file": [len(groups) for groups in groups_of_files],
        "row_groups": row_groups,
        "columns": sorted(columns),
        "fingerprint": digest.hexdigest(),
        "code_version": CODE_VERSION,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    if reasons:
        log.warning(
            "source %s: %d of %d rows quarantined in %s: %s",
            name,
            reasons.total(),
            manifest["rows_in"],
            "quarantine.parquet",
            quarantine.summary(),
        )
    return digest.hexdigest()


class _Quarantine:
    """Sifts malformed rows into a Parquet file of their own."""

    def __init__(self, path: Path, digest: hashlib.blake2b) -> None:
        self.reasons: Counter[str] = Counter()
        self._first: dict[str, str] = {}
        self._writer = pq.ParquetWriter(path, QUARANTINE_SCHEMA)
        self._digest = digest
        self._waiting: list[Malformed] = []

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._writer.close()

    def sift(self, records: Iterator[Record | Malformed]) -> Iterator[Record]:
        for record in records:
            if isinstance(record, Record):
                yield record
            else:
                self._add(record)

    def summary(self) -> str:
        """The commonest reasons with their counts, and where each stands first."""
        return "; ".join(
            f"{count} × {reason} (first: {self._first[reason]})" for reason, count in self.reasons.most_common(5)
        )

    def _add(self, malformed: Malformed) -> None:
        self._digest.update(repr(malformed).encode())
        self.reasons[malformed.reason] += 1
        self._first.setdefault(malformed.reason, malformed.origin)
        self._waiting.append(malformed._replace(row=malformed.row[:_QUARANTINED_CHARACTERS]))
        if len(self._waiting) == GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        rows = [malformed._asdict() for malformed in self._waiting]
        self._writer.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))
        self._waiting.clear()


def _file_name(number: int) -> str:
    return f"part-{number:05}.parquet"


def _write(records: Iterator[Record], folder: Path, digest: hashlib.blake2b) -> list[list[int]]:
    """Writes the records; the rows of each row group of each file."""
    head = list(itertools.islice(records, GROUP_ROWS * _WANTED_GROUPS))
    size = group_rows(len(head))
    rest = itertools.chain(head, records)
    groups = iter(lambda: list(itertools.islice(rest, size)), [])
    written: list[list[int]] = []
    for first in groups:
        sizes = []
        with pq.ParquetWriter(folder / _file_name(len(written)), SCHEMA) as writer:
            for group in itertools.chain([first], itertools.islice(groups, _GROUPS_PER_FILE - 1)):
                writer.write_table(_table(group, digest), row_group_size=len(group))
                sizes.append(len(group))
        written.append(sizes)
    return written


def group_rows(rows: int) -> int:
    """Rows of a row group for a source of so many rows: a power of two near a 64th of them, 64 to 1,024."""
    wanted = 1 << max(rows // _WANTED_GROUPS, 1).bit_length() - 1
    return min(max(wanted, SMALLEST_GROUP_ROWS), GROUP_ROWS)


def _table(group: list[Record], digest: hashlib.blake2b) -> pa.Table:
    rows = []
    for record in group:
        row = record._asdict()
        ids = {
            Column.QUERY_ID: text_id(record.query),
            Column.POSITIVE_IDS: [text_id(text) for text in record.positives],
            Column.NEGATIVE_IDS: [text_id(text) for text in record.negatives],
        }
        rest = [row[name] for name in Column.OPTIONAL]
        digest.update(f"{record.id} {list(ids.values())} {rest}\n".encode())
        rows.append(row | ids)
    return pa.Table.from_pylist(rows, schema=SCHEMA)
