"""The rows of a window in an order that keeps equal ids apart.

Two rows with the same query, or with a document in common, make each other's positive a false negative where they meet
in a batch. Rather than dealing rows to batches, which would tie a window to where its batches begin, equal ids are kept
`spacing` = B places apart: no B neighbours hold one twice, whatever the weights and however sources are mixed.

1. Spread: the m rows of an id get places at even distances, from a random one on; all others random places. An id
   with more rows than there are batches is thus spread as thinly as can be.
2. Exchange: rows that carry several ids, and those near the neighbouring windows, may still be too near. Each changes
   places with another row wherever that suits both. What no exchange of two rows mends is left to the loss's mask.

Both are functions of the ids and of the random words, in time n log n and at most EXCHANGES tries a row.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np

from data_services.order.clusters import Clusters

TRIES = 64  # places that a row tries at most, at one go
EXCHANGES = 1  # tries for each row of a window, on the average
LEAST_EXCHANGES = 1 << 13
_GOLDEN = 0.6180339887498949  # 1/φ
# Query and document may be the same text, and so have the same id; they aren't duplicates of each other.
OF_DOCUMENTS = np.int64(0x5851F42D4C957F2D)


class IdColumns(Protocol):
    """Reads the columns of a source (`schema.Column`) that its order depends on, without its texts."""

    def ids(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(query_ids [n], positive_ids [p] of all rows end to end, positives [n] of each row), all int64.

        The rows are those of the row groups, in the order of `groups` and within each as stored.
        """
        ...

    def clusters(self, groups: np.ndarray) -> np.ndarray:
        """[n] int64 the cluster of each of these rows; asked for by a plan of neighbours alone."""
        ...


@dataclass(frozen=True)
class Carried:
    """Which ids rows carry: the row, or place, `at[i]` carries `ids[i]`. Both [c] int64; no pair twice."""

    at: np.ndarray
    ids: np.ndarray

    @classmethod
    def none(cls) -> Carried:
        return cls(np.zeros(0, np.int64), np.zeros(0, np.int64))

    @classmethod
    def of(cls, query_ids: np.ndarray, positive_ids: np.ndarray, positives: np.ndarray) -> Carried:
        """From the columns that `IdColumns` reads."""
        rows = np.arange(len(query_ids))
        at = np.concatenate([rows, np.repeat(rows, positives)])
        return cls(at, np.concatenate([query_ids, positive_ids ^ OF_DOCUMENTS]))

    @classmethod
    def joined(cls, parts: Sequence[Carried]) -> Carried:
        return cls(np.concatenate([p.at for p in parts]), np.concatenate([p.ids for p in parts]))

    def moved(self, by: int) -> Carried:
        return Carried(self.at + by, self.ids)

    def placed(self, order: np.ndarray) -> Carried:
        """By place, where `order` [n] is the row at each place."""
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return Carried(place[self.at], self.ids)

    def between(self, first: int, end: int) -> Carried:
        """What stands at first … end-1."""
        there = (self.at >= first) & (self.at < end)
        return Carried(self.at[there], self.ids[there])


def duplicate_rows(carried: Carried) -> np.ndarray:
    """The rows, ascending, that carry an id which a row before them carries."""
    order = np.lexsort((carried.at, carried.ids))
    ids, at = carried.ids[order], carried.at[order]
    again = (ids[1:] == ids[:-1]) & (at[1:] != at[:-1])
    return np.unique(at[1:][again])


def arranged(
    words: np.ndarray,
    carried: Carried,
    spacing: int,
    beside: Sequence[Carried] = (),
    clusters: Clusters | None = None,
) -> np.ndarray:
    """[n] the row at each place: random by `words` [n] uint64, equal ids at least `spacing` apart where that can be.

    beside    what stands before place 0 and from place n on, by place: it stays there
    clusters  of the rows: those of one stand together, in runs of `spacing` places
    """
    n, own = len(words), len(carried.at)
    ids = np.concatenate([carried.ids, *(b.ids for b in beside)])
    at = np.concatenate([carried.at, *(b.at for b in beside)])
    _, codes, times = np.unique(ids, return_inverse=True, return_counts=True)
    repeated = times[codes] > 1
    mine = np.arange(len(ids)) < own
    fixed = codes[repeated & ~mine], at[repeated & ~mine]
    codes, rows = _distinct(codes[repeated & mine], carried.at[repeated[:own]])
    keys = _spread(words, codes, rows)
    if clusters is None:
        order, walk, stride = np.argsort(keys, kind="stable"), np.arange(n), n * _GOLDEN
    else:
        order, walk = clusters.gathered(keys, words, spacing)
        stride = spacing  # the next run along the walk, then the one after it
    copies = np.bincount(codes, minlength=len(times))
    if spacing > 1:
        hopeful = (copies - 1) * spacing < n
        keep, keep_fixed = hopeful[codes], hopeful[fixed[0]]
        beyond = fixed[0][keep_fixed], fixed[1][keep_fixed]
        exchange = _Exchange(order, codes[keep], rows[keep], *beyond, spacing, walk, _coprime(n, stride))
        exchange.run(max(EXCHANGES * n, LEAST_EXCHANGES))
    return order


