"""Which rows are among the newest K of all workers, or of each class: told by their numbers, whoever holds them.

Rows are numbered over the whole run by (enqueue, rank, position in the worker's batch), and with `per` those of each
class also apart. N rows numbered so far, those numbered N - K and above are the newest K, however unevenly they were
split; every worker can tell of its own rows without asking another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.objectives.keys import Keys


class Newest:
    """The numbers of a queue of `rows` = K rows, or of K rows of every class in the keys' column `per`.

    Their columns: `sequence` [k] int64, a row's own number; with `per`, `in_class` [k], that among its class.
    """

    def __init__(self, rows: int, per: str | None, group: Group) -> None:
        self.rows, self.per, self._group = rows, per, group
        self._next = 0  # N
        self._next_of: dict[int, int] = {}  # with `per`, N of each class that has appeared

    @property
    def columns(self) -> tuple[str, ...]:
        """What `stale` needs to know of a row."""
        return ("sequence",) if self.per is None else ("sequence", "in_class", self.per)

    @property
    def most(self) -> int:
        """Rows numbered so far; with `per`, of the class that has most."""
        return self._next if self.per is None else max(self._next_of.values(), default=0)

    def number(self, keys: Keys, counts: list[int] | None = None) -> dict[str, Tensor]:
        """Numbers this worker's next rows, [d] each; `counts` every worker's d, where they are known. Collective."""
        counts = self._group.sizes(len(keys), keys.query_ids.device) if counts is None else counts
        first = sum(counts[: self._group.rank])
        own = slice(first, first + len(keys))
        sequence = torch.arange(self._next, self._next + sum(counts), device=keys.query_ids.device)
        self._next += sum(counts)
        if self.per is None:
            return {"sequence": sequence[own]}
        classes = self._group.all_gather(self._classes(keys), counts)
        in_class = torch.empty_like(classes)
        for value in classes.unique().tolist():
            rows = (classes == value).nonzero()[:, 0]
            start = self._next_of.get(value, 0)
            self._next_of[value] = start + len(rows)
            in_class[rows] = torch.arange(start, start + len(rows), device=classes.device)
        return {"sequence": sequence[own], "in_class": in_class[own]}

    def stale(self, columns: Mapping[str, Tensor]) -> Tensor:
        """[k] bool: the rows that are not among the newest K."""
        if self.per is None:
            return columns["sequence"] < self._next - self.rows
        return columns["in_class"] < self._numbered(columns[self.per]) - self.rows

    def incomplete(self, columns: Mapping[str, Tensor]) -> Tensor | None:
        """[k] bool: the rows of classes that have not had K; None: all classes that appeared have."""
        if self.per is None or all(n >= self.rows for n in self._next_of.values()):
            return None
        return self._numbered(columns[self.per]) < self.rows

    def state(self) -> dict[str, Tensor]:
        """`next` [1]; with `per` also `next_of_<per>` [classes, 2], each class and its N."""
        state = {"next": torch.tensor([self._next])}
        if self.per is not None:
            state[f"next_of_{self.per}"] = _table(self._next_of)
        return state

    def restore(self, states: Sequence[Mapping[str, Tensor]]) -> None:
        """Goes on where the workers of an earlier run, `states` of all of them, left off."""
        saved, wanted = {name for name in states[0] if name.startswith("next")}, set(self.state())
        if saved != wanted:
            raise UsageError(
                f"queue: the checkpoint has the counters {sorted(saved)}, a queue with per: {self.per} needs "
                f"{sorted(wanted)}; resume with the queue.per that wrote it"
            )
        counters = {int(state["next"]) for state in states}
        if len(counters) != 1:
            raise ValueError(f"queue: states of different moments, next = {sorted(counters)}")
        self._next = counters.pop()
        if self.per is not None:
            self._next_of = dict(states[0][f"next_of_{self.per}"].tolist())

    def _numbered(self, classes: Tensor) -> Tensor:
        """[k] N of each row's class."""
        known = _table(self._next_of).to(classes.device)
        return known[torch.searchsorted(known[:, 0].contiguous(), classes), 1]

    def _classes(self, keys: Keys) -> Tensor:
        assert self.per is not None
        classes = getattr(keys, self.per)
        if classes is None:
            raise ValueError(f"enqueue: a queue per {self.per} needs keys.{self.per}, which is None")
        return classes


def _table(counts: Mapping[int, int]) -> Tensor:
    """[n, 2] int64, by key."""
    return torch.tensor(sorted(counts.items()), dtype=torch.int64).reshape(-1, 2)
