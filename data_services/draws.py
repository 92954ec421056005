"""Random numbers that are a function of keys alone: whatever else is drawn, in whatever order, a key gets the same."""

from __future__ import annotations

import numpy as np


def mix(x: np.ndarray) -> np.ndarray:
    """[n] uint64 -> [n] uint64, the finaliser of splitmix64 (Steele et al. 2014): a permutation of 64-bit numbers."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
