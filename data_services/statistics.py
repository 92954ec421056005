"""What is in a source: counts, lengths, repetitions, classes, examples."""

from __future__ import annotations

import itertools
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.items import Kind, Kinds, Media, item_id, text_id
from data_services.media.audio import audio_seconds
from data_services.media.checks import readable
from data_services.media.image import image_size
from data_services.near_duplicates import Duplicates
from data_services.schema import UNKNOWN, Column
from data_services.store import StoredSource

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_EXAMPLES = 3
_BATCH_ROWS = 1_024
_SIDES = {"query": Column.QUERY, "positive": Column.POSITIVES, "negative": Column.NEGATIVES}

CountTokens = Callable[[Sequence[str], str], np.ndarray]
"""n texts and their side ("query" or "document") -> [n] tokens."""


@dataclass(frozen=True)
class SourceStats:
    """texts       {"query" | "positive" | "negative": {"texts", "unique"}}, images and sounds among them
    a_row       {"positives" | "negatives": {number: rows that have so many}}
    lengths     {side: {"characters" | "tokens" | "bytes" | "height" | "width" | "seconds":
                {"mean", "min", "1%" … "99%", "max"}}}; a side of items of parts is "query.PART", each by itself
    classes     {"label" | "task" | "language" | "modality": {class: rows}}
    duplicates  rows that repeat an earlier one, "exact" and "near"
    contaminated  rows that the evaluation source holds, "exact" and "near"; None: there is none
    quarantined rows left out when the source was read, by reason
    """

    rows: int
    quarantined: dict[str, int]
    texts: dict[str, dict[str, int]]
    a_row: dict[str, dict[int, int]]
    lengths: dict[str, dict[str, dict[str, float]]]
    classes: dict[str, dict[str, int]]
    duplicates: dict[str, int]
    contaminated: dict[str, int] | None
    examples: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def count_words(texts: Sequence[str], side: str) -> np.ndarray:
    """Runs of what isn't white space: tokens where no tokenizer is given."""
    return np.array([len(text.split()) for text in texts], np.int64)


def describe(
    source: StoredSource, found: Duplicates, names: dict[int, str], count_tokens: CountTokens = count_words
) -> SourceStats:
    """The figures of a source. found: its duplicates; names: of classes, as far as they are known."""
    sides = {side: _Side(kind, count_tokens) for side, kind in _kinds_of(source.kinds).items()}
    a_row: dict[str, Counter[int]] = {"positives": Counter(), "negatives": Counter()}
    classes: dict[str, Counter[int]] = {name: Counter() for name in Column.CLASSES if name in source.columns}
    for table in _tables(source):
        for name, side in sides.items():
            of, _, part = name.partition(".")
            items = _flat(table.column(_SIDES[of]))
            side.add(
                pc.struct_field(items, part).drop_null() if part else items, "query" if of == "query" else "document"
            )
        for name, counter in a_row.items():
            counter.update(pc.list_value_length(table.column(name)).to_pylist())
        for name, counter in classes.items():
            counter.update(table.column(name).fill_null(UNKNOWN).to_pylist())
    known = language_names() | names | {UNKNOWN: "unknown"}
    shown = np.unique(np.linspace(0, source.rows - 1, _EXAMPLES).astype(int))
    return SourceStats(
        rows=source.rows,
        quarantined=source.quarantined,
        texts={side: {"texts": it.items, "unique": len(it.ids)} for side, it in sides.items()},
        a_row={name: dict(sorted(counter.items())) for name, counter in a_row.items()},
        lengths={side: it.lengths() for side, it in sides.items() if it.items},
        classes={n: {known.get(c, str(c)): rows for c, rows in it.most_common()} for n, it in classes.items()},
        duplicates={"exact": found.exact, "near": found.near},
        contaminated=found.contaminated,
        examples=[_example(row, source.kinds) for row in source.read(shown).to_pylist()],
    )


class _Side:
    """Lengths and ids of the items of one side, or of one of their parts."""

    def __init__(self, kind: Kind, count_tokens: CountTokens) -> None:
        self.ids: set[int] = set()
        self.items = 0
        self._kind, self._count_tokens = kind, count_tokens
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(self, items: pa.Array, side: str) -> None:
        listed = items.to_pylist()
        self.items += len(listed)
        self.ids.update(item_id(item if isinstance(item, str) else Media(self._kind, item)) for item in listed)
        for unit, lengths in self._lengths(items, listed, side).items():
            self._parts.setdefault(unit, []).append(lengths)

    def _lengths(self, items: pa.Array, listed: list[Any], side: str) -> dict[str, np.ndarray]:
        """[n] in each of the units that its kind has."""
        if self._kind == "text":
            characters = pc.utf8_length(items).to_numpy(zero_copy_only=False)
            return {"characters": characters, "tokens": self._count_tokens(listed, side)}
        found = {"bytes": pc.binary_length(items).to_numpy(zero_copy_only=False)}
        if self._kind == "image":
            sizes = np.array([image_size(data) for data in listed], np.int64).reshape(-1, 2)
            found |= {"height": sizes[:, 0], "width": sizes[:, 1]}
        elif self._kind == "audio":
            found["seconds"] = np.array([audio_seconds(data) for data in listed])
        return found

    def lengths(self) -> dict[str, dict[str, float]]:
        return {unit: percentiles(np.concatenate(parts)) for unit, parts in self._parts.items()}


def _kinds_of(kinds: Kinds) -> dict[str, Kind]:
    """Each side with its kind, "query"; of items of parts "query.PART" each."""
    forms = {"query": kinds.query, "positive": kinds.document, "negative": kinds.document}
    return {
        name: kind
        for side, form in forms.items()
        for name, kind in (
            {side: form} if isinstance(form, str) else {f"{side}.{p}": k for p, k in form.items()}
        ).items()
    }


def percentiles(lengths: np.ndarray) -> dict[str, float]:
    """Mean, least, most, and the PERCENTILES: lengths that are there, not between two."""
    found = np.percentile(lengths, PERCENTILES, method="lower")
    named = {f"{p}%": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(lengths.mean()), "min": float(lengths.min()), **named, "max": float(lengths.max())}


def language_names() -> dict[int, str]:
    """Codes of two letters by their `class_id`: the store keeps the ids of names only."""
    letters = itertools.product(string.ascii_lowercase, repeat=2)
    return {text_id(code): code for code in map("".join, letters)}


def _example(row: dict[str, Any], kinds: Kinds) -> dict[str, Any]:
    documents = {
        name: [readable(item, kinds.document) for item in row[name]] for name in (Column.POSITIVES, Column.NEGATIVES)
    }
    return {Column.ID: row[Column.ID], Column.QUERY: readable(row[Column.QUERY], kinds.query), **documents}


def _tables(source: StoredSource) -> Iterator[pa.Table]:
    columns = [*_SIDES.values(), *Column.CLASSES]
    for path in source.files:
        for batch in pq.ParquetFile(path).iter_batches(_BATCH_ROWS, columns=columns):
            yield pa.table(batch)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return pa.concat_arrays(flat.chunks) if flat.num_chunks else pa.array([], flat.type)
