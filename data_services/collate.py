"""A global batch of records to one `Batch` per worker: dealt by token cost, cut into chunks of like length.

The membership of a global batch is fixed by `order`; how it is dealt and cut is free, since the loss is over
the whole batch. Both are functions of the lengths alone: every process that does it gets the same answer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np

from data_services.assemble import GlobalBatch
from data_services.ragged import Inputs, Ragged, arrays_of, towers_of
from data_services.schema import SIDES, Batch, Pairs

if TYPE_CHECKING:
    import pyarrow as pa

CHUNKS_PER_BUDGET = 256  # launching one more chunk is taken to cost as much as 1/256 of a full one (see `cut`)


def deal(costs: np.ndarray, world_size: int) -> list[np.ndarray]:
    """[B] token costs -> the rows of each worker, ascending.

    The longest goes first, always to the least loaded worker (LPT, Graham 1969), so every worker gets a row.
    Raises ValueError where there are fewer rows than workers.
    """
    if len(costs) < world_size:
        raise ValueError(f"costs: {len(costs)} rows can't be dealt to {world_size} workers")
    loads = [(0, 0, worker) for worker in range(world_size)]  # (tokens, rows, worker): a heap
    shares: list[list[int]] = [[] for _ in range(world_size)]
    for row in np.argsort(-costs, kind="stable"):
        tokens, rows, worker = loads[0]
        shares[worker].append(int(row))
        heapq.heapreplace(loads, (tokens + max(int(costs[row]), 1), rows + 1, worker))
    return [np.sort(np.array(share, np.int64)) for share in shares]


def cut(lengths: Sequence[np.ndarray], budget_tokens: int) -> list[list[np.ndarray]]:
    """Each worker's text lengths [n] -> its chunks, indices of texts, longest first; equally many for all workers.

    All texts are sorted by length together and cut into classes; a worker's chunk is what it has of a class, which may
    be nothing. So the i-th chunks of all workers are of like length, for workers that wait for each other at every
    chunk. The cut is the one where the sum over classes of (texts x longest + W budget/256) is least, by dynamic
    programming, with texts x longest <= budget on each worker; a text beyond the budget is a chunk by itself. The
    second term is what one more chunk costs: without it every length would be its own chunk.
    """
    worker = np.repeat(np.arange(len(lengths)), [len(own) for own in lengths])
    index = np.concatenate([np.arange(len(own)) for own in lengths])
    order = np.argsort(np.concatenate(lengths), kind="stable")
    worker, index, length = worker[order], index[order], np.maximum(np.concatenate(lengths)[order], 1)
    begins = _earliest_begins(worker, np.maximum(budget_tokens // length, 1), len(lengths))
    n, price = len(length), len(lengths) * budget_tokens / CHUNKS_PER_BUDGET
    best, begin = np.zeros(n + 1), np.zeros(n + 1, np.int64)
    for end in range(1, n + 1):
        first = begins[end - 1]
        totals = best[first:end] + np.arange(end - first, 0, -1) * length[end - 1]
        begin[end] = first + int(totals.argmin())
        best[end] = totals[begin[end] - first] + price
    chunks: list[list[np.ndarray]] = [[] for _ in lengths]
    end = n
    while end:
        part = slice(begin[end], end)
        for rank, own in enumerate(chunks):
            own.append(index[part][worker[part] == rank])
        end = int(begin[end])
    return chunks


def _earliest_begins(worker: np.ndarray, most: np.ndarray, workers: int) -> np.ndarray:
    """[n] where a class that ends with each text may begin at the earliest: no worker has more than `most` [n] of it.

    worker [n] of each text, shortest first
    """
    earliest = np.zeros(len(worker), np.int64)
    for rank in range(workers):
        places = np.flatnonzero(worker == rank)
        beyond = np.cumsum(worker == rank) - most  # texts of this worker that must come before
        there = beyond > 0
        earliest[there] = np.maximum(earliest[there], places[beyond[there] - 1] + 1)
    return earliest


def token_costs(batch: Pairs) -> np.ndarray:
    """[B] tokens of each query and its documents."""
    costs = batch.queries.lengths
    np.add.at(costs, batch.owners, batch.documents.lengths)
    return costs


def share_batch(batch: GlobalBatch, world_size: int, budget_tokens: int) -> list[Batch]:
    """One Batch per worker: rows dealt by token cost, each with all of its documents; equally many chunks, and those
    of one number through the same tower."""
    n = len(batch.queries)
    shares = [_part(batch, rows) for rows in deal(token_costs(batch), world_size)]
    sides = [(share["queries"], share["documents"]) for share in shares]
    cuts, towers, of_sides = _cut_by_tower(sides, budget_tokens)
    return [
        Batch(global_queries=n, chunks=tuple(chunks), chunk_towers=towers, chunk_sides=of_sides, **share)
        for share, chunks in zip(shares, cuts, strict=True)
    ]


def _cut_by_tower(
    sides: Sequence[tuple[Ragged, Ragged]], budget_tokens: int
) -> tuple[list[list[np.ndarray]], np.ndarray | None, np.ndarray | None]:
    """The chunks of each worker's items, tower after tower, each equally many for all; [chunks] the tower of each, and
    `Batch.chunk_sides`.

    sides  of a worker's queries and documents
    """
    lengths = [np.concatenate([its.lengths for its in both]) for both in sides]
    if towers_of(sides[0][0]) is None:
        return cut(lengths, budget_tokens), None, None
    towers = [np.concatenate([its for of in both if (its := towers_of(of)) is not None]) for both in sides]
    cuts: list[list[np.ndarray]] = [[] for _ in sides]
    of_chunks: list[int] = []
    of_sides: list[int] = []
    used = [np.unique(np.concatenate([of for both in sides if (of := towers_of(both[i])) is not None])) for i in (0, 1)]
    for tower in np.unique(np.concatenate(towers)):
        places = [np.flatnonzero(its == tower) for its in towers]
        parts = cut([its[at] for its, at in zip(lengths, places, strict=True)], budget_tokens)
        for cut_of, chunks, at in zip(cuts, parts, places, strict=True):
            cut_of += [at[chunk] for chunk in chunks]
        of_chunks += [tower] * len(parts[0])
        of_sides += [sum(bit for bit, its in zip(SIDES.values(), used, strict=True) if tower in its)] * len(parts[0])
    return cuts, np.array(of_chunks, np.int8), np.array(of_sides, np.int8)


def _part(batch: Pairs, rows: np.ndarray) -> dict[str, Any]:
    """The fields of `Pairs` for the queries at `rows` [b], ascending, and the documents that they own."""
    n = len(batch.queries)
    places = np.full(n, -1)  # of each query among `rows`
    places[rows] = np.arange(len(rows))
    documents = np.flatnonzero(places[batch.owners] >= 0)

    def taken(names: tuple[str, ...], indices: np.ndarray) -> dict[str, Any]:
        columns = {name: getattr(batch, name) for name in names}
        return {name: column if column is None else column[indices] for name, column in columns.items()}

    return {
        "step": batch.step,
        "queries": batch.queries.take(rows),
        "documents": batch.documents.take(documents),
        **taken(Pairs.OF_QUERIES, rows),
        **taken(Pairs.OF_DOCUMENTS, documents),
        "owners": places[batch.owners[documents]],
        "prompt_tokens": batch.prompt_tokens[np.concatenate([rows, n + documents])],
    }


_NUMBERS, _RAGGED = ("step", "global_queries", "rank"), ("queries", "documents", "chunks")
_ARRAY = "."  # between queries or documents and the name of one of their arrays


def to_arrow(batch: Batch, rank: int) -> pa.Table:
    """A table of one row: list columns of the batch's arrays, and the rank it is for. What is None has no column."""
    import pyarrow as pa

    values = {field.name: getattr(batch, field.name) for field in fields(batch)} | {"rank": rank}
    lists = np.cumsum([0, *(len(chunk) for chunk in batch.chunks)])
    values["chunks"] = Ragged(np.concatenate(batch.chunks).astype(np.int32), lists)
    for name in _RAGGED:
        values |= _flat(name, values.pop(name))
    return pa.table({name: _one(value) for name, value in values.items() if value is not None})


