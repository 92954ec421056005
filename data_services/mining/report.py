"""What a mining found, in figures and a sample for the eye."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data_services.mining.filters import Fate

_QUANTILES = {"min": 0.0, "25%": 0.25, "median": 0.5, "75%": 0.75, "max": 1.0}


@dataclass(frozen=True)
class Example:
    """A query with its positives and negatives, each with its score."""

    query: str
    positives: list[tuple[float, str]]
    negatives: list[tuple[float, str]]


@dataclass(frozen=True)
class MiningReport:
    """rows, queries, documents: of the source, unique by text, of the corpus.

    negatives_a_query  {negatives: queries that have so many}
    scores             {"positive" | "negative" | "difference": {"mean", "sd", "min", "25%", …}}, the difference of a
                       negative to its query's hardest positive
    fates              {fate: share of all candidates}, of `filters.Fate` by name
    replaced           hard negatives that the source had; they were candidates like any document
    """

    rows: int
    queries: int
    documents: int
    replaced: int
    negatives_a_query: dict[int, int]
    scores: dict[str, dict[str, float]]
    fates: dict[str, float]
    examples: list[Example]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def without(self) -> int:
        """Queries for which no negative was found."""
        return self.negatives_a_query.get(0, 0)


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and quantiles; nothing of nothing."""
    if not len(values):
        return {}
    quantiles = np.quantile(values, list(_QUANTILES.values()))
    return {"mean": float(values.mean()), "sd": float(values.std())} | {
        name: float(q) for name, q in zip(_QUANTILES, quantiles, strict=True)
    }


def fate_shares(counts: np.ndarray) -> dict[str, float]:
    """[fates] counts to shares by name; those that no candidate met are left out."""
    there = counts.sum() - counts[Fate.NOT_THERE]
    return {
        fate.name.lower(): float(counts[fate] / max(there, 1))
        for fate in Fate
        if counts[fate] and fate != Fate.NOT_THERE
    }


def histogram(counts: Sequence[int] | np.ndarray) -> dict[int, int]:
    """{number: how often}, smallest first."""
    values, times = np.unique(np.asarray(counts, int), return_counts=True)
    return {int(v): int(t) for v, t in zip(values, times, strict=True)}
