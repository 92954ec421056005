"""The global batches of a run. Nothing is replayed to reach step t: segment, draws and windows are addressed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from data_services.order.duplicates import IdColumns
from data_services.order.epochs import EpochOrder
from data_services.order.mixture import mixing_weights
from data_services.order.schedule import Stage, lay_out
from data_services.order.segments import Draws, Segment, check_fill, segment_differences
from data_services.order.shapes import RowGroups, SourceShape, check_sources
from data_services.schema import UsageError

FORMAT = 3  # of `Plan.state`
_SCALARS = ("seed", "batch", "steps", "window_groups", "avoid_duplicates", "neighbours")


class Plan:
    """The global batches 0 … steps-1 of a run.

    Every batch has exactly `batch` rows: the tail of a source's epoch flows into its next epoch, and rows
    that would not fill a last batch of the run are left out. Within an epoch of a source every row comes
    exactly once.

    epochs, steps       exactly one: passes over all sources together, fractions too, or number of batches. With
                        `epochs` the run ends before that where every source has reached its limit
    mixing_temperature  see `mixing_weights`; of no account where the sources carry weights
    homogeneous         a global batch comes from one source, else its rows are mixed
    stages              what changes on the way, instead of `homogeneous`
    window_groups       row groups of a shuffling window
    ids                 reads a source's id columns, by its fingerprint: rows with a query or a positive in common
                        are then kept out of each other's batches where their windows can do it (`duplicates`).
                        None: they are let be
    neighbours          a batch's rows of a source are of one cluster, or of clusters with neighbouring numbers, as far
                        as their window has them (`clusters`); needs `ids`

    Raises UsageError naming the key for an empty source, a repeated name, impossible weights, a batch that
    the rows cannot fill without repeating one, or more steps than the sources' limits allow.
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
        stages: Sequence[Stage] = (),
        window_groups: int = 64,
        ids: Mapping[str, IdColumns] | None = None,
        neighbours: bool = False,
    ) -> None:
        if neighbours and ids is None:
            raise ValueError("ids: a plan of neighbours keeps duplicates apart, and needs the sources' id columns")
        if (epochs is None) == (steps is None):
            raise UsageError("give exactly one of data.epochs and data.steps")
        check_sources(sources)
        wanted = _steps(epochs, batch, sources) if steps is None else steps
        stages = stages or [Stage(homogeneous=homogeneous)]
        layout = lay_out(seed, batch, sources, stages, wanted, mixing_temperature)
        if layout.stop < wanted and steps is not None:
            raise UsageError(
                f"data.steps={steps}, but every source has reached its limit at step {layout.stop}: lower data.steps, "
                "or raise max_epochs or max_rows of a source"
            )
        self._set(seed, batch, layout.stop, window_groups, ids is not None, neighbours, layout.segments, ids)

    def _set(
        self,
        seed: int,
        batch: int,
        steps: int,
        window_groups: int,
        avoid_duplicates: bool,
        neighbours: bool,
        segments: tuple[Segment, ...],
        ids: Mapping[str, IdColumns] | None,
    ) -> None:
        self.seed, self.batch, self.steps, self.window_groups = seed, batch, steps, window_groups
        self.avoid_duplicates, self.neighbours, self.segments, self._ids = avoid_duplicates, neighbours, segments, ids
        # Every source of every segment once: the numbers that `rows` speaks of.
        self.sources = tuple(dict.fromkeys(x for s in segments for x in s.sources))
        number = {x: i for i, x in enumerate(self.sources)}
        self._numbers = [np.array([number[x] for x in s.sources]) for s in segments]
        self._draws = [Draws(s, seed, batch) for s in segments]
        self._orders: dict[int, EpochOrder] = {}

    def rows(self, t: int) -> np.ndarray:
        """[batch, 2] int64 (source, row) of global batch t; `source` is an index into `self.sources`."""
        if not 0 <= t < self.steps:
            raise ValueError(f"t: the plan has steps 0..{self.steps - 1}, got {t}")
        segment = self._segment(t)
        drawn, positions = self._draws[segment].of_batch(t)
        sources, rows = self._numbers[segment][drawn], np.empty(self.batch, np.int64)
        for source in np.unique(sources).tolist():
            chosen = sources == source
            first = int(positions[chosen][0])  # the positions of a source within a batch are consecutive
            rows[chosen] = self._order(source).rows(first, int(chosen.sum()))
        return np.stack([sources, rows], axis=1)

    def positions(self, t: int) -> np.ndarray:
        """[sources] positions reached before step t by the sources of the segment that step t-1 falls in."""
        return self._draws[self._segment(max(t - 1, 0))].reached(t)

    def weights(self, t: int) -> dict[str, float]:
        """The shares of the sources at step t, by name."""
        segment = self.segments[self._segment(t)]
        return {source.name: weight for source, weight in zip(segment.sources, segment.weights, strict=True)}

    def negatives(self, t: int, otherwise: int) -> int:
        """Hard negatives of each record at step t, at most; `otherwise` where the plan doesn't say."""
        told = self.segments[self._segment(t)].negatives
        return otherwise if told is None else told

    def extended(
        self,
        start: int,
        sources: Sequence[SourceShape],
        mixing_temperature: float = 1.0,
        ids: Mapping[str, IdColumns] | None = None,
    ) -> Plan:
        """This plan with other sources or weights from step `start` on, after all its segments; the same before it.

        A source that keeps its name, row count and row groups goes on where it stood, another begins its first epoch.
        ids  of the sources that are new
        """
        last = self.segments[-1]
        if start <= last.start:
            raise ValueError(f"start: the last segment begins at {last.start}, a new one can't begin at {start}")
        check_sources(sources)
        reached = dict(zip(map(_place, last.sources), self.positions(start).tolist(), strict=True))
        segment = replace(
            last,
            start=start,
            origin=start,
            sources=tuple(s.bare for s in sources),
            weights=mixing_weights(sources, mixing_temperature),
            offsets=tuple(reached.get(_place(s), 0) for s in sources),
        )
        check_fill(segment, self.batch)
        return self._with((*self.segments, segment), ids)

    def refreshed(self, start: int, source: SourceShape, ids: IdColumns | None = None) -> Plan:
        """This plan with other content of one source from step `start` on, newly mined negatives say.

        Every batch keeps its rows' numbers; only what is read for them changes. The source keeps its name, rows and
        row groups, else ValueError. ids  of the new content, where the plan avoids duplicates
        """
        if not 0 <= start < self.steps:
            raise ValueError(f"start: the plan has steps 0..{self.steps - 1}, got {start}")
        if _place(source) not in {_place(s) for s in self.segments[self._segment(start)].sources}:
            raise ValueError(f"source {source.name!r}: step {start} has none of that name with the same row groups")
        cut = self._segment(start)
        kept = list(self.segments[: cut + (self.segments[cut].start < start)])
        for later in self.segments[cut:]:
            contents = tuple(source.bare if _place(s) == _place(source) else s for s in later.sources)
            kept.append(replace(later, start=max(later.start, start), sources=contents))
        return self._with(tuple(kept), {source.fingerprint: ids} if ids is not None else None)

    def _with(self, segments: tuple[Segment, ...], ids: Mapping[str, IdColumns] | None) -> Plan:
        plan = Plan.__new__(Plan)
        known = {**(self._ids or {}), **(ids or {})} if self.avoid_duplicates else None
        plan._set(**{n: getattr(self, n) for n in _SCALARS}, segments=segments, ids=known)
        return plan

    def state(self) -> dict[str, Any]:
        """Everything the plan is a function of but the sources' content, as JSON; as long as its segments are many."""
        scalars = {n: getattr(self, n) for n in _SCALARS}
        return {"format": FORMAT, **scalars, "segments": [asdict(s) for s in self.segments]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], ids: Mapping[str, IdColumns] | None = None) -> Plan:
        """The plan that `state()` described, equal to it in every batch. Raises UsageError for another format.

        ids  as in the constructor; without them a plan that avoids duplicates can be compared, but not read
        """
        if state.get("format") != FORMAT:
            raise UsageError(
                f"this plan has format {state.get('format', 1)} and this version of gyre writes {FORMAT}: the order of "
                "its batches can't be made again; start a new run (model.init_from takes the old one's weights)"
            )
        plan = cls.__new__(cls)
        segments = tuple(_segment_of(s) for s in state["segments"])
        plan._set(**{n: state[n] for n in _SCALARS}, segments=segments, ids=ids)
        return plan

    def differences(self, other: Plan) -> list[str]:
        """What makes the batches of two plans differ, one line each, empty where they are equal.

        The number of steps is not among them: a longer run of the same plan begins with the same batches.
        """
        pairs = [(n, getattr(self, n), getattr(other, n)) for n in _SCALARS if n != "steps"]
        pairs.append(("segments", len(self.segments), len(other.segments)))
        lines = [f"{name}: {a!r} became {b!r}" for name, a, b in pairs if a != b]
        for a, b in zip(self.segments, other.segments, strict=False):
            lines += segment_differences(a, b)
        return lines

    def __reduce__(self) -> tuple[Any, ...]:
        return Plan.from_state, (self.state(), self._ids)  # without the cached windows

    def _segment(self, t: int) -> int:
        return bisect_right([s.start for s in self.segments], t) - 1

    def _order(self, source: int) -> EpochOrder:
        """Made when first asked for: a run of many sources reads few of them at a time."""
        if source not in self._orders:
            shape, ids = self.sources[source], None
            if self.avoid_duplicates:
                ids = (self._ids or {}).get(shape.fingerprint)
                if ids is None:
                    raise ValueError(f"ids: a plan that avoids duplicates needs the id columns of {shape.name!r}")
            of_source = shape, self.seed, self.window_groups, ids, self.batch
            self._orders[source] = EpochOrder(*of_source, neighbours=self.neighbours)
        return self._orders[source]


def _steps(epochs: float | None, batch: int, sources: Sequence[SourceShape]) -> int:
    assert epochs is not None
    rows = sum(s.rows for s in sources)
    steps = int(epochs * rows + 1e-6) // batch
    if steps == 0:
        raise UsageError(f"data.epochs={epochs} of {rows} rows do not fill one batch of data.batch={batch}")
    return steps


def _place(source: SourceShape) -> tuple[str, int, RowGroups]:
    """What a position in a source depends on."""
    return source.name, source.rows, source.row_groups


def _segment_of(state: Mapping[str, Any]) -> Segment:
    sources = []
    for source in state["sources"]:
        runs = tuple((rows, times) for rows, times in source["row_groups"]["runs"])
        sources.append(SourceShape(**{**source, "row_groups": RowGroups(runs)}))
    lists = {"sources": tuple(sources), "weights": tuple(state["weights"]), "offsets": tuple(state["offsets"])}
    return Segment(**{**state, **lists})
