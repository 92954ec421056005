"""Parts of a source to Parquet: each by itself, on any node, once; then all of them as one stored source.

    <unfinished>/part-<key>/     appears when it is finished, whole; the key is of its files and what is wanted of them
        rows-000.parquet …       stored rows (`columns.schema_of`) in row groups
        hashes.u64               `columns.row_hashes` of them, little-endian
        quarantine.parquet       malformed rows, if any: name of the file, number, reason, row
        part.json                counts

What a part becomes, and so the whole, doesn't depend on where, when or beside which others it is converted.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_services.columns import clean, record_table, row_hashes, schema_of, with_ids
from data_services.fields import check_fields
from data_services.items import TEXT, Kinds
from data_services.readers.blocks import Block, Part, Want
from data_services.records import Malformed, Record, Row, record
from data_services.schema import UsageError

# Raised when the same source would be stored differently.
CODE_VERSION = 5
QUARANTINE_SCHEMA = pa.schema([("origin", pa.string()), ("reason", pa.string()), ("row", pa.string())])
_PART_QUARANTINE = pa.schema([("name", pa.string()), ("number", pa.int64()), *list(QUARANTINE_SCHEMA)[1:]])

GROUP_ROWS = 1024
SMALLEST_GROUP_ROWS = 64
# A smaller source gets smaller row groups, so that shuffling by windows of groups still has groups to choose.
_WANTED_GROUPS = 64
_GROUPS_PER_FILE = 512
# Row groups of images and sounds are smaller: a shuffling window of them stays in the cache of `store`.
_MEDIA_GROUP_BYTES = 4 << 20
_REGROUPED_MEDIA_BYTES = 1 << 30
_QUARANTINED_CHARACTERS = 2_000
# So many rows without one good one, and a field that none of them has: the field is wrong, not the rows.
_PROBE_ROWS = 1_000


@dataclass(frozen=True)
class Converted:
    """What part.json says.

    rows_in  rows that were read    files    of rows, in order
    spans    by how much the numbers of the rows of each file go on in the next part
    present  fields that some row has
    """

    rows_in: int
    files: list[str]
    spans: dict[str, int]
    present: list[str]


def part_folder(folder: Path, part: Part, want: Want) -> Path:
    """Where a part goes: by what its files are and what is wanted of them, so that a changed one goes elsewhere."""
    return folder / f"part-{hashlib.blake2b(repr((part, want)).encode(), digest_size=8).hexdigest()}"


def convert_part(part: Part, want: Want, source: str, folder: Path) -> None:
    """Converts one part into its folder, which appears when it is whole; who finds it there leaves it as it is."""
    finished = part_folder(folder, part, want)
    making = folder / f".{finished.name}-{uuid.uuid4().hex}"
    making.mkdir()
    try:
        _convert(part, want, source, making)
        os.rename(making, finished)
    except OSError:
        if not finished.exists():  # else another was first, with the same
            raise
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _convert(part: Part, want: Want, source: str, folder: Path) -> None:
    rows_in = 0
    spans: Counter[str] = Counter()
    present: set[str] = set()
    with _Rows(folder, want) as rows, _Quarantine(folder) as quarantine:
        for block in part.blocks(want):
            rows_in += block.rows_in
            spans[block.name] += block.span
            present |= block.present
            rows.add(_records(block, want, quarantine))
            if rows_in >= _PROBE_ROWS and not rows.any:
                check_fields(present, want.fields, source)
    done = Converted(rows_in, rows.files, dict(spans), sorted(present))
    (folder / "part.json").write_text(json.dumps(asdict(done)))


def _records(block: Block, want: Want, quarantine: _Quarantine) -> pa.Table:
    """The record table of a block: at once where no row has a fault, else row by row."""
    if block.table is not None and (table := clean(block.table, want.fields, want.max_bytes)) is not None:
        return table
    good = []
    for row in block.rows():
        result = record(row, want.fields, want.max_bytes) if isinstance(row, Row) else row
        if isinstance(result, Record):
            good.append(result)
        else:
            quarantine.add(block.name, result)
    return record_table(good, want.fields.kinds)


class _Rows:
    """Stored rows into files of row groups, with their hashes."""

    def __init__(self, folder: Path, want: Want) -> None:
        self._folder, self._named = folder, want.fields.id is not None
        self._schema, self._media = schema_of(want.fields.kinds), want.fields.kinds != TEXT
        self.files: list[str] = []
        self.any = False
        self._waiting: list[pa.Table] = []
        self._waiting_rows = 0
        self._writer: pq.ParquetWriter | None = None
        self._groups = 0
        self._hashes = (folder / "hashes.u64").open("wb")

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._write_groups(1)
        if self._writer is not None:
            self._writer.close()
        self._hashes.close()

    def add(self, records: pa.Table) -> None:
        if not len(records):
            return
        self.any = True
        stored = with_ids(records)
        self._hashes.write(row_hashes(stored, self._named).astype("<u8").tobytes())
        self._waiting.append(stored)
        self._waiting_rows += len(stored)
        if self._media and sum(table.nbytes for table in self._waiting) >= _MEDIA_GROUP_BYTES:
            self._write_groups(1)
        elif self._waiting_rows >= GROUP_ROWS:
            self._write_groups(GROUP_ROWS)

    def _write_groups(self, least: int) -> None:
        """Writes what waits in row groups, as long as there are `least` rows for one."""
        if not self._waiting_rows:
            return
        table = pa.concat_tables(self._waiting).combine_chunks()
        start = 0
        while len(table) - start >= least:
            group = table.slice(start, GROUP_ROWS)
            self._file().write_table(group, row_group_size=GROUP_ROWS)
            self._groups += 1
            start += len(group)
        self._waiting, self._waiting_rows = (
            ([table.slice(start)], len(table) - start) if start < len(table) else ([], 0)
        )

    def _file(self) -> pq.ParquetWriter:
        if self._writer is None or self._groups == _GROUPS_PER_FILE:
            if self._writer is not None:
                self._writer.close()
            self.files.append(f"rows-{len(self.files):03}.parquet")
            self._writer, self._groups = pq.ParquetWriter(self._folder / self.files[-1], self._schema), 0
        return self._writer


class _Quarantine:
    """Malformed rows into a Parquet file of their own, if there are any."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "quarantine.parquet"
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[dict[str, Any]] = []

    def __enter__(self) -> _Quarantine:
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        if self._writer is not None:
            self._writer.close()

    def add(self, name: str, malformed: Malformed) -> None:
        shown = malformed.row[:_QUARANTINED_CHARACTERS].encode(errors="replace").decode()
        self._waiting.append({"name": name, "number": malformed.number, "reason": malformed.reason, "row": shown})
        if len(self._waiting) == GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._path, _PART_QUARANTINE)
        self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=_PART_QUARANTINE))
        self._waiting.clear()


