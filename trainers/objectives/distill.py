"""Losses that learn from a teacher: from its scores of a query's documents, or from its vectors of the texts.

Legend: s_ij the similarity of query i and document j (the inner product; for token vectors the sum of maxima),
y_j = Embedded.scores the teacher's score of document j for the query that owns it; m the teacher's vectors, which are
the momentum encoder's or, with `teacher: data`, come with the batch.
A document whose score is NaN isn't known to the teacher and takes no part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.objectives.blocks import Block
from trainers.objectives.embedded import Embedded, LossShare, scores_of
from trainers.objectives.keys import Keys
from trainers.objectives.own_pairs import own_similarities
from trainers.objectives.reductions import Reduced, Wanted
from trainers.objectives.sections.distill import (
    EmbeddingDistillSection,
    KLDistillSection,
    MarginMSESection,
    SimilarityDistillSection,
)
from trainers.objectives.sharded_softmax import exchange
from trainers.objectives.terms import mean_over_workers, one_vector_a_text


class MarginMSE:
    """The student's margin between a query's positive and each of its further documents follows the teacher's.

        L = mean_ij [(a s_ii - a s_ij) - (y_i - y_j)]^2

    i is a query and its positive, j one of its further documents, a the `scale`. The mean is over all such pairs,
    each weighted as its query. Units: squared teacher scores.
    Source: Hofstätter et al., Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge
    Distillation, arXiv:2010.02666, eq. 3.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: MarginMSESection, group: Group) -> None:
        self._scale, self._group = section.scale, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective. Metrics: loss; margins, how many were compared. Raises UsageError without `scores`."""
        teacher, b = scores_of(embedded, "margin_mse"), len(embedded.queries)
        owners = embedded.owners[b:]
        errors = self._scale * _margins(own_similarities(embedded), owners) - _margins(teacher, owners)
        known = ~errors.isnan()
        weights = None if embedded.weights is None else embedded.weights[owners][known]
        mean = mean_over_workers(errors[known].square(), weights, self._group)
        return LossShare(mean.share, {"loss": mean.value, "margins": float(mean.count)})


class KLDistill:
    """The student's distribution over a query's own documents, its positive included, follows the teacher's.

        L = t^2 mean_i sum_j p_ij (log p_ij - log p'_ij),   p_i = softmax_j(y_j / t'),  p'_i = softmax_j(s_ij / t)

    t is `temperature`, t' `teacher_temperature`, j the documents of query i. t^2 keeps gradients alike when t changes.
    The mean is over queries with two scored documents or more. In nats, times t^2.
    Sources: Hinton et al., Distilling the Knowledge in a Neural Network, arXiv:1503.02531, section 2; over documents:
    Lin et al., Distilling Dense Representations for Ranking using Tightly-Coupled Teachers, arXiv:2010.11386.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: KLDistillSection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective. Metrics: loss; nothing_to_compare, queries that leave the mean. Raises UsageError without
        `scores`."""
        teacher, b = scores_of(embedded, "kl_distill"), len(embedded.queries)
        known = ~teacher.isnan()
        owners, temperature = embedded.owners[known], self._section.temperature
        target = _log_softmax_by_owner(teacher[known] / self._section.teacher_temperature, owners, b)
        own = _log_softmax_by_owner(own_similarities(embedded)[known] / temperature, owners, b)
        divergence = own.new_zeros(b).index_add(0, owners, target.exp() * (target - own))
        compared = owners.bincount(minlength=b) > 1
        weights = None if embedded.weights is None else embedded.weights[compared]
        mean = mean_over_workers(temperature**2 * divergence[compared], weights, self._group)
        nothing = float(embedded.global_queries - mean.count)
        return LossShare(mean.share, {"loss": mean.value, "nothing_to_compare": nothing})


class EmbeddingDistill:
    """Each text's vector follows the teacher's of the same text.

        L = mean_i 1 - cos(x_i, m_i)              distance: cosine
        L = mean_i |x_i - m_i|^2 / D              distance: mse; for unit vectors 2/D times the other

    The mean is over the queries, the documents (hard negatives too) or all texts alike, each weighted as its query.
    Sources: Grill et al., Bootstrap Your Own Latent, arXiv:2006.07733, eq. 2 (half of it); as mean squared error:
    Reimers & Gurevych, arXiv:2004.09813, section 2.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: EmbeddingDistillSection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective. Metrics: loss. Raises UsageError without the teacher or where it has other dimensions, ValueError
        for token vectors."""
        one_vector_a_text(embedded, self)
        teacher_queries, teacher_documents = _vectors(embedded, self._section.teacher, "embedding_distill")
        dimensions, of_teacher = embedded.queries.shape[1], teacher_queries.shape[1]
        if dimensions != of_teacher:
            raise UsageError(
                f"embedding_distill compares vectors of {dimensions} dimensions with a teacher's of {of_teacher}: take "
                "similarity_distill, or a model.head as wide as the teacher"
            )
        owner = torch.arange(len(embedded.queries), device=embedded.owners.device)
        sides = {
            "queries": [(embedded.queries, teacher_queries, owner)],
            "documents": [(embedded.documents, teacher_documents, embedded.owners)],
        }
        sides["both"] = sides["queries"] + sides["documents"]
        own, teacher, owners = (torch.cat(x) for x in zip(*sides[self._section.of], strict=True))
        if self._section.distance == "cosine":
            distances = 1 - cosine_similarity(own, teacher, dim=1)
        else:
            distances = (own - teacher).square().mean(1)
        weights = None if embedded.weights is None else embedded.weights[owners]
        mean = mean_over_workers(distances, weights, self._group)
        return LossShare(mean.share, {"loss": mean.value})


@dataclass(frozen=True)
class _TeacherProbabilities:
    """p_ij of `SimilarityDistill`, from keys whose `reference` holds [m_i / t', -log sum] and [m_j, 1]."""

    def of(self, these: Keys, others: Keys, dtype: torch.dtype) -> Tensor:
        assert these.reference is not None
        assert others.reference is not None
        return (these.reference @ others.reference.T).exp_().to(dtype)


class SimilarityDistill:
    """A query's distribution over the documents of the whole batch follows the teacher's, whatever its dimensions.

        L = -mean_i sum_j p_ij log p'_ij,   p_i = softmax_j(m_i.m_j / t'),  p'_i = softmax_j(s_ij / t)

    t is `temperature`, t' `teacher_temperature`; j runs over the documents of all workers, hard negatives and the
    query's own included. In nats; the least it can be is the mean entropy of p_i.
    Source: Fang et al., SEED, arXiv:2101.04731, eq. 4, with the batch in the place of its queue.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: SimilarityDistillSection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result. Metrics: loss. Raises UsageError without the teacher,
        ValueError for token vectors."""
        one_vector_a_text(embedded, self)
        teacher_queries, teacher_documents = _vectors(embedded, self._section.teacher, "similarity_distill")
        t, of_teacher = self._section.temperature, self._section.teacher_temperature
        query_keys, document_keys = _bare(embedded.query_keys), _bare(embedded.document_keys)
        with torch.no_grad():
            teachers = teacher_queries, teacher_documents
            sums = self._over_batch(*teachers, query_keys, document_keys, of_teacher, embedded.query_counts)
            normalisers = sums.denominators[0][:, None]
            ones = normalisers.new_ones(len(teacher_documents), 1)
        asked = replace(query_keys, reference=torch.cat([teacher_queries / of_teacher, -normalisers], 1))
        among = replace(document_keys, reference=torch.cat([teacher_documents, ones], 1))
        wanted = Wanted(targets=_TeacherProbabilities(), soft=True)
        own = embedded.queries, embedded.documents
        found = self._over_batch(*own, asked, among, t, embedded.query_counts, wanted)
        mean = mean_over_workers(found.denominators[0] - found.target_sum, embedded.weights, self._group)
        return LossShare(mean.share, {"loss": mean.value})

    def _over_batch(
        self,
        queries: Tensor,
        documents: Tensor,
        query_keys: Keys,
        document_keys: Keys,
        temperature: float,
        sizes: list[int] | None,
        wanted: Wanted | None = None,
    ) -> Reduced:
        reduced = exchange(
            queries,
            query_keys,
            [Block(documents, document_keys)],
            temperature=temperature,
            tile=self._section.tile,
            group=self._group,
            wanted=wanted,
            sizes=sizes,
        )
        return reduced.rows


def _vectors(embedded: Embedded, teacher: str, kind: str) -> tuple[Tensor, Tensor]:
    """The teacher's vectors of queries [b, D'] and documents [d, D'], in the type of the embeddings."""
    if teacher == "momentum":
        return _momentum(embedded, kind)
    if embedded.teacher_queries is None or embedded.teacher_documents is None:
        raise UsageError(f"{kind} needs a teacher's vectors, and the batch has none: name data.teacher.model")
    dtype = embedded.queries.dtype
    return embedded.teacher_queries.to(dtype), embedded.teacher_documents.to(dtype)


def _momentum(embedded: Embedded, kind: str) -> tuple[Tensor, Tensor]:
    """The momentum encoder's vectors of queries [b, D] and documents [d, D]."""
    if embedded.momentum_queries is None or embedded.momentum_documents is None:
        raise UsageError(
            f"{kind} needs the batch's vectors by the momentum encoder, and there are none: give the recipe a "
            "momentum.decay"
        )
    return embedded.momentum_queries, embedded.momentum_documents


def _margins(values: Tensor, owners: Tensor) -> Tensor:
    """[d - b] value of the positive less that of each further document, of values [d] and those documents' owners."""
    further = values[len(values) - len(owners) :]
    return values[owners] - further


def _log_softmax_by_owner(logits: Tensor, owners: Tensor, queries: int) -> Tensor:
    """[d] log-soft-max of logits [d] among the documents of each owner."""
    largest = logits.new_full((queries,), -torch.inf).scatter_reduce(0, owners, logits.detach(), "amax")
    shifted = logits - largest[owners]
    return shifted - logits.new_zeros(queries).index_add(0, owners, shifted.exp()).log()[owners]


def _bare(keys: Keys) -> Keys:
    """The ids alone: what no mask asks for needn't travel."""
    return Keys(keys.query_ids, keys.document_ids)
