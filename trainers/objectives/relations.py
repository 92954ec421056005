"""Which other candidates, on any worker or in the queue, are positives of a query, wholly or in part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from data_services.schema import class_id
from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN, equal_classes, known
from trainers.objectives.sections.contrastive import Positives, SoftTargets


@dataclass(frozen=True)
class SharedTargets:
    """t_ij = 1 where the pair shares what `section` names, else 0."""

    section: Positives

    def of(self, these: Keys, others: Keys, dtype: torch.dtype) -> Tensor:
        """[n, m]"""
        shared = torch.zeros(len(these), len(others), dtype=torch.bool, device=these.query_ids.device)
        if self.section.same_document:
            shared |= equal_classes(these.document_ids, others.document_ids)
        if self.section.same_query:
            shared |= equal_classes(these.query_ids, others.query_ids)
        if self.section.same_label:
            shared |= equal_classes(*known("labels", these, others))
        return shared.to(dtype)


@dataclass(frozen=True)
class OnlyTargets:
    """Hides whatever is no positive."""

    targets: SharedTargets
    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        logits.masked_fill_(self.targets.of(these, others, logits.dtype) == 0, HIDDEN)


class PartialTargets:
    """t_ij between 0 and 1: how like the pair's labels are, and `relevance` of a query's own documents; the larger."""

    def __init__(self, section: SoftTargets) -> None:
        self._section = section
        ids = sorted({class_id(label) for alike in section.alike for label in alike.labels})
        self._labels = torch.tensor(ids, dtype=torch.int64)
        # The last row and column are of labels that the section doesn't name.
        self._similarity = torch.zeros(len(ids) + 1, len(ids) + 1, dtype=torch.float64)
        for alike in section.alike:
            at = torch.tensor([ids.index(class_id(label)) for label in alike.labels])
            pairs = at[:, None], at[None]
            self._similarity[pairs] = self._similarity[pairs].clamp(min=alike.similarity)

    def of(self, these: Keys, others: Keys, dtype: torch.dtype) -> Tensor:
        """[n, m]"""
        targets = torch.zeros(len(these), len(others), dtype=dtype, device=these.query_ids.device)
        if self._section.alike:
            mine, theirs = known("labels", these, others)
            similarity = self._similarity.to(targets)[self._places(mine)[:, None], self._places(theirs)[None]]
            targets = similarity.masked_fill(equal_classes(mine, theirs), 1)
        if self._section.scores:
            targets = torch.maximum(targets, _relevant(these, others, dtype))
            targets = torch.maximum(targets, _relevant(others, these, dtype).T)
        return targets

    def _places(self, labels: Tensor) -> Tensor:
        """[n] row of the table of each label."""
        named = self._labels.to(labels.device)
        at = torch.searchsorted(named, labels).clamp(max=len(named) - 1)
        return torch.where(named[at] == labels, at, len(named))


def relevance(scores: Tensor, queries: int) -> Tensor:
    """[d] of `Embedded.scores`; of a positive, the first so many, 1 where it isn't known, of any other document 0.

    Raises ValueError where one is negative.
    """
    if (scores < 0).any():
        least = float(scores[scores < 0].min())
        raise ValueError(f"scores has {least:g}: soft_targets needs scores that aren't negative, as targets are")
    unknown = scores.new_zeros(len(scores))
    unknown[:queries] = 1
    return torch.where(scores.isnan(), unknown, scores)


def _relevant(these: Keys, others: Keys, dtype: torch.dtype) -> Tensor:
    """[n, m] relevance of a candidate of `others` to the query that it was given with, 0 of any other pair."""
    if others.relevance is None:
        return torch.zeros(len(these), len(others), dtype=dtype, device=these.query_ids.device)
    own = equal_classes(these.query_ids, others.query_ids)
    if others.rejects is not None:
        own |= equal_classes(these.query_ids, others.rejects)
    return own * others.relevance.to(dtype)[None]
