"""Which reader reads a file, by its suffix, and how files are cut into parts that are converted by themselves.

The cut depends on the files alone, never on how many workers convert them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data_services.files import File
from data_services.readers import archive, delimited, lines, tables
from data_services.readers.blocks import Block, Want

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
            yield from piece.blocks(want)


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
        return archive.sampled(file, max_bytes)
    if file.suffix == ".json":
        lines.check_lines(file)
    return lines.sampled(file, max_bytes)


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
