"""Lists of different lengths end to end: tokens, and whatever else towers read of an item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """Lists of different lengths, end to end. values [T] int32 tokens, or [T, ...] of any type; offsets [n+1] int64,
    offsets[0] == 0."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, tokens of each text."""
        return np.diff(self.offsets)

    def __getitem__(self, i: int) -> np.ndarray:
        return self.values[self.offsets[i] : self.offsets[i + 1]]

    def take(self, indices: np.ndarray) -> Ragged:
        """The texts at `indices` [m], in that order."""
        lengths = self.lengths[indices]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        return Ragged(self.values[np.repeat(self.offsets[:-1][indices], lengths) + within], offsets)

    def padded(self, pad: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """(ids [n, L] int64, mask [n, L] int64) of tokens, padded on the right to the longest text."""
        width = int(self.lengths.max(initial=1))
        mask = (np.arange(width) < self.lengths[:, None]).astype(np.int64)
        ids = np.full((len(self), width), pad, np.int64)
        ids[mask.astype(bool)] = self.values
        return ids, mask

    @classmethod
    def of(cls, lists: Sequence[Sequence[int] | np.ndarray]) -> Ragged:
        """Of token lists."""
        offsets = np.concatenate([[0], np.cumsum([len(x) for x in lists])]).astype(np.int64)
        values = np.concatenate([np.asarray(x, np.int32) for x in lists]) if lists else np.zeros(0, np.int32)
        return Ragged(values.astype(np.int32), offsets)

    @staticmethod
    def concat(parts: Sequence[Ragged]) -> Ragged:
        """End to end; `Inputs` where one of them is."""
        if any(isinstance(part, Inputs) for part in parts):
            return _inputs(parts)
        return _end_to_end(parts)


@dataclass(frozen=True)
class Inputs(Ragged):
    """What towers read of n items: tokens, and named arrays beside them.

    An image or a sound has placeholder tokens, as many as its tower computes for it: batches are dealt and cut by them.

    arrays  by name n lists, [T, ...] end to end: pixels, mel frames; empty of an item that has none
    towers  [n] int8, which tower encodes each; None: there is one
    """

    arrays: Mapping[str, Ragged] = field(default_factory=dict)
    towers: np.ndarray | None = None

    def __post_init__(self) -> None:
        columns = dict(self.arrays) | ({} if self.towers is None else {"towers": self.towers})
        for name, column in columns.items():
            if len(column) != len(self):
                raise ValueError(f"{name} has {len(column)} rows, the tokens are of {len(self)} items")

    def take(self, indices: np.ndarray) -> Inputs:
        tokens = super().take(indices)
        arrays = {name: array.take(indices) for name, array in self.arrays.items()}
        return Inputs(tokens.values, tokens.offsets, arrays, None if self.towers is None else self.towers[indices])

    @classmethod
    def of_tower(cls, tokens: Ragged, tower: int) -> Inputs:
        """All items for one of several towers."""
        return cls(tokens.values, tokens.offsets, arrays_of(tokens), np.full(len(tokens), tower, np.int8))


def arrays_of(tokens: Ragged) -> Mapping[str, Ragged]:
    """The arrays beside the tokens, {} of texts alone."""
    return tokens.arrays if isinstance(tokens, Inputs) else {}


def towers_of(tokens: Ragged) -> np.ndarray | None:
    """[n] int8, which tower encodes each item; None: there is one."""
    return tokens.towers if isinstance(tokens, Inputs) else None


def _end_to_end(parts: Sequence[Ragged]) -> Ragged:
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([p.lengths for p in parts]))]).astype(np.int64)
    return Ragged(np.concatenate([p.values for p in parts]), offsets)


def _inputs(parts: Sequence[Ragged]) -> Inputs:
    """An array that one part lacks is empty of its items. Either all parts say their towers or none does."""
    tokens, arrays = _end_to_end(parts), {}
    for name, like in {name: array for part in parts for name, array in arrays_of(part).items()}.items():
        none = [Ragged(like.values[:0], np.zeros(len(part) + 1, np.int64)) for part in parts]
        arrays[name] = _end_to_end([arrays_of(part).get(name, empty) for part, empty in zip(parts, none, strict=True)])
    towers = [its for part in parts if (its := towers_of(part)) is not None]
    return Inputs(tokens.values, tokens.offsets, arrays, np.concatenate(towers) if towers else None)
