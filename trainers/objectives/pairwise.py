"""Losses over pairs and triplets: a query, its positive, and negatives of its own or from the whole batch and queue.

Legend: s_ij the similarity of query i and candidate j (for token vectors the sum of maxima), s_ii of its own positive;
N_i the documents of all workers and of the queue, without i's positive and without what the masks hide; w_i the weight
of query i. Queries [b, D] and documents [d, D], or token vectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from trainers.collectives import Group
from trainers.negative_queue import side_of
from trainers.objectives.blocks import Block
from trainers.objectives.contrastive import LOG_TEMPERATURE
from trainers.objectives.embedded import Embedded, LossShare, number
from trainers.objectives.keys import Keys
from trainers.objectives.masks import HIDDEN, AboveCeiling, Mask, SameClass, SameId
from trainers.objectives.own_pairs import own_positives, own_similarities, similarity_of
from trainers.objectives.reductions import Reduced, Wanted
from trainers.objectives.sections.numbers import Learned, value_at
from trainers.objectives.sections.pairwise import (
    AmongCandidatesSection,
    EnergyHingeSection,
    SigmoidSection,
    TripletSection,
)
from trainers.objectives.sharded_softmax import exchange
from trainers.objectives.similarity import NegativeDistance, NegativeSquaredDistance, Similarity
from trainers.objectives.terms import Mean, mean_over_workers, one_vector_a_text

BIAS = "bias"


class Sigmoid:
    """SigLIP: each pair is asked by itself whether it belongs together.

        L = sum_i w_i [ log(1 + exp(-(s_ii/t + c))) + sum_{j in N_i} log(1 + exp(s_ij/t + c)) ] / sum_i w_i

    t is the temperature and c the bias, fixed, scheduled or learned (the temperature by its logarithm). In nats a
    query. A query without negatives still has its positive's part, and is counted.

    Source: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", arXiv:2303.15343, algorithm 1.
    """

    def __init__(self, section: SigmoidSection, group: Group) -> None:
        self._section, self._group = section, group
        self.learned: dict[str, float] = {}
        if isinstance(section.temperature, Learned):
            self.learned[LOG_TEMPERATURE] = math.log(section.temperature.start)
        if isinstance(section.bias, Learned):
            self.learned[BIAS] = section.bias.start

    def __call__(self, embedded: Embedded) -> LossShare:
        """Metrics: loss; accuracy, the share of queries whose positive outscores every negative; nothing_to_compare,
        queries without negatives, which accuracy leaves out; temperature and bias.

        Collective, as is its backward.
        """
        section, group, learned = self._section, self._group, embedded.learned
        temperature: float | Tensor = (
            learned[LOG_TEMPERATURE].exp()
            if isinstance(section.temperature, Learned)
            else value_at(section.temperature, embedded.progress)
        )
        bias: float | Tensor = (
            learned[BIAS] if isinstance(section.bias, Learned) else value_at(section.bias, embedded.progress)
        )
        score = similarity_of(embedded)
        positive = own_positives(embedded, score) / temperature
        apart = _Apart(number(bias))
        # The weights turn the row's log-sum-exp into the logarithm of the sum's derivative by the bias.
        wanted = Wanted(weights=(apart,) if isinstance(bias, Tensor) else (), pointwise=apart)
        rows = among_candidates(embedded, section, group, score, wanted, temperature)
        negatives = rows.pointwise
        if isinstance(bias, Tensor):
            negatives = negatives + (bias - bias.detach()) * rows.denominators[0].detach().exp()
        compared = rows.count > 0
        right = compared & (positive > rows.hardest)
        counts = compared.sum(), right.sum()
        mean = mean_over_workers(softplus(-(positive + bias)) + negatives, embedded.weights, group, counts)
        of_all, correct = mean.more
        return LossShare(
            mean.share,
            {
                "loss": mean.value,
                "accuracy": correct / max(1, of_all),
                "nothing_to_compare": float(mean.count - of_all),
                "temperature": number(temperature),
                "bias": number(bias),
            },
        )


@dataclass(frozen=True)
class _Apart:
    """log(1 + exp(l + bias)) of a negative's logit l; as a weighting, its derivative by the bias: sigmoid(l + bias)."""

    bias: float
    symmetric = True

    def value(self, logits: Tensor) -> Tensor:
        return softplus(logits + self.bias)

    def slope(self, logits: Tensor) -> Tensor:
        return (logits + self.bias).sigmoid_()

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        logits.copy_(logsigmoid(logits + self.bias))


class Triplet:
    """A query's positive is nearer than a negative by a margin.

        L = mean over triplets (i, j) of max(0, s_ij - s_ii + margin),  or log(1 + exp(s_ij - s_ii)) with a soft margin

    weighted by w_i, with s minus the distance |q - k|, minus its square, or the inner product; j is, by `mining`,

        own         each document of query i's own that doesn't answer it (masks and queue don't enter)
        batch_hard  the nearest of N_i
        semi_hard   the nearest of N_i that is not nearer than the positive; queries without one leave the mean
        batch_all   each of N_i, but only those with a loss above 0 count in the mean

    Equally near negatives share the gradient. Units: of s.

    Sources: Hermans et al., "In Defense of the Triplet Loss", arXiv:1703.07737, section 2: batch hard, batch
    all without zeros, soft margin; semi-hard: Schroff et al., FaceNet, arXiv:1503.03832, section 3.2.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: TripletSection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Metrics: loss; triplets in the mean; nothing_to_compare, queries without a negative (not with batch_all).

        Collective, as is its backward. Raises ValueError for the distance of token vectors.
        """
        section, group = self._section, self._group
        if section.similarity == "inner_product":
            score = similarity_of(embedded)
        else:
            one_vector_a_text(embedded, self)
            score = NegativeDistance() if section.similarity == "distance" else NegativeSquaredDistance()
        if section.mining == "own":
            return _of_own_negatives(embedded, score, section, group)
        if section.mining == "batch_all":
            return _of_all_negatives(embedded, score, section, group)
        return _of_hardest_negatives(embedded, score, section, group)


