"""A global batch of records to one `Batch` per worker: dealt by token cost, cut into chunks of like length.

The membership of a global batch is fixed by `order`; how it is dealt and cut is free, since the loss is over
the whole batch. Both are functions of the lengths alone: every process that does it gets the same answer.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from data_services.schema import Batch, Column, Ragged, Tokenize

if TYPE_CHECKING:
    import pyarrow as pa

SOURCE_SHIFT = 40  # a row's key is source << 40 | row
CHUNKS_PER_BUDGET = 128  # launching one more chunk costs about as much as 1/128 of a full one (see `cut`)


@dataclass(frozen=True)
class GlobalBatch:
    """A whole global batch, tokenised.

    queries       Ragged of B texts
    documents     Ragged of B + m texts, the positive of query i at i, hard negatives after them
    owners        [m] the query that each hard negative belongs to
    query_ids     [B] int64;  document_ids [B + m] int64
    rows          [B] int64, source << 40 | row
    """

    step: int
    queries: Ragged
    documents: Ragged
    owners: np.ndarray
    query_ids: np.ndarray
    document_ids: np.ndarray
    rows: np.ndarray


def _mix(x: np.ndarray) -> np.ndarray:
    """[n] uint64 -> [n] uint64, the finaliser of splitmix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def choose_positive(counts: np.ndarray, rows: np.ndarray, step: int, seed: int) -> np.ndarray:
    """[B] which of its `counts` [B] positives each row shows: a keyed hash of (seed, step, row)."""
    key = _mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(step)
    return (_mix(rows.astype(np.uint64) + _mix(key)) % counts.astype(np.uint64)).astype(np.int64)


def tokenise(
    table: pa.Table, rows: np.ndarray, tokenize: Tokenize, step: int, seed: int, negatives: int
) -> GlobalBatch:
    """The records of a global batch (`schema.Column`, [B] in the plan's order) as token lists.

    rows [B] int64 row keys; negatives: hard negatives taken of each record, the first ones.
    """
    records = {name: table.column(name).to_pylist() for name in (Column.QUERY, Column.POSITIVES, Column.NEGATIVES)}
    ids = {name: table.column(name).to_pylist() for name in (Column.POSITIVE_IDS, Column.NEGATIVE_IDS)}
    counts = np.array([len(p) for p in records[Column.POSITIVES]])
    chosen = choose_positive(counts, rows, step, seed)
    documents = [p[c] for p, c in zip(records[Column.POSITIVES], chosen, strict=True)]
    document_ids = [p[c] for p, c in zip(ids[Column.POSITIVE_IDS], chosen, strict=True)]
    owners = []
    for i, (texts, text_ids) in enumerate(zip(records[Column.NEGATIVES], ids[Column.NEGATIVE_IDS], strict=True)):
        documents += texts[:negatives]
        document_ids += text_ids[:negatives]
        owners += [i] * len(texts[:negatives])
    return GlobalBatch(
        step=step,
        queries=tokenize(records[Column.QUERY], "query"),
        documents=tokenize(documents, "document"),
        owners=np.array(owners, np.int64),
        query_ids=np.array(table.column(Column.QUERY_ID).to_pylist(), np.int64),
        document_ids=np.array(document_ids, np.int64),
        rows=rows,
    )


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


