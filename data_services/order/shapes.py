"""What `order` knows of a source, small however many rows it has; and the random numbers keyed by it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_services.schema import UsageError


@dataclass(frozen=True)
class RowGroups:
    """Rows of each row group of a source. Equal neighbours are kept as one, so that a billion rows take no room.

    runs  (rows of a group, how many neighbours have so many), in the order they are stored
    """

    runs: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, sizes: Iterable[int]) -> RowGroups:
        """sizes [groups] rows of each, none of them 0."""
        rows = np.fromiter(sizes, np.int64)
        begins = np.flatnonzero(np.diff(rows, prepend=-1))
        times = np.diff(begins, append=len(rows))
        return cls(tuple(zip(rows[begins].tolist(), times.tolist(), strict=True)))

    def sizes(self) -> np.ndarray:
        """[groups] int64."""
        return np.repeat(*np.array(self.runs, np.int64).reshape(-1, 2).T)

    @property
    def rows(self) -> int:
        return sum(rows * times for rows, times in self.runs)


@dataclass(frozen=True)
class SourceShape:
    """A source as the plan sees it.

    rows         how many it has
    fingerprint  of its content
    weight       its share of the draws, explicitly; None: by its rows (`schedule.mixing_weights`)
    limit        rows that the run takes of it at most, repetitions counted; None: as many as its weight asks for
    """

    name: str
    rows: int
    row_groups: RowGroups
    fingerprint: str
    weight: float | None = None
    limit: int | None = None

    @property
    def bare(self) -> SourceShape:
        """What it holds, whatever its part in a mixture."""
        return replace(self, weight=None, limit=None)


def check_sources(sources: Sequence[SourceShape]) -> None:
    """Raises UsageError where there is none, one is empty, or two have one name."""
    if not sources:
        raise UsageError("data.sources is empty: name at least one source")
    seen: set[str] = set()
    for source in sources:
        if source.rows == 0:
            raise UsageError(f"source {source.name!r} has no rows")
        if source.name in seen:
            raise UsageError(f"data.sources names {source.name!r} twice; give it a larger weight instead")
        assert source.row_groups.rows == source.rows, source
        assert min(rows for rows, _ in source.row_groups.runs) > 0, source
        seen.add(source.name)


def permutation(n: int, *key: int) -> np.ndarray:
    """[n] a permutation keyed by non-negative integers."""
    return np.argsort(random_words(n, *key), kind="stable")


def random_words(n: int, *key: int) -> np.ndarray:
    """[n] uint64 keyed by non-negative integers.

    Raw Philox words: numpy promises that they stay the same between its versions, and does not promise it of
    `Generator.permutation`.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(n)


def name_key(name: str) -> int:
    """64 bits of a source's name, for a key."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
