"""Is the difference between two models more than the luck of the queries? A paired bootstrap over queries."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_BLOCK = 4_000_000  # resampled queries held at once


@dataclass(frozen=True)
class Difference:
    """Mean of a − b over the queries, its 95 % interval, and the two-sided p of "there is none"."""

    difference: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.p:.2g}"


def paired_bootstrap(a: np.ndarray, b: np.ndarray, resamples: int = 10_000, seed: int = 0) -> Difference:
    """Compare per-query scores a [q] and b [q] of the same queries in the same order.

    Queries are drawn with replacement; the interval is the percentile one, p the share of resampled means
    that lie as far from the observed mean as that lies from zero (Efron & Tibshirani 1993, ch. 13 and 16;
    Sakai 2006 for retrieval), never below 1 / (resamples + 1). The same seed gives the same result.
    It speaks of other queries of the same kind, not of other training seeds. ValueError where the shapes
    differ or q < 2.
    """
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a has shape {a.shape}, b has {b.shape}: both must be [q], of the same queries")
    if len(a) < 2:
        raise ValueError(f"a paired bootstrap needs at least 2 queries (axis 0), got {len(a)}")
    differences = np.asarray(a, np.float64) - np.asarray(b, np.float64)
    observed = differences.mean()
    generator, means, at_once = np.random.default_rng(seed), [], max(1, _BLOCK // len(differences))
    for start in range(0, resamples, at_once):
        size = (min(at_once, resamples - start), len(differences))
        means.append(differences[generator.integers(len(differences), size=size)].mean(axis=1))
    drawn = np.concatenate(means)
    low, high = np.quantile(drawn, [0.025, 0.975])
    # A hair of slack: the mean of equal differences is rounded differently from draw to draw.
    as_far = int((np.abs(drawn - observed) >= abs(observed) - 1e-12).sum())
    return Difference(float(observed), float(low), float(high), (as_far + 1) / (resamples + 1))
