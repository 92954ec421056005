"""Is the difference between two models more than the luck of the queries? Resampling over queries.

Both tests speak of other queries of the same kind, not of other training seeds, and both give the same result for the
same seed. Legend: q queries, a and b [q] two models' scores of the same queries in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

_BLOCK = 4_000_000  # resampled queries held at once
RESAMPLES = 10_000


@dataclass(frozen=True)
class Difference:
    """Mean of a − b over the queries, its interval, and the two-sided p of "there is none"."""

    difference: float
    low: float
    high: float
    p: float

    def __str__(self) -> str:
        return f"{self.difference:+.4f} [{self.low:+.4f}, {self.high:+.4f}], p = {self.p:.2g}"


def paired_bootstrap(
    a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES, seed: int = 0, confidence: float = 0.95
) -> Difference:
    """The interval of the mean difference by resampling queries with replacement.

    A percentile interval, widened to what Student's t has of the normal at q queries (Hesterberg 2015, "What Teachers
    Should Know About the Bootstrap", section 3.3): without it intervals over few queries are too narrow. p is the share
    of resampled means that lie as far from the observed mean as that lies from zero (Efron & Tibshirani 1993, ch. 16;
    Sakai 2006 for retrieval), never below 1 / (resamples + 1). ValueError where the shapes differ or q < 2.
    """
    differences = _paired(a, b)
    observed = differences.mean()

    def means(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        return differences[generator.integers(len(differences), size=size)].mean(axis=1)

    drawn = np.concatenate(list(_blocks(means, len(differences), resamples, seed)))
    tail = _tail(confidence, len(differences))
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return Difference(float(observed), float(low), float(high), _share_as_far(drawn - observed, observed))


def paired_randomisation(a: np.ndarray, b: np.ndarray, resamples: int = RESAMPLES, seed: int = 0) -> float:
    """Two-sided p of "the two models are exchangeable": the signs of the differences are drawn anew.

    The share of draws whose mean difference is as large as the observed one (Fisher 1935; Smucker et al. 2007 for
    retrieval), never below 1 / (resamples + 1). ValueError as of `paired_bootstrap`.
    """
    differences = _paired(a, b)

    def means(generator: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
        return np.where(generator.random(size, np.float32) < 0.5, differences, -differences).mean(axis=1)

    drawn = np.concatenate(list(_blocks(means, len(differences), resamples, seed)))
    return _share_as_far(drawn, differences.mean())


def _paired(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a − b [q] float64."""
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"a has shape {a.shape}, b has {b.shape}: both must be [q], of the same queries")
    if len(a) < 2:
        raise ValueError(f"a paired test needs at least 2 queries (axis 0), got {len(a)}")
    return np.asarray(a, np.float64) - np.asarray(b, np.float64)


def _blocks(
    means: Callable[[np.random.Generator, tuple[int, int]], np.ndarray], queries: int, resamples: int, seed: int
) -> Iterator[np.ndarray]:
    """`means` of [draws, q] resampled queries, so many at once as memory allows."""
    generator, at_once = np.random.default_rng(seed), max(1, _BLOCK // queries)
    for start in range(0, resamples, at_once):
        yield means(generator, (min(at_once, resamples - start), queries))


def _tail(confidence: float, queries: int) -> float:
    """The share of resampled means that each end of the interval leaves out."""
    from scipy.stats import norm, t

    return float(norm.cdf(t.ppf((1 - confidence) / 2, queries - 1) * np.sqrt(queries / (queries - 1))))


def _share_as_far(drawn: np.ndarray, observed: float) -> float:
    # A hair of slack: the mean of equal differences is rounded differently from draw to draw.
    as_far = int((np.abs(drawn) >= abs(observed) - 1e-12).sum())
    return (as_far + 1) / (len(drawn) + 1)
