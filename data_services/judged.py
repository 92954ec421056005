"""Data that models are scored on, read whole and strictly: where a row is malformed, nothing is scored."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data_services.files import File
from data_services.items import TEXT, Item, item_id
from data_services.origins import origin_of
from data_services.readers.blocks import Block, Want
from data_services.readers.formats import FilePart
from data_services.readers.joined import BeirPart, document_fields, judgements
from data_services.records import Malformed
from data_services.schema import Column, UsageError, text_id
from data_services.sources import SourceConfig, open_source, retrieval_pool
from data_services.store import StoredSource


class Judged(NamedTuple):
    """A retrieval task: texts by id, and for each query the grades of the documents that were judged for it.

    A document is relevant above 0; what isn't named was not judged, and counts as not relevant.
    """

    queries: Mapping[str, Item]
    documents: Mapping[str, Item]
    grades: dict[str, dict[str, float]]


def read_judged(source: SourceConfig, home: Path) -> Judged:
    """A BEIR folder with its whole corpus and the grades of its qrels; of any other source every positive is a
    document, of grade 1 for its query (of images and sounds as `retrieval_pool` grades), and texts that are equal are
    one query or document.

    Raises UsageError for what isn't there, is malformed, or is named by the qrels and missing.
    """
    reading = origin_of(source, home).reading()
    part = reading.parts[0] if reading.parts else None
    return _beir(part, source.max_bytes) if isinstance(part, BeirPart) else _pairs(source, home)


def read_languages(source: SourceConfig, field: str, home: Path) -> dict[str, str]:
    """The language of each query of `read_judged`, by its text: a field of BEIR's queries, or of the source's rows."""
    reading = origin_of(source, home).reading()
    part = reading.parts[0] if reading.parts else None
    if not isinstance(part, BeirPart):
        query = reading.want.fields.query
        return {str(row[query]): str(row[field]) for row in read_fields(source, [query, field], home)}
    languages = {}
    for file in part.queries:
        fields = document_fields(file, source.max_bytes)._replace(label=field)
        for where, row in _good_rows(FilePart.of(file).blocks(Want(fields, source.max_bytes))):
            if field not in row:
                raise UsageError(f"{where}: no field {field!r}; it has {', '.join(map(str, row))}")
            languages[_whole_text(row)] = str(row[field])
    return languages


def read_fields(source: SourceConfig, fields: Sequence[str], home: Path) -> list[dict[str, Any]]:
    """These fields of every row of a source. Raises UsageError for the first row that lacks one, or is malformed."""
    first, *others = fields
    named = {"query": first, "positive": others[0] if others else first, "negatives": others[1:] or None}
    reading = origin_of(source.model_copy(update=named), home).reading()
    rows = []
    for where, row in _good_rows(block for part in reading.parts for block in part.blocks(reading.want)):
        missing = next((field for field in fields if field not in row), None)
        if missing is not None:
            near = difflib.get_close_matches(missing, [str(name) for name in row], 1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(map(str, row))}"
            raise UsageError(f"{where}: no field {missing!r}; {hint}")
        rows.append({field: row[field] for field in fields})
    if not rows:
        raise UsageError(f"source {source.shown} has no row to score a model on")
    return rows


def _good_rows(blocks: Iterable[Block]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(file:number, fields) of each row."""
    for block in blocks:
        for row in block.rows():
            where = f"{block.name}:{row.number}"
            if isinstance(row, Malformed):
                raise UsageError(f"{where}: {row.reason}; mend the row or take it out, a score needs all of them")
            yield where, dict(row.fields)


def _beir(part: BeirPart, max_bytes: int) -> Judged:
    judged, malformed = judgements(part.qrels)
    if malformed:
        raise UsageError(f"{part.qrels.name}:{malformed[0].number}: {malformed[0].reason}")
    grades = {query: scores for query, (_, scores) in judged.items()}
    queries, documents = (dict(_texts(files, max_bytes)) for files in (part.queries, part.corpus))
    for query, scores in grades.items():
        if query not in queries:
            raise UsageError(f"{part.qrels.name} names query {query!r}, which isn't in {part.queries[0].name}")
        missing = next((document for document in scores if document not in documents), None)
        if missing is not None:
            raise UsageError(
                f"{part.qrels.name} names document {missing!r} for query {query!r}, which isn't in "
                f"{part.corpus[0].name}: add it there or take the line out"
            )
    return Judged({query: queries[query] for query in grades}, documents, grades)


def _texts(files: Iterable[File], max_bytes: int) -> Iterator[tuple[str, str]]:
    """(id, text) of every document, or query; a title goes before the text."""
    for file in files:
        fields = document_fields(file, max_bytes)
        blocks = FilePart.of(file).blocks(Want(fields, max_bytes))
        for _, row in _good_rows(blocks):
            yield str(row[fields.query]), _whole_text(row)


def _whole_text(row: Mapping[str, Any]) -> str:
    return " ".join(str(row[name]) for name in ("title", "text") if row.get(name))


def _pairs(source: SourceConfig, home: Path) -> Judged:
    stored = open_source(source, home)
    if stored.kinds != TEXT:
        return _items(stored)
    table = stored.table().select([Column.ID, Column.QUERY, Column.POSITIVES])
    queries, documents = _Named(), _Named()
    grades: dict[str, dict[str, float]] = {}
    for row in table.to_pylist():
        judged = grades.setdefault(queries.id_of(row[Column.QUERY], row[Column.ID]), {})
        alone = len(row[Column.POSITIVES]) == 1
        judged |= {documents.id_of(p, row[Column.ID] if alone else None): 1.0 for p in row[Column.POSITIVES]}
    return Judged(queries.texts, documents.texts, grades)


def _items(stored: StoredSource) -> Judged:
    """Images, sounds and parts go by their ids."""
    pool = retrieval_pool(stored)
    queries, documents = ({f"{item_id(item) % 2**64:016x}": item for item in side} for side in pool[:2])
    names = list(documents)
    grades = {
        query: {names[d]: grade for d, grade in some.items()}
        for query, some in zip(queries, pool.relevant, strict=True)
    }
    return Judged(queries, documents, grades)


class _Named:
    """Texts by id: that of the row a text first stood in, where it is free, else the text's own hash."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._ids: dict[str, str] = {}

    def id_of(self, text: str, proposed: str | None) -> str:
        if text not in self._ids:
            free = proposed is not None and proposed not in self.texts
            self._ids[text] = proposed if free and proposed else f"{text_id(text) % 2**64:016x}"
            self.texts[self._ids[text]] = text
        return self._ids[text]
