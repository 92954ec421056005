"""Terms that shape where texts lie: a query near its positive, different texts apart.

`Alignment` is a mean over pairs. The others compare each text of a side (the queries, or the positives) with every
other one of the global batch: the texts travel through the exchange and meet each worker's own, a text's own place
left out. They know nothing of pairs, so `Embedded.weights` doesn't enter them.

Legend: x_i, x_j two of the B texts [B, D] of one side; sums over i != j run over all B (B - 1) of them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from trainers.collectives import Group
from trainers.objectives.blocks import Block
from trainers.objectives.embedded import Embedded, LossShare, gather_scalars, share_of
from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN
from trainers.objectives.reductions import Reduced, Wanted
from trainers.objectives.sections.terms import (
    AlignmentSection,
    AmongTextsSection,
    KoLeoSection,
    SpreadOutSection,
    UniformitySection,
)
from trainers.objectives.sharded_softmax import exchange
from trainers.objectives.similarity import NegativeSquaredDistance, Similarity

_TINY = 1e-8  # added to squared distances, whose logarithm is taken: equal texts have none

AnySection = TypeVar("AnySection", bound=AmongTextsSection)


@dataclass(frozen=True)
class Mean:
    """A weighted mean over all workers' values.

    share  this worker's part of it, differentiable: the parts of all workers add up to the mean
    value  the mean; 0 where nothing has weight
    count  values of all workers
    more   the sums over workers of what else was given
    """

    share: Tensor
    value: float
    count: int
    more: list[float]


def mean_over_workers(values: Tensor, weights: Tensor | None, group: Group, more: Sequence[Tensor] = ()) -> Mean:
    """sum w_i v_i / sum w_i over the values [n] of every worker, any n on each; weights [n], None: equal. `more` are
    counts that travel in the same message. Collective."""
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype)
    weighted = (weights * values).sum()
    sums = [weighted.detach(), weights.sum(), values.new_tensor(len(values)), *more]
    numerator, denominator, count, *rest = group.all_reduce(torch.stack([x.double() for x in sums])).tolist()
    denominator = denominator or 1.0
    return Mean(weighted / denominator, numerator / denominator, int(count), rest)


class Alignment:
    """L = mean_i |q_i - d_i|^power, d_i the positive of query i.

    Queries [b, D] and documents [d, D]. For unit vectors and power 2 it is the mean of 2 - 2 cos(q_i, d_i).
    Source: Wang & Isola, arXiv:2005.10242, section 4.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: AlignmentSection, group: Group) -> None:
        self._power, self._group = section.power, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective. Metrics: loss. Raises ValueError for token vectors."""
        one_vector_a_text(embedded, self)
        distances = torch.linalg.vector_norm(embedded.queries - embedded.positives, dim=1)
        mean = mean_over_workers(distances.pow(self._power), embedded.weights, self._group)
        return LossShare(mean.share, {"loss": mean.value})


class _AmongTexts(ABC, Generic[AnySection]):
    """A loss over one side's texts, or the mean over both sides' losses. 0 for a batch of one query."""

    learned: Mapping[str, float] = {}

    def __init__(self, section: AnySection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result. Metrics: loss. Raises ValueError for token vectors."""
        one_vector_a_text(embedded, self)
        if embedded.global_queries < 2:
            return LossShare(embedded.queries.sum() * 0, {"loss": 0.0})
        queries, positives = embedded.queries, embedded.positives
        sides = {"queries": [queries], "documents": [positives], "both": [queries, positives]}[self._section.of]
        sizes = embedded.query_counts or self._group.sizes(len(queries), queries.device)
        loss = torch.stack([self._side(texts, sizes) for texts in sides]).mean()
        return LossShare(share_of(loss, self._group), {"loss": float(loss)})

    @abstractmethod
    def _side(self, texts: Tensor, sizes: list[int]) -> Tensor:
        """The whole loss of one side, of which this worker has texts [b, D] and each as many as `sizes` says. It
        reaches the texts through `gather_scalars`."""

    def _with_others(
        self,
        texts: Tensor,
        sizes: list[int],
        score: Similarity | None = None,
        temperature: float = 1.0,
        wanted: Wanted | None = None,
    ) -> Reduced:
        """What is reduced of each of texts [b, D] over all other texts of the side."""
        none = torch.zeros(len(texts), dtype=torch.int64, device=texts.device)
        keys = Keys(none, none)
        return exchange(
            texts,
            keys,
            [Block(texts, keys, diagonal=True)],
            temperature=temperature,
            tile=self._section.tile,
            group=self._group,
            score=score,
            wanted=wanted,
            sizes=sizes,
        ).rows


