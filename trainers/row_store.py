"""Rows that come and go, in columns that stay contiguous: what a queue keeps on one worker.

A row that enters takes the place of one that leaves, and the last rows fill the places that are left over. So `n`
live rows always stand at 0..n-1, no other row moves, and the columns are hardly longer than what they hold. Their
order is not the order of entry, but a pure function of what entered and left.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad


class RowStore:
    """Named columns [n, ...] of n live rows; the first rows that enter say which columns there are.

    room   rows that places are reserved for at first; more are made as needed, a sixteenth at a time
    """

    def __init__(self, room: int = 0) -> None:
        self._room, self._live = room, 0
        self._columns: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return self._live

    def columns(self) -> dict[str, Tensor]:
        """Views [n, ...] of the live rows, valid until the next `replace`."""
        return {name: column[: self._live] for name, column in self._columns.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all columns, free places included."""
        return sum(column.untyped_storage().nbytes() for column in self._columns.values())

    @torch.no_grad()
    def replace(self, gone: Tensor, fresh: Mapping[str, Tensor]) -> None:
        """The rows at `gone` [g] int64, ascending, leave; those of `fresh`, columns [m, ...], enter.

        Token vectors [m, L, D] may differ in L from those stored: the shorter are padded with zeros.
        """
        entering = len(next(iter(fresh.values()))) if fresh else 0
        if not self._columns:
            self._columns = {name: column.new_empty(self._room, *column.shape[1:]) for name, column in fresh.items()}
        before, self._live = self._live, self._live + entering - len(gone)
        self._reserve(before)
        added = torch.arange(before, max(before, self._live), device=gone.device)
        places, holes = torch.cat([gone[:entering], added]), gone[entering:]
        for name, column in fresh.items():
            rows = self._as_wide(name, column)
            self._columns[name][places] = rows
        if len(holes):
            self._fill(holes, before)

    def _fill(self, holes: Tensor, before: int) -> None:
        """The last of the `before` rows move into the holes [h]; h rows less are live."""
        last = torch.ones(before - self._live, dtype=torch.bool, device=holes.device)
        last[holes[holes >= self._live] - self._live] = False
        movers = last.nonzero()[:, 0] + self._live
        for column in self._columns.values():
            column[holes[holes < self._live]] = column[movers]

    def _reserve(self, filled: int) -> None:
        """Places for the live rows; the first `filled` are occupied."""
        for name, column in self._columns.items():
            if self._live > len(column):
                spare = column.new_empty(self._live * 17 // 16 - filled, *column.shape[1:])
                self._columns[name] = torch.cat([column[:filled], spare])

    def _as_wide(self, name: str, rows: Tensor) -> Tensor:
        stored = self._columns[name]
        if rows.ndim == 3 and rows.shape[1] > stored.shape[1]:
            self._columns[name] = pad(stored, (0, 0, 0, rows.shape[1] - stored.shape[1]))
        elif rows.ndim == 3:
            rows = pad(rows, (0, 0, 0, stored.shape[1] - rows.shape[1]))
        return rows
