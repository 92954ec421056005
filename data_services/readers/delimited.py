"""CSV and TSV: a header, then a row a line; fields may be quoted and hold line ends (RFC 4180); .gz and .zst."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from data_services.fields import Fields, check_fields
from data_services.files import File, reading
from data_services.readers.blocks import BLOCK_ROWS, Block, Want
from data_services.records import Malformed, Row
from data_services.schema import Column, UsageError

_Line = tuple[int, list[str] | str]  # (line, cells or what is wrong with them)
_WHOLE = re.compile(r"-?\d{1,18}")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are no UTF-8
_SHOWN_CHARACTERS = 2_000


def blocks(file: File, want: Want) -> Iterator[Block]:
    """Rows, numbered by the line they begin at."""
    with reading(file):
        lines = _read(file, want.max_bytes)
        header = next(lines, (1, []))[1]
        if isinstance(header, str):
            raise UsageError(f"source file {file.uri} has no header that can be read: {header}")
        check_fields(header, want.fields, file.uri)
        while some := list(islice(lines, BLOCK_ROWS)):
            rows = partial(_rows, some, header, want.fields)
            yield Block(file.name, len(some), _table(some, header, want.fields), rows, frozenset(header))


def header_of(file: File, max_bytes: int) -> list[str]:
    with reading(file):
        header = next(_read(file, max_bytes), (1, []))[1]
        return [] if isinstance(header, str) else header


def _read(file: File, max_bytes: int) -> Iterator[_Line]:
    """(line, cells) of each row, or (line, what is wrong with it); the header first."""
    csv.field_size_limit(max(csv.field_size_limit(), max_bytes))
    text = io.TextIOWrapper(file.stream(), encoding="utf-8-sig", errors="surrogateescape", newline="")
    delimiter = "\t" if file.suffix == ".tsv" else ","
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield line, f"not {'TSV' if delimiter != ',' else 'CSV'}: {error}"
            continue
        if cells:
            yield line, cells


def _rows(some: list[_Line], header: list[str], fields: Fields) -> Iterator[Row | Malformed]:
    for number, cells in some:
        if isinstance(cells, str):
            yield Malformed(number, cells, "")
            continue
        shown = "\t".join(cells)
        if _NOT_UTF8.search(shown):
            yield Malformed(number, "not UTF-8", shown.encode(errors="surrogateescape").decode(errors="replace"))
        elif len(cells) != len(header):
            yield Malformed(number, f"not {len(header)} cells, as the header has", shown[:_SHOWN_CHARACTERS])
        else:
            row = dict(zip(header, cells, strict=True))
            yield Row(number, {field: _values([row[field]], field, fields)[0] for field in fields.named})


def _values(cells: Sequence[str], field: str, fields: Fields) -> list[Any]:
    """Cells of a column as the values that its field needs; an empty one is missing where a row may lack it."""
    if field in (fields.query, fields.positive, fields.id):
        return list(cells)
    if field in (fields.weight, fields.positive_scores, fields.negative_scores, fields.relations):
        return [_number(cell) if cell else None for cell in cells]
    if field in [getattr(fields, name) for name in Column.CLASSES]:
        return [(int(cell) if _WHOLE.fullmatch(cell) else cell) if cell else None for cell in cells]
    return [cell or None for cell in cells]


def _number(cell: str) -> float | str:
    try:
        return float(cell)
    except ValueError:
        return cell


def _table(some: list[_Line], header: list[str], fields: Fields) -> pa.Table | None:
    rows = [cells for _, cells in some if isinstance(cells, list) and len(cells) == len(header)]
    if len(rows) < len(some) or _NOT_UTF8.search("".join(map("".join, rows))):
        return None
    columns = dict(zip(header, zip(*rows, strict=True), strict=True))
    try:
        return pa.table({field: _values(columns[field], field, fields) for field in fields.named})
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
