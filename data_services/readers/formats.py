"""Which reader reads a file, by its suffix, and how files are cut into parts that are converted by themselves.

The cut depends on the files alone, never on how many workers convert them.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_services.fields import Fields
from data_services.files import File
from data_services.items import Kind
from data_services.media.kinds import kind_of
from data_services.readers import archive, delimited, lines, tables
from data_services.readers.beside import with_files
from data_services.readers.blocks import Block, Want
from data_services.records import Row

JSON_LINES = (".jsonl", ".ndjson", ".json")
PARQUET, ARROW, DELIMITED, ARCHIVE = (".parquet",), (".arrow", ".feather", ".ipc"), (".csv", ".tsv"), (".tar",)
SUFFIXES = (*PARQUET, *ARROW, *JSON_LINES, *DELIMITED, *ARCHIVE)
# In a folder a .json is rather a description of it.
FOLDER_SUFFIXES = tuple(suffix for suffix in SUFFIXES if suffix != ".json")
PART_BYTES = 128 << 20


class Piece(NamedTuple):
    """A file, or a range of it: bytes of JSON lines, row groups of Parquet."""

    file: File
    start: int = 0
    stop: int | None = None

    def blocks(self, want: Want) -> Iterator[Block]:
        if self.file.suffix in PARQUET:
            return tables.parquet_blocks(self.file, want, self.start, self.stop)
        if self.file.suffix in ARROW:
            return tables.arrow_blocks(self.file, want)
        if self.file.suffix in DELIMITED:
            return delimited.blocks(self.file, want)
        if self.file.suffix in ARCHIVE:
            return archive.blocks(self.file, want)
        return lines.blocks(self.file, want, self.start, self.stop)


@dataclass(frozen=True)
class FilePart:
    """Whole small files, or a range of a large one."""

    pieces: tuple[Piece, ...]

    @classmethod
    def of(cls, file: File) -> FilePart:
        return cls((Piece(file),))

    @property
    def files(self) -> tuple[File, ...]:
        return tuple(piece.file for piece in self.pieces)

    def blocks(self, want: Want) -> Iterator[Block]:
        for piece in self.pieces:
            yield from with_files(piece.blocks(want), want, posixpath.dirname(piece.file.uri))


def fields_of(file: File, max_bytes: int) -> list[str]:
    """The fields of a file, by its schema, header or first rows; none where it is empty."""
    if not file.size:
        return []
    if file.suffix in PARQUET:
        return tables.parquet_fields(file)
    if file.suffix in ARROW:
        return tables.arrow_fields(file)
    if file.suffix in DELIMITED:
        return delimited.header_of(file, max_bytes)
    if file.suffix in ARCHIVE:
        return list(archive.sampled(file, max_bytes))
    if file.suffix == ".json":
        lines.check_lines(file)
    return lines.sampled(file, max_bytes)


def media_of(file: File, fields: Iterable[str], max_bytes: int) -> dict[str, Kind]:
    """Which of the fields hold images or sounds, by their first bytes, where the format can hold bytes."""
    wanted = set(fields)
    if not file.size or file.suffix not in (*PARQUET, *ARROW, *ARCHIVE):
        return {}
    if file.suffix in ARCHIVE:
        first = archive.sampled(file, max_bytes)
    else:
        wanted &= tables.bytes_fields(file, arrow=file.suffix in ARROW)
        names = sorted(wanted)
        probe = Want(Fields(names[0], names[-1], tuple(names)), max_bytes, None) if names else None
        first = _first_row(file, probe) if probe else {}
    found: dict[str, Kind] = {}
    for name in wanted:
        kind = kind_of(_first_bytes(first.get(name)) or b"")
        if kind == "image" or kind == "audio":
            found[name] = kind
    return found


def _first_row(file: File, want: Want) -> Mapping[str, Any]:
    rows = (row for block in Piece(file).blocks(want) for row in block.rows() if isinstance(row, Row))
    return next(rows, Row(0, {})).fields


def _first_bytes(value: Any) -> bytes | None:
    if isinstance(value, list):
        return next((data for its in value if (data := _first_bytes(its)) is not None), None)
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value if isinstance(value, bytes) else None


def parts_of(files: Sequence[File], part_bytes: int | None = None) -> list[FilePart]:
    """Files in parts of about `part_bytes`: small neighbours together, large ones in ranges, empty ones left out."""
    limit = part_bytes or PART_BYTES
    parts: list[FilePart] = []
    waiting: list[Piece] = []
    for file in files:
        pieces = _pieces(file, limit)
        if len(pieces) > 1 or sum(piece.file.size for piece in waiting) + file.size > limit:
            parts += [FilePart(tuple(waiting))] if waiting else []
            waiting = []
        if len(pieces) > 1:
            parts += [FilePart((piece,)) for piece in pieces]
        else:
            waiting += pieces
    return parts + ([FilePart(tuple(waiting))] if waiting else [])


def _pieces(file: File, limit: int) -> list[Piece]:
    if file.size == 0 or file.size <= limit or file.compression:
        return [Piece(file)] if file.size else []
    if file.suffix in PARQUET:
        return [Piece(file, start, stop) for start, stop in _runs(tables.parquet_group_bytes(file), limit)]
    if file.suffix in JSON_LINES:
        return [Piece(file, start, min(start + limit, file.size)) for start in range(0, file.size, limit)]
    return [Piece(file)]


def _runs(sizes: Sequence[int], limit: int) -> list[tuple[int, int]]:
    """Ranges of neighbours that reach the limit together."""
    runs, start, total = [], 0, 0
    for i, size in enumerate(sizes):
        total += size
        if total >= limit:
            runs.append((start, i + 1))
            start, total = i + 1, 0
    return runs + ([(start, len(sizes))] if start < len(sizes) else [])
