"""Which rows make global batch `t`: a pure function of the seed, the sources, their weights, and `t`.

Nothing is replayed to reach step t. A *mixture* says which source each draw comes from and the draw's ordinal
within that source; an *epoch order* says which row stands at that ordinal. Both are addressed, not iterated.

    rows of a source      0 .. rows-1, in the order they are stored, in row groups that are read as a whole
    position in a source  draws made from it so far; position // rows is the epoch, position % rows the place
    window                `window_groups` neighbours in the epoch's permutation of the row groups; rows are
                          permuted inside a window only, so that reading stays nearly sequential

Random numbers are raw Philox words turned into a permutation by sorting: numpy promises that raw words stay
the same between its versions, and does not promise it of `Generator.permutation`.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from data_services.schema import UsageError

CYCLE = 1 << 10  # draws of a mixture that are permuted together
GRID = 1 << 20  # resolution of a weight: over GRID draws every source gets exactly its share


@dataclass(frozen=True)
class SourceShape:
    """What `order` knows of a source: rows, rows of each row group, content fingerprint, explicit weight."""

    name: str
    rows: int
    row_groups: tuple[int, ...]
    fingerprint: str
    weight: float | None = None


@dataclass(frozen=True)
class Segment:
    """Steps from `start` on, until the next segment.

    weights  [sources] shares of the draws, summing to 1
    offsets  [sources] positions the sources have reached when the segment begins
    """

    start: int
    sources: tuple[SourceShape, ...]
    weights: tuple[float, ...]
    offsets: tuple[int, ...]


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


def _permutation(n: int, *key: int) -> np.ndarray:
    """[n] a permutation keyed by non-negative integers."""
    words = np.random.Philox(np.random.SeedSequence(key)).random_raw(n)
    return np.argsort(words, kind="stable")


def _name_key(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


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
        points = self._stride * _permutation(CYCLE, 1, *self._key, cycle)
        points += self._offsets[cycle % self._stride]
        return np.searchsorted(self._bounds, points, side="right") - 1


class EpochOrder:
    """The rows of one source, shuffled, epoch after epoch; addressable anywhere at the cost of a window."""

    def __init__(self, source: SourceShape, seed: int, window_groups: int) -> None:
        self._source, self._window_groups = source, window_groups
        self._sizes = np.array(source.row_groups, np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._key = (seed, _name_key(source.name))
        # The last epoch and window asked for: consecutive batches share them.
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._window: tuple[int, int, np.ndarray] | None = None

    def rows(self, first: int, count: int) -> np.ndarray:
        """[count] rows at positions first … first+count-1, which may cross windows and epochs."""
        parts, position = [], first
        while position < first + count:
            epoch, place = divmod(position, self._source.rows)
            _, ends = self._groups(epoch)
            window = int(np.searchsorted(ends, place, side="right"))
            start = int(ends[window - 1]) if window else 0
            rows = self._window_rows(epoch, window)
            part = rows[place - start : place - start + first + count - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)

    def _groups(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(row groups in the epoch's order, ends [windows]: rows of the windows up to and including each)."""
        if self._epoch is None or self._epoch[0] != epoch:
            groups = _permutation(len(self._sizes), 2, *self._key, epoch)
            windows = np.arange(0, len(groups), self._window_groups)
            ends = np.cumsum(np.add.reduceat(self._sizes[groups], windows))
            self._epoch = (epoch, groups, ends)
        return self._epoch[1:]

    def _window_rows(self, epoch: int, window: int) -> np.ndarray:
        """[rows of the window], permuted."""
        if self._window is None or self._window[:2] != (epoch, window):
            groups = self._groups(epoch)[0][window * self._window_groups : (window + 1) * self._window_groups]
            rows = np.concatenate([np.arange(self._starts[g], self._starts[g + 1]) for g in groups])
            shuffled = rows[_permutation(len(rows), 3, *self._key, epoch, window)]
            self._window = (epoch, window, shuffled)
        return self._window[2]


