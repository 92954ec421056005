"""CSV and TSV: a header, then a row a line; fields may be quoted and hold line ends (RFC 4180); .gz and .zst."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

import pyarrow as pa

from data_services.files import File, reading
from data_services.readers.blocks import BLOCK_ROWS, Block, Want
from data_services.records import Fields, Malformed, Row, check_fields
from data_services.schema import Column, UsageError

_WHOLE = re.compile(r"-?\d{1,18}")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what `surrogateescape` makes of bytes that are no UTF-8
_SHOWN_CHARACTERS = 2_000


def blocks(file: File, want: Want) -> Iterator[Block]:
    """Rows numbered by the line they begin at. An empty cell of a field that a row may lack is a missing one."""
    with reading(file):
        lines = _read(file, want.max_bytes)
        header = next(lines, (1, []))[1]
        if isinstance(header, str):
            raise UsageError(f"source file {file.uri} has no header that can be read: {header}")
        check_fields(header, want.fields, file.uri)
        while some := list(islice(lines, BLOCK_ROWS)):
            rows = [_row(number, cells, header, want.fields) for number, cells in some]
            yield Block(file.name, len(rows), _table(rows, want.fields), partial(iter, rows), frozenset(header))


def header_of(file: File, max_bytes: int) -> list[str]:
    with reading(file):
        header = next(_read(file, max_bytes), (1, []))[1]
        return [] if isinstance(header, str) else header


def _read(file: File, max_bytes: int) -> Iterator[tuple[int, list[str] | str]]:
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


def _row(number: int, cells: list[str] | str, header: list[str], fields: Fields) -> Row | Malformed:
    if isinstance(cells, str):
        return Malformed(number, cells, "")
    shown = "\t".join(cells)
    if _NOT_UTF8.search(shown):
        return Malformed(number, "not UTF-8", shown.encode(errors="surrogateescape").decode(errors="replace"))
    if len(cells) != len(header):
        return Malformed(number, f"not {len(header)} cells, as the header has", shown[:_SHOWN_CHARACTERS])
    row = dict(zip(header, cells, strict=True))
    return Row(number, {field: _value(row[field], field, fields) for field in fields.named})


def _value(cell: str, field: str, fields: Fields) -> Any:
    """A cell as the value that its field needs."""
    if field in (fields.query, fields.positive, fields.id):
        return cell
    if not cell:
        return None
    if field in (fields.weight, fields.positive_scores, fields.negative_scores, fields.relations):
        try:
            return float(cell)
        except ValueError:
            return cell
    if field in [getattr(fields, name) for name in Column.CLASSES] and _WHOLE.fullmatch(cell):
        return int(cell)
    return cell


def _table(rows: list[Row | Malformed], fields: Fields) -> pa.Table | None:
    if not all(isinstance(row, Row) for row in rows):
        return None
    try:
        return pa.table({name: [row.fields[name] for row in rows if isinstance(row, Row)] for name in fields.named})
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return None
