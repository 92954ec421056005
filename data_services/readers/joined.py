"""Rows that name their documents by id, with the documents elsewhere: BEIR folders, Tevatron with a corpus.

Each part goes through the whole corpus, and keeps in memory the documents that its own rows name. Blocks of the corpus
are read by columns, and rows become tables again where no id is missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from data_services.fields import Fields
from data_services.files import File, reading
from data_services.readers.blocks import BLOCK_ROWS, Block, Want, blocks_of_rows
from data_services.readers.formats import FilePart, fields_of
from data_services.records import Malformed, Row
from data_services.schema import UsageError

# What `BeirPart` calls the fields of its rows.
BEIR_FIELDS = Fields("query", "positive", ("negative",), "positive_scores", "negative_scores", id="_id")
_BEIR_SCHEMA = pa.schema(
    [
        ("_id", pa.string()),
        ("query", pa.string()),
        ("positive", pa.list_(pa.string())),
        ("negative", pa.list_(pa.string())),
        ("positive_scores", pa.list_(pa.float64())),
        ("negative_scores", pa.list_(pa.float64())),
    ]
)
_DOCUMENT_IDS = ("_id", "docid", "id")
QRELS_BYTES = 8 << 20  # of a part: about 250,000 judgements


@dataclass(frozen=True)
class BeirPart:
    """Queries that a qrels file judges: documents above 0 answer, with that score; the others are hard negatives.

    The number-th of `of` runs of queries, as they are first judged; malformed judgements are the first run's.
    """

    corpus: tuple[File, ...]
    queries: tuple[File, ...]
    qrels: File
    number: int = 0
    of: int = 1

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.corpus, *self.queries, self.qrels)

    def blocks(self, want: Want) -> Iterator[Block]:
        judged, malformed = judgements(self.qrels)
        if self.number == 0:
            yield from blocks_of_rows(self.qrels.name, malformed)
        names = list(judged)
        own = names[len(names) * self.number // self.of : len(names) * (self.number + 1) // self.of]
        if not own:
            return
        queries = texts_of(self.queries, set(own), want.max_bytes)
        documents = texts_of(self.corpus, {d for query in own for d in judged[query][1]}, want.max_bytes)
        for start in range(0, len(own), BLOCK_ROWS):
            some = own[start : start + BLOCK_ROWS]
            rows = [self._row(query, *judged[query], queries, documents) for query in some]
            whole = [row.fields for row in rows if isinstance(row, Row)]
            table = pa.Table.from_pylist(whole, _BEIR_SCHEMA) if len(whole) == len(rows) else None
            present = frozenset(_BEIR_SCHEMA.names) if whole else frozenset()
            yield Block(self.qrels.name, len(rows), table, partial(iter, rows), present)

    def _row(
        self,
        query: str,
        number: int,
        scores: Mapping[str, float],
        queries: Mapping[str, str],
        documents: Mapping[str, str],
    ) -> Row | Malformed:
        if query not in queries:
            return Malformed(number, f"its query isn't in {self.queries[0].name}", query)
        missing = next((d for d in scores if d not in documents), None)
        if missing is not None:
            return Malformed(number, f"a document of it isn't in {self.corpus[0].name}", f"{query} {missing}")
        return Row(number, _beir_row(query, queries[query], documents, scores))


def beir_parts(corpus: tuple[File, ...], queries: tuple[File, ...], qrels: File) -> list[BeirPart]:
    """A BEIR folder in parts of about QRELS_BYTES of judgements."""
    count = max(-(-qrels.size // QRELS_BYTES), 1)
    return [BeirPart(corpus, queries, qrels, number, count) for number in range(count)]


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


_Judged = dict[str, tuple[int, dict[str, float]]]
"""By query: the line that first judges it, and the score of each document."""


def judgements(file: File) -> tuple[_Judged, list[Malformed]]:
    """query-id, corpus-id, score: tab-separated under a header."""
    judged: _Judged = {}
    malformed = []
    with reading(file):
        text = io.TextIOWrapper(file.stream(), encoding="utf-8-sig", errors="replace", newline="")
        for number, cells in enumerate(csv.reader(text, delimiter="\t"), start=1):
            if (number == 1 and cells[:3] == ["query-id", "corpus-id", "score"]) or not cells:
                continue
            try:
                query, document, score = cells
                judged.setdefault(query, (number, {}))[1][document] = float(score)
            except ValueError:
                told = "not query-id, corpus-id and score between tabs"
                malformed.append(Malformed(number, told, "\t".join(cells)))
    return judged, malformed


@dataclass(frozen=True)
class CorpusPart:
    """Rows of files whose `id_fields` hold ids, or lists of ids, of documents in a corpus."""

    part: FilePart
    corpus: tuple[File, ...]
    id_fields: tuple[str, ...]

    @property
    def files(self) -> tuple[File, ...]:
        return (*self.part.files, *self.corpus)

    def blocks(self, want: Want) -> Iterator[Block]:
        wanted = {i for block in self.part.blocks(want) for i in self._ids_of(block)}
        documents = texts_of(self.corpus, wanted, want.max_bytes)
        found = pa.array(list(documents), pa.string()), pa.array(list(documents.values()), pa.string())
        for block in self.part.blocks(want):
            table = self._joined_table(block.table, *found) if block.table is not None else None
            yield block._replace(table=table, rows=partial(self._joined_rows, block, documents))

    def _ids_of(self, block: Block) -> Iterator[str]:
        if block.table is not None and all(_of_texts(block.table, field) for field in self.id_fields):
            for field in self.id_fields:
                yield from _flat(block.table, field).drop_null().to_pylist()
        else:
            yield from (str(i) for row in block.rows() if isinstance(row, Row) for i in self._ids(row))

    def _joined_table(self, table: pa.Table, ids: pa.Array, texts: pa.Array) -> pa.Table | None:
        """The table with texts for ids; None where one is missing, or its rows have to be looked at one by one."""
        for field in self.id_fields:
            if field not in table.column_names or not _of_texts(table, field) or table.column(field).null_count:
                return None
            column = table.column(field).combine_chunks()
            column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
            taken = texts.take(pc.index_in(_flat(table, field), ids))
            if taken.null_count:
                return None
            if pa.types.is_list(column.type):
                lengths = pc.list_value_length(column)
                offsets = pc.cumulative_sum(pa.concat_arrays([pa.array([0], lengths.type), lengths]))
                taken = pa.ListArray.from_arrays(offsets, taken)
            table = table.set_column(table.column_names.index(field), field, taken)
        return table

    def _ids(self, row: Row) -> Iterator[Any]:
        for field in self.id_fields:
            yield from _listed(row.fields.get(field))

    def _joined_rows(self, block: Block, documents: Mapping[str, str]) -> Iterator[Row | Malformed]:
        return (self._joined(row, documents) for row in block.rows())

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


def _of_texts(table: pa.Table, field: str) -> bool:
    """Whether a column is of texts, or of lists of them."""
    kind = table.schema.field(field).type if field in table.column_names else pa.null()
    return pa.types.is_string(kind.value_type if pa.types.is_list(kind) else kind)


def _flat(table: pa.Table, field: str) -> pa.Array:
    """A column of texts, or of lists of them, end to end."""
    column = table.column(field)
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return pa.concat_arrays([pa.array([], pa.string()), *flat.chunks])


def texts_of(files: Iterable[File], wanted: set[str], max_bytes: int) -> dict[str, str]:
    """The texts, title before text, of those ids among the documents (or queries) of some files."""
    found: dict[str, str] = {}
    for file in files:
        fields = document_fields(file, max_bytes)
        for block in FilePart.of(file).blocks(Want(fields, max_bytes)):
            if block.table is not None and all(_of_texts(block.table, name) for name in fields.named):
                found |= _by_columns(block.table, fields, wanted)
            else:
                found |= _by_rows(block, fields, wanted)
    return found


def _by_columns(table: pa.Table, fields: Fields, wanted: set[str]) -> dict[str, str]:
    keys = table.column(fields.query).to_pylist()
    at = [i for i, key in enumerate(keys) if key in wanted]
    parts = [table.column(name).take(pa.array(at, pa.int64())).to_pylist() for name in (fields.prompt, "text") if name]
    return {keys[i]: " ".join(filter(None, texts)) for i, *texts in zip(at, *parts, strict=True)}


def _by_rows(block: Block, fields: Fields, wanted: set[str]) -> dict[str, str]:
    found = {}
    for row in block.rows():
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
