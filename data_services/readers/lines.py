"""JSON lines: one object a line, UTF-8, LF or CRLF, blank lines and byte order marks allowed; .gz and .zst."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.json

from data_services.fields import Fields
from data_services.files import File, reading
from data_services.readers.blocks import BLOCK_BYTES, Block, Want
from data_services.records import Malformed, Row, as_row
from data_services.schema import Column, UsageError

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_BYTES = 2_000
_SAMPLED_LINES = 20


class _LongLine(NamedTuple):
    """A line that isn't kept: its beginning, and all its bytes counted."""

    head: bytes
    size: int


def blocks(file: File, want: Want, start: int = 0, stop: int | None = None) -> Iterator[Block]:
    """The lines that begin at the bytes start … stop-1 of a file; numbered from 1 at the first of them."""
    number = 1
    with reading(file):
        for chunk in _range(file, want.max_bytes, start, stop):
            if isinstance(chunk, _LongLine):
                yield _long(file.name, number, chunk, want.max_bytes)
                number += 1
                continue
            lines = chunk.count(b"\n") + (not chunk.endswith(b"\n"))
            table, present = _parse(chunk, lines, want)
            count = lines if table is not None else sum(1 for line in chunk.split(b"\n") if _bare(line))
            yield Block(file.name, count, table, _row_by_row(chunk, number, want.max_bytes), present, lines)
            number += lines


def sampled(file: File, max_bytes: int) -> list[str]:
    """Fields of the first objects of a file."""
    with reading(file):
        for chunk in _whole_lines(_reader(file, 0), max_bytes):
            if isinstance(chunk, bytes) and (rows := _first_objects(chunk)):
                return list(dict.fromkeys(str(field) for row in rows for field in row))
    return []


# Lines.


def _reader(file: File, start: int) -> Callable[[int], bytes]:
    if not start:
        return file.stream().read
    opened = file.open()
    opened.seek(start)
    return opened.read


def _whole_lines(read: Callable[[int], bytes], max_bytes: int) -> Iterator[bytes | _LongLine]:
    """Bytes that end where a line ends; a line beyond max_bytes is passed over in bounded memory."""
    rest = b""
    while data := read(BLOCK_BYTES):
        cut = data.rfind(b"\n") + 1
        if cut:
            yield rest + data[:cut]
            rest = data[cut:]
            continue
        rest += data
        if len(rest) > max_bytes:
            long, after = _pass_over(read, rest)
            yield long
            cut = after.rfind(b"\n") + 1
            rest = after[cut:]
            if cut:
                yield after[:cut]
    if rest:
        yield rest


def _pass_over(read: Callable[[int], bytes], begun: bytes) -> tuple[_LongLine, bytes]:
    """(the line that has begun, what was read after its end)."""
    size = len(begun)
    while data := read(BLOCK_BYTES):
        end = data.find(b"\n") + 1
        if end:
            return _LongLine(begun[:_SHOWN_BYTES], size + end), data[end:]
        size += len(data)
    return _LongLine(begun[:_SHOWN_BYTES], size), b""


def _range(file: File, max_bytes: int, start: int, stop: int | None) -> Iterator[bytes | _LongLine]:
    """The lines that begin in start … stop-1: after the first line end at start-1 or later, up to that at stop-1."""
    position = max(start - 1, 0)
    inside = start == 0
    for whole in _whole_lines(_reader(file, position), max_bytes):
        chunk, size = whole, whole.size if isinstance(whole, _LongLine) else len(whole)
        begins, position = position, position + size
        if not inside:  # the end of a line that began earlier
            inside = True
            if isinstance(chunk, _LongLine):
                continue
            skipped = chunk.find(b"\n") + 1
            chunk, begins = chunk[skipped:] if skipped else b"", begins + skipped
        if stop is not None and begins >= stop:
            return
        if isinstance(chunk, _LongLine):
            yield chunk
            continue
        if stop is not None and position >= stop:
            chunk = chunk[: chunk.find(b"\n", stop - 1 - begins) + 1 or len(chunk)]
        if begins == 0:
            chunk = chunk.removeprefix(_BYTE_ORDER_MARK)
        if chunk:
            yield chunk


def _bare(line: bytes) -> bytes:
    return line.removeprefix(_BYTE_ORDER_MARK).strip()


