"""What stands in a file, row by row, and how a row becomes a record or is said to be malformed."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_services.schema import UsageError

# So many rows without one good one, and a field that none of them has: the field is wrong, not the rows.
_PROBE_ROWS = 1_000
_BATCH_ROWS = 4_096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class Row(NamedTuple):
    """A row as it was read. `origin` says where: file:line, or the name of a built-in pair."""

    origin: str
    fields: Mapping[str, Any]


class Record(NamedTuple):
    """A good row: `id` unique in its source, one positive or more."""

    id: str
    query: str
    positives: list[str]
    negatives: list[str]


class Malformed(NamedTuple):
    """A row that can't be used: where it stands, why, and what it holds."""

    origin: str
    reason: str
    row: str


class Fields(NamedTuple):
    """Names of the fields that hold the texts of a record."""

    query: str
    positive: str
    negatives: str | None

    @property
    def named(self) -> list[str]:
        return [field for field in self if field is not None]


def records(rows: Iterable[Row | Malformed], fields: Fields, source: str) -> Iterator[Record | Malformed]:
    """One record or malformed row for each row. UsageError where a field of `fields` is in none of them."""
    seen: dict[str, None] = {}
    any_good = False
    for number, row in enumerate(rows):
        if number == _PROBE_ROWS and not any_good:
            check_fields(seen, fields, source)
        result = _record(row, fields) if isinstance(row, Row) else row
        if isinstance(row, Row):
            seen.update(dict.fromkeys(row.fields))
        any_good = any_good or isinstance(result, Record)
        yield result
    check_fields(seen, fields, source)


def check_fields(present: Iterable[str], fields: Fields, source: str) -> None:
    """UsageError naming the first of `fields` that isn't among those present, where any are."""
    names = sorted(str(name) for name in present)
    for field in fields.named:
        if names and field not in names:
            raise UsageError(f"source {source} has no field {field!r}; its fields are {', '.join(names)}")


def parquet_rows(path: Path, name: str, fields: Fields) -> Iterator[Row | Malformed]:
    """Rows of a Parquet file, those columns only, numbered from 1."""
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise UsageError(f"source file {path} is not a Parquet file: {str(error).splitlines()[0]}") from error
    check_fields(file.schema_arrow.names, fields, str(path))
    number = 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=fields.named):
        for row in batch.to_pylist():
            number += 1
            yield Row(f"{name}:{number}", row)


def jsonl_rows(path: Path, name: str) -> Iterator[Row | Malformed]:
    """Objects line by line, numbered from 1; blank lines are no rows. Unzips what ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(_BYTE_ORDER_MARK).strip()
                if line:
                    yield _json_row(f"{name}:{number}", line)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UsageError(f"source file {path} is not a whole gzip file: {error}") from error


def _json_row(origin: str, line: bytes) -> Row | Malformed:
    try:
        return as_row(origin, json.loads(line.decode()))
    except UnicodeDecodeError:
        return Malformed(origin, "not UTF-8", line.decode(errors="replace"))
    except (json.JSONDecodeError, RecursionError):
        return Malformed(origin, "not JSON", line.decode())


def as_row(origin: str, fields: Any) -> Row | Malformed:
    """A mapping as a row; anything else is malformed."""
    if isinstance(fields, Mapping):
        return Row(origin, fields)
    return Malformed(origin, f"{_kind(fields)}, not an object of fields", repr(fields))


class _Unusable(ValueError):
    """Why a row can't be used."""


def _record(row: Row, fields: Fields) -> Record | Malformed:
    try:
        query = _texts(row.fields, fields.query)
        positives = _texts(row.fields, fields.positive)
        if len(query) != 1:
            raise _Unusable(f"field {fields.query!r} is a list, not one text")
        if not positives:
            raise _Unusable(f"field {fields.positive!r} is an empty list")
        # A row may have no hard negatives.
        if fields.negatives is None or row.fields.get(fields.negatives) is None:
            return Record(row.origin, query[0], positives, [])
        return Record(row.origin, query[0], positives, _texts(row.fields, fields.negatives))
    except _Unusable as why:
        return Malformed(row.origin, str(why), repr(dict(row.fields)))


def _texts(fields: Mapping[str, Any], field: str) -> list[str]:
    """The text of a field, or its list of texts."""
    if field not in fields:
        raise _Unusable(f"no field {field!r}")
    value = fields[field]
    texts: Sequence[Any] = value if isinstance(value, list | tuple) else [value]
    for text in texts:
        if not isinstance(text, str):
            raise _Unusable(f"field {field!r} is {_kind(text)}, not text")
        if not text.strip():
            raise _Unusable(f"field {field!r} is empty")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Unusable(f"field {field!r} has half of a surrogate pair, which is no text") from None
    return list(texts)


def _kind(value: object) -> str:
    return _KINDS.get(type(value), f"a {type(value).__name__}")


_KINDS = {
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}
