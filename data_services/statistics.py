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

from data_services.near_duplicates import Duplicates
from data_services.schema import UNKNOWN, Column, text_id
from data_services.store import StoredSource

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_EXAMPLES = 3
_SIDES = {"query": Column.QUERY, "positive": Column.POSITIVES, "negative": Column.NEGATIVES}

CountTokens = Callable[[Sequence[str], str], np.ndarray]
"""n texts and their side ("query" or "document") -> [n] tokens."""


@dataclass(frozen=True)
class SourceStats:
    """texts       {"query" | "positive" | "negative": {"texts", "unique"}}
    a_row       {"positives" | "negatives": {number: rows that have so many}}
    lengths     {side: {"characters" | "tokens": {"mean", "min", "1%" … "99%", "max"}}}
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
    sides = {side: _Side() for side in _SIDES}
    a_row: dict[str, Counter[int]] = {"positives": Counter(), "negatives": Counter()}
    classes: dict[str, Counter[int]] = {name: Counter() for name in Column.CLASSES if name in source.columns}
    for table in _tables(source):
        for side, column in _SIDES.items():
            sides[side].add(_flat(table.column(column)), "query" if side == "query" else "document", count_tokens)
        for name, counter in a_row.items():
            counter.update(pc.list_value_length(table.column(name)).to_pylist())
        for name, counter in classes.items():
            counter.update(table.column(name).fill_null(UNKNOWN).to_pylist())
    known = language_names() | names | {UNKNOWN: "unknown"}
    shown = np.unique(np.linspace(0, source.rows - 1, _EXAMPLES).astype(int))
    return SourceStats(
        rows=source.rows,
        quarantined=source.quarantined,
        texts={side: {"texts": it.texts, "unique": len(it.ids)} for side, it in sides.items()},
        a_row={name: dict(sorted(counter.items())) for name, counter in a_row.items()},
        lengths={side: it.lengths() for side, it in sides.items() if it.texts},
        classes={n: {known.get(c, str(c)): rows for c, rows in it.most_common()} for n, it in classes.items()},
        duplicates={"exact": found.exact, "near": found.near},
        contaminated=found.contaminated,
        examples=[_example(row) for row in source.read(shown).to_pylist()],
    )


class _Side:
    """Lengths and ids of the texts of one side."""

    def __init__(self) -> None:
        self.ids: set[int] = set()
        self._parts: dict[str, list[np.ndarray]] = {"characters": [], "tokens": []}

    def add(self, texts: pa.Array, side: str, count_tokens: CountTokens) -> None:
        listed = texts.to_pylist()
        self.ids.update(map(text_id, listed))
        self._parts["characters"].append(pc.utf8_length(texts).to_numpy(zero_copy_only=False))
        self._parts["tokens"].append(count_tokens(listed, side))

    @property
    def texts(self) -> int:
        return sum(map(len, self._parts["tokens"]))

    def lengths(self) -> dict[str, dict[str, float]]:
        return {unit: percentiles(np.concatenate(parts)) for unit, parts in self._parts.items()}


def percentiles(lengths: np.ndarray) -> dict[str, float]:
    """Mean, least, most, and the PERCENTILES: lengths that are there, not between two."""
    found = np.percentile(lengths, PERCENTILES, method="lower")
    named = {f"{p}%": float(value) for p, value in zip(PERCENTILES, found, strict=True)}
    return {"mean": float(lengths.mean()), "min": float(lengths.min()), **named, "max": float(lengths.max())}


def language_names() -> dict[int, str]:
    """Codes of two letters by their `class_id`: the store keeps the ids of names only."""
    letters = itertools.product(string.ascii_lowercase, repeat=2)
    return {text_id(code): code for code in map("".join, letters)}


def _example(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row[name] for name in (Column.ID, Column.QUERY, Column.POSITIVES, Column.NEGATIVES)}


def _tables(source: StoredSource) -> Iterator[pa.Table]:
    columns = [*_SIDES.values(), *Column.CLASSES]
    for path in source.files:
        for batch in pq.ParquetFile(path).iter_batches(columns=columns):
            yield pa.table(batch)


def _flat(column: pa.ChunkedArray) -> pa.Array:
    flat = pc.list_flatten(column) if pa.types.is_list(column.type) else column
    return pa.concat_arrays(flat.chunks) if flat.num_chunks else pa.array([], pa.string())
