"""The momentum queue over all workers: exactly the newest K rows, each on the worker that encoded it.

Rows are numbered over the whole run by (step, rank, position in the worker's batch). A worker keeps those of
its rows that are numbered N - K or above, N being the number of rows enqueued so far: together the workers
hold exactly the newest K, however unevenly they were split, and no row ever moves between them.
Source: He et al., "Momentum Contrast", arXiv:1911.05722, whose queue is one array replicated on every worker.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.config import QueueConfig

NO_QUERY = -(2**63)
"""Query id of a row that answers no query, a hard negative say: `text_id` gives it with probability 2^-64."""


@dataclass(frozen=True)
class QueueRows:
    """This worker's k live rows, oldest first: views, valid until the next `enqueue`.

    vectors [k, D]; document_ids [k] and query_ids [k] int64 (NO_QUERY where a row answers none); steps [k]
    int64, when each was enqueued.
    """

    vectors: Tensor
    document_ids: Tensor
    query_ids: Tensor
    steps: Tensor


class NegativeQueue:
    """K = `config.rows` rows of width `dim` over all workers of `group`, kept on `device` in `config.dtype`.

    Rows lie end to end in a buffer an eighth longer than they need, so that they stay contiguous and in order
    while the oldest fall off its front; when its end is reached they are moved back to the start.
    """

    def __init__(self, config: QueueConfig, dim: int, group: Group, device: torch.device | str = "cpu") -> None:
        self._capacity, self._group, self._device = config.rows, group, torch.device(device)
        self._columns = {
            "vectors": torch.empty(0, dim, dtype=getattr(torch, config.dtype), device=device),
            "document_ids": torch.empty(0, dtype=torch.int64, device=device),
            "query_ids": torch.empty(0, dtype=torch.int64, device=device),
            "steps": torch.empty(0, dtype=torch.int64, device=device),
            "sequence": torch.empty(0, dtype=torch.int64, device=device),
        }
        self._live = slice(0, 0)  # where the live rows stand in every column
        self._next = 0  # N: the number of the next row enqueued by any worker

    def __len__(self) -> int:
        """Live rows on this worker."""
        return self._live.stop - self._live.start

    def rows(self) -> QueueRows:
        """This worker's rows among the newest K."""
        return QueueRows(*(self._columns[name][self._live] for name in QueueRows.__dataclass_fields__))

    @torch.no_grad()
    def enqueue(self, vectors: Tensor, document_ids: Tensor, query_ids: Tensor, step: int) -> None:
        """Adds vectors [d, D] with their ids [d]; any d on each worker, none or more than K included.
        Collective. Rows that are no longer among the newest K go."""
        self._check(vectors, document_ids, query_ids)
        counts = self._group.sizes(len(vectors), self._device)
        first = self._next + sum(counts[: self._group.rank])
        self._next += sum(counts)
        sequence = torch.arange(first, first + len(vectors), device=self._device)
        self._drop_older_than(self._next - self._capacity)
        stale = min(len(vectors), max(0, self._next - self._capacity - first))
        fresh = {
            "vectors": vectors,
            "document_ids": document_ids,
            "query_ids": query_ids,
            "steps": torch.full_like(sequence, step),
            "sequence": sequence,
        }
        self._append({name: column[stale:] for name, column in fresh.items()})

    def age_steps(self, step: int) -> float:
        """Mean over all workers' rows of the steps since they were enqueued; 0 for an empty queue.
        Collective."""
        steps = self.rows().steps
        sums = torch.stack([(step - steps).sum(), steps.new_tensor(len(steps))])
        total, count = self._group.all_reduce(sums).tolist()
        return total / count if count else 0.0

    def state(self) -> dict[str, Tensor]:
        """This worker's rows, oldest first, their numbers, and `next`, the number of the run's next row."""
        state = {name: c[self._live].detach().to("cpu", copy=True) for name, c in self._columns.items()}
        return state | {"next": torch.tensor([self._next])}

    @torch.no_grad()
    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up the states of all workers of an earlier run, in rank order. Not collective.

        At the same number of workers each takes its own rows back. At another, the newest K are dealt out in
        turn, so that every worker holds old and new rows alike and loses them at the same pace.
        """
        dim = self._columns["vectors"].shape[1]
        for state in states:
            if state["vectors"].shape[1] != dim:
                raise UsageError(
                    f"queue: the checkpoint's rows have {state['vectors'].shape[1]} dimensions and the model "
                    f"gives {dim}; resume with the model that wrote it"
                )
        counters = {int(state["next"]) for state in states}
        if len(counters) != 1:
            raise ValueError(f"queue: states of different moments, next = {sorted(counters)}")
        self._next, self._live = counters.pop(), slice(0, 0)
        if len(states) == self._group.size:
            mine = {name: states[self._group.rank][name] for name in self._columns}
        else:
            merged = {name: torch.cat([state[name] for state in states]) for name in self._columns}
            newest = merged["sequence"] >= self._next - self._capacity
            order = merged["sequence"].argsort()
            order = order[newest[order]][self._group.rank :: self._group.size]
            mine = {name: column[order] for name, column in merged.items()}
        self._append(mine)
        self._drop_older_than(self._next - self._capacity)

    def _drop_older_than(self, number: int) -> None:
        stale = int((self._columns["sequence"][self._live] < number).sum())
        self._live = slice(self._live.start + stale, self._live.stop)

    def _append(self, fresh: dict[str, Tensor]) -> None:
        start, live, n = self._live.start, len(self), len(fresh["sequence"])
        if self._live.stop + n > len(self._columns["sequence"]):
            needed = (live + n) * 9 // 8
            for name, column in self._columns.items():
                if needed > len(column):
                    spare = column.new_empty(needed - live, *column.shape[1:])
                    self._columns[name] = torch.cat([column[self._live], spare])
                else:
                    _move_to_front(column, start, live)
            self._live = slice(0, live)
        end = self._live.stop + n
        for name, column in self._columns.items():
            column[self._live.stop : end] = fresh[name]
        self._live = slice(self._live.start, end)

    def _check(self, vectors: Tensor, document_ids: Tensor, query_ids: Tensor) -> None:
        dim = self._columns["vectors"].shape[1]
        if vectors.ndim != 2 or vectors.shape[1] != dim:
            raise ValueError(f"enqueue: vectors are {list(vectors.shape)}, the queue holds [d, {dim}]")
        for name, ids in (("document_ids", document_ids), ("query_ids", query_ids)):
            if ids.shape != vectors.shape[:1]:
                raise ValueError(f"enqueue: {name} {list(ids.shape)} for {len(vectors)} vectors on axis 0")


def _move_to_front(column: Tensor, start: int, rows: int) -> None:
    """column[:rows] = column[start:start+rows], in pieces of `start` rows, whose ends don't overlap."""
    for at in range(0, rows, start):
        piece = slice(at, min(at + start, rows))
        column[piece] = column[start + piece.start : start + piece.stop]