def _distinct(codes: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each (code, row) once, sorted by code, then row."""
    order = np.lexsort((rows, codes))
    codes, rows = codes[order], rows[order]
    first = np.ones(len(codes), bool)
    first[1:] = (codes[1:] != codes[:-1]) | (rows[1:] != rows[:-1])
    return codes[first], rows[first]


def _spread(words: np.ndarray, codes: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """[n] keys in [0, 1) to sort the rows by: at even distances for the rows of an id, else random.

    A row with several ids goes with the one that most rows carry.
    """
    keys = (words >> np.uint64(11)) * 2.0**-53
    copies = np.bincount(codes)[codes] if len(codes) else codes
    by_row = np.lexsort((codes, -copies, rows))
    main = by_row[np.diff(rows[by_row], prepend=-1) != 0]  # of each row that has one
    codes, rows = codes[main], rows[main]
    order = np.lexsort((keys[rows], codes))
    codes, rows = codes[order], rows[order]
    begins = np.flatnonzero(np.diff(codes, prepend=-1))
    members = np.diff(begins, append=len(codes))
    rank = np.arange(len(codes)) - np.repeat(begins, members)
    # From where on: the words of an id's rows together are random whatever their order.
    start = np.add.reduceat(words[rows], begins) if len(begins) else words[:0]
    start = (start >> np.uint64(11)) * 2.0**-53
    alone = members == 1
    start[alone] = keys[rows[begins[alone]]]
    keys[rows] = (rank + np.repeat(start, members)) / np.repeat(members, members)
    return keys


class _Exchange:
    """Rows that stand too near to one with an id of theirs change places with others; `order` is changed in place.

    codes, rows            [c] int64: row carries code
    fixed_codes, fixed_at  [f] int64: what stands beside the window
    walk, stride           [n] int64, places: a row tries every `stride`-th from its own on
    """

    def __init__(
        self,
        order: np.ndarray,
        codes: np.ndarray,
        rows: np.ndarray,
        fixed_codes: np.ndarray,
        fixed_at: np.ndarray,
        spacing: int,
        walk: np.ndarray,
        stride: int,
    ) -> None:
        self._order, self._spacing, self._n = order, spacing, len(order)
        self._walk, self._stride, self._step_of = walk, stride, np.argsort(walk)
        place = np.empty(self._n, np.int64)
        place[order] = np.arange(self._n)
        all_codes = np.concatenate([codes, fixed_codes])
        places = np.concatenate([place[rows], fixed_at])
        by_code = np.lexsort((places, all_codes))
        # What each code, and each row, has stands end to end in an array; lists of it are made when asked for.
        self._places_of = _Lists(all_codes[by_code], places[by_code], int(all_codes.max(initial=-1)) + 1)
        by_row = np.argsort(rows, kind="stable")
        self._codes_of = _Lists(rows[by_row], codes[by_row], self._n)

    def run(self, tries: int) -> None:
        """Exchanges until none mends anything any more, or so many have been tried."""
        mended = True
        while mended and tries > 0:
            mended = False
            for at in self._too_near():
                spent = self._mend(at)
                tries -= abs(spent)
                mended |= spent > 0
                if tries <= 0:
                    return

    def _too_near(self) -> list[int]:
        """Places, ascending, whose row has an id that stands too near before it, or beside the window after it."""
        codes, places = self._places_of.keys, self._places_of.current()
        near = (codes[1:] == codes[:-1]) & (np.diff(places) < self._spacing)
        before, after = places[:-1][near], places[1:][near]
        at = np.unique(np.where(after < self._n, after, before))
        return at[(at >= 0) & (at < self._n)].tolist()

    def _mend(self, at: int) -> int:
        """Tries it took to find the row at a place another; negative where none was found, 0 where none is needed."""
        row = int(self._order[at])
        if self._fits(row, at, at):
            return 0
        tries, step = min(TRIES, self._n - 1), int(self._step_of[at])
        for i in range(1, tries + 1):
            to = int(self._walk[(step + i * self._stride) % self._n])
            if self._fits(row, to, at) and self._fits(int(self._order[to]), at, to):
                self._swap(at, to)
                return i
        return -tries

    def _fits(self, row: int, at: int, leaving: int) -> bool:
        """Whether none of the row's ids stands too near to a place once it stands there.

        The place it leaves doesn't count, nor one at that place itself: the row that stands there goes away.
        """
        for code in self._codes_of[row]:
            places = self._places_of[code]
            near = places[bisect_right(places, at - self._spacing) : bisect_left(places, at + self._spacing)]
            if near and near != [leaving] and near != [at]:
                return False
        return True

    def _swap(self, a: int, b: int) -> None:
        for row, out, to in ((int(self._order[a]), a, b), (int(self._order[b]), b, a)):
            for code in self._codes_of[row]:
                places = self._places_of[code]
                places.remove(out)
                insort(places, to)
        self._order[a], self._order[b] = self._order[b], self._order[a]


class _Lists:
    """Values [c] by key 0 … size-1, sorted by it; a key's values become a list, to be changed, when first asked for."""

    def __init__(self, keys: np.ndarray, values: np.ndarray, size: int) -> None:
        self.keys, self._values, self._size = keys, values, size
        self._lists: dict[int, list[int]] = {}

    def __getitem__(self, key: int) -> list[int]:
        found = self._lists.get(key)
        if found is None:
            found = self._lists[key] = self._values[self._begins[key] : self._begins[key + 1]].tolist()
        return found

    def current(self) -> np.ndarray:
        """[c] the values with the changes made to the lists."""
        for key, values in self._lists.items():
            self._values[self._begins[key] : self._begins[key + 1]] = values
        return self._values

    @cached_property
    def _begins(self) -> list[int]:
        """Where each key's values begin; most windows have nothing to mend and never ask."""
        return np.searchsorted(self.keys, np.arange(self._size + 1)).tolist()


def _coprime(n: int, near: float) -> int:
    """A number from `near` on that is coprime with n: its multiples visit every one of n places once, and near
    n / golden ratio they are spread out from the first on."""
    stride = max(round(near), 1)
    while math.gcd(stride, n) > 1:
        stride += 1
    return stride