# Row by row.


def _long(name: str, number: int, line: _LongLine, max_bytes: int) -> Block:
    malformed = Malformed(number, _too_long(max_bytes), line.head.decode(errors="replace"))
    return Block(name, 1, None, lambda: [malformed], frozenset(), 1)


def _too_long(max_bytes: int) -> str:
    return f"its line has more than max_bytes={max_bytes} bytes"


def _row_by_row(chunk: bytes, first: int, max_bytes: int) -> Callable[[], Iterator[Row | Malformed]]:
    def rows() -> Iterator[Row | Malformed]:
        for number, line in enumerate(chunk.split(b"\n"), start=first):
            if line := _bare(line):
                yield _row(number, line, max_bytes)

    return rows


def _row(number: int, line: bytes, max_bytes: int) -> Row | Malformed:
    if len(line) > max_bytes:
        return Malformed(number, _too_long(max_bytes), line[:_SHOWN_BYTES].decode(errors="replace"))
    try:
        return as_row(number, json.loads(line.decode()))
    except UnicodeDecodeError:
        return Malformed(number, "not UTF-8", line.decode(errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        return Malformed(number, "not JSON", line.decode())


# By whole columns.


def _parse(chunk: bytes, lines: int, want: Want) -> tuple[pa.Table | None, frozenset[str]]:
    """(the table of a chunk or None, fields known to stand in it)."""
    rows = _first_objects(chunk)
    present = frozenset(str(field) for row in rows for field in row)
    if not rows or not _one_object_a_line(chunk, lines, want.max_bytes):
        return None, present
    schema = pa.schema([(field, _type_in(rows, field, want.fields)) for field in want.fields.named])
    try:
        chunk.decode()
        table = pyarrow.json.read_json(
            pa.BufferReader(chunk),
            read_options=pyarrow.json.ReadOptions(use_threads=False, block_size=len(chunk) + 1),
            parse_options=pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except (UnicodeDecodeError, pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None, present
    if len(table) != lines:
        return None, present
    filled = {name for name in table.column_names if table[name].null_count < len(table)}
    return table, present | filled


def _one_object_a_line(chunk: bytes, lines: int, max_bytes: int) -> bool:
    """Whether every line ends an object and the next begins one: then as many rows as lines are those lines."""
    if len(chunk) > max_bytes and max(map(len, chunk.split(b"\n"))) > max_bytes:
        return False
    return max(chunk.count(b"}\n{"), chunk.count(b"}\r\n{")) == lines - 1


def _first_objects(chunk: bytes) -> list[dict[str, Any]]:
    rows, begin = [], 0
    for _ in range(_SAMPLED_LINES):
        end = chunk.find(b"\n", begin)
        line = chunk[begin : end if end >= 0 else len(chunk)]
        try:
            row = json.loads(_bare(line)) if _bare(line) else None
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        if end < 0:
            break
        begin = end + 1
    return rows


def _type_in(rows: list[dict[str, Any]], field: str, fields: Fields) -> pa.DataType:
    """The type of a field by the first rows that say so; null where none does."""
    whole = field in {fields.id, *(getattr(fields, name) for name in Column.CLASSES)}
    kinds = (_type_of(row.get(field), whole) for row in rows)
    return next((kind for kind in kinds if not _unknown(kind)), pa.null())


def _type_of(value: Any, whole: bool) -> pa.DataType:
    if isinstance(value, str):
        return pa.string()
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int | float):
        return pa.int64() if whole and isinstance(value, int) else pa.float64()
    if isinstance(value, list):
        return pa.list_(next((_type_of(item, whole) for item in value if item is not None), pa.null()))
    if isinstance(value, dict):
        return pa.struct([(name, pa.string()) for name in ("title", "text") if name in value])
    return pa.null()


def _unknown(kind: pa.DataType) -> bool:
    return pa.types.is_null(kind) or (pa.types.is_list(kind) and pa.types.is_null(kind.value_type))


def check_lines(file: File) -> None:
    """UsageError where a .json file is one array, not an object a line."""
    with reading(file):
        begin = file.stream().read(1024).lstrip()
    if begin.startswith(b"["):
        raise UsageError(f"source file {file.uri} is one JSON array: write one object a line (jq -c '.[]')")