def cut(lengths: np.ndarray, budget_tokens: int) -> list[np.ndarray]:
    """[n] text lengths -> chunks of indices, longest texts first, that waste the least padding.

    Texts are sorted by length and cut where the sum over chunks of (texts x longest + budget/128) is least,
    by dynamic programming, with texts x longest <= budget; a text beyond the budget is a chunk by itself.
    The second term is what one more chunk costs: without it every length would be its own chunk.
    """
    order = np.argsort(lengths, kind="stable")
    length = np.maximum(lengths[order], 1)
    n, price = len(length), budget_tokens / CHUNKS_PER_BUDGET
    best, begin = np.zeros(n + 1), np.zeros(n + 1, np.int64)
    for end in range(1, n + 1):
        longest = int(length[end - 1])
        first = max(end - max(budget_tokens // longest, 1), 0)
        totals = best[first:end] + np.arange(end - first, 0, -1) * longest
        begin[end] = first + int(totals.argmin())
        best[end] = totals[begin[end] - first] + price
    chunks, end = [], n
    while end:
        chunks.append(order[begin[end] : end])
        end = int(begin[end])
    return chunks


def split(chunks: list[np.ndarray], lengths: np.ndarray, count: int) -> list[np.ndarray]:
    """`chunks` split further until there are `count`, the largest first, empty ones at the end if need be."""
    chunks = list(chunks)
    while len(chunks) < count:
        padded = [len(c) * int(lengths[c].max()) if len(c) > 1 else 0 for c in chunks]
        widest = int(np.argmax(padded)) if chunks else 0
        if not chunks or padded[widest] == 0:
            return chunks + [np.zeros(0, np.int64)] * (count - len(chunks))
        chunk = chunks[widest]
        middle = len(chunk) // 2  # the indices ascend by length, chunks descend: the longer half goes first
        chunks[widest : widest + 1] = [chunk[middle:], chunk[:middle]]
    return chunks


def share_batch(batch: GlobalBatch, world_size: int, budget_tokens: int) -> list[Batch]:
    """One Batch per worker: rows dealt by token cost, each with its own negatives; equally many chunks."""
    n = len(batch.queries)
    lengths = batch.documents.lengths
    costs = batch.queries.lengths + lengths[:n]
    np.add.at(costs, batch.owners, lengths[n:])
    shares, texts = deal(costs, world_size), []
    for rows in shares:
        mine = np.zeros(n, bool)
        mine[rows] = True
        documents = np.concatenate([rows, n + np.flatnonzero(mine[batch.owners])])
        texts.append((documents, np.concatenate([batch.queries.lengths[rows], lengths[documents]])))
    cuts = [cut(worker_lengths, budget_tokens) for _, worker_lengths in texts]
    count = max(len(chunks) for chunks in cuts)
    return [
        Batch(
            step=batch.step,
            global_queries=n,
            queries=batch.queries.take(rows),
            documents=batch.documents.take(documents),
            query_ids=batch.query_ids[rows],
            document_ids=batch.document_ids[documents],
            rows=batch.rows[rows],
            chunks=tuple(split(chunks, worker_lengths, count)),
        )
        for rows, (documents, worker_lengths), chunks in zip(shares, texts, cuts, strict=True)
    ]


_RAGGED = ("queries", "documents", "chunks")


def to_arrow(batch: Batch, rank: int) -> pa.Table:
    """A table of one row: list columns of the batch's arrays, and the rank it is for."""
    import pyarrow as pa

    chunks = Ragged(np.concatenate(batch.chunks).astype(np.int32), np.cumsum([0, *(len(c) for c in batch.chunks)]))
    columns: dict[str, Any] = {"rank": rank, "step": batch.step, "global_queries": batch.global_queries}
    for name, ragged in (("queries", batch.queries), ("documents", batch.documents), ("chunks", chunks)):
        columns |= {f"{name}_values": ragged.values, f"{name}_offsets": ragged.offsets}
    columns |= {name: getattr(batch, name) for name in ("query_ids", "document_ids", "rows")}
    return pa.table({name: _one(value) for name, value in columns.items()})


def _one(value: int | np.ndarray) -> pa.Array:
    import pyarrow as pa

    if isinstance(value, int):
        return pa.array([value], pa.int64())
    return pa.ListArray.from_arrays(pa.array([0, len(value)], pa.int32()), pa.array(value))


def from_arrow(table: pa.Table) -> tuple[Batch, int]:
    """(the batch, the rank it is for) of a one-row table of `to_arrow`; the arrays are copies."""
    assert table.num_rows == 1, f"a batch is one row, got {table.num_rows}"

    def array(name: str) -> np.ndarray:
        return table.column(name)[0].values.to_numpy(zero_copy_only=False).copy()

    ragged = {name: Ragged(array(f"{name}_values"), array(f"{name}_offsets")) for name in _RAGGED}
    chunks = ragged["chunks"]
    return Batch(
        step=table.column("step")[0].as_py(),
        global_queries=table.column("global_queries")[0].as_py(),
        queries=ragged["queries"],
        documents=ragged["documents"],
        query_ids=array("query_ids"),
        document_ids=array("document_ids"),
        rows=array("rows"),
        chunks=tuple(chunks[i].astype(np.int64) for i in range(len(chunks))),
    ), table.column("rank")[0].as_py()
