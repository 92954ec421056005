"""What a reader gives: blocks of rows, as a table where that is quick and sure, and row by row where asked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple, Protocol

import pyarrow as pa

from data_services.fields import Fields
from data_services.files import File
from data_services.records import Malformed, Row

BLOCK_ROWS = 4_096
MEDIA_BLOCK_ROWS = 32  # of images and sounds
BLOCK_BYTES = 4 << 20


class Want(NamedTuple):
    """What of a source is read: its fields, and no row larger than `max_bytes`.

    root  folder that paths of images and sounds are relative to; None: the folder of the file that has them
    """

    fields: Fields
    max_bytes: int
    root: str | None = None

    @property
    def block_rows(self) -> int:
        return MEDIA_BLOCK_ROWS if self.fields.media else BLOCK_ROWS


class Block(NamedTuple):
    """Consecutive rows of one file.

    name     of the file
    rows_in  rows, good and malformed
    table    the rows with every field of `Want.fields`, or None where a row may be malformed
    rows     the same rows one by one
    present  fields that are known to stand in some row
    span     by how much the numbers of the rows that follow in the file are higher: lines, say; 0 where rows are
             numbered from the file's beginning anyway
    """

    name: str
    rows_in: int
    table: pa.Table | None
    rows: Callable[[], Iterable[Row | Malformed]]
    present: frozenset[str]
    span: int = 0


class Part(Protocol):
    """A piece of a source that is converted by itself, the same wherever and whenever that is done.

    files  that it reads; none: only this process can read it
    """

    @property
    def files(self) -> tuple[File, ...]: ...

    def blocks(self, want: Want) -> Iterator[Block]: ...


def blocks_of_rows(name: str, rows: Iterable[Row | Malformed], block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Blocks of what can only be read row by row."""
    iterator = iter(rows)
    while some := list(islice(iterator, block_rows)):
        present = frozenset(str(field) for row in some if isinstance(row, Row) for field in row.fields)
        yield Block(name, len(some), None, partial(iter, some), present)


def blocks_of_table(name: str, table: pa.Table, before: int, block_rows: int = BLOCK_ROWS) -> Iterator[Block]:
    """Blocks of a table whose rows are numbered from before + 1."""
    for start in range(0, len(table), block_rows):
        part = table.slice(start, block_rows)

        def rows(part: pa.Table = part, first: int = before + start + 1) -> Iterator[Row]:
            return (Row(first + i, fields) for i, fields in enumerate(part.to_pylist()))

        yield Block(name, len(part), part, rows, frozenset(part.column_names))