# All parts as one source.


def assemble(folder: Path, parts: Sequence[Part], want: Want, source: str, more: dict[str, Any]) -> dict[str, Any]:
    """Writes the quarantine and the manifest of converted parts, and gives the manifest.

    more: what else the manifest says. Raises UsageError where no row is good, or a field is in none of them.
    """
    folders = [part_folder(folder, part, want) for part in parts]
    converted = [Converted(**json.loads((part / "part.json").read_text())) for part in folders]
    check_fields({name for part in converted for name in part.present}, want.fields, source)
    digest = hashlib.blake2b(f"{CODE_VERSION}\n".encode(), digest_size=16)
    for part in folders:
        with (part / "hashes.u64").open("rb") as hashes:
            while data := hashes.read(1 << 20):
                digest.update(data)
    reasons, summary = _merge_quarantine(folder, folders, converted, digest)
    files = [part / name for part, done in zip(folders, converted, strict=True) for name in done.files]
    groups = [_groups(file) for file in files]
    if not groups:
        raise UsageError(f"source {source} has no usable row: {summary or 'it is empty'}")
    rows, kinds = sum(map(sum, groups)), want.fields.kinds
    if (size := _regroup_size(files, rows, kinds)) is not None:
        files, groups = _regrouped(folder, files, size, schema_of(kinds))
    rows_in = sum(done.rows_in for done in converted)
    assert rows_in == rows + reasons.total(), f"{source}: {rows_in} rows in, {rows} out, {reasons.total()} quarantined"
    manifest = {
        "rows_in": rows_in,
        "rows_out": rows,
        "quarantined": dict(reasons),
        "quarantine_summary": summary,
        "files": [file.relative_to(folder).as_posix() for file in files],
        "groups_per_file": [len(sizes) for sizes in groups],
        "row_groups": [size for sizes in groups for size in sizes],
        "columns": sorted(want.fields.columns),
        "fingerprint": digest.hexdigest(),
        "code_version": CODE_VERSION,
        **({} if kinds == TEXT else {"kinds": kinds._asdict()}),
        **more,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    return manifest


def _merge_quarantine(
    folder: Path, parts: Sequence[Path], converted: Sequence[Converted], digest: hashlib.blake2b
) -> tuple[Counter[str], str]:
    """One file of all malformed rows, numbered through their files; (rows by reason, the commonest ones in words)."""
    reasons: Counter[str] = Counter()
    first: dict[str, str] = {}
    before: Counter[str] = Counter()
    with pq.ParquetWriter(folder / "quarantine.parquet", QUARANTINE_SCHEMA) as writer:
        for part, done in zip(parts, converted, strict=True):
            for batch in _malformed(part / "quarantine.parquet"):
                rows = [
                    {"origin": f"{r['name']}:{r['number'] + before[r['name']]}", "reason": r["reason"], "row": r["row"]}
                    for r in batch.to_pylist()
                ]
                for row in rows:
                    reasons[row["reason"]] += 1
                    first.setdefault(row["reason"], row["origin"])
                    digest.update(f"{row['reason']}\n{row['row']}\n".encode())
                writer.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA))
            before.update(done.spans)
    commonest = reasons.most_common(5)
    return reasons, "; ".join(f"{count} × {reason} (first: {first[reason]})" for reason, count in commonest)