def _flat(name: str, ragged: Ragged) -> dict[str, np.ndarray | None]:
    """One-dimensional columns of a Ragged and of what `Inputs` have besides."""
    columns: dict[str, np.ndarray | None] = {f"{name}_values": ragged.values.ravel(), f"{name}_offsets": ragged.offsets}
    if ragged.values.ndim > 1:
        columns[f"{name}_shape"] = np.array(ragged.values.shape[1:])
    columns[f"{name}_towers"] = towers_of(ragged)
    for array, values in arrays_of(ragged).items():
        columns |= _flat(f"{name}{_ARRAY}{array}", values)
    return columns


def _one(value: int | np.ndarray) -> pa.Array:
    import pyarrow as pa

    if isinstance(value, int):
        return pa.array([value], pa.int64())
    flat = pa.array(value.reshape(-1))
    rows = flat if value.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, value.shape[1])
    return pa.LargeListArray.from_arrays(pa.array([0, len(value)], pa.int64()), rows)


def from_arrow(table: pa.Table) -> tuple[Batch, int]:
    """(the batch, the rank it is for) of a one-row table of `to_arrow`; the arrays are copies."""
    import pyarrow as pa

    assert table.num_rows == 1, f"a batch is one row, got {table.num_rows}"
    there = set(table.column_names)

    def array(name: str) -> np.ndarray:
        rows = table.column(name)[0].values
        if pa.types.is_fixed_size_list(rows.type):
            return rows.flatten().to_numpy().reshape(-1, rows.type.list_size).copy()
        return rows.to_numpy(zero_copy_only=False).copy()

    def ragged(name: str) -> Ragged:
        values, offsets = array(f"{name}_values"), array(f"{name}_offsets")
        if (shape := f"{name}_shape") in there:
            values = values.reshape(-1, *array(shape))
        towers = array(f"{name}_towers") if f"{name}_towers" in there else None
        inner = [c.removesuffix("_offsets") for c in table.column_names if c.startswith(name + _ARRAY)]
        arrays = {path.removeprefix(name + _ARRAY): ragged(path) for path in inner if f"{path}_offsets" in there}
        return Ragged(values, offsets) if towers is None and not arrays else Inputs(values, offsets, arrays, towers)

    numbers = {name: table.column(name)[0].as_py() for name in _NUMBERS}
    lists: dict[str, Any] = {name: ragged(name) for name in _RAGGED}
    arrays: dict[str, Any] = {f.name: array(f.name) for f in fields(Batch) if f.name in there - set(_NUMBERS)}
    chunks, rank = lists.pop("chunks"), numbers.pop("rank")
    places = tuple(chunks[i].astype(np.int64) for i in range(len(chunks)))
    return Batch(chunks=places, **numbers, **lists, **arrays), rank