class Plan:
    """The global batches 0 … steps-1 of a run.

    Every batch has exactly `batch` rows: the tail of a source's epoch flows into its next epoch, and rows
    that would not fill a last batch of the run are left out. Within an epoch of a source every row comes
    exactly once. A batch that straddles two epochs can hold a row twice; the loss masks equal texts.

    epochs, steps       exactly one: passes over all sources together, fractions too, or number of batches
    mixing_temperature  see `mixing_weights`; of no account where the sources carry weights
    homogeneous         a global batch comes from one source, else its rows are mixed
    window_groups       row groups of a shuffling window

    Raises UsageError naming the key for an empty source, a repeated name, impossible weights, or a batch that
    the rows cannot fill without repeating one.
    """

    def __init__(
        self,
        seed: int,
        batch: int,
        sources: Sequence[SourceShape],
        *,
        epochs: float | None = None,
        steps: int | None = None,
        mixing_temperature: float = 1.0,
        homogeneous: bool = True,
        window_groups: int = 64,
    ) -> None:
        if (epochs is None) == (steps is None):
            raise UsageError("give exactly one of data.epochs and data.steps")
        _check_sources(sources)
        if epochs is not None:
            rows = sum(s.rows for s in sources)
            steps = int(epochs * rows + 1e-6) // batch
            if steps == 0:
                raise UsageError(f"data.epochs={epochs} of {rows} rows do not fill one batch of data.batch={batch}")
        assert steps is not None
        weights = mixing_weights(sources, mixing_temperature)
        segment = Segment(0, tuple(sources), weights, (0,) * len(sources))
        self._set(seed, batch, steps, homogeneous, window_groups, (segment,))
        self._check_fill(segment)

    def _set(
        self,
        seed: int,
        batch: int,
        steps: int,
        homogeneous: bool,
        window_groups: int,
        segments: tuple[Segment, ...],
    ) -> None:
        self.seed, self.batch, self.steps = seed, batch, steps
        self.homogeneous, self.window_groups, self.segments = homogeneous, window_groups, segments
        # Every source of every segment once: the numbers that `rows` speaks of.
        self.sources = tuple(dict.fromkeys(replace(x, weight=None) for s in segments for x in s.sources))
        number = {x: i for i, x in enumerate(self.sources)}
        self._numbers = [np.array([number[replace(x, weight=None)] for x in s.sources]) for s in segments]
        self._mixtures = [Mixture(s.weights, (seed, i)) for i, s in enumerate(segments)]
        self._orders = [EpochOrder(x, seed, window_groups) for x in self.sources]

    def rows(self, t: int) -> np.ndarray:
        """[batch, 2] int64 (source, row) of global batch t; `source` is an index into `self.sources`."""
        if not 0 <= t < self.steps:
            raise ValueError(f"t: the plan has steps 0..{self.steps - 1}, got {t}")
        number = self._segment(t)
        drawn, positions = self._draws(number, t - self.segments[number].start)
        sources, rows = self._numbers[number][drawn], np.empty(self.batch, np.int64)
        for source in np.unique(sources):
            chosen = sources == source
            first = int(positions[chosen][0])  # the positions of a source within a batch are consecutive
            rows[chosen] = self._orders[source].rows(first, int(chosen.sum()))
        return np.stack([sources, rows], axis=1)

    def positions(self, t: int) -> np.ndarray:
        """[sources] positions reached before step t by the sources of the segment that step t-1 falls in."""
        number = self._segment(max(t - 1, 0))
        segment, mixture = self.segments[number], self._mixtures[number]
        rows_a_draw = self.batch if self.homogeneous else 1
        draws = (t - segment.start) * self.batch // rows_a_draw
        cycles, rest = divmod(draws, CYCLE)
        tail, _ = mixture.draw(cycles * CYCLE, rest)
        counts = mixture.counts(cycles) + np.bincount(tail, minlength=len(segment.sources))
        return counts * rows_a_draw + np.array(segment.offsets, np.int64)

    def extended(self, start: int, sources: Sequence[SourceShape], mixing_temperature: float = 1.0) -> Plan:
        """This plan with other sources, contents or weights from step `start` on; the same before it.

        A source that keeps its name and row count goes on where it stood, another begins its first epoch.
        """
        last = self.segments[-1]
        if start <= last.start:
            raise ValueError(f"start: the last segment begins at {last.start}, a new one can't begin at {start}")
        _check_sources(sources)
        reached = dict(zip(((s.name, s.rows) for s in last.sources), self.positions(start), strict=True))
        offsets = tuple(int(reached.get((s.name, s.rows), 0)) for s in sources)
        segment = Segment(start, tuple(sources), mixing_weights(sources, mixing_temperature), offsets)
        self._check_fill(segment)
        state = self.state()
        return Plan.from_state({**state, "segments": [*state["segments"], asdict(segment)]})

    def state(self) -> dict[str, Any]:
        """Everything the plan is a function of, as JSON."""
        return {n: getattr(self, n) for n in _SCALARS} | {"segments": [asdict(s) for s in self.segments]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Plan:
        """The plan that `state()` described, equal to it in every batch."""
        plan = cls.__new__(cls)
        segments = tuple(_segment_of(s) for s in state["segments"])
        plan._set(**{n: state[n] for n in _SCALARS}, segments=segments)
        return plan

    def differences(self, other: Plan) -> list[str]:
        """What makes the batches of two plans differ, one line each, empty where they are equal.

        The number of steps is not among them: a longer run of the same plan begins with the same batches.
        """
        pairs = [(n, getattr(self, n), getattr(other, n)) for n in _SCALARS if n != "steps"]
        pairs.append(("segments", len(self.segments), len(other.segments)))
        lines = [f"{name}: {a!r} became {b!r}" for name, a, b in pairs if a != b]
        for a, b in zip(self.segments, other.segments, strict=False):
            lines += _segment_differences(a, b)
        return lines

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_state, (self.state(),)  # without the cached windows

    def _segment(self, t: int) -> int:
        return bisect_right([s.start for s in self.segments], t) - 1

    def _draws(self, number: int, t: int) -> tuple[np.ndarray, np.ndarray]:
        """(sources [batch] within the segment, positions [batch]) of the segment's t-th batch."""
        mixture, offsets = self._mixtures[number], np.array(self.segments[number].offsets, np.int64)
        if self.homogeneous:
            source, ordinal = mixture.draw(t, 1)
            first = ordinal * self.batch + offsets[source]
            return np.repeat(source, self.batch), first + np.arange(self.batch)
        sources, ordinals = mixture.draw(t * self.batch, self.batch)
        return sources, ordinals + offsets[sources]

    def _check_fill(self, segment: Segment) -> None:
        for source, weight in zip(segment.sources, segment.weights, strict=True):
            need = self.batch if self.homogeneous and weight > 0 else int(np.ceil(self.batch * weight))
            if need > source.rows:
                remedy = "lower data.batch or the source's weight"
                if self.homogeneous and len(segment.sources) > 1:
                    remedy += ", or set data.homogeneous=false"
                raise UsageError(
                    f"data.batch={self.batch} takes {need} rows at once of source {source.name!r}, which has "
                    f"only {source.rows}: {remedy}"
                )


_SCALARS = ("seed", "batch", "steps", "homogeneous", "window_groups")


def _segment_of(state: dict[str, Any]) -> Segment:
    sources = tuple(SourceShape(**{**s, "row_groups": tuple(s["row_groups"])}) for s in state["sources"])
    return Segment(state["start"], sources, tuple(state["weights"]), tuple(state["offsets"]))


def _check_sources(sources: Sequence[SourceShape]) -> None:
    if not sources:
        raise UsageError("data.sources is empty: name at least one source")
    seen: set[str] = set()
    for source in sources:
        if source.rows == 0:
            raise UsageError(f"source {source.name!r} has no rows")
        if source.name in seen:
            raise UsageError(f"data.sources names {source.name!r} twice; give it a larger weight instead")
        assert sum(source.row_groups) == source.rows, source
        assert min(source.row_groups) > 0, source
        seen.add(source.name)


def _segment_differences(a: Segment, b: Segment) -> list[str]:
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
        pairs = [("order of sources", [s.name for s in a.sources], [s.name for s in b.sources])]
        pairs += [(n, getattr(a, n), getattr(b, n)) for n in ("start", "weights", "offsets")]
        lines += [f"segment {a.start}, {n}: {x} became {y}" for n, x, y in pairs if x != y]
    return sorted(lines)