class EnergyHinge:
    """PromCSE's hinge: the positive is nearer than the hardest negative by a margin, beside an InfoNCE.

        L = sum_i w_i max(0, margin + max_{j in N_i} s_ij - s_ii) / sum_i w_i

    over the queries that have a negative; s is the inner product. `triplet` with mining: batch_hard.

    Source: Jiang et al., "Improved Universal Sentence Embeddings with Prompt-based Contrastive Learning and
    Energy-based Learning", arXiv:2203.06875.
    """

    learned: Mapping[str, float] = {}

    def __init__(self, section: EnergyHingeSection, group: Group) -> None:
        self._section, self._group = section, group

    def __call__(self, embedded: Embedded) -> LossShare:
        """Metrics: loss; triplets in the mean; nothing_to_compare, queries without a negative. Collective, as is its
        backward."""
        return _of_hardest_negatives(embedded, similarity_of(embedded), self._section, self._group)


def _of_own_negatives(embedded: Embedded, score: Similarity, section: TripletSection, group: Group) -> LossShare:
    b = len(embedded.queries)
    similarity, owners = own_similarities(embedded, score), embedded.owners[b:]
    doesnt_answer = embedded.document_keys.query_ids[b:] != embedded.query_keys.query_ids[owners]
    losses = _hinge(similarity[b:] - similarity[:b][owners], section)[doesnt_answer]
    owners = owners[doesnt_answer]
    alone = (owners.bincount(minlength=b) == 0).sum()
    mean = mean_over_workers(losses, None if embedded.weights is None else embedded.weights[owners], group, [alone])
    return _triplets(mean, nothing_to_compare=mean.more[0])


def _of_hardest_negatives(
    embedded: Embedded, score: Similarity, section: TripletSection | EnergyHingeSection, group: Group
) -> LossShare:
    positive = own_positives(embedded, score)
    masks: tuple[Mask, ...] = ()
    if isinstance(section, TripletSection) and section.mining == "semi_hard":
        embedded = replace(embedded, query_keys=replace(embedded.query_keys, ceiling=positive.detach()))
        masks = (AboveCeiling(),)
    rows = among_candidates(embedded, section, group, score, Wanted(hardest=True), masks=masks)
    compared = rows.count > 0
    losses = _hinge((rows.hardest - positive)[compared], section)
    mean = mean_over_workers(losses, None if embedded.weights is None else embedded.weights[compared], group)
    return _triplets(mean, nothing_to_compare=float(embedded.global_queries - mean.count))


def _of_all_negatives(embedded: Embedded, score: Similarity, section: TripletSection, group: Group) -> LossShare:
    assert section.margin is not None, "the section asks for one with batch_all"
    positive = own_positives(embedded, score)
    ceiling = positive.detach() - section.margin
    violated = replace(embedded, query_keys=replace(embedded.query_keys, ceiling=ceiling))
    above = _AboveCeiling()
    rows = among_candidates(violated, section, group, score, Wanted(pointwise=above), masks=(above,))
    # The exchange takes the ceilings for constants: each counted negative has slope -1 in its query's positive.
    totals = rows.pointwise - (positive - positive.detach()) * rows.count
    some = rows.count > 0
    count = rows.count[some]
    weights = count if embedded.weights is None else count * embedded.weights[some]
    mean = mean_over_workers(totals[some] / count, weights, group, [count.sum()])
    return _triplets(replace(mean, count=int(mean.more[0])))


def _triplets(mean: Mean, **metrics: float) -> LossShare:
    return LossShare(mean.share, {"loss": mean.value, "triplets": float(mean.count), **metrics})


def _hinge(excess: Tensor, section: TripletSection | EnergyHingeSection) -> Tensor:
    return softplus(excess) if section.margin is None else (excess + section.margin).relu()


class _AboveCeiling:
    """How far a negative's similarity is above its query's ceiling; those that aren't are hidden."""

    symmetric = False

    def apply(self, logits: Tensor, these: Keys, others: Keys) -> None:
        assert these.ceiling is not None
        logits.sub_(these.ceiling[:, None])
        logits.masked_fill_(logits <= 0, HIDDEN)

    def value(self, logits: Tensor) -> Tensor:
        return logits.clamp(min=0)

    def slope(self, logits: Tensor) -> Tensor:
        return (logits > 0).to(logits.dtype)


def among_candidates(
    embedded: Embedded,
    section: AmongCandidatesSection,
    group: Group,
    score: Similarity,
    wanted: Wanted,
    temperature: float | Tensor = 1.0,
    masks: tuple[Mask, ...] = (),
) -> Reduced:
    """What is reduced of each query [b] over N_i. Collective, as is its backward."""
    if section.mask_same_document or section.mask_same_query:
        masks = SameId(section.mask_same_document, section.mask_same_query), *masks
    if section.mask_same_label:
        masks = SameClass("labels"), *masks
    blocks = [Block(embedded.documents, embedded.document_keys, masks, diagonal=True)]
    if section.queue:
        stored = (rows for name, rows in sorted(embedded.queues.items()) if side_of(name) == "documents")
        blocks += [Block(rows.vectors, rows.keys, masks, fresh=False) for rows in stored]
    return exchange(
        embedded.queries,
        embedded.query_keys,
        blocks,
        temperature=temperature,
        tile=section.tile,
        group=group,
        score=score,
        wanted=wanted,
        sizes=embedded.query_counts,
    ).rows
