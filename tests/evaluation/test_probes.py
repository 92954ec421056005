"""Classes by a linear probe and by neighbours, each item by the others."""

from collections import Counter

import numpy as np
import pytest

from data_services.schema import UNKNOWN, UsageError
from evaluation.probes import FOLDS, nearest_labels, probe_accuracies


def test_classes_that_lie_apart_are_told_and_those_that_do_not_are_guessed():
    random = np.random.default_rng(0)
    classes = [7] * 20 + [9] * 10 + [4] * (FOLDS - 1) + [UNKNOWN] * 6  # those of 4 are too few
    apart = np.eye(3)[[0] * 20 + [1] * 10 + [2] * 10] + 0.05 * random.normal(size=(40, 3))
    found = probe_accuracies(apart.astype(np.float32), classes)
    assert found == {"probe_accuracy": 1.0, "knn_accuracy": 1.0, "majority": pytest.approx(2 / 3), "classes": 2.0}
    nowhere = probe_accuracies(np.zeros((40, 3), np.float32), classes)
    assert nowhere["probe_accuracy"] == pytest.approx(2 / 3)


def test_an_item_is_told_by_others_alone_in_parts_with_equally_many_of_each_class():
    """Every vector is one of a kind, so that only its own label could tell it: what memory would get right."""
    classes = [i % 2 for i in range(4 * FOLDS)]
    found = probe_accuracies(np.eye(len(classes), dtype=np.float32), classes)
    assert found["probe_accuracy"] == pytest.approx(0.5)


def test_the_nearest_labels_vote_and_of_equally_many_the_nearer_wins():
    train = np.array([[1, 0], [0.9, 0.1], [0, 1], [0.2, 0.8]], np.float32)
    assert nearest_labels(train, ["a", "b", "b", "a"], np.array([[1, 0]], np.float32), 2) == ["a"]
    assert nearest_labels(train, ["a", "b", "b", "a"], np.array([[1, 0]], np.float32), 3) == [
        Counter(["a", "b", "a"]).most_common(1)[0][0]
    ]


def test_too_few_classes_are_refused():
    with pytest.raises(UsageError, match=f"fewer than two classes have {FOLDS} items"):
        probe_accuracies(np.zeros((6, 2), np.float32), [1] * 5 + [2])
