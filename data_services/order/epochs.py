"""Which row of a source stands at a position: shuffled in windows, epoch after epoch; addressed, not iterated.

    rows of a source      0 .. rows-1, in the order they are stored, in row groups that are read as a whole
    position in a source  draws made from it so far; position // rows is the epoch, position % rows the place
    window                at most `window_groups` neighbours in the epoch's permutation of the row groups; rows are
                          permuted inside a window only, so that reading stays nearly sequential

Equal ids are kept `spacing` positions apart (`duplicates.arranged`): they can't meet in a batch of so many rows,
wherever it begins. Of the windows, counted through all epochs, an even one is arranged by itself and an odd one between
its two neighbours. So a batch that straddles two is seen to as well, and any position costs three windows at most.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np

from data_services.order.clusters import Clusters
from data_services.order.duplicates import Carried, IdColumns, arranged
from data_services.order.shapes import SourceShape, name_key, permutation, random_words

T = TypeVar("T")
KEPT_WINDOWS = 4  # an odd window, its neighbours, and the odd one before


class _Window(NamedTuple):
    """rows [n] in their order; what the first and the last `spacing`-1 of them carry, by place."""

    rows: np.ndarray
    head: Carried
    tail: Carried


class EpochOrder:
    """The rows of one source, in an endless sequence of epochs that hold each row once.

    ids         reads the id columns of row groups; None: duplicates are let be
    spacing     positions between equal ids, where it can be
    neighbours  rows of a cluster come in runs of `spacing` positions, which begin at its multiples; needs `ids`
    """

    def __init__(
        self,
        source: SourceShape,
        seed: int,
        window_groups: int,
        ids: IdColumns | None = None,
        spacing: int = 1,
        neighbours: bool = False,
    ) -> None:
        self._rows, self._ids, self._spacing, self._neighbours = source.rows, ids, spacing, neighbours
        self._sizes = source.row_groups.sizes()
        self._starts = np.cumsum(self._sizes) - self._sizes
        groups, windows = len(self._sizes), -(-len(self._sizes) // window_groups)
        self._windows = windows  # of an epoch
        self._cuts = -(-np.arange(windows + 1) * groups // windows)  # equally many groups each, to within one
        self._key = (seed, name_key(source.name))
        # The last ones asked for: consecutive batches share them.
        self._epochs: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()
        self._shuffled: OrderedDict[int, _Window] = OrderedDict()

    def rows(self, first: int, count: int) -> np.ndarray:
        """[count] rows at positions first … first+count-1, which may cross windows and epochs."""
        parts, position = [np.zeros(0, np.int64)], first
        while position < first + count:
            epoch, place = divmod(position, self._rows)
            window = int(np.searchsorted(self._epoch(epoch)[1], place, side="right"))
            start = self._start(epoch, window)
            rows = self._window(epoch * self._windows + window).rows
            part = rows[place - start : place - start + first + count - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row groups in the epoch's order, ends [windows]: rows of the windows up to and including each)."""

        def make() -> tuple[np.ndarray, np.ndarray]:
            groups = permutation(len(self._sizes), 2, *self._key, epoch)
            return groups, np.cumsum(np.add.reduceat(self._sizes[groups], self._cuts[:-1]))

        return _kept(self._epochs, epoch, make, 2)

    def _start(self, epoch: int, window: int) -> int:
        """Rows of the epoch before a window."""
        return int(self._epoch(epoch)[1][window - 1]) if window else 0

    def _window(self, number: int) -> _Window:
        """A window by its number through all epochs."""
        if self._ids is None or number % 2 == 0:
            return _kept(self._shuffled, number, lambda: self._arrange(number, ()), KEPT_WINDOWS)
        return _kept(self._shuffled, number, lambda: self._between(number), KEPT_WINDOWS)

    def _between(self, number: int) -> _Window:
        before, after = self._window(number - 1), self._window(number + 1)
        epoch, window = divmod(number, self._windows)
        rows = self._start(epoch, window + 1) - self._start(epoch, window)
        return self._arrange(number, (before.tail.moved(-len(before.rows)), after.head.moved(rows)))

    def _arrange(self, number: int, beside: tuple[Carried, ...]) -> _Window:
        epoch, window = divmod(number, self._windows)
        groups = self._epoch(epoch)[0][self._cuts[window] : self._cuts[window + 1]]
        sizes = self._sizes[groups]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        rows = np.repeat(self._starts[groups], sizes) + within
        words = random_words(len(rows), 3, *self._key, epoch, window)
        if self._ids is None:
            nothing = Carried.none()
            return _Window(rows[np.argsort(words, kind="stable")], nothing, nothing)
        carried = Carried.of(*self._ids.ids(groups))
        clusters = None
        if self._neighbours:
            position = epoch * self._rows + self._start(epoch, window)
            clusters = Clusters(self._ids.clusters(groups), position)
        order = arranged(words, carried, self._spacing, beside, clusters)
        placed = carried.placed(order)
        edge = self._spacing - 1
        return _Window(rows[order], placed.between(0, edge), placed.between(len(rows) - edge, len(rows)))


def _kept(cache: OrderedDict[int, T], key: int, make: Callable[[], T], most: int) -> T:
    """What the cache holds under the key, made where it doesn't; the `most` used last stay."""
    value = cache[key] if key in cache else make()
    cache[key] = value
    cache.move_to_end(key)
    while len(cache) > most:
        cache.popitem(last=False)
    return value
