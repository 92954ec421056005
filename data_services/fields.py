"""Which fields of a source's rows hold the parts of a record."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import NamedTuple

from data_services.items import Form, Kind, Kinds
from data_services.schema import Column, UsageError

CONSTANT = "="  # `task: =nli` is a class of every row, where `task: kind` is a field


class Fields(NamedTuple):
    """Names of the fields that hold the parts of a record, None where the source lacks one.

    negatives  one field of a text or a list of texts, or several fields of one text each
    relations  1, -1 or 0 for each text of `positive`: it answers, it doesn't, it isn't known
    prompt     a text that goes before the query
    title      a text that goes before each positive, with a space

    query_parts     several fields that are the query together, in the place of `query`
    positive_parts  the same of each positive
    media           fields that hold images or sounds, each with its kind; the others hold texts

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
    query_parts: tuple[str, ...] = ()
    positive_parts: tuple[str, ...] = ()
    media: tuple[tuple[str, Kind], ...] = ()

    @property
    def of_query(self) -> tuple[str, ...]:
        """The fields that hold the query."""
        return self.query_parts or (self.query,)

    @property
    def of_positive(self) -> tuple[str, ...]:
        return self.positive_parts or (self.positive,)

    @property
    def named(self) -> list[str]:
        """The fields that some row must have."""
        left_out = {"query", "positive", "negatives", "query_parts", "positive_parts", "media"}
        left_out |= {name for name in Column.CLASSES if (getattr(self, name) or "").startswith(CONSTANT)}
        single = [field for name, field in self._asdict().items() if name not in left_out]
        return list(dict.fromkeys([*self.of_query, *self.of_positive, *filter(None, single), *self.negatives]))

    def kind_of(self, field: str) -> Kind:
        return dict(self.media).get(field, "text")

    @property
    def kinds(self) -> Kinds:
        """What the queries and the documents of the records are."""
        return Kinds(self._form(self.query, self.query_parts), self._form(self.positive, self.positive_parts))

    def _form(self, field: str, parts: tuple[str, ...]) -> Form:
        return {part: self.kind_of(part) for part in parts} if parts else self.kind_of(field)

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


def check_media_fields(fields: Fields, source: str) -> None:
    """UsageError where `fields.media` can't be: a field of no side, sides of several kinds, words before an image."""
    sides = {*fields.of_query, *fields.of_positive, *fields.negatives}
    for field, _ in fields.media:
        if field not in sides:
            raise UsageError(f"source {source}: kinds has {field!r}, but the sides are {', '.join(sorted(sides))}")
    document = fields.kinds.document
    for field in fields.negatives:
        if fields.kind_of(field) != document:
            what = document if isinstance(document, str) else "an item of parts"
            raise UsageError(
                f"source {source}: its positives are of kind {what}, but negatives {field!r} of kind "
                f"{fields.kind_of(field)}: leave `negatives` out, or name a field of that kind"
            )
    for key, form in (("prompt", fields.kinds.query), ("title", document)):
        if (field := getattr(fields, key)) is not None and form != "text":
            raise UsageError(f"source {source}: {key} {field!r} goes before a text, and there is none: leave it out")
