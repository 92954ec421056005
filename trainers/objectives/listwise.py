"""Losses over each query's own graded documents: their order, or their list.

    y_j = Embedded.scores, the grade of document j for its query (NaN: not graded, left out)
    l_j = s(q, k_j) / temperature, q the query that document j belongs to

A query's documents live beside it: only sums are sent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainers.collectives import Group
from trainers.objectives.embedded import Embedded, LossShare, scores_of, weights_of
from trainers.objectives.own_pairs import own_similarities
from trainers.objectives.sections.graded import (
    LambdaRankSection,
    ListMLESection,
    ListNetSection,
    ListwiseSection,
    RankNetSection,
)
from trainers.objectives.sections.numbers import value_at
from trainers.objectives.terms import mean_over_workers

AnySection = TypeVar("AnySection", bound=ListwiseSection)


class _Listwise(ABC, Generic[AnySection]):
    """A mean over the queries of the batch of a loss over each one's own graded documents.

        L = sum_i w_i loss_i / sum_i w_i,     i over the queries with something to compare, w_i their weights

    A query has something to compare if two of its documents have different grades.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: AnySection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Metrics: loss; pair_accuracy, the share of pairs of a query's documents with different grades that are in
        the right order; nothing_to_compare, queries that leave the mean.

        Collective. Raises UsageError without `scores`.
        """
        grades = scores_of(embedded, self._section.kind)
        logits = own_similarities(embedded) / value_at(self._section.temperature, embedded.progress)
        logits, grades = _lists(embedded.owners, len(embedded.queries), logits, grades)
        compared = self.comparable(grades)
        logits, grades, weights = logits[compared], grades[compared], weights_of(embedded)[compared]

        higher = _higher(grades)
        right = higher & (logits[:, :, None] > logits[:, None])
        counts = (~compared).sum(), higher.sum(), right.sum()
        mean = mean_over_workers(self.losses(logits, grades), weights, self._group, counts)
        alone, pairs, ordered = mean.more
        accuracy = ordered / max(1, pairs)
        return LossShare(
            mean.share, {"loss": mean.value, "pair_accuracy": accuracy, "nothing_to_compare": float(alone)}
        )

    @staticmethod
    def comparable(grades: Tensor) -> Tensor:
        """[b] bool, from grades [b, m], NaN where there is none."""
        return _higher(grades).any(2).any(1)

    @abstractmethod
    def losses(self, logits: Tensor, grades: Tensor) -> Tensor:
        """[n] of the n queries with something to compare. logits [n, m]; grades [n, m], NaN: not graded, or padding."""


class ListMLE(_Listwise[ListMLESection]):
    """ListMLE: the likelihood of the graded order when documents are drawn one after the other by soft-max.

        loss = sum_i [log sum_{j: y_j <= y_i} exp l_j - l_i],      over the documents i that have a lower one

    With equal grades the denominators are those of Breslow's tied likelihood: the order among them doesn't matter,
    and among the lowest nothing is asked. Grades of 1 and 0, one 1: the soft-max cross-entropy.

    Source: Xia et al., "Listwise approach to learning to rank", ICML 2008; ties: Breslow, Biometrics 30, 1974.
    """

    def losses(self, logits: Tensor, grades: Tensor) -> Tensor:
        # `itself` keeps the rows of ungraded documents, which aren't summed, from being empty
        itself = torch.eye(grades.shape[1], dtype=torch.bool, device=grades.device)
        lower_or_equal = (grades[:, :, None] >= grades[:, None]) | itself
        drawn_from = torch.where(lower_or_equal, logits[:, None], -torch.inf).logsumexp(2)
        return ((drawn_from - logits) * _higher(grades).any(2)).sum(1)


class ListNet(_Listwise[ListNetSection]):
    """ListNet: the cross-entropy of two soft-maxes, of the grades and of the similarities (top-one probabilities).

        loss = -sum_j softmax(y / grade_temperature)_j log softmax(l)_j

    Equal grades say something here: a query has something to compare if two of its documents are graded.

    Source: Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach", ICML 2007.
    """

    @staticmethod
    def comparable(grades: Tensor) -> Tensor:
        return (~grades.isnan()).sum(1) > 1

    def losses(self, logits: Tensor, grades: Tensor) -> Tensor:
        unknown = grades.isnan()
        target = (grades / self._section.grade_temperature).masked_fill(unknown, -torch.inf).softmax(1)
        log_likely = logits.masked_fill(unknown, -torch.inf).log_softmax(1)
        return -(target * log_likely.masked_fill(unknown, 0)).sum(1)


class RankNet(_Listwise[RankNetSection]):
    """RankNet: the logistic loss of each pair of documents with different grades, their mean.

        loss = mean_{y_i > y_j} log(1 + exp(l_j - l_i))

    Source: Burges et al., "Learning to Rank using Gradient Descent", ICML 2005.
    """

    def losses(self, logits: Tensor, grades: Tensor) -> Tensor:
        higher = _higher(grades)
        return (_logistic(logits) * higher).sum((1, 2)) / higher.sum((1, 2))


class LambdaRank(_Listwise[LambdaRankSection]):
    """LambdaRank and its kin: pairs weigh as much as nDCG@top would change.

        loss = sum_{y_i > y_j} w_ij log(1 + exp(l_j - l_i))
        w_ij = |G_i - G_j| rho_ij             bound: lambdarank, rho_ij   = |1/D(r_i) - 1/D(r_j)|
             = |G_i - G_j| delta_ij           bound: ndcg2,      delta_ij = 1/D(|r_i - r_j|) - 1/D(|r_i - r_j| + 1)
             = |G_i - G_j| (rho_ij + mu delta_ij)                                                 bound: ndcg2++

    r_i is the rank of i by similarity among the query's graded documents, D(r) = log2(1 + r), and G_i the gain
    2^y_i - 1 (gain: linear, y_i) over the largest DCG@top that these documents can have. Pairs count of which one at
    least ranks in the first `top`. w is taken as a constant.

    Source: Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization", CIKM 2018 (logarithms to
    base 2 there); LambdaRank: Burges et al., NIPS 2006.
    """

    def losses(self, logits: Tensor, grades: Tensor) -> Tensor:
        if (grades < 0).any():
            least = float(grades[grades < 0].min())
            raise ValueError(f"scores has {least:g}: lambdarank needs grades that aren't negative, as its gains are")
        higher = _higher(grades)
        return (_logistic(logits) * higher * self._weights(logits.detach(), grades)).sum((1, 2))

    def _weights(self, logits: Tensor, grades: Tensor) -> Tensor:
        """[n, m, m] of each pair of documents."""
        top, unknown = self._section.top or grades.shape[1], grades.isnan()
        order = logits.masked_fill(unknown, -torch.inf).argsort(dim=1, descending=True, stable=True)
        ranks = (order.argsort(1) + 1).to(logits.dtype)
        gains = grades.nan_to_num(0)
        gains = gains.exp2() - 1 if self._section.gain == "exponential" else gains
        places = torch.arange(1, grades.shape[1] + 1, device=logits.device, dtype=logits.dtype)
        ideal = (gains.sort(1, descending=True).values / _discount(places))[:, :top].sum(1)
        gains = gains / ideal[:, None]

        differ = (gains[:, :, None] - gains[:, None]).abs()
        counted = (ranks[:, :, None] <= top) | (ranks[:, None] <= top)
        return differ * counted * self._bound(ranks)

    def _bound(self, ranks: Tensor) -> Tensor:
        """[n, m, m] rho, delta, or rho + mu delta, of ranks [n, m]."""
        inverse = 1 / _discount(ranks)
        rho = (inverse[:, :, None] - inverse[:, None]).abs()
        if self._section.bound == "lambdarank":
            return rho
        apart = (ranks[:, :, None] - ranks[:, None]).abs().clamp(min=1)
        delta = 1 / _discount(apart) - 1 / _discount(apart + 1)
        return delta if self._section.bound == "ndcg2" else rho + self._section.mu * delta


def _lists(owners: Tensor, queries: int, logits: Tensor, grades: Tensor) -> tuple[Tensor, Tensor]:
    """logits [d] and grades [d] of documents as [b, m] of each query's own, m the longest list; padding has logit 0
    and grade NaN."""
    order = owners.argsort(stable=True)
    lengths = owners.bincount(minlength=queries)
    row = owners[order]
    column = torch.arange(len(row), device=row.device) - (lengths.cumsum(0) - lengths)[row]
    shape = queries, int(lengths.max()) if queries else 0
    padded = logits.new_zeros(shape).index_put((row, column), logits[order])
    return padded, grades.new_full(shape, torch.nan).index_put((row, column), grades[order])


def _higher(grades: Tensor) -> Tensor:
    """[n, m, m] bool, y_i > y_j, of grades [n, m]; False where either is NaN."""
    return grades[:, :, None] > grades[:, None]


def _logistic(logits: Tensor) -> Tensor:
    """[n, m, m] log(1 + exp(l_j - l_i)) of logits [n, m]."""
    return softplus(logits[:, None] - logits[:, :, None])


def _discount(rank: Tensor) -> Tensor:
    return torch.log2(1 + rank)
