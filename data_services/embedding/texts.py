"""Texts, or other items, to embed: a range of rows at a time, each with its id."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from data_services.items import Item, items_of
from data_services.schema import Column
from data_services.store import StoredSource

Field = Literal["document", "query"]
_COLUMNS = {"document": (Column.POSITIVES, Column.POSITIVE_IDS), "query": (Column.QUERY, Column.QUERY_ID)}


class Texts(Protocol):
    """n texts in a fixed order. It travels to the workers pickled."""

    @property
    def fingerprint(self) -> str:
        """Of the texts and their order."""
        ...

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int) -> tuple[np.ndarray, Sequence[Item]]:
        """(ids [m] int64, `schema.item_id`; items) of rows start … stop-1."""
        ...


@runtime_checkable
class Named(Protocol):
    """Texts that have names of their own beside their ids."""

    def names(self, start: int, stop: int) -> list[str]:
        """Of rows start … stop-1."""
        ...


class _Index(NamedTuple):
    """Where each text first comes: its id, its row, its place among the row's texts; all [n] int64."""

    ids: np.ndarray
    rows: np.ndarray
    places: np.ndarray


class SourceTexts:
    """The documents (positives) or queries of a stored source, each once, in the order in which they first come.

    Memory is 24 bytes a text; the texts are read from the source's row groups when asked for. A text's name is the
    id of the row where it first comes.
    """

    def __init__(self, source: StoredSource, field: Field = "document") -> None:
        self.source, self.field = source, field

    @property
    def fingerprint(self) -> str:
        return f"{self.source.fingerprint}-{self.field}"

    def __len__(self) -> int:
        return len(self._index.ids)

    def read(self, start: int, stop: int) -> tuple[np.ndarray, Sequence[Item]]:
        import pyarrow.compute as pc

        part = slice(start, stop)
        table = self.source.read(self._index.rows[part])
        texts = table.column(_COLUMNS[self.field][0])
        if self.field == "document":
            lengths = pc.list_value_length(texts).to_numpy().astype(np.int64)
            texts = pc.list_flatten(texts).take(np.cumsum(lengths) - lengths + self._index.places[part])
        kinds = self.source.kinds
        return self._index.ids[part], items_of(texts, kinds.document if self.field == "document" else kinds.query)

    def names(self, start: int, stop: int) -> list[str]:
        return self.source.read(self._index.rows[start:stop]).column(Column.ID).to_pylist()

    def __getstate__(self) -> dict[str, Any]:
        return {"source": self.source, "field": self.field}  # every process reads the ids itself

    @cached_property
    def _index(self) -> _Index:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        name = _COLUMNS[self.field][1]
        column = pa.chunked_array([c for f in self.source.files for c in pq.read_table(f, columns=[name])[name].chunks])
        lists = pa.types.is_list(column.type)
        counts = pc.list_value_length(column).to_numpy().astype(np.int64) if lists else np.ones(len(column), np.int64)
        ids = (pc.list_flatten(column) if lists else column).to_numpy()
        first = np.sort(np.unique(ids, return_index=True)[1])
        rows = np.repeat(np.arange(len(counts)), counts)
        places = np.arange(len(ids)) - np.repeat(np.cumsum(counts) - counts, counts)
        return _Index(ids[first], rows[first], places[first])
