"""Rows that name their documents by id, with the documents elsewhere: BEIR folders, Tevatron with a corpus.

Only the documents that are named are kept in memory, not the corpus.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data_services.files import File, reading
from data_services.readers.blocks import Block, Want, blocks_of_rows
from data_services.readers.formats import FilePart, fields_of, row_blocks
from data_services.records import Fields, Malformed, Row
from data_services.schema import UsageError

# What `BeirPart` calls the fields of its rows.
BEIR_FIELDS = Fields("query", "positive", ("negative",), "positive_scores", "negative_scores", id="_id")
_DOCUMENT_IDS = ("_id", "docid", "id")


@dataclass(frozen=True)
class BeirPart:
    """Queries that a qrels file judges: documents above 0 answer, with that score; the others are hard negatives."""

    corpus: tuple[File, ...]
    queries: tuple[File, ...]
    qrels: File

    def blocks(self, want: Want) -> Iterator[Block]:
        yield from blocks_of_rows(self.qrels.name, self._rows(want.max_bytes))

    def _rows(self, max_bytes: int) -> Iterator[Row | Malformed]:
        judged: dict[str, tuple[int, dict[str, float]]] = {}
        for row in judgements(self.qrels):
            if isinstance(row, Malformed):
                yield row
                continue
            query, document, score = row.fields["query"], row.fields["document"], row.fields["score"]
            judged.setdefault(query, (row.number, {}))[1][document] = score
        queries = texts_of(self.queries, set(judged), max_bytes)
        documents = texts_of(self.corpus, {d for _, scores in judged.values() for d in scores}, max_bytes)
        for query, (number, scores) in judged.items():
            missing = next((d for d in scores if d not in documents), None)
            if query not in queries:
                yield Malformed(number, f"its query isn't in {self.queries[0].name}", query)
            elif missing is not None:
                yield Malformed(number, f"a document of it isn't in {self.corpus[0].name}", f"{query} {missing}")
            else:
                yield Row(number, _beir_row(query, queries[query], documents, scores))


def _beir_row(query: str, text: str, documents: Mapping[str, str], scores: Mapping[str, float]) -> dict[str, Any]:
    right, wrong = [d for d in scores if scores[d] > 0], [d for d in scores if scores[d] <= 0]
    return {
        "_id": query,
        "query": text,
        "positive": [documents[d] for d in right],
        "negative": [documents[d] for d in wrong],
        "positive_scores": [scores[d] for d in right],
        "negative_scores": [scores[d] for d in wrong],
    }


def judgements(file: File) -> Iterator[Row | Malformed]:
    """query-id, corpus-id, score: tab-separated under a header."""
    with reading(file):
        text = io.TextIOWrapper(file.stream(), encoding="utf-8-sig", errors="replace", newline="")
        for number, cells in enumerate(csv.reader(text, delimiter="\t"), start=1):
            if (number == 1 and cells[:3] == ["query-id", "corpus-id", "score"]) or not cells:
                continue
            try:
                query, document, score = cells
                yield Row(number, {"query": query, "document": document, "score": float(score)})
            except ValueError:
                yield Malformed(number, "not query-id, corpus-id and score between tabs", "\t".join(cells))


@dataclass(frozen=True)
class CorpusPart:
    """Rows of files whose `id_fields` hold ids, or lists of ids, of documents in a corpus."""

    parts: tuple[FilePart, ...]
    corpus: tuple[File, ...]
    id_fields: tuple[str, ...]

    def blocks(self, want: Want) -> Iterator[Block]:
        wanted = {str(i) for _, row in self._rows(want) if isinstance(row, Row) for i in self._ids(row)}
        documents = texts_of(self.corpus, wanted, want.max_bytes)
        for name, rows in row_blocks(self.parts, want):
            yield from blocks_of_rows(name, (self._joined(row, documents) for row in rows))

    def _rows(self, want: Want) -> Iterator[tuple[str, Row | Malformed]]:
        return ((name, row) for name, rows in row_blocks(self.parts, want) for row in rows)

    def _ids(self, row: Row) -> Iterator[Any]:
        for field in self.id_fields:
            yield from _listed(row.fields.get(field))

    def _joined(self, row: Row | Malformed, documents: Mapping[str, str]) -> Row | Malformed:
        if isinstance(row, Malformed):
            return row
        missing = next((i for i in self._ids(row) if str(i) not in documents), None)
        if missing is not None:
            return Malformed(row.number, f"a document of it isn't in {self.corpus[0].name}", repr(dict(row.fields)))
        texts = {f: [documents[str(i)] for i in _listed(row.fields[f])] for f in self.id_fields if f in row.fields}
        return Row(row.number, {**row.fields, **texts})


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def texts_of(files: Iterable[File], wanted: set[str], max_bytes: int) -> dict[str, str]:
    """The texts, title before text, of those ids among the documents (or queries) of some files."""
    found: dict[str, str] = {}
    for file in files:
        fields = document_fields(file, max_bytes)
        for _, rows in row_blocks((FilePart.of(file),), Want(fields, max_bytes)):
            for row in rows:
                if isinstance(row, Row) and (key := str(row.fields.get(fields.query))) in wanted:
                    found[key] = " ".join(str(row.fields[n]) for n in ("title", "text") if row.fields.get(n))
    return found


def document_fields(file: File, max_bytes: int) -> Fields:
    """The id of a document as `query`, its text as `positive`, its title as `prompt`."""
    present = fields_of(file, max_bytes)
    key = next((name for name in _DOCUMENT_IDS if name in present), None)
    if key is None or "text" not in present:
        raise UsageError(
            f"source file {file.uri} has fields {', '.join(present) or 'of no name'}: documents need a `text` and one "
            f"of {', '.join(_DOCUMENT_IDS)}"
        )
    return Fields(key, "text", prompt="title" if "title" in present else None)
