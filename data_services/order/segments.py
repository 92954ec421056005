"""The stretches of a run over which nothing changes but the batch's number, and what each batch of one draws."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_services.order.mixture import CYCLE, Mixture
from data_services.order.shapes import SourceShape
from data_services.schema import UsageError


@dataclass(frozen=True)
class Segment:
    """Steps from `start` on, until the next segment.

    origin       the step from which its draws count: `start`, or before it where only contents changed at `start`
    sources      bare, see `SourceShape`
    weights      [sources] shares of the draws, summing to 1
    offsets      [sources] positions the sources had reached at `origin`
    homogeneous  a global batch comes from one source, else its rows are mixed
    negatives    hard negatives of each record, at most; None: as many as the reader takes
    """

    start: int
    origin: int
    sources: tuple[SourceShape, ...]
    weights: tuple[float, ...]
    offsets: tuple[int, ...]
    homogeneous: bool
    negatives: int | None = None


class Draws:
    """Where the batches of one segment take their rows: source and position of each, a function of the step."""

    def __init__(self, segment: Segment, seed: int, batch: int) -> None:
        self.segment, self._batch = segment, batch
        self._mixture = Mixture(segment.weights, (seed, segment.origin))
        self._offsets = np.array(segment.offsets, np.int64)

    def of_batch(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources [batch] as the segment numbers them, positions [batch]) of step t."""
        at = t - self.segment.origin
        if self.segment.homogeneous:
            source, ordinal = self._mixture.draw(at, 1)
            first = ordinal * self._batch + self._offsets[source]
            return np.repeat(source, self._batch), first + np.arange(self._batch)
        sources, ordinals = self._mixture.draw(at * self._batch, self._batch)
        return sources, ordinals + self._offsets[sources]

    def reached(self, t: int) -> np.ndarray:
        """[sources] positions before step t."""
        rows_a_draw = self._batch if self.segment.homogeneous else 1
        draws = (t - self.segment.origin) * self._batch // rows_a_draw
        cycles, rest = divmod(draws, CYCLE)
        tail, _ = self._mixture.draw(cycles * CYCLE, rest)
        counts = self._mixture.counts(cycles) + np.bincount(tail, minlength=len(self._offsets))
        return counts * rows_a_draw + self._offsets


def rows_at_once(batch: int, weight: float, homogeneous: bool) -> int:
    """Rows that a batch takes of a source of this weight, on the average where it is mixed."""
    return batch if homogeneous and weight > 0 else int(np.ceil(batch * weight))


def check_fill(segment: Segment, batch: int) -> None:
    """Raises UsageError where a batch takes more rows of a source than it has."""
    for source, weight in zip(segment.sources, segment.weights, strict=True):
        need = rows_at_once(batch, weight, segment.homogeneous)
        if need > source.rows:
            remedy = "lower data.batch or the source's weight"
            if segment.homogeneous and len(segment.sources) > 1:
                remedy += ", or set data.homogeneous=false"
            raise UsageError(
                f"data.batch={batch} takes {need} rows at once of source {source.name!r}, which has "
                f"only {source.rows}: {remedy}"
            )


def segment_differences(a: Segment, b: Segment) -> list[str]:
    """What makes two segments differ, one line each."""
    lines = []
    before, now = {s.name: s for s in a.sources}, {s.name: s for s in b.sources}
    lines += [f"source {name!r} is gone" for name in before.keys() - now.keys()]
    lines += [f"source {name!r} is new" for name in now.keys() - before.keys()]
    for name in sorted(before.keys() & now.keys()):
        x, y = before[name], now[name]
        if (x.rows, x.fingerprint) != (y.rows, y.fingerprint):
            lines.append(f"source {name!r}: {x.rows} rows ({x.fingerprint}) became {y.rows} ({y.fingerprint})")
        elif x.row_groups != y.row_groups:
            lines.append(f"source {name!r}: stored in other row groups")
    if not lines:
        pairs = [("order of sources", _names(a.sources), _names(b.sources))]
        settings = ("start", "origin", "weights", "offsets", "homogeneous", "negatives")
        pairs += [(n, getattr(a, n), getattr(b, n)) for n in settings]
        lines += [f"segment {a.start}, {n}: {x} became {y}" for n, x, y in pairs if x != y]
    return sorted(lines)


def _names(sources: Sequence[SourceShape]) -> list[str]:
    return [source.name for source in sources]
