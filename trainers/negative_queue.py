"""Momentum queues over all workers: each exactly its newest K rows, every row on the worker that encoded it.

A worker keeps those of its rows that are among the newest K by number (newest.py): together the workers hold exactly
those, and no row ever moves between them.

Source: He et al., "Momentum Contrast", arXiv:1911.05722, whose queue is one array replicated on every worker.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.config import OneQueue, QueueConfig
from trainers.newest import Newest
from trainers.objectives.keys import Keys
from trainers.queue_metrics import duplicate_share, sampled, separability
from trainers.row_store import RowStore

Side = Literal["documents", "queries"]
KEYS = tuple(field.name for field in fields(Keys))


@dataclass(frozen=True)
class QueueRows:
    """This worker's k rows of a queue: views, valid until its next `rows` or `enqueue`. Their order means nothing.

    vectors [k, D], of token vectors [k, L, D]; keys [k]; steps [k] int64, when each was enqueued; numbers [k] int64,
    each row's own over all workers and the whole run.
    """

    vectors: Tensor
    keys: Keys
    steps: Tensor
    numbers: Tensor


class NegativeQueue:
    """K = `config.rows` rows of width `dim` over all workers of `group`, kept on `device` in `config.dtype`."""

    def __init__(self, config: OneQueue, dim: int, group: Group, device: torch.device | str = "cpu") -> None:
        self.config, self._dim, self._group, self._device = config, dim, group, torch.device(device)
        self._dtype: torch.dtype = getattr(torch, config.dtype)
        self._newest = Newest(config.rows, config.per, group)
        self._store = self._new_store()

    def __len__(self) -> int:
        """Rows on this worker."""
        return len(self._store)

    @property
    def numbered(self) -> int:
        """Rows that were ever enqueued, over all workers; with `per`, of the class that has had most."""
        return self._newest.most

    @property
    def nbytes(self) -> int:
        """Bytes that the queue takes on this worker."""
        return self._store.nbytes

    def rows(self, step: int) -> QueueRows | None:
        """This worker's rows that the loss of `step` may use; None, on all workers alike, before there are any.

        Drops rows older than `config.max_age_steps`. While `config.start: filled` holds back the rows of some classes
        of a queue `per` class, the others' are a copy.
        """
        if self._newest.most < (self.config.rows if self.config.start == "filled" else 1):
            return None
        self._store.replace(self._gone(step), {})
        columns = self._store.columns()
        held_back = self._newest.incomplete(columns) if self.config.start == "filled" else None
        if held_back is not None and held_back.any():
            columns = {name: column[~held_back] for name, column in columns.items()}
        keys = Keys(**{name: column for name, column in columns.items() if name in KEYS})
        return QueueRows(columns["vectors"], keys, columns["steps"], columns["sequence"])

    @torch.no_grad()
    def enqueue(self, vectors: Tensor, keys: Keys, step: int, counts: list[int] | None = None) -> None:
        """Adds vectors [d, D] or [d, L, D] with their keys [d]; any d on each worker, none or more than K included.

        counts  d of every worker, in rank order; None: they are asked for

        Collective. Rows that are no longer among the newest K go. The columns of the keys are kept, and must be the
        same in every call. Raises ValueError where shapes or columns disagree.
        """
        self._check(vectors, keys)
        keys = keys.to(self._device)
        numbers = self._newest.number(keys, counts)
        fresh = {"vectors": vectors.detach(), **keys.columns(), **numbers}
        fresh["steps"] = torch.full_like(numbers["sequence"], step)
        self._put(fresh, self._gone(step))

    def ages(self, step: int) -> Tensor:
        """[2] int64, of this worker's rows that the loss of `step` may use: how many, and their ages' sum."""
        rows = self.rows(step)
        steps = torch.empty(0, dtype=torch.int64, device=self._device) if rows is None else rows.steps
        return torch.stack([steps.new_tensor(len(steps)), (step - steps).sum()])

    def compared(self, vectors: Tensor, keys: Keys, step: int, of: Side) -> dict[str, float]:
        """`duplicates` and `separability` of `Queues.observe`; vectors and keys of this worker's fresh rows of a side.
        Collective."""
        rows = self.rows(step) or QueueRows(vectors[:0], keys[:0], keys.query_ids[:0], keys.query_ids[:0])
        ids = rows.keys.query_ids if of == "queries" else rows.keys.document_ids
        stored, fresh = (sampled(*kind, self._group) for kind in ((rows.vectors, rows.keys), (vectors, keys)))
        duplicates = duplicate_share(ids, self._group)
        return {"duplicates": duplicates, "separability": separability(stored, fresh, self._group)}

    def state(self) -> dict[str, Tensor]:
        """This worker's rows, column by column, and what numbers the next ones."""
        columns = {name: column.to("cpu", copy=True) for name, column in self._store.columns().items()}
        return columns | self._newest.state()

    @torch.no_grad()
    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up the states of all workers of an earlier run, in rank order. Not collective.

        At the same number of workers each takes its own rows back, in their order. At another, the newest K are
        dealt out in turn, so that every worker holds old and new rows alike and loses them at the same pace.
        Raises UsageError where the rows aren't of this queue's kind.
        """
        same = len(states) == self._group.size
        if same:  # nobody opens what only others need
            states = [states[self._group.rank]]
        self._newest.restore(states)
        self._store = self._new_store()
        if self._newest.most == 0:
            return
        for state in states:
            self._check_saved(state)
        if same:
            self._take(states[0], slice(None))
        else:
            for state, mine in zip(states, self._dealt(states), strict=True):
                self._take(state, mine)

    def _dealt(self, states: Sequence[Mapping[str, Tensor]]) -> Sequence[Tensor]:
        """Which rows of each state are this worker's, [k] bool each."""
        sizes = [len(state["sequence"]) for state in states]
        numbers = {name: torch.cat([state[name] for state in states]) for name in self._newest.columns}
        order = numbers["sequence"].argsort()
        alive = order[~self._newest.stale(numbers)[order]]
        mine = torch.zeros(sum(sizes), dtype=torch.bool)
        mine[alive[self._group.rank :: self._group.size]] = True
        return mine.split(sizes)

    def _take(self, state: Mapping[str, Tensor], rows: Tensor | slice) -> None:
        names = [name for name in state if name not in self._newest.state()]
        self._put({name: state[name][rows] for name in names}, self._gone())

    def _put(self, fresh: Mapping[str, Tensor], gone: Tensor) -> None:
        """The rows of `fresh` that are among the newest take the places of those `gone`."""
        entering = ~self._newest.stale(fresh)
        there = {name: column[entering].to(self._device) for name, column in fresh.items()}
        self._store.replace(gone, there | {"vectors": there["vectors"].to(self._dtype)})

    def _gone(self, step: int | None = None) -> Tensor:
        """[g] places of the rows that are no longer among the newest, or too old at `step`."""
        if not len(self._store):
            return torch.empty(0, dtype=torch.int64, device=self._device)
        columns = self._store.columns()
        gone = self._newest.stale(columns)
        if step is not None and self.config.max_age_steps is not None:
            gone |= step - columns["steps"] > self.config.max_age_steps
        return gone.nonzero()[:, 0]

    def _new_store(self) -> RowStore:
        """Room for an even share of the rows and a little more, splits being never quite even."""
        share = -(-self.config.rows // self._group.size)
        return RowStore(0 if self.config.per else share + share // 64)

    def _check(self, vectors: Tensor, keys: Keys) -> None:
        shape = list(vectors.shape)
        if vectors.ndim not in (2, 3) or shape[-1] != self._dim:
            raise ValueError(f"enqueue: vectors are {shape}, the queue holds [d, {self._dim}] or [d, L, {self._dim}]")
        if vectors.ndim == 3 and keys.lengths is None:
            raise ValueError(f"enqueue: token vectors {shape} need keys.lengths, which is None")
        for name, column in keys.columns().items():
            if len(column) != len(vectors):
                raise ValueError(f"enqueue: keys.{name} {list(column.shape)} for {len(vectors)} vectors on axis 0")
        stored = self._store.columns()
        if not stored:
            return
        kept, given = {name for name in stored if name in KEYS}, set(keys.columns())
        if kept != given:
            raise ValueError(f"enqueue: keys have the columns {sorted(given)}, the queue's rows {sorted(kept)}")
        if vectors.ndim != stored["vectors"].ndim:
            raise ValueError(f"enqueue: vectors are {shape}, those stored {list(stored['vectors'].shape)}")

    def _check_saved(self, state: Mapping[str, Tensor]) -> None:
        width = state["vectors"].shape[-1]
        if width != self._dim:
            raise UsageError(
                f"queue: the checkpoint's rows have {width} dimensions and the model gives {self._dim}; "
                "resume with the model that wrote it"
            )


class Queues:
    """The recipe's queues by name; `documents` is that of `queue.rows`, where it is on.

    `fresh` gives, by side, the momentum encodings [n, D] (or [n, L, D]) of a batch and their keys [n].
    """

    def __init__(self, config: QueueConfig, dim: int, group: Group, device: torch.device | str = "cpu") -> None:
        self._config, self._group = config, group
        self.by_name = {name: NegativeQueue(one, dim, group, device) for name, one in config.by_name.items()}

    @property
    def sides(self) -> set[Side]:
        """Which sides the queues keep: what `enqueue` must be given."""
        return {side_of(name) for name in self.by_name}

    def rows(self, step: int) -> dict[str, QueueRows]:
        """This worker's rows for the loss of `step`, by name. A queue is left out, on all workers alike, until it has
        rows to give: until the first `enqueue`, or until it is filled."""
        given = {name: queue.rows(step) for name, queue in self.by_name.items()}
        return {name: rows for name, rows in given.items() if rows is not None}

    def enqueue(
        self, fresh: Mapping[Side, tuple[Tensor, Keys]], step: int, counts: Mapping[Side, list[int]] | None = None
    ) -> None:
        """Adds a batch to every queue, after its loss; `counts` every worker's rows of a side, where they are known.
        Collective."""
        if missing := self.sides - set(fresh):
            raise ValueError(f"enqueue: there are queues of {missing.pop()}, which were not given")
        for name, queue in self.by_name.items():
            side = side_of(name)
            queue.enqueue(*fresh[side], step, counts[side] if counts else None)

    def observe(self, fresh: Mapping[Side, tuple[Tensor, Keys]], step: int) -> dict[str, float]:
        """Metrics of the rows that the loss of `step` may use, equal on all workers; `fresh`: what they are compared
        with, the batch's documents say. Names begin with `queue_`, and with `queue_queries_` or
        `queue_documents_by_task_` say for those in queue.others. Collective.

        rows             over all workers
        age_steps        their mean age
        duplicates       share whose text another row has too         \\ only where observe_every_steps
        separability     how well they can be told from fresh rows    / divides the step
        """
        metrics: dict[str, float] = {}
        closely = step % self._config.observe_every_steps == 0
        ages = self._group.all_reduce(torch.stack([queue.ages(step) for queue in self.by_name.values()])).tolist()
        for (name, queue), (rows, age) in zip(self.by_name.items(), ages, strict=True):
            prefix = "queue_" if name == "documents" else f"queue_{name.replace('/', '_')}_"
            side = side_of(name)
            seen = {"rows": float(rows), "age_steps": age / max(1, rows)}
            seen |= queue.compared(*fresh[side], step, side) if closely else {}
            metrics |= {prefix + metric: value for metric, value in seen.items()}
        return metrics

    def state(self) -> dict[str, Tensor]:
        """Every queue's state, each under its name."""
        return {f"{name}.{key}": x for name, queue in self.by_name.items() for key, x in queue.state().items()}

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Takes up the states of all workers of an earlier run, of any number of workers. Not collective.

        Raises UsageError where the recipe's queues aren't those of the checkpoint.
        """
        saved = {key.partition(".")[0] for key in states[0]}
        if saved != set(self.by_name):
            raise UsageError(
                f"queue: the checkpoint has the queues {sorted(saved)} and the recipe {sorted(self.by_name)}; "
                "resume with the recipe that wrote it"
            )
        for name, queue in self.by_name.items():
            queue.restore([_Part(state, f"{name}.") for state in states])


def side_of(name: str) -> Side:
    """Whose encodings a queue keeps: `queries` and `queries/by_task` those of queries."""
    return "queries" if name.partition("/")[0] == "queries" else "documents"


class _Part(Mapping[str, Tensor]):
    """The entries under a prefix, each read when asked for."""

    def __init__(self, state: Mapping[str, Tensor], prefix: str) -> None:
        self._state, self._prefix = state, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self._prefix) for name in self._state if name.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
