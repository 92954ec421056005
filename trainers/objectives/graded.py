"""Losses over all graded pairs of the batch: similarities in the order that a teacher, an annotator or clicks give.

    y_j = Embedded.scores, the grade of document j for its query (NaN: not graded, left out)
    l_j = s(q, k_j) / temperature, q the query that document j belongs to

All pairs of the global batch are ordered against each other: their scalars are gathered, 24 bytes a pair. Losses over
each query's own list are in listwise.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainers.collectives import Group
from trainers.objectives.embedded import Embedded, LossShare, gather_scalars, scores_of, share_of, weights_of, wide
from trainers.objectives.own_pairs import own_similarities
from trainers.objectives.sections.graded import AngleSection, CosentSection
from trainers.objectives.sections.numbers import value_at
from trainers.objectives.sections.wrappers import GradedWeights
from trainers.objectives.terms import one_vector_a_text


class Cosent:
    """CoSENT: every pair of texts is more similar than all pairs with a lower grade.

        L = log(1 + sum_{y_i > y_j} w_i w_j exp(l_j - l_i))

    i, j run over the graded (query, document) pairs of the whole batch; l is the cosine over the temperature; w is
    the weight of the pair's query (2: as if the pair stood there twice). One logarithm for the batch, no mean.

    Source: Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking", TASLP 2024,
    doi:10.1109/TASLP.2024.3402087, with weights of our own.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: CosentSection | AngleSection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Metrics: loss; ordered_pairs, how many pairs i, j are in the sum; ungraded, documents without a grade.

        Collective. Raises UsageError without `scores`.
        """
        grades = scores_of(embedded, self._section.kind)
        logits = self._similarity(embedded) / value_at(self._section.temperature, embedded.progress)
        weights = weights_of(embedded)[embedded.owners]
        # In float64: the sum runs over the whole batch, and these are a few numbers a document.
        scalars = torch.stack([x.double() for x in (logits, grades, weights.log())], 1)
        scalars = scalars[~grades.isnan() & (weights > 0)]
        loss, pairs = _disorder(*gather_scalars(scalars, self._group).unbind(1))
        ungraded = self._group.all_reduce(grades.isnan().sum())
        metrics = {"loss": float(loss.detach()), "ordered_pairs": float(pairs), "ungraded": float(ungraded)}
        return LossShare(share_of(loss, self._group).to(logits.dtype), metrics)

    def _similarity(self, embedded: Embedded) -> Tensor:
        """[d] of each document and its query."""
        return own_similarities(embedded)


class Angle(Cosent):
    """AnglE: CoSENT with an angle between complex vectors instead of the cosine, which is flat near its ends.

    The first half of a unit vector is the real part, the second the imaginary one: q = a + ib, k = c + id, and

        s(q, k) = |sum_m Re(q_m conj(k_m)) + Im(q_m conj(k_m))| = |a.c + b.d + b.c - a.d|

    The published loss adds this to CoSENT and an in-batch InfoNCE: a recipe lists the three as terms.

    Source: Li & Li, "AnglE-optimized Text Embeddings", arXiv:2309.12871, the angle objective, in the order of
    subtraction of its released code (the paper writes the opposite one).
    """

    def _similarity(self, embedded: Embedded) -> Tensor:
        one_vector_a_text(embedded, self)
        queries, documents = wide(embedded.queries)[embedded.owners], wide(embedded.documents)
        odd = queries.shape[1] % 2
        (a, b), (c, d) = (pad(x, (0, odd)).chunk(2, 1) for x in (queries, documents))
        return (a * c + b * d + b * c - a * d).sum(1).abs()


def _disorder(logits: Tensor, grades: Tensor, log_weights: Tensor) -> tuple[Tensor, Tensor]:
    """(log(1 + sum_{y_i > y_j} w_i w_j exp(l_j - l_i)), number of such i, j) of [n] each, in n log n."""
    order = grades.argsort(descending=True)
    logits, falling, log_weights = logits[order], -grades[order], log_weights[order]
    higher = torch.searchsorted(falling, falling)  # of each pair, how many have a higher grade: the first so many
    nothing = logits.new_full((1,), -torch.inf)
    best_first = torch.cat([nothing, (log_weights - logits).logcumsumexp(0)])
    terms = best_first[higher] + logits + log_weights
    return torch.cat([logits.new_zeros(1), terms]).logsumexp(0), higher.sum()


def graded_weights(section: GradedWeights, embedded: Embedded) -> Embedded:
    """The same batch, each pair weighted by the grade of its positive (an ungraded one: 0), times its weight if any.

        w_i = y_i (gain: linear),   log2(1 + y_i) (logarithmic),   2^y_i - 1 (exponential)

    Raises UsageError without `scores`, ValueError where a grade is negative.

    Source: the mechanism of Zhu et al., "Generalized Contrastive Learning for Multi-Modal Retrieval and Ranking",
    arXiv:2404.08535: a weight per pair from its graded relevance, in an otherwise unchanged loss.
    """
    grades = scores_of(embedded, "graded_weights")[: len(embedded.queries)].nan_to_num(0)
    if (grades < 0).any():
        raise ValueError(f"scores has {float(grades.min()):g}: graded_weights needs grades that aren't negative")
    gains = {"linear": grades, "logarithmic": (1 + grades).log2(), "exponential": grades.exp2() - 1}
    return replace(embedded, weights=weights_of(embedded) * gains[section.gain])
