"""What every task of a suite has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from data_services.items import Item
from data_services.schema import UsageError
from evaluation.excerpts import excerpt
from evaluation.stored import Excerpts, PerQuery
from evaluation.vectors import Vectors


@dataclass(frozen=True)
class TaskScores:
    """metrics: {name: value}; per_query: one by one what is a mean of them."""

    metrics: dict[str, float]
    per_query: PerQuery


@dataclass(frozen=True)
class Task:
    """A task with its texts, made by one of the kinds.

    metrics    what is asked for, the main one first
    languages  of each of `asked_texts`, where that is known
    """

    name: str
    metrics: tuple[str, ...]
    languages: Sequence[str] = field(default=(), kw_only=True)
    kind: ClassVar[str]

    @property
    def main(self) -> str:
        return self.metrics[0]

    def sides(self) -> Mapping[str, Sequence[Item]]:
        """The texts, or images and sounds, that are scored, by what they are: queries, documents, texts."""
        raise NotImplementedError

    @property
    def asked_texts(self) -> Sequence[str]:
        """The text of each single score, where a mean over some of the scores is the metric of that part."""
        return ()

    def asked_items(self) -> Mapping[str, Item]:
        """What each single score is about, by its id; empty where a score is of all texts together."""
        return dict(zip(numbered(len(self.asked_texts)), self.asked_texts, strict=True))

    def found_items(self) -> Mapping[str, Item]:
        """What may be among a score's hits, by id."""
        return {}

    def content(self) -> Any:
        """What decides the scores beside the model, as JSON."""
        raise NotImplementedError

    def score(self, vectors: Vectors) -> TaskScores:
        raise NotImplementedError

    def baselines(self) -> dict[str, TaskScores]:
        """Scores that need no model: BM25 where something is ranked."""
        return {}

    @property
    def counts(self) -> dict[str, int]:
        return {side: len(texts) for side, texts in self.sides().items()}

    def fingerprint(self) -> str:
        """Of name, kind, metrics and data: equal where two evaluations can be compared."""
        told = json.dumps([self.name, self.kind, self.metrics, self.content()], sort_keys=True)
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def asked(self, values: Mapping[str, float], per_query: PerQuery) -> TaskScores:
        """Those of the computed values that are asked for, in that order."""
        scores = {metric: x for metric, x in per_query.scores.items() if metric in self.metrics}
        return TaskScores(
            {metric: float(values[metric]) for metric in self.metrics},
            PerQuery(per_query.query_ids, scores, per_query.hits),
        )


def excerpts_of(task: Task, per_query: PerQuery) -> Excerpts:
    """What the queries and hits of a task's single scores show."""
    asked, found = task.asked_items(), task.found_items()
    hits = dict.fromkeys(id for hits in per_query.hits for id in hits)
    return Excerpts(
        {id: excerpt(asked[id]) for id in per_query.query_ids if id in asked},
        {id: excerpt(found[id]) for id in hits if id in found},
    )


def refuse_empty(name: str, **sides: Sequence[Any]) -> None:
    """UsageError where one of a task's sides has nothing in it."""
    for side, items in sides.items():
        if not len(items):
            raise UsageError(f"task {name} has no {side}: its data is empty")


def numbered(count: int) -> list[str]:
    """Ids of rows without names, from 1; they sort as they count."""
    return [f"{i:0{len(str(count))}d}" for i in range(1, count + 1)]


def means(scores: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {metric: float(np.mean(x)) for metric, x in scores.items()}
