"""Sources as Parquet: converted once, addressed by rows, read by row groups.

    home/data/<name>-<key>/           one slot for each source, its fields and this code's version
        stamp.json                    what the source looked like (sizes, times), and the folder that holds it
        <fingerprint>/                one folder for each content, never changed after it appears
            rows.parquet              or part-*/rows-*.parquet: columns of `Column`, in row groups
            quarantine.parquet        malformed rows: origin, reason, row
            manifest.json             counts, row groups, optional columns, fingerprint, code version
        .unfinished/                  parts of a conversion that was killed or failed: the next one goes on with them

A conversion writes to a folder of its own and renames it at the end: a reader sees all of it or nothing.
rows in = rows out + rows quarantined.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import threading
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.columns import schema_of
from data_services.convert import assemble
from data_services.items import TEXT, Kinds
from data_services.parallel import convert_parts
from data_services.readers.blocks import Part, Want
from data_services.schema import UNKNOWN, Column, RunError, UsageError

log = logging.getLogger(__name__)

_IDS = (Column.QUERY_ID, Column.POSITIVE_IDS)
_CACHE_BYTES = 256 << 20
_UNFINISHED = ".unfinished"


@dataclass(frozen=True)
class StoredSource:
    """A source in Parquet, addressed by rows 0 … rows-1; pickles as names and counts, a few bytes a file and row group.

    names            of its files, below `folder`
    row_groups       rows of each row group, through all files
    groups_per_file  row groups of each file
    quarantined      rows left out, by reason
    columns          which of `Column.OPTIONAL` it has; the others are null in every row
    layout           of its rows as they were read (`layouts`)
    kinds            what its queries and documents are
    """

    name: str
    folder: Path
    names: tuple[str, ...]
    row_groups: tuple[int, ...]
    groups_per_file: tuple[int, ...]
    fingerprint: str
    quarantined: dict[str, int]
    columns: frozenset[str] = frozenset()
    layout: str = ""
    kinds: Kinds = TEXT

    def __getstate__(self) -> dict[str, Any]:
        """The fields, without what was computed from them."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def files(self) -> Iterator[Path]:
        """One by one: a hundred thousand paths take seconds to make."""
        return (self.folder / name for name in self.names)

    @property
    def rows(self) -> int:
        return int(self._ends[-1]) if self.row_groups else 0

    @cached_property
    def _ends(self) -> np.ndarray:
        """[groups] the row after each row group's last."""
        return np.cumsum(self.row_groups)

    @cached_property
    def _file_ends(self) -> np.ndarray:
        """[files] the row group after each file's last."""
        return np.cumsum(self.groups_per_file)

    def read(self, rows: np.ndarray) -> pa.Table:
        """Those rows [m], in that order, repetitions included, as a table of `columns.schema_of(kinds)`.

        Reads whole row groups, and keeps the latest of this process in memory (256 MiB over all sources):
        batches drawn from one window of row groups read each group once. ValueError where a row isn't there.
        """
        rows = np.asarray(rows, np.int64)
        if not len(rows):
            return schema_of(self.kinds).empty_table()
        if rows.min() < 0 or rows.max() >= self.rows:
            wrong = rows[(rows < 0) | (rows >= self.rows)][0]
            raise ValueError(f"row {wrong} is not among the {self.rows} rows of source {self.name}")
        ends = self._ends
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
        table = self._columns(groups, _IDS)
        queries, positives = (table.column(name).combine_chunks() for name in _IDS)
        lengths = pc.list_value_length(positives).to_numpy(zero_copy_only=False)
        return queries.to_numpy(), positives.flatten().to_numpy(), lengths.astype(np.int64)

    def clusters(self, groups: np.ndarray) -> np.ndarray:
        """[n] int64 clusters of the rows of those row groups, in the order of `ids`; UNKNOWN where a row has none."""
        return self._columns(groups, (Column.CLUSTER,)).column(0).fill_null(UNKNOWN).to_numpy()

    def _columns(self, groups: np.ndarray, names: Sequence[str]) -> pa.Table:
        """Those columns alone of those row groups, in the order of `groups`."""
        ends = self._file_ends
        files = np.searchsorted(ends, groups, side="right")
        order = np.argsort(files, kind="stable")
        parts = []
        for file in np.unique(files):
            path, its = (
                self.folder / self.names[file],
                groups[order][files[order] == file] - (ends[file] - self.groups_per_file[file]),
            )
            reader = pq.ParquetFile(path, metadata=_metadata(path))
            parts.append(reader.read_row_groups(its.tolist(), list(names), use_threads=False))
        table = pa.concat_tables(parts).combine_chunks()
        if len(parts) > 1:  # back to the order asked for
            sizes = np.fromiter((self.row_groups[group] for group in groups), np.int64)
            starts = np.empty_like(sizes)
            starts[order] = np.cumsum(sizes[order]) - sizes[order]
            table = table.take(np.repeat(starts - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum()))
        return table

    def table(self) -> pa.Table:
        """Every row, in order."""
        return pa.concat_tables([pq.read_table(path, schema=schema_of(self.kinds)) for path in self.files])

    def _group(self, group: int) -> pa.Table:
        ends = self._file_ends
        file = int(np.searchsorted(ends, group, side="right"))
        return _CACHE.read(self.folder / self.names[file], group - int(ends[file] - self.groups_per_file[file]))


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


@dataclass(frozen=True)
class Reading:
    """How a source is read: its parts, what of them, and the layout that was named or recognised."""

    parts: Sequence[Part]
    want: Want
    layout: str


Report = Callable[[int, int], None]
"""Takes (parts that are finished, parts) while a source is converted."""


