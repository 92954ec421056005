"""What stands in a file, row by row, and how a row becomes a record or is said to be malformed."""

from __future__ import annotations

import difflib
import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from data_services.schema import UNKNOWN, Column, UsageError, class_id

# So many rows without one good one, and a field that none of them has: the field is wrong, not the rows.
_PROBE_ROWS = 1_000
_BATCH_ROWS = 4_096
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_LARGEST_FLOAT32 = 3.4028234e38
_CONSTANT = "="  # `task: =nli` is a class of every row, where `task: kind` is a field


class Row(NamedTuple):
    """A row as it was read. `origin` says where: file:line, or the name of a built-in pair."""

    origin: str
    fields: Mapping[str, Any]


class Record(NamedTuple):
    """A good row: `id` unique in its source, one positive or more. Named as in `schema.Column`.

    Each list of scores is as long as the texts it is of. What the source lacks is None.
    """

    id: str
    query: str
    positives: list[str]
    negatives: list[str]
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    weight: float | None = None
    label: int | None = None
    task: int | None = None
    language: int | None = None
    modality: int | None = None


class Malformed(NamedTuple):
    """A row that can't be used: where it stands, why, and what it holds."""

    origin: str
    reason: str
    row: str


class Fields(NamedTuple):
    """Names of the fields that hold the parts of a record, None where the source lacks one.

    From `positive_scores` to `modality` they are named as in `Column.OPTIONAL`. A class may be =NAME, the same of
    every row. id: a text or whole number; none: the row's origin. title: goes before each positive, with a space.
    """

    query: str
    positive: str
    negatives: str | None = None
    positive_scores: str | None = None
    negative_scores: str | None = None
    weight: str | None = None
    label: str | None = None
    task: str | None = None
    language: str | None = None
    modality: str | None = None
    id: str | None = None
    title: str | None = None

    @property
    def named(self) -> list[str]:
        """The fields that some row must have."""
        constants = {name for name in Column.CLASSES if (getattr(self, name) or "").startswith(_CONSTANT)}
        return [field for name, field in self._asdict().items() if field is not None and name not in constants]

    @property
    def columns(self) -> frozenset[str]:
        """Which of `Column.OPTIONAL` the records have."""
        return frozenset(name for name in Column.OPTIONAL if getattr(self, name) is not None)


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
            nearest = difflib.get_close_matches(field, names, 1)
            raise UsageError(
                f"source {source} has no field {field!r}; its fields are {', '.join(names)}"
                + (f"; did you mean {nearest[0]}?" if nearest else "")
            )


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
        return _read(row, fields)
    except _Unusable as why:
        return Malformed(row.origin, str(why), repr(dict(row.fields)))


def _read(row: Row, fields: Fields) -> Record:
    query = _texts(row.fields, fields.query)
    positives = _texts(row.fields, fields.positive)
    if len(query) != 1:
        raise _Unusable(f"field {fields.query!r} is a list, not one text")
    if not positives:
        raise _Unusable(f"field {fields.positive!r} is an empty list")
    if fields.title is not None and (title := row.fields.get(fields.title)):  # a row may have none
        positives = [f"{_text(title, fields.title)} {text}" for text in positives]
    field = fields.negatives  # a row may have none
    negatives = _texts(row.fields, field) if field is not None and row.fields.get(field) is not None else []
    return Record(
        row.origin if fields.id is None else _name(_value(row.fields, fields.id), fields.id),
        query[0],
        positives,
        negatives,
        _scores(row.fields, fields.positive_scores, fields.positive, len(positives)),
        _scores(row.fields, fields.negative_scores, fields.negatives, len(negatives)),
        _weight(row.fields, fields.weight),
        **{name: _class(row.fields, getattr(fields, name)) for name in Column.CLASSES},
    )


def _value(fields: Mapping[str, Any], field: str) -> Any:
    if field not in fields:
        raise _Unusable(f"no field {field!r}")
    return fields[field]


def _texts(fields: Mapping[str, Any], field: str) -> list[str]:
    """The text of a field, or its list of texts."""
    value = _value(fields, field)
    return [_text(text, field) for text in (value if isinstance(value, list | tuple) else [value])]


def _text(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise _Unusable(f"field {field!r} is {_kind(text)}, not text")
    if not text.strip():
        raise _Unusable(f"field {field!r} is empty")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"field {field!r} has half of a surrogate pair, which is no text") from None
    return text


def _name(value: Any, field: str) -> str:
    """An id as text."""
    return str(value) if _is(Integral, value) else _text(value, field)


def _scores(fields: Mapping[str, Any], field: str | None, of: str | None, texts: int) -> list[float] | None:
    """The number of a field, or its list of numbers: one for each of the `texts` texts of field `of`."""
    if field is None:
        return None
    value = _value(fields, field) if texts else fields.get(field)
    if value is None and not texts:  # a row without hard negatives needs no scores of them
        return []
    scores = [_number(score, field) for score in (value if isinstance(value, list | tuple) else [value])]
    if len(scores) != texts:
        raise _Unusable(f"field {field!r} has {len(scores)} scores for {texts} texts of {of!r}")
    return scores


def _number(value: Any, field: str) -> float:
    if not _is(Real, value):
        raise _Unusable(f"field {field!r} is {_kind(value)}, not a number")
    if not abs(value) <= _LARGEST_FLOAT32:
        raise _Unusable(f"field {field!r} is a number that isn't finite in 32 bits")
    return float(value)


def _weight(fields: Mapping[str, Any], field: str | None) -> float | None:
    if field is None:
        return None
    weight = _number(_value(fields, field), field)
    if weight < 0:
        raise _Unusable(f"field {field!r} is a negative weight")
    return weight


def _class(fields: Mapping[str, Any], field: str | None) -> int | None:
    """The class that a field names, by text or whole number; UNKNOWN where the row has none."""
    if field is None:
        return None
    if field.startswith(_CONSTANT):
        return class_id(field.removeprefix(_CONSTANT))
    value = fields.get(field)
    if value is None:
        return UNKNOWN
    if _is(Integral, value):
        if not UNKNOWN < value < -UNKNOWN:
            raise _Unusable(f"field {field!r} is a number beyond 64 bits")
        return class_id(int(value))
    if isinstance(value, str):
        return class_id(_text(value, field))
    raise _Unusable(f"field {field!r} is {_kind(value)}, not a text or a whole number")


def _is(kind: type, value: Any) -> bool:
    """Whether it is such a number; numpy's are too, booleans aren't."""
    return isinstance(value, kind) and not isinstance(value, bool)


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
