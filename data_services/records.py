"""How a row becomes a record, or is said to be malformed: one row at a time, with the reason.

`columns` does the same to a block of rows at once, where none of them has a fault.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from data_services.fields import CONSTANT, Fields
from data_services.items import Kind, Kinds
from data_services.media.checks import MEDIA_KINDS, check_media
from data_services.schema import UNKNOWN, Column, Undecodable, class_id

_LARGEST_FLOAT32 = 3.4028234e38


class Row(NamedTuple):
    """A row as it was read: its number in its file (from 1) and its fields."""

    number: int
    fields: Mapping[str, Any]


Stored = str | bytes | dict[str, str | bytes]
"""An item as it is stored: a text, the bytes of an image or sound, or those of its parts that the row has."""


class Record(NamedTuple):
    """A good row, with one positive or more. Named as in `schema.Column`.

    Each list of scores is as long as the texts it is of. What the source lacks is None; an `id` it lacks is made
    of the texts (`columns.with_ids`).
    """

    id: str | None
    query: Stored
    positives: list[Stored]
    negatives: list[Stored]
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    weight: float | None = None
    frequency: float | None = None
    label: int | None = None
    task: int | None = None
    language: int | None = None
    modality: int | None = None
    cluster: int | None = None


class Malformed(NamedTuple):
    """A row that can't be used: its number in its file, why, and what it holds."""

    number: int
    reason: str
    row: str


def as_row(number: int, fields: Any) -> Row | Malformed:
    """A mapping as a row; anything else is malformed."""
    if isinstance(fields, Mapping):
        return Row(number, fields)
    return Malformed(number, f"{_kind(fields)}, not an object of fields", repr(fields))


class _Unusable(ValueError):
    """Why a row can't be used."""


def record(row: Row, fields: Fields, max_bytes: int) -> Record | Malformed:
    """The record of a row. max_bytes: of its texts together, in UTF-8, and of its images and sounds, encoded."""
    try:
        made = _read(row.fields, fields)
        if sum(map(_size, (made.query, *made.positives, *made.negatives))) > max_bytes:
            what = "texts, images and sounds" if fields.media else "texts"
            raise _Unusable(f"its {what} have more than max_bytes={max_bytes} bytes")
        _check_media(made, fields.kinds)
    except _Unusable as why:
        return Malformed(row.number, str(why), shown(row.fields))
    return made


def shown(fields: Mapping[str, Any]) -> str:
    """A row for a person to see: of bytes only how many they are."""
    return repr({name: _shown(value) for name, value in fields.items()})