class Uniformity(_AmongTexts[UniformitySection]):
    """L = log mean_{i != j} exp(-t |x_i - x_j|^2), t the sharpness.

    At most 0; -2t where every two unit vectors are orthogonal. Source: Wang & Isola, arXiv:2005.10242, section 4.
    """

    def _side(self, texts: Tensor, sizes: list[int]) -> Tensor:
        distance, temperature, count = NegativeSquaredDistance(), 1 / self._section.sharpness, sum(sizes)
        rows = self._with_others(texts, sizes, distance, temperature).denominators[0]
        return gather_scalars(rows, self._group, sizes).logsumexp(0) - math.log(count * (count - 1))


@dataclass(frozen=True)
class _Square:
    """A similarity's square, as the exchange sums it."""

    def value(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits == HIDDEN, 0).square_()

    def slope(self, logits: Tensor) -> Tensor:
        return logits.masked_fill(logits == HIDDEN, 0).mul_(2)


class SpreadOut(_AmongTexts[SpreadOutSection]):
    """L = a M1^2 + b max(0, M2 - 1/D), M1 = mean_{i != j} x_i.x_j and M2 = mean_{i != j} (x_i.x_j)^2.

    a, b are `first_moment` and `second_moment`. 0 and 1/D are the moments of points that are spread evenly over the
    sphere in D dimensions. Source: Zhang et al., Learning Spread-out Local Feature Descriptors, arXiv:1708.06320,
    section 3 (global orthogonal regularisation).
    """

    def _side(self, texts: Tensor, sizes: list[int]) -> Tensor:
        count, one_each = sum(sizes), [1] * self._group.size
        pairs, loss = count * (count - 1), texts.new_zeros((), dtype=torch.promote_types(texts.dtype, torch.float32))
        if self._section.first_moment:
            # sum_{i != j} x_i.x_j = |sum_i x_i|^2 - sum_i |x_i|^2 takes D numbers of each worker
            total = gather_scalars(texts.sum(0, keepdim=True).to(loss.dtype), self._group, one_each).sum(0)
            with_self = gather_scalars(texts.to(loss.dtype).square().sum(1), self._group, sizes).sum()
            mean = (total.square().sum() - with_self) / pairs
            loss = loss + self._section.first_moment * mean.square()
        if self._section.second_moment:
            squares = self._with_others(texts, sizes, wanted=Wanted(pointwise=_Square())).pointwise
            mean = gather_scalars(squares, self._group, sizes).sum() / pairs
            loss = loss + self._section.second_moment * (mean - 1 / texts.shape[1]).relu()
        return loss


class KoLeo(_AmongTexts[KoLeoSection]):
    """L = -mean_i log min_{j != i} |x_i - x_j|

    After the Kozachenko-Leonenko estimate of entropy. Texts equally near share the gradient. Source: Sablayrolles et
    al., Spreading vectors for similarity search, arXiv:1806.03198, section 3.
    """

    def _side(self, texts: Tensor, sizes: list[int]) -> Tensor:
        nearest = -self._with_others(texts, sizes, NegativeSquaredDistance(), wanted=Wanted(hardest=True)).hardest
        logs = (nearest.clamp(min=0) + _TINY).log() / 2
        return -gather_scalars(logs, self._group, sizes).mean()


def one_vector_a_text(embedded: Embedded, loss: object) -> None:
    """Raises ValueError where texts have a vector for each token."""
    if not embedded.pooled:
        shape = list(embedded.queries.shape)
        raise ValueError(f"{type(loss).__name__} needs one vector a text [b, D], queries are token vectors {shape}")
