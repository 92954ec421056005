"""Which source each draw comes from, and the draw's ordinal within it: addressed, not iterated."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_services.order.shapes import SourceShape, permutation
from data_services.schema import UsageError

CYCLE = 1 << 10  # draws of a mixture that are permuted together
GRID = 1 << 20  # resolution of a weight: over GRID draws every source gets exactly its share


def mixing_weights(sources: Sequence[SourceShape], temperature: float) -> tuple[float, ...]:
    """[sources] shares summing to 1: the explicit weights, or rows**(1/temperature).

    Temperature 1 is proportional to size, larger is flatter (Raffel et al. 2020, T5, section 3.5.2). Raises
    UsageError where some sources carry a weight and others don't, or all weights are 0.
    """
    given = [s.weight for s in sources]
    missing = [s.name for s in sources if s.weight is None]
    if missing and len(missing) < len(given):
        raise UsageError(f"data.sources: {missing[0]!r} has no weight but others have: give all one, or none")
    raw = np.array([s.rows ** (1 / temperature) if s.weight is None else s.weight for s in sources], float)
    if not np.isfinite(raw).all() or raw.min() < 0 or raw.sum() <= 0:
        raise UsageError(f"data.sources: weights {raw.tolist()} must be finite, not negative, and not all 0")
    return tuple((raw / raw.sum()).tolist())


class Mixture:
    """An infinite sequence of draws from sources by weight, addressable anywhere.

    Draws come in cycles of CYCLE. The points of cycle c are r(c), r(c)+R, r(c)+2R, … with R = GRID // CYCLE,
    permuted; a draw takes the source whose share of [0, GRID) its point falls in. Any cycle thus holds every
    share to within one draw, and R cycles together hold it exactly.
    """

    def __init__(self, weights: Sequence[float], key: tuple[int, ...]) -> None:
        self._key = key
        # [sources + 1] boundaries of the shares on the grid
        self._bounds = np.rint(np.concatenate([[0.0], np.cumsum(weights)]) * GRID).astype(np.int64)
        self._bounds[-1] = GRID
        self._stride = GRID // CYCLE
        # r(c): a full-period walk whose neighbours are far apart (multiplier near stride / golden ratio, odd)
        self._offsets = np.arange(self._stride) * 633 % self._stride

    def _below(self, offsets: np.ndarray) -> np.ndarray:
        """[offsets, sources + 1] points of a cycle with each offset that lie below each boundary."""
        return (self._bounds[None, :] - offsets[:, None] + self._stride - 1) // self._stride

    def counts(self, cycles: int) -> np.ndarray:
        """[sources] draws of each source in the first `cycles` cycles."""
        whole, rest = divmod(cycles, self._stride)
        return np.diff(whole * self._bounds + self._below(self._offsets[:rest]).sum(axis=0))

    def draw(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draws first … first+count-1: (sources [count], ordinals [count] of each draw within its source)."""
        begin, end = first // CYCLE, -(-(first + count) // CYCLE)
        sources = np.concatenate([np.zeros(0, np.int64), *(self._cycle(c) for c in range(begin, end))])
        ordinals = np.empty_like(sources)
        for source, before in enumerate(self.counts(begin)):
            chosen = sources == source
            ordinals[chosen] = before + np.arange(chosen.sum())
        part = slice(first - begin * CYCLE, first - begin * CYCLE + count)
        return sources[part], ordinals[part]

    def _cycle(self, cycle: int) -> np.ndarray:
        """[CYCLE] source of each draw of a cycle."""
        points = self._stride * permutation(CYCLE, 1, *self._key, cycle)
        points += self._offsets[cycle % self._stride]
        return np.searchsorted(self._bounds, points, side="right") - 1
