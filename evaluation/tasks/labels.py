"""Tasks over labelled texts: can a classifier, or the labels' own names, tell the labels apart? Do they cluster?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from data_services.schema import UsageError
from evaluation.probes import linear_probe, nearest_labels
from evaluation.search import rank
from evaluation.stored import PerQuery
from evaluation.tasks.base import Task, TaskScores, means, numbered, refuse_empty
from evaluation.vectors import Side, Vectors


@dataclass(frozen=True)
class Labelled(Task):
    """n texts with a label each, encoded as `side`."""

    texts: Sequence[str]
    labels: Sequence[str]
    side: Side

    def __post_init__(self) -> None:
        refuse_empty(self.name, texts=self.texts)
        if len(set(self.labels)) < 2:
            raise UsageError(f"task {self.name}: all texts have the label {self.labels[0]!r}, none can be told apart")

    def sides(self) -> dict[str, Sequence[str]]:
        return {"texts": self.texts}

    @property
    def counts(self) -> dict[str, int]:
        return {"texts": len(self.texts), "labels": len(set(self.labels))}

    def content(self) -> Any:
        return [list(self.texts), list(self.labels), self.side]


@dataclass(frozen=True)
class Classification(Labelled):
    """A classifier of labelled vectors, tried on others.

    accuracy, f1          by `probes.linear_probe`; f1 is the macro mean
    knn_accuracy, knn_f1  by `probes.nearest_labels` of so many `neighbours`
    """

    train_texts: Sequence[str]
    train_labels: Sequence[str]
    neighbours: int
    kind: ClassVar[str] = "classification"
    METRICS: ClassVar = ("accuracy", "f1", "knn_accuracy", "knn_f1")

    @property
    def asked_texts(self) -> Sequence[str]:
        return self.texts

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_empty(self.name, training_texts=self.train_texts)
        if unseen := sorted(set(self.labels) - set(self.train_labels)):
            raise UsageError(
                f"task {self.name}: no training text has the label {unseen[0]!r}, so it can't be learned; add some, or "
                "name the labels that are tried in `labels`"
            )

    @property
    def counts(self) -> dict[str, int]:
        return super().counts | {"training_texts": len(self.train_texts)}

    def content(self) -> Any:
        return [*super().content(), list(self.train_texts), list(self.train_labels), self.neighbours]

    def score(self, vectors: Vectors) -> TaskScores:
        both = vectors.stored([*self.train_texts, *self.texts], self.side)
        train, test = both[: len(self.train_texts)], both[len(self.train_texts) :]
        predicted = {}
        if {"accuracy", "f1"} & set(self.metrics):
            predicted[""] = linear_probe(train, self.train_labels, test)
        if {"knn_accuracy", "knn_f1"} & set(self.metrics):
            predicted["knn_"] = nearest_labels(train, self.train_labels, test, self.neighbours)
        right, f1 = {}, {}
        for prefix, labels in predicted.items():
            right[f"{prefix}accuracy"] = _right(labels, self.labels)
            f1[f"{prefix}f1"] = macro_f1(self.labels, labels)
        return self.asked(means(right) | f1, PerQuery(numbered(len(self.texts)), right))


@dataclass(frozen=True)
class ZeroShot(Labelled):
    """The label whose text is most similar; of equally similar ones the first in the order of their names.

    label_texts: {label: what is encoded for it, as a document}.
    """

    label_texts: dict[str, str]
    kind: ClassVar[str] = "zero_shot"
    METRICS: ClassVar = ("accuracy", "f1")

    @property
    def asked_texts(self) -> Sequence[str]:
        return self.texts

    def content(self) -> Any:
        return [*super().content(), sorted(self.label_texts.items())]

    def score(self, vectors: Vectors) -> TaskScores:
        names = sorted(self.label_texts)
        choices = vectors.stored([self.label_texts[name] for name in names], "document")
        found, _ = rank(vectors.of(self.texts, self.side), choices, 1)
        given = [names[i] for i in found[:, 0]]
        right = {"accuracy": _right(given, self.labels)}
        return self.asked(
            means(right) | {"f1": macro_f1(self.labels, given)}, PerQuery(numbered(len(self.texts)), right)
        )


@dataclass(frozen=True)
class Clustering(Labelled):
    """k-means with as many clusters as labels, `repeats` times from other starts: the mean V-measure (Rosenberg &
    Hirschberg 2007, "V-Measure"). Its single scores are those of the repeats.
    """

    repeats: int
    kind: ClassVar[str] = "clustering"
    METRICS: ClassVar = ("v_measure",)

    def content(self) -> Any:
        return [*super().content(), self.repeats]

    def score(self, vectors: Vectors) -> TaskScores:
        from sklearn.cluster import KMeans
        from sklearn.metrics import v_measure_score

        points, clusters = vectors.stored(self.texts, self.side).astype(np.float64), len(set(self.labels))
        found = [KMeans(clusters, n_init=1, random_state=seed).fit_predict(points) for seed in range(self.repeats)]
        values = {"v_measure": np.array([v_measure_score(self.labels, assigned) for assigned in found])}
        return self.asked(means(values), PerQuery([f"repeat {i}" for i in numbered(self.repeats)], values))


def _right(given: Sequence[str], gold: Sequence[str]) -> np.ndarray:
    return np.array([a == b for a, b in zip(given, gold, strict=True)], float)


def macro_f1(gold: Sequence[str], given: Sequence[str]) -> float:
    """Mean over the labels that occur of 2·precision·recall / (precision + recall), 0 where a label is never right."""
    from sklearn.metrics import f1_score

    return float(f1_score(list(gold), list(given), average="macro", zero_division=0))
