"""What masks and relations know of a query or a candidate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from trainers.collectives import Group

UNKNOWN = -(2**63)
"""A class that isn't known: masks and relations treat it as equal to nothing."""


@dataclass(frozen=True)
class Keys:
    """What masks and relations compare, one row a query or candidate; a column that isn't known is None.

    query_ids     [n] int64; of a query its own id, of a candidate the query that it answers (UNKNOWN: none)
    document_ids  [n] int64; of a query its positive's id, of a candidate its own
    rejects       [n] int64; of a candidate the query of which it is a known negative (UNKNOWN: none)
    labels, tasks, languages, modalities
                  [n] int64 classes; UNKNOWN equals nothing
    lengths       [n] int64 valid tokens of token vectors
    numbers       [n] int64 running numbers of queue rows
    log_q         [n] float, log of the probability with which a candidate was sampled
    relevance     [n] float, how much of a positive a candidate is for the query of `query_ids` or of `rejects`
    ceiling       [n] float, the logit above which something other than the positive counts as a false negative
    reference     [n, R] unit vectors of a reference model
    """

    query_ids: Tensor
    document_ids: Tensor
    rejects: Tensor | None = None
    labels: Tensor | None = None
    tasks: Tensor | None = None
    languages: Tensor | None = None
    modalities: Tensor | None = None
    lengths: Tensor | None = None
    numbers: Tensor | None = None
    log_q: Tensor | None = None
    relevance: Tensor | None = None
    ceiling: Tensor | None = None
    reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.query_ids)

    def __getitem__(self, rows: slice | Tensor) -> Keys:
        return self._each(lambda column: column[rows])

    def to(self, device: torch.device | str) -> Keys:
        return self._each(lambda column: column.to(device))

    def columns(self) -> dict[str, Tensor]:
        """The columns that are known, by name."""
        return {f.name: column for f in fields(self) if (column := getattr(self, f.name)) is not None}

    def gathered_with(self, vectors: Tensor, group: Group, sizes: list[int]) -> tuple[Tensor, Keys]:
        """(vectors [n, ...] of all workers, [sum sizes, ...], end to end in rank order, and their keys), in one
        message. Collective; every worker must know the same columns."""
        columns = self.columns()
        everyone, *of_all = group.all_gather_together([vectors, *columns.values()], sizes)
        return everyone, replace(self, **dict(zip(columns, of_all, strict=True)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Keys:
        return replace(self, **{name: change(column) for name, column in self.columns().items()})
