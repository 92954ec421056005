"""Which other candidates, on any worker or in the queue, are positives of a query."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN, equal_classes, known
from trainers.objectives.sections.contrastive import Positives


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
