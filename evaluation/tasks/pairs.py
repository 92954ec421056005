"""Tasks over pairs of texts: how similar they are, whether they belong together, which translates which.

Every similarity is the cosine, or the inner product for a model whose similarity that is. Legend: n pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_services.schema import Item, UsageError
from evaluation.search import rank
from evaluation.stored import PerQuery
from evaluation.tasks.base import Task, TaskScores, means, numbered, refuse_empty
from evaluation.vectors import Side, Vectors


@dataclass(frozen=True)
class Pairs(Task):
    """n pairs of texts, both encoded as `side`."""

    first: Sequence[str]
    second: Sequence[str]
    side: Side

    def __post_init__(self) -> None:
        refuse_empty(self.name, pairs=self.first)

    def sides(self) -> dict[str, Sequence[str]]:
        return {"texts": list(dict.fromkeys([*self.first, *self.second]))}

    @property
    def counts(self) -> dict[str, int]:
        return {"pairs": len(self.first)} | super().counts

    def content(self) -> Any:
        return [list(self.first), list(self.second), self.side]

    def asked_items(self) -> Mapping[str, Item]:
        pairs = zip(self.first, self.second, strict=True)
        return dict(zip(numbered(len(self.first)), ({"one": a, "other": b} for a, b in pairs), strict=True))

    def vectors_of(self, vectors: Vectors) -> tuple[np.ndarray, np.ndarray]:
        both = vectors.stored([*self.first, *self.second], self.side).astype(np.float64)
        return both[: len(self.first)], both[len(self.first) :]

    def similarities(self, vectors: Vectors) -> np.ndarray:
        """[n] float32: rounded, so that pairs of equal texts tie."""
        a, b = self.vectors_of(vectors)
        return np.einsum("nd,nd->n", a, b).astype(np.float32)


@dataclass(frozen=True)
class STS(Pairs):
    """Semantic textual similarity: do the similarities order the pairs as people did? scores [n].

    A pair's share of a correlation is the product of its two standardised values (ranks, for Spearman's, ties
    sharing the mean of their ranks): their mean is the correlation.
    """

    scores: Sequence[float]
    kind: ClassVar[str] = "sts"
    METRICS: ClassVar = ("spearman", "pearson")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.scores)) < 2:
            raise UsageError(f"task {self.name}: all scores are equal, nothing correlates with them")

    def content(self) -> Any:
        return [*super().content(), list(self.scores)]

    def score(self, vectors: Vectors) -> TaskScores:
        from scipy.stats import rankdata

        gold, given = np.asarray(self.scores, np.float64), self.similarities(vectors).astype(np.float64)
        products = {
            "spearman": _standard(rankdata(gold)) * _standard(rankdata(given)),
            "pearson": _standard(gold) * _standard(given),
        }
        return self.asked(means(products), PerQuery(numbered(len(gold)), products))


def _standard(values: np.ndarray) -> np.ndarray:
    """Mean 0, deviation 1; of equal values all 0: they correlate with nothing."""
    deviation = values.std()
    return (values - values.mean()) / (deviation if deviation > 0 else 1)


@dataclass(frozen=True)
class PairClassification(Pairs):
    """Does a pair belong together? labels [n] bool.

    ap is the mean of the precision at each positive pair, equal similarities counted as one step; f1 and accuracy
    are those of the best threshold for this data.
    """

    labels: Sequence[bool]
    kind: ClassVar[str] = "pair_classification"
    METRICS: ClassVar = ("ap", "f1", "accuracy")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(set(self.labels)) < 2:
            raise UsageError(
                f"task {self.name}: all pairs have the label {self.labels[0]}, nothing is to be told apart"
            )

    def content(self) -> Any:
        return [*super().content(), list(self.labels)]

    def score(self, vectors: Vectors) -> TaskScores:
        given, gold = self.similarities(vectors), np.asarray(self.labels, bool)
        thresholds, step = np.unique(-given, return_inverse=True)  # from the highest on
        positive = np.cumsum(np.bincount(step, gold, len(thresholds)))
        chosen = np.cumsum(np.bincount(step, minlength=len(thresholds)))
        precision = positive / chosen
        wrong = chosen - positive + gold.sum() - positive
        values = {
            "f1": np.max(2 * positive / (chosen + gold.sum())),
            "accuracy": 1 - min(wrong.min(), gold.sum()) / len(gold),  # also that of calling no pair positive
        }
        ids = np.array(numbered(len(gold)))[gold].tolist()
        ap = {"ap": precision[step][gold]}
        return self.asked(values | means(ap), PerQuery(ids, ap))


@dataclass(frozen=True)
class BitextMining(Pairs):
    """Is a text's translation the nearest of all? Of equally near ones the first; equal texts are one.

    accuracy and back_accuracy in the two directions; f1 of the first weights each text alike (as mteb has it).
    """

    kind: ClassVar[str] = "bitext_mining"
    METRICS: ClassVar = ("f1", "accuracy", "back_accuracy")

    @property
    def asked_texts(self) -> Sequence[str]:
        return self.first

    def score(self, vectors: Vectors) -> TaskScores:
        from sklearn.metrics import f1_score

        a, b = self.vectors_of(vectors)
        there, back = (
            _first_equal(self.second)[rank(a, b, 1)[0][:, 0]],
            _first_equal(self.first)[rank(b, a, 1)[0][:, 0]],
        )
        right = {
            "accuracy": (there == _first_equal(self.second)).astype(float),
            "back_accuracy": (back == _first_equal(self.first)).astype(float),
        }
        f1 = f1_score(_first_equal(self.second), there, average="weighted", zero_division=0)
        return self.asked(means(right) | {"f1": f1}, PerQuery(numbered(len(a)), right))


def _first_equal(texts: Sequence[str]) -> np.ndarray:
    """[n] the position of the first text that is equal to each."""
    first: dict[str, int] = {}
    return np.array([first.setdefault(text, i) for i, text in enumerate(texts)])
