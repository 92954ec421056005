"""What vectors say of classes that they weren't trained for: a linear probe and the nearest neighbours.

Legend: n items, m items to learn from, D dimensions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from data_services.schema import UNKNOWN, UsageError
from evaluation.search import rank

FOLDS = 5
NEIGHBOURS = 5


def linear_probe(train: np.ndarray, labels: Sequence[Any], test: np.ndarray) -> list[Any]:
    """[n] the label of each of `test` [n, D] by logistic regression (scikit-learn's, L2 with C = 1, to convergence) of
    `train` [m, D]."""
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=5000).fit(train.astype(np.float64), list(labels))
    return list(probe.predict(test.astype(np.float64)))


def nearest_labels(train: np.ndarray, labels: Sequence[Any], test: np.ndarray, neighbours: int) -> list[Any]:
    """[n] the label that most of the nearest of `train` [m, D] have; of equally frequent ones that of the nearer."""
    found, _ = rank(test, train, min(neighbours, len(train)))
    return [Counter(labels[i] for i in row).most_common(1)[0][0] for row in found]


def common_classes(classes: Sequence[int]) -> set[int]:
    """Those of at least `FOLDS` items, UNKNOWN aside. UsageError where there are fewer than two."""
    counts = Counter(its for its in classes if its != UNKNOWN)
    common = {its for its, count in counts.items() if count >= FOLDS}
    if len(common) < 2:
        raise UsageError(f"evaluation.classes: fewer than two classes have {FOLDS} items or more; name another field")
    return common


def probe_accuracies(vectors: np.ndarray, classes: Sequence[int]) -> dict[str, float]:
    """How well a class is told by the vectors [n, D] of the other items, in `FOLDS` parts that are left out in turn.

    Every class of `common_classes` is spread evenly over the parts, others are left out. `majority` is what the most
    frequent class alone would give.
    """
    common, seen = common_classes(classes), Counter[int]()
    kept = [i for i, its in enumerate(classes) if its in common]
    fold = np.zeros(len(kept), np.int64)
    for row, i in enumerate(kept):
        fold[row], seen[classes[i]] = seen[classes[i]] % FOLDS, seen[classes[i]] + 1
    points, labels = vectors[kept], np.array([classes[i] for i in kept])
    right = {"probe_accuracy": 0.0, "knn_accuracy": 0.0}
    for part in range(FOLDS):
        train, test = fold != part, fold == part
        told = points[train], labels[train].tolist(), points[test]
        right["probe_accuracy"] += float((np.array(linear_probe(*told)) == labels[test]).sum())
        right["knn_accuracy"] += float((np.array(nearest_labels(*told, NEIGHBOURS)) == labels[test]).sum())
    most = max(Counter(labels.tolist()).values())
    shares = {name: count / len(kept) for name, count in right.items()}
    return {**shares, "majority": most / len(kept), "classes": float(len(common))}
