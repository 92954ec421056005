"""The unique texts of sources, each with a position, on disk and in the order in which they first come.

A corpus doesn't fit into memory, so the texts lie in an Arrow file that is mapped; in memory are 16 bytes a text.
"""

from __future__ import annotations

import hashlib
import itertools
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.schema import Column, text_id
from data_services.store import StoredSource

IDS = {
    Column.QUERY: Column.QUERY_ID,
    Column.POSITIVES: Column.POSITIVE_IDS,
    Column.NEGATIVES: Column.NEGATIVE_IDS,
}
_BATCH = 4096  # texts of a batch of the file, which is what `take` touches at least
_SCHEMA = pa.schema([("text", pa.large_string())])


def plain_id(text: str) -> int:
    """`text_id` of the text without what carries no meaning: case, white space, forms of one character."""
    return text_id(" ".join(unicodedata.normalize("NFKC", text).casefold().split()))


class TextTable:
    """n unique texts. ids [n] int64 (`text_id`), plain_ids [n] int64 (`plain_id`)."""

    def __init__(self, path: Path, ids: np.ndarray, plain_ids: np.ndarray) -> None:
        self.path, self.ids, self.plain_ids = path, ids, plain_ids
        self._file = pa.ipc.open_file(pa.memory_map(str(path)))
        self._sorted = np.argsort(ids)

    def __reduce__(self) -> tuple[type[TextTable], tuple[Path, np.ndarray, np.ndarray]]:
        return TextTable, (self.path, self.ids, self.plain_ids)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def fingerprint(self) -> str:
        """Of the texts and their order."""
        return hashlib.blake2b(self.ids.tobytes(), digest_size=16).hexdigest()

    def read(self, start: int, stop: int) -> tuple[np.ndarray, list[str]]:
        """(ids [m] int64, texts) of the positions start … stop-1."""
        return self.ids[start:stop], self.take(np.arange(start, min(stop, len(self))))

    def take(self, positions: np.ndarray) -> list[str]:
        """The texts at `positions` [m], in that order."""
        positions = np.asarray(positions, np.int64)
        order = np.argsort(positions, kind="stable")
        batches = positions[order] // _BATCH
        edges = np.flatnonzero(np.diff(batches, prepend=-1, append=-1))
        texts = np.empty(len(positions), object)
        for start, stop in itertools.pairwise(edges):
            part = order[start:stop]
            batch = self._file.get_batch(int(batches[start]))
            texts[part] = batch.column(0).take(pa.array(positions[part] % _BATCH)).to_pylist()
        return texts.tolist()

    def positions(self, ids: np.ndarray) -> np.ndarray:
        """[m] where each of the `ids` [m] stands; every one must be there."""
        return self._sorted[np.searchsorted(self.ids, ids, sorter=self._sorted)]


def write_texts(
    path: Path,
    sources: Sequence[StoredSource],
    columns: Sequence[str],
    known: Callable[[np.ndarray], np.ndarray] | None = None,
) -> TextTable:
    """The unique texts of the columns (query, positives, negatives) of all sources.

    known  takes ids [n] int64, gives [n] bool: the texts that are left out
    """
    ids = np.concatenate([ids for _, ids in _groups(sources, [IDS[c] for c in columns], texts=False)])
    first = np.zeros(len(ids), bool)
    unique, at = np.unique(ids, return_index=True)
    first[at if known is None else at[~known(unique)]] = True
    plain_ids = np.empty(first.sum(), np.int64)
    done = read = 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, _SCHEMA) as writer:
        waiting = pa.array([], pa.large_string())
        for texts, _ in _groups(sources, [column for c in columns for column in (c, IDS[c])], texts=True):
            kept = texts.filter(pa.array(first[read : read + len(texts)]))
            plain_ids[done : done + len(kept)] = [plain_id(text) for text in kept.to_pylist()]
            read, done = read + len(texts), done + len(kept)
            waiting = pa.concat_arrays([waiting, kept])
            while len(waiting) >= _BATCH:
                writer.write_batch(pa.record_batch([waiting[:_BATCH]], _SCHEMA))
                waiting = waiting[_BATCH:]
        if len(waiting):
            writer.write_batch(pa.record_batch([waiting], _SCHEMA))
    return TextTable(path, ids[first], plain_ids)


def _groups(sources: Sequence[StoredSource], columns: list[str], texts: bool) -> Iterator[tuple[pa.Array, np.ndarray]]:
    """(texts, ids) of the columns of each row group end to end; no texts where only ids are asked for."""
    for path in (path for source in sources for path in source.files):
        file = pq.ParquetFile(path)
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=columns)
            flat = {name: _flat(table.column(name)) for name in columns}
            ids = np.concatenate([flat[c].to_numpy() for c in columns if c in IDS.values()])
            strings = [flat[c].cast(pa.large_string()) for c in columns if c not in IDS.values()]
            yield pa.concat_arrays(strings) if texts else pa.array([]), ids


def _flat(column: pa.ChunkedArray) -> pa.Array:
    """A column as one array, lists end to end."""
    whole = column.combine_chunks()
    whole = pa.concat_arrays(whole.chunks) if isinstance(whole, pa.ChunkedArray) else whole
    return pc.list_flatten(whole) if pa.types.is_list(whole.type) else whole


class Lists(NamedTuple):
    """q lists of positions end to end: list i is values[offsets[i]:offsets[i+1]]. values int64, offsets [q+1]."""

    offsets: np.ndarray
    values: np.ndarray

    @property
    def owners(self) -> np.ndarray:
        """[values] the list that each value is in."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))

    def part(self, start: int, stop: int) -> Lists:
        """The lists start … stop-1."""
        offsets = self.offsets[start : stop + 1]
        return Lists(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])


def positives_of(source: StoredSource, queries: TextTable, documents: TextTable) -> tuple[Lists, int]:
    """The positives of every query over all its rows, each once; and the most that a query lists, repeats included.

    Equal query texts are one query: what answers it in one row is no negative in another.
    """
    owners, answers = [], []
    for path in source.files:
        table = pq.read_table(path, columns=[Column.QUERY_ID, Column.POSITIVE_IDS])
        counts = pc.list_value_length(table.column(Column.POSITIVE_IDS)).to_numpy()
        owners.append(np.repeat(queries.positions(table.column(Column.QUERY_ID).to_numpy()), counts))
        answers.append(documents.positions(_flat(table.column(Column.POSITIVE_IDS)).to_numpy()))
    owner, answer = np.concatenate(owners), np.concatenate(answers)
    pairs = np.unique(np.stack([owner, answer], axis=1), axis=0)
    offsets = np.searchsorted(pairs[:, 0], np.arange(len(queries) + 1))
    return Lists(offsets, pairs[:, 1]), int(np.bincount(owner).max())
