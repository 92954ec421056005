"""Which pairs are compared, and with what weight: decided where the candidate lives, from keys that travel.

A mask sets hidden entries of a tile of logits to -inf; a weighting adds the logarithm of a weight to them. Both see
`these` keys on axis 0 and `others` on axis 1. One that is `symmetric` says the same of a pair whichever side asks;
any other is asked twice, the second time with the tile transposed, for the candidates' own reductions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from trainers.objectives.keys import UNKNOWN, Keys

HIDDEN = -torch.inf

ClassColumn = Literal["labels", "tasks", "languages", "modalities"]


class Mask(Protocol):
    symmetric: bool

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        """Changes logits [n, m] in place; these [n], others [m]."""
        ...


@dataclass(frozen=True)
class SameId:
    """Hides candidates that are the query's positive in another row, or that answer an equal query."""

    document: bool = True
    query: bool = True
    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        if self.document:
            logits.masked_fill_(these.document_ids[:, None] == others.document_ids[None], HIDDEN)
        if self.query:
            logits.masked_fill_(equal_classes(these.query_ids, others.query_ids), HIDDEN)


@dataclass(frozen=True)
class SameClass:
    """Hides candidates of the query's own class (labels, mostly: they are no negatives)."""

    column: ClassColumn
    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        logits.masked_fill_(equal_classes(*known(self.column, these, others)), HIDDEN)


@dataclass(frozen=True)
class OtherClass:
    """Hides candidates of another class, where both are known: negatives of one task, language or modality only."""

    column: ClassColumn
    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        mine, theirs = known(self.column, these, others)
        differ = (mine[:, None] != theirs[None]) & (mine != UNKNOWN)[:, None] & (theirs != UNKNOWN)[None]
        logits.masked_fill_(differ, HIDDEN)


@dataclass(frozen=True)
class Unrelated:
    """Hides pairs of which it isn't known that the candidate is wrong: leaves a query its own hard negatives."""

    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        wrong = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
        if others.rejects is not None:
            wrong |= equal_classes(these.query_ids, others.rejects)
        if these.rejects is not None:
            wrong |= equal_classes(these.rejects, others.query_ids)
        logits.masked_fill_(~wrong, HIDDEN)


class AboveCeiling:
    """Hides what scores above `Keys.ceiling`, a bound derived from the positive's logit (positive-aware margin:
    Moreira et al., NV-Retriever, arXiv:2407.15831)."""

    symmetric = False

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        assert these.ceiling is not None, "the objective sets ceilings before the exchange"
        logits.masked_fill_(logits > these.ceiling[:, None], HIDDEN)


@dataclass(frozen=True)
class SimilarReference:
    """Hides candidates whose reference vectors' inner product is above a bound: the reference model takes them for
    false negatives (DCLR, Zhou et al., arXiv:2205.00656, eq. 4)."""

    above: float
    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        mine, theirs = known("reference", these, others)
        logits.masked_fill_(mine @ theirs.to(mine.dtype).T > self.above, HIDDEN)


@dataclass(frozen=True)
class Harder:
    """Weights each negative by exp(strength * logit), taken as a constant: hard negatives count more."""

    strength: float
    symmetric = True

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        logits.mul_(1 + self.strength)


class Sampled:
    """Divides each candidate's exponential by the probability with which it was sampled (the logQ correction of
    sampled soft-max: Bengio & Senecal 2008; Yi et al. 2019), from `Keys.log_q`. The positive, which wasn't sampled, is
    left as it is."""

    symmetric = False

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        if others.log_q is not None:
            logits.sub_(others.log_q.to(logits.dtype)[None])


def equal_classes(these: Tensor, others: Tensor) -> Tensor:
    """[n, m] bool, where [n] and [m] are the same and known."""
    return (these[:, None] == others[None]) & (these != UNKNOWN)[:, None]


def known(column: str, these: Keys, others: Keys) -> tuple[Tensor, Tensor]:
    mine, theirs = getattr(these, column), getattr(others, column)
    if mine is None or theirs is None:
        side = "query" if mine is None else "candidate"
        raise ValueError(f"a mask compares {column}, and the {side} keys have none: give batch and queue that column")
    return mine, theirs
