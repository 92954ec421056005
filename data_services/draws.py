"""Random numbers that are a function of keys alone: whatever else is drawn, in whatever order, a key gets the same.

splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators") as a counter: the i-th number of a
key is the finaliser of key + i · 2^64/φ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / φ, odd


def mix(x: np.ndarray) -> np.ndarray:
    """[n] uint64 -> [n] uint64, the finaliser of splitmix64: a permutation of the 64-bit numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_keys(rows: np.ndarray, step: int, seed: int) -> np.ndarray:
    """[n] uint64 keys of rows (source << 40 | row) at a step."""
    key = mix(np.array([seed], np.uint64) + np.uint64(_GOLDEN)) + np.uint64(step)
    return mix(rows.astype(np.uint64) + mix(key))


def ranks(lengths: np.ndarray) -> np.ndarray:
    """[n] lengths -> [T] 0 .. lengths[j]-1 for every j, end to end."""
    return np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)


@dataclass(frozen=True)
class Draws:
    """A source of random numbers for each of n texts. keys [n] uint64"""

    keys: np.ndarray

    def stream(self, number: int) -> Draws:
        """Another source, independent of this one and of those of other numbers."""
        return Draws(mix(self.keys ^ mix(np.array([number + 1], np.uint64) * np.uint64(_GOLDEN))))

    def take(self, texts: np.ndarray) -> Draws:
        """Of some of the texts, indices or a mask."""
        return Draws(self.keys[texts])

    def each(self, lengths: np.ndarray) -> np.ndarray:
        """[T] float64 in [0, 1): lengths[j] numbers for text j, end to end; the first ones don't depend on how many."""
        counts = (ranks(lengths) + 1).astype(np.uint64) * np.uint64(_GOLDEN)
        return (mix(np.repeat(self.keys, lengths) + counts) >> np.uint64(11)) * 2.0**-53

    def one(self) -> np.ndarray:
        """[n] float64 in [0, 1)."""
        return self.each(np.ones(len(self.keys), np.int64))

    def below(self, bounds: np.ndarray) -> np.ndarray:
        """[n] int64, uniform in 0 .. bounds[j]-1."""
        return (self.one() * bounds).astype(np.int64)


def smallest(numbers: np.ndarray, lengths: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """[T] bool: the counts[j] smallest of the lengths[j] numbers of each j, a uniform sample without replacement."""
    texts = np.repeat(np.arange(len(lengths)), lengths)
    chosen = np.empty(len(numbers), bool)
    chosen[np.lexsort((numbers, texts))] = ranks(lengths) < np.repeat(counts, lengths)
    return chosen
