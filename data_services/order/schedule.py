"""From a schedule to segments: stages, weights that change, sources that are used up. All known before step 0."""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_services.order.mixture import mixing_weights
from data_services.order.segments import Draws, Segment, check_fill, rows_at_once
from data_services.order.shapes import SourceShape
from data_services.schema import UsageError


@dataclass(frozen=True)
class Stage:
    """Settings from step `start` on, until the next stage.

    weights      [sources] shares, 0 leaves a source out; None: the sources' own, see `mixing_weights`
    homogeneous  a global batch comes from one source, else its rows are mixed
    negatives    hard negatives of each record, at most; None: as many as the reader takes
    """

    start: int = 0
    weights: tuple[float, ...] | None = None
    homogeneous: bool = True
    negatives: int | None = None


@dataclass(frozen=True)
class Layout:
    """segments; the step at which every source with a weight has reached its limit, `stop` where none has."""

    segments: tuple[Segment, ...]
    stop: int


def lay_out(
    seed: int, batch: int, sources: Sequence[SourceShape], stages: Sequence[Stage], stop: int, temperature: float
) -> Layout:
    """The segments of steps 0 … stop-1: one a stage, and a further one wherever a source reaches its limit.

    A source is used up at the first step that would take it past its limit; from there on the others share its
    weight in their proportions. Raises UsageError for stages that don't begin at 0 and ascend, or that the sources
    can't fill.
    """
    _check_stages(stages, stop, len(sources))
    segments: list[Segment] = []
    offsets, left = (0,) * len(sources), set(range(len(sources)))
    for stage, end in zip(stages, [*(s.start for s in stages[1:]), stop], strict=True):
        weighed = sources if stage.weights is None else _weighed(sources, stage.weights)
        at = stage.start
        while at < end:
            weights = _shares(weighed, left, temperature)
            if weights is None:
                if end < stop:
                    raise UsageError(
                        f"data.stages: every source of the one from step {stage.start} on is used up at step {at}, and "
                        f"the next begins at {end}: begin it there, or raise max_epochs or max_rows of a source"
                    )
                return Layout(tuple(segments), at)
            bare = tuple(s.bare for s in sources)
            segment = Segment(at, at, bare, weights, offsets, stage.homogeneous, stage.negatives)
            check_fill(segment, batch)
            _check_limits(sources, segment, batch)
            draws = Draws(segment, seed, batch)
            until, spent = _used_up(draws, sources, end)
            if until > at:
                segments.append(segment)
            offsets, left, at = tuple(draws.reached(until).tolist()), left - spent, until
    return Layout(tuple(segments), stop)


def _check_stages(stages: Sequence[Stage], stop: int, sources: int) -> None:
    starts = [s.start for s in stages]
    if not starts or starts[0] != 0 or any(b <= a for a, b in itertools.pairwise(starts)):
        raise UsageError(f"data.stages begin at steps {starts}: the first begins at 0, each later one after the last")
    if starts[-1] >= stop > 0:
        raise UsageError(
            f"data.stages, or a source's weight: one changes at step {starts[-1]}, and the run has only {stop} steps"
        )
    for stage in stages:
        if stage.weights is not None and len(stage.weights) != sources:
            raise UsageError(
                f"data.stages: the one from step {stage.start} on has {len(stage.weights)} weights for {sources} "
                "sources; give one for each, 0 for a source that is left out"
            )


def _weighed(sources: Sequence[SourceShape], weights: Sequence[float]) -> list[SourceShape]:
    return [replace(source, weight=weight) for source, weight in zip(sources, weights, strict=True)]


def _shares(sources: Sequence[SourceShape], left: set[int], temperature: float) -> tuple[float, ...] | None:
    """[sources] summing to 1, 0 for those that aren't left; None where nothing is."""
    all_of_them = mixing_weights(sources, temperature)  # the wrong ones are told though a source is used up
    shares = np.array([share if i in left else 0.0 for i, share in enumerate(all_of_them)])
    if len(left) == len(sources):
        return all_of_them
    return tuple((shares / shares.sum()).tolist()) if shares.sum() > 0 else None


def _check_limits(sources: Sequence[SourceShape], segment: Segment, batch: int) -> None:
    for source, weight in zip(sources, segment.weights, strict=True):
        need = rows_at_once(batch, weight, segment.homogeneous)
        if source.limit is not None and need > source.limit:
            raise UsageError(
                f"source {source.name!r} may give {source.limit} rows in all, and a batch takes {need} at once: raise "
                "its max_epochs or max_rows, or lower data.batch"
            )


def _used_up(draws: Draws, sources: Sequence[SourceShape], end: int) -> tuple[int, set[int]]:
    """(the first step, or `end`, that would take a source past its limit, which ones that are)."""
    limits = np.array([np.iinfo(np.int64).max if s.limit is None else s.limit for s in sources])
    limits = np.maximum(limits, draws.segment.offsets)  # one that stands still doesn't go past it

    def past(t: int) -> np.ndarray:
        return draws.reached(t + 1) > limits

    steps = range(draws.segment.start, end)
    until = steps.start + bisect_right(steps, False, key=lambda t: bool(past(t).any()))
    return until, set(np.flatnonzero(past(until)).tolist()) if until < end else set()