def _malformed(path: Path) -> Iterator[pa.RecordBatch]:
    return pq.ParquetFile(path).iter_batches(GROUP_ROWS) if path.exists() else iter(())


def _regroup_size(files: Sequence[Path], rows: int, kinds: Kinds) -> int | None:
    """Rows of each row group that a source of few rows is cut into anew; None: it stays as its parts are."""
    if rows >= GROUP_ROWS * _WANTED_GROUPS:
        return None
    if kinds == TEXT:
        return group_rows(rows)
    stored = sum(file.stat().st_size for file in files)
    if stored > _REGROUPED_MEDIA_BYTES:
        return None
    return max(min(group_rows(rows), _MEDIA_GROUP_BYTES * rows // stored), 1)


def _regrouped(folder: Path, files: Iterable[Path], size: int, schema: pa.Schema) -> tuple[list[Path], list[list[int]]]:
    """The rows of some files in one file of row groups of that size."""
    whole = folder / "rows.parquet"
    with pq.ParquetWriter(whole, schema) as writer:
        for table in _tables_of(files, size, schema):
            writer.write_table(table, row_group_size=size)
    return [whole], [_groups(whole)]


def _tables_of(files: Iterable[Path], size: int, schema: pa.Schema) -> Iterator[pa.Table]:
    """The rows of some files in tables of `size` rows."""
    rest = schema.empty_table()
    for file in files:
        for batch in pq.ParquetFile(file).iter_batches(GROUP_ROWS):
            rest = pa.concat_tables([rest, pa.Table.from_batches([batch], schema)])
            while len(rest) >= size:
                yield rest.slice(0, size)
                rest = rest.slice(size)
    if len(rest):
        yield rest


def _groups(file: Path) -> list[int]:
    metadata = pq.read_metadata(file)
    return [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]


def group_rows(rows: int) -> int:
    """Rows of a row group for a source of so many rows: a power of two near a 64th of them, 64 to 1,024."""
    wanted = 1 << max(rows // _WANTED_GROUPS, 1).bit_length() - 1
    return min(max(wanted, SMALLEST_GROUP_ROWS), GROUP_ROWS)