def store(
    name: str,
    slot: Path,
    stamp: Callable[[], Any] | None,
    reading: Callable[[], Reading],
    report: Report | None = None,
) -> StoredSource:
    """The source in `slot`, converted unless the stamp says that it hasn't changed since.

    stamp  sizes and times of what is read, as JSON; None where only reading tells (it is then always read)

    One conversion of a slot runs at a time: who comes second waits, and uses what the first made. Content that was
    seen before keeps its folder, whatever the stamp. Raises UsageError where there isn't a single good row or the
    source changes while it is read, RunError where the disk is full; parts that are finished are kept for the next
    try.
    """
    before = stamp() if stamp is not None else None
    if stamp is not None and (known := stored_already(name, slot, before)):
        return known
    with _alone(slot, name) as alone:
        if stamp is not None and (known := stored_already(name, slot, before)):
            return known
        unfinished = slot / (_UNFINISHED if alone and stamp is not None else f"{_UNFINISHED}-{uuid.uuid4().hex}")
        unfinished.mkdir(exist_ok=True)
        try:
            folder = _converted(name, slot, unfinished, reading(), report)
            if stamp is not None and stamp() != before:
                raise UsageError(f"source {name} changed while it was read: start again when nothing writes to it")
            _remember(slot, before, folder)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise RunError(
                    f"no space left on the disk of {slot.parent} while converting source {name}: make room and start "
                    "again; parts that were finished are kept"
                ) from error
            raise
        finally:
            _tidy(slot, unfinished)
    return _load(name, folder)


def _converted(name: str, slot: Path, unfinished: Path, reading: Reading, report: Report | None) -> Path:
    """The folder of the whole, from parts that were finished earlier and those that are now."""
    for finished in convert_parts(reading.parts, reading.want, name, unfinished):
        if report is not None:
            report(finished, len(reading.parts))
    try:
        manifest = assemble(unfinished, reading.parts, reading.want, name, {"layout": reading.layout})
    except UsageError:
        shutil.rmtree(unfinished)  # no part of it is of use
        raise
    folder = slot / manifest["fingerprint"][:16]
    if folder.exists():
        shutil.rmtree(unfinished)
    else:
        os.rename(unfinished, folder)
        _sweep_parts(folder, manifest["files"])
    if manifest["quarantined"]:
        quarantined = manifest["rows_in"] - manifest["rows_out"]
        log.warning(
            "source %s: %d of %d rows quarantined in %s: %s",
            name,
            quarantined,
            manifest["rows_in"],
            folder / "quarantine.parquet",
            manifest["quarantine_summary"],
        )
    return folder


def stored_already(name: str, slot: Path, stamp: Any) -> StoredSource | None:
    """What was converted when the source looked like this."""
    memo = slot / "stamp.json"
    if memo.exists():
        known = json.loads(memo.read_text())
        if known["stamp"] == stamp and (slot / known["folder"] / "manifest.json").exists():
            return _load(name, slot / known["folder"])
    return None


def _remember(slot: Path, stamp: Any, folder: Path) -> None:
    writing = slot / f".stamp-{uuid.uuid4().hex}"
    writing.write_text(json.dumps({"stamp": stamp, "folder": folder.name}))
    writing.replace(slot / "stamp.json")


@contextlib.contextmanager
def _alone(slot: Path, name: str) -> Iterator[bool]:
    """Waits until no other process converts into the slot. False where the file system knows no locks."""
    handle = _open_slot(slot)
    try:
        locked = _lock(handle, name)
        while locked and not _is(slot, handle):  # it was removed while this one waited
            os.close(handle)
            handle = _open_slot(slot)
            locked = _lock(handle, name)
        yield locked
    finally:
        os.close(handle)


def _open_slot(slot: Path) -> int:
    while True:
        slot.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            return os.open(slot, os.O_RDONLY)


def _is(slot: Path, handle: int) -> bool:
    try:
        return os.stat(slot).st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False


def _lock(handle: int, name: str) -> bool:
    """Whether the folder is locked now; False where its file system knows no locks."""
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("source %s is being converted by another process: waiting for it", name)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EBADF):
            return False
        raise
    return True


def _sweep_parts(folder: Path, files: Sequence[str]) -> None:
    """Removes from a finished source what only its conversion needed."""
    kept = {file.split("/")[0] for file in files}
    for part in folder.glob("*part-*"):
        if part.name not in kept:
            shutil.rmtree(part, ignore_errors=True)
            continue
        for helper in ("hashes.u64", "quarantine.parquet", "part.json"):
            (part / helper).unlink(missing_ok=True)


def _tidy(slot: Path, unfinished: Path) -> None:
    """Leaves of a conversion that failed its finished parts alone, and no empty folder."""
    if unfinished.name != _UNFINISHED:
        shutil.rmtree(unfinished, ignore_errors=True)
    elif unfinished.exists():
        for path in unfinished.iterdir():
            if not path.name.startswith("part-"):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    for folder in (unfinished, slot):
        with contextlib.suppress(OSError):
            folder.rmdir()


def _load(name: str, folder: Path) -> StoredSource:
    manifest = json.loads((folder / "manifest.json").read_text())
    return StoredSource(
        name=name,
        folder=folder,
        names=tuple(manifest["files"]),
        row_groups=tuple(manifest["row_groups"]),
        groups_per_file=tuple(manifest["groups_per_file"]),
        fingerprint=manifest["fingerprint"],
        quarantined=manifest["quarantined"],
        columns=frozenset(manifest["columns"]),
        layout=manifest["layout"],
        kinds=Kinds(**manifest.get("kinds", TEXT._asdict())),
    )
