"""How a row becomes a record, or is said to be malformed: one row at a time, with the reason.

`columns` does the same to a block of rows at once, where none of them has a fault.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from data_services.schema import UNKNOWN, Column, UsageError, class_id

_LARGEST_FLOAT32 = 3.4028234e38
_CONSTANT = "="  # `task: =nli` is a class of every row, where `task: kind` is a field


class Row(NamedTuple):
    """A row as it was read: its number in its file (from 1) and its fields."""

    number: int
    fields: Mapping[str, Any]


class Record(NamedTuple):
    """A good row, with one positive or more. Named as in `schema.Column`.

    Each list of scores is as long as the texts it is of. What the source lacks is None; an `id` it lacks is made
    of the texts (`columns.with_ids`).
    """

    id: str | None
    query: str
    positives: list[str]
    negatives: list[str]
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


class Fields(NamedTuple):
    """Names of the fields that hold the parts of a record, None where the source lacks one.

    negatives  one field of a text or a list of texts, or several fields of one text each
    relations  1, -1 or 0 for each text of `positive`: it answers, it doesn't, it isn't known
    prompt     a text that goes before the query
    title      a text that goes before each positive, with a space

    From `positive_scores` to `cluster` they are named as in `Column.OPTIONAL`. A class may be =NAME, the same of
    every row.
    """

    query: str
    positive: str
    negatives: tuple[str, ...] = ()
    positive_scores: str | None = None
    negative_scores: str | None = None
    weight: str | None = None
    frequency: str | None = None
    label: str | None = None
    task: str | None = None
    language: str | None = None
    modality: str | None = None
    cluster: str | None = None
    id: str | None = None
    prompt: str | None = None
    relations: str | None = None
    title: str | None = None

    @property
    def named(self) -> list[str]:
        """The fields that some row must have."""
        constants = {name for name in Column.CLASSES if (getattr(self, name) or "").startswith(_CONSTANT)}
        single = {name: field for name, field in self._asdict().items() if name not in {"negatives", *constants}}
        return list(dict.fromkeys([*filter(None, single.values()), *self.negatives]))

    @property
    def columns(self) -> frozenset[str]:
        """Which of `Column.OPTIONAL` the records have."""
        return frozenset(name for name in Column.OPTIONAL if getattr(self, name) is not None)


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


def as_row(number: int, fields: Any) -> Row | Malformed:
    """A mapping as a row; anything else is malformed."""
    if isinstance(fields, Mapping):
        return Row(number, fields)
    return Malformed(number, f"{_kind(fields)}, not an object of fields", repr(fields))


class _Unusable(ValueError):
    """Why a row can't be used."""


def record(row: Row, fields: Fields, max_bytes: int) -> Record | Malformed:
    """The record of a row. max_bytes: of its texts together, in UTF-8."""
    try:
        made = _read(row.fields, fields)
        size = sum(len(text.encode()) for text in (made.query, *made.positives, *made.negatives))
        if size > max_bytes:
            raise _Unusable(f"its texts have more than max_bytes={max_bytes} bytes")
    except _Unusable as why:
        return Malformed(row.number, str(why), repr(dict(row.fields)))
    return made


def _read(row: Mapping[str, Any], fields: Fields) -> Record:
    query = _texts(row, fields.query)
    positives = _texts(row, fields.positive)
    if len(query) != 1:
        raise _Unusable(f"field {fields.query!r} is a list, not one text")
    if fields.title is not None and row.get(fields.title) not in (None, ""):
        positives = [f"{_text(row[fields.title], fields.title)} {text}" for text in positives]
    negatives = _negatives(row, fields.negatives)
    if fields.relations is not None:
        positives, judged_wrong = _by_relation(row, fields, positives)
        negatives = judged_wrong + negatives
    if not positives:
        raise _Unusable(f"field {fields.positive!r} is an empty list")
    prompt = (
        "" if fields.prompt is None or row.get(fields.prompt) is None else _plain(row[fields.prompt], fields.prompt)
    )
    return Record(
        _id(row, fields.id),
        prompt + query[0],
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


def _negatives(fields: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    """Texts of every such field that the row has: a row may have no hard negative."""
    return [text for name in names if fields.get(name) is not None for text in _texts(fields, name)]


def _by_relation(row: Mapping[str, Any], fields: Fields, texts: list[str]) -> tuple[list[str], list[str]]:
    """(texts that answer the query, texts that don't); those of which it isn't known are left out."""
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