def _shown(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"({len(value):,} bytes)"
    if isinstance(value, list | tuple):
        return [_shown(its) for its in value]
    return {name: _shown(its) for name, its in value.items()} if isinstance(value, Mapping) else value


def _size(item: Stored) -> int:
    if isinstance(item, dict):
        return sum(map(_size, item.values()))
    return len(item.encode() if isinstance(item, str) else item)


def _check_media(made: Record, kinds: Kinds) -> None:
    """Whether every image and sound can be decoded: training, evaluation and search then meet none that can't."""
    for form, items in ((kinds.query, [made.query]), (kinds.document, [*made.positives, *made.negatives])):
        for item in items if form != "text" else []:
            parts = item if isinstance(item, dict) else {"": item}
            for name, data in parts.items():
                if isinstance(data, bytes):
                    kind = form if isinstance(form, str) else form[name]
                    try:
                        check_media(data, kind)
                    except Undecodable as error:
                        raise _Unusable(str(error)) from None


def _read(row: Mapping[str, Any], fields: Fields) -> Record:
    query = _items(row, fields.query, fields.query_parts, fields)
    positives = _items(row, fields.positive, fields.positive_parts, fields)
    if len(query) != 1:
        raise _Unusable(f"field {fields.query!r} is a list, not one {fields.kind_of(fields.query)}")
    if fields.title is not None and row.get(fields.title) not in (None, ""):
        positives = [_text(row[fields.title], fields.title) + " " + str(text) for text in positives]
    negatives = _negatives(row, fields)
    if fields.relations is not None:
        positives, judged_wrong = _by_relation(row, fields, positives)
        negatives = judged_wrong + negatives
    if not positives:
        raise _Unusable(f"field {fields.positive!r} is an empty list")
    if fields.prompt is not None and row.get(fields.prompt) is not None:
        query = [_plain(row[fields.prompt], fields.prompt) + str(text) for text in query]
    return Record(
        _id(row, fields.id),
        query[0],
        positives,
        negatives,
        _scores(row, fields.positive_scores, fields.positive, len(positives)),
        _scores(row, fields.negative_scores, ", ".join(fields.negatives), len(negatives)),
        _weight(row, fields.weight),
        _frequency(row, fields.frequency),
        **{name: _class(row, getattr(fields, name)) for name in Column.CLASSES},
    )


def _id(fields: Mapping[str, Any], field: str | None) -> str | None:
    if field is None:
        return None
    value = _value(fields, field)
    return str(int(value)) if _is(Integral, value) else _text(value, field)


def _negatives(row: Mapping[str, Any], fields: Fields) -> list[Stored]:
    """Items of every such field that the row has: a row may have no hard negative."""
    return [item for name in fields.negatives if row.get(name) is not None for item in _items(row, name, (), fields)]


def _items(row: Mapping[str, Any], field: str, parts: tuple[str, ...], fields: Fields) -> list[Stored]:
    """What a field holds, or each in its list; of several parts one item, of those that the row has."""
    if parts:
        return [_parts(row, parts, fields)]
    kind = fields.kind_of(field)
    if kind == "text":
        return [*_texts(row, field)]
    value = _value(row, field)
    several = isinstance(value, list | tuple) and (kind in MEDIA_KINDS or all(isinstance(its, bytes) for its in value))
    return [_bytes(its, field, kind) for its in (value if several else [value])]


def _parts(row: Mapping[str, Any], parts: tuple[str, ...], fields: Fields) -> dict[str, str | bytes]:
    there: dict[str, str | bytes] = {}
    for name in parts:
        if (value := row.get(name)) is not None and value != "":
            kind = fields.kind_of(name)
            there[name] = _text(value, name) if kind == "text" else _bytes(value, name, kind)
    if not there:
        raise _Unusable(f"it has none of the fields {', '.join(parts)}")
    return there


def _bytes(value: Any, field: str, kind: Kind) -> bytes:
    """The bytes of a file, bare or as `datasets` keeps them: {bytes, path}. Readers have put them where a path was.

    Of a kind of a user's own a text is its UTF-8, and what is neither text nor bytes is its JSON.
    """
    if kind in MEDIA_KINDS:
        value = value.get("bytes") if isinstance(value, Mapping) else value
    elif value is not None and not isinstance(value, bytes):
        value = _encoded(value, field)
    if not isinstance(value, bytes):
        raise _Unusable(f"field {field!r} is {_kind(value)}, not the bytes of a file")
    return value


def _encoded(value: Any, field: str) -> bytes:
    if isinstance(value, str):
        return _plain(value, field).encode()
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (TypeError, ValueError):
        raise _Unusable(f"field {field!r} holds what can't be written as JSON") from None


def _by_relation(row: Mapping[str, Any], fields: Fields, texts: list[Stored]) -> tuple[list[Stored], list[Stored]]:
    """(items that answer the query, items that don't); those of which it isn't known are left out."""
    assert fields.relations is not None
    values = _scores(row, fields.relations, fields.positive, len(texts)) or []
    if not set(values) <= {1, 0, -1}:
        raise _Unusable(f"field {fields.relations!r} has another number than 1, -1 and 0")
    by_value = {value: [t for t, v in zip(texts, values, strict=True) if v == value] for value in (1, -1)}
    return by_value[1], by_value[-1]


def _value(fields: Mapping[str, Any], field: str) -> Any:
    if field not in fields:
        raise _Unusable(f"no field {field!r}")
    return fields[field]


def _texts(fields: Mapping[str, Any], field: str) -> list[str]:
    """The text of a field, or its list of texts."""
    value = _value(fields, field)
    return [_text(text, field) for text in (value if isinstance(value, list | tuple) else [value])]


def _text(text: Any, field: str) -> str:
    """A text, or that of a passage: an object with `text` and perhaps `title`, which goes before it."""
    if isinstance(text, Mapping) and "text" in text:
        title = text.get("title")
        body = _text(text["text"], f"{field}.text")
        return body if title is None or title == "" else f"{_plain(title, f'{field}.title')} {body}"
    _plain(text, field)
    if not text.strip():
        raise _Unusable(f"field {field!r} is empty")
    return text


def _plain(text: Any, field: str) -> str:
    if not isinstance(text, str):
        raise _Unusable(f"field {field!r} is {_kind(text)}, not text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _Unusable(f"field {field!r} has half of a surrogate pair, which is no text") from None
    return text


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


def _frequency(fields: Mapping[str, Any], field: str | None) -> float | None:
    frequency = _weight(fields, field)
    if frequency == 0:
        raise _Unusable(f"field {field!r} is a frequency of 0, of a row that is there")
    return frequency


def _class(fields: Mapping[str, Any], field: str | None) -> int | None:
    """The class that a field names, by text or whole number; UNKNOWN where the row has none."""
    if field is None:
        return None
    if field.startswith(CONSTANT):
        return class_id(field.removeprefix(CONSTANT))
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
