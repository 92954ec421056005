"""InfoNCE and its family over the global batch and the queue, in one direction or both.

    row_i   = -log  exp(s_ii/t) / (exp(s_ii/t) + sum_{j in N_i} exp(s_ij/t))     query i among candidates
    col_i   = -log  exp(s_ii/t) / (exp(s_ii/t) + sum_{j in M_i} exp(s_ji/t))     positive i among queries
    L       = mean_i row_i                            directions: query_to_document
    L       = (mean_i row_i + mean_i col_i) / 2       directions: both

s is the similarity (the cosine, of unit vectors), t the temperature. N_i: every worker's documents, hard negatives
included, and the queue, without i's positive and without what the masks hide. M_i: every worker's queries, and a
query-side queue, without i and without what the masks hide. Each mean is over the queries that have something to be
compared with in that direction, weighted where pairs have weights.

What one query's loss is made of is in `nats.py`. Sources: van den Oord et al., arXiv:1807.03748, eq. 4; both
directions: Radford et al., arXiv:2103.00020, figure 3; the queue: He et al., arXiv:1911.05722, eq. 1; queries and
documents among themselves: Li et al. (GTE), arXiv:2308.03281, eq. 3; alignment and uniformity: Wang & Isola,
arXiv:2005.10242, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from trainers.collectives import Group
from trainers.negative_queue import side_of
from trainers.objectives.blocks import Block
from trainers.objectives.embedded import Embedded, LossShare, number, scores_of, wide
from trainers.objectives.keys import Keys
from trainers.objectives.masks import (
    AboveCeiling,
    Harder,
    Mask,
    OtherClass,
    SameClass,
    SameId,
    Sampled,
    SimilarReference,
    Unrelated,
)
from trainers.objectives.nats import Side, joined, losses, wanted, weighted_positives
from trainers.objectives.observed import metrics_of, observed
from trainers.objectives.relations import OnlyTargets, PartialTargets, SharedTargets, relevance
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.numbers import Learned, value_at
from trainers.objectives.sharded_softmax import Reductions, exchange
from trainers.objectives.similarity import SIMILARITIES, Keyed, MaxSim, Reversed, Similarity

LOG_TEMPERATURE = "log_temperature"


class Contrastive:
    """The loss of `section` over the workers of `group`.

    Its metrics, of the whole global batch:
        loss                L
        accuracy            share of queries whose positive outscores every negative (and every other soft target)
        alignment           mean squared distance of a query and its positive
        uniformity          log mean exp(-2 |q_i - q_j|^2) over pairs of queries
        queue_hardness      the queues' share of the soft-max denominator, mean over queries
        nothing_to_compare  queries with no negative, or only targets of 0; accuracy and hardness leave them out, as L
                            does
        temperature         where it isn't a constant
    """

    def __init__(self, section: ContrastiveSection, group: Group) -> None:
        self._section, self._group = section, group
        self._score = SIMILARITIES[section.similarity]()
        self._masks = _masks(section)
        weights: list[Mask] = [Harder(section.harder)] if section.harder else []
        weights += [Sampled()] if section.sampling_correction else []
        self._shared = SharedTargets(section.positives) if section.positives else None
        partial = PartialTargets(section.soft_targets) if section.soft_targets else None
        self._wanted = wanted(section, tuple(weights), self._shared or partial)
        self._both = section.directions == "both"
        start = section.temperature.start if isinstance(section.temperature, Learned) else None
        self.learned: Mapping[str, float] = {} if start is None else {LOG_TEMPERATURE: math.log(start)}

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result. Raises ValueError where `global_queries` isn't the sum of
        every worker's b, or a mask's column is missing."""
        temperature = self._temperature(embedded)
        row_pairs, column_pairs = self._own_pairs(embedded)
        query_keys, document_keys = self._keys(embedded, row_pairs, temperature)
        if self._documents_move(embedded):
            there = self._from_documents(embedded, query_keys, document_keys, temperature)
        else:
            there = self._among_candidates(embedded, query_keys, document_keys, temperature)
        back = self._among_queries(embedded, query_keys, document_keys, temperature)
        return self._reduce(embedded, row_pairs, column_pairs, there, back, temperature)

    def _temperature(self, embedded: Embedded) -> float | Tensor:
        temperature = self._section.temperature
        if isinstance(temperature, Learned):
            return embedded.learned[LOG_TEMPERATURE].exp()
        return value_at(temperature, embedded.progress)

    def _own_pairs(self, embedded: Embedded) -> tuple[Tensor, Tensor]:
        """[b] each: similarity of every query and its positive, for the query's and for the positive's direction."""
        b = len(embedded.queries)
        queries = Keyed(wide(embedded.queries), embedded.query_keys)
        positives = Keyed(wide(embedded.positives), embedded.document_keys[:b])
        if self._section.positive_encoding == "online":
            pairs = self._score.of_pairs(queries, positives)
            return pairs, pairs
        theirs, their_documents = (wide(x[:b]) for x in momentum(embedded))
        return (
            self._score.of_pairs(queries, Keyed(their_documents, positives.keys)),
            self._score.of_pairs(Keyed(theirs, queries.keys), positives),
        )

    def _keys(self, embedded: Embedded, pairs: Tensor, temperature: float | Tensor) -> tuple[Keys, Keys]:
        """The keys of queries and documents with what soft targets and masks of false negatives need."""
        queries, documents, rule = embedded.query_keys, embedded.document_keys, self._section.false_negatives
        if self._section.soft_targets and self._section.soft_targets.scores:
            documents = replace(documents, relevance=self._relevance(embedded))
        if rule is None:
            return queries, documents
        if rule.reference is not None:
            mine, theirs = momentum(embedded)
            return replace(queries, reference=mine), replace(documents, reference=theirs)
        positive = pairs.detach()
        if self._shared is not None:  # the hardest positive, wherever it is: the largest of the negated scores
            masks = (OnlyTargets(self._shared),)
            block = Block(embedded.documents.detach(), documents, masks, fresh=False, diagonal=True)
            others = self._exchange(embedded, embedded.queries.detach(), queries, [block], -1.0, plain=True).rows
            positive = torch.minimum(positive, -others.hardest)
        if rule.margin is not None:
            bound = positive - rule.margin
        else:
            assert rule.share is not None, "FalseNegatives has exactly one of its keys"
            bound = positive * rule.share
        ceiling = bound / number(temperature)
        beyond = ceiling.new_full((len(documents) - len(ceiling),), torch.inf)
        return replace(queries, ceiling=ceiling), replace(documents, ceiling=torch.cat([ceiling, beyond]))

    def _relevance(self, embedded: Embedded) -> Tensor:
        """[d] how much of a positive each document is for its owner."""
        return relevance(scores_of(embedded, "objective.soft_targets"), len(embedded.queries))

    def _exchange(
        self,
        embedded: Embedded,
        rows: Tensor,
        keys: Keys,
        blocks: list[Block],
        temperature: float | Tensor,
        *,
        plain: bool = False,
        documents_move: bool = False,
        score: Similarity | None = None,
    ) -> Reductions:
        return exchange(
            rows,
            keys,
            blocks,
            temperature=temperature,
            tile=self._section.tile,
            group=self._group,
            score=score or self._score,
            wanted=None if plain else self._wanted,
            sizes=embedded.document_counts if documents_move else embedded.query_counts,
            operands=embedded.operands,
        )

    def _among_candidates(
        self, embedded: Embedded, queries: Keys, documents: Keys, temperature: float | Tensor
    ) -> Reductions:
        """Queries over all workers' documents, each other where that is asked, and the queues of documents."""
        online = self._section.positive_encoding == "online"
        vectors = embedded.documents if online else momentum(embedded)[1]
        kept = slice(0, 0) if self._section.batch_negatives == "none" else slice(None)
        masks = (*self._masks, Unrelated()) if self._section.batch_negatives == "own" else self._masks
        columns = self._both and online and kept.stop is None
        blocks = [Block(vectors[kept], documents[kept], masks, fresh=online, diagonal=True, columns=columns)]
        if self._section.among_queries:
            blocks.append(Block(embedded.queries, queries, self._masks, diagonal=True))
        blocks += self._stored(embedded, "documents")
        return self._exchange(embedded, embedded.queries, queries, blocks, temperature)

    def _documents_move(self, embedded: Embedded) -> bool:
        """Of token vectors, whether the documents are the shorter side and may travel: what has no query to stay
        with, a queue say, must stay itself. Collective."""
        section = self._section
        if embedded.pooled or embedded.queues or section.among_queries or section.positive_encoding == "momentum":
            return False
        own = [[*x.shape[:2]] for x in (embedded.queries, embedded.documents)]
        shapes = self._group.all_gather(torch.tensor([own], device=embedded.queries.device), [1] * self._group.size)
        tokens = shapes[:, :, 0].sum(0) * shapes[:, :, 1].amax(0)  # as they would travel, padded to the longest
        return bool(tokens[1] < tokens[0])

    def _from_documents(
        self, embedded: Embedded, queries: Keys, documents: Keys, temperature: float | Tensor
    ) -> Reductions:
        """The same as `_among_candidates`, of what a worker's own queries see and of their positives as columns, with
        the documents of all workers travelling to the queries."""
        block = Block(embedded.queries, queries, self._masks, diagonal=True, columns=True)
        score, moving = Reversed(MaxSim()), embedded.documents
        found = self._exchange(embedded, moving, documents, [block], temperature, score=score, documents_move=True)
        b = len(embedded.queries)
        return Reductions(found.columns, found.rows[slice(0, b)], found.columns.denominators[:1], found.exchange)

    def _among_queries(
        self, embedded: Embedded, queries: Keys, documents: Keys, temperature: float | Tensor
    ) -> Reductions | None:
        """Positives over what isn't reduced as columns of the first exchange: a queue of queries, momentum encodings
        of queries, the other positives. None where there is none of it: then this second exchange isn't needed."""
        if not self._both:
            return None
        positives = documents[: len(embedded.queries)]
        # Seen from its document, a query answers; the document's own query is what equals the key of its row.
        keys = replace(positives, query_ids=queries.query_ids, document_ids=queries.document_ids)
        blocks = []
        if self._section.positive_encoding == "momentum" and self._section.batch_negatives != "none":
            blocks.append(Block(momentum(embedded)[0], queries, self._masks, fresh=False, diagonal=True))
        if self._section.among_documents:
            blocks.append(Block(embedded.positives, keys, self._masks, diagonal=True))
        if self._section.batch_negatives == "none":
            blocks.append(Block(embedded.queries[:0], queries[:0], diagonal=True))
        blocks += self._stored(embedded, "queries")
        if not blocks:
            return None
        return self._exchange(embedded, embedded.positives, keys, blocks, temperature)

    def _stored(self, embedded: Embedded, side: str) -> list[Block]:
        """The rows of a side's queues. They are the momentum encoder's, hence their own reference."""
        rule, share = self._section.false_negatives, value_at(self._section.hardest_share, embedded.progress)
        blocks = []
        for name, rows in sorted(embedded.queues.items()):
            if side_of(name) == side:
                keys = replace(rows.keys, numbers=rows.numbers)
                if rule is not None and rule.reference is not None:
                    keys = replace(keys, reference=rows.vectors)
                blocks.append(Block(rows.vectors, keys, self._masks, fresh=False, share=share))
        return blocks

    def _reduce(
        self,
        embedded: Embedded,
        row_pairs: Tensor,
        column_pairs: Tensor,
        there: Reductions,
        back: Reductions | None,
        temperature: float | Tensor,
    ) -> LossShare:
        """The loss and the metrics from every query's own positive and its reduced negatives."""
        section, group = self._section, self._group
        soft, target = section.soft_targets, None
        if soft is not None:
            target = self._relevance(embedded)[: len(row_pairs)] if soft.scores else torch.ones_like(row_pairs)
        sides = [Side(row_pairs, there.rows, target=target)]
        if self._both:
            in_batch = section.positive_encoding == "online" and section.batch_negatives != "none"
            columns = there.columns if in_batch else None
            sides.append(Side(column_pairs, joined(columns, back.rows if back else None), target=target))
        if section.normalisation == "joint":
            sides = [Side(row_pairs, joined(*(side.reduced for side in sides)), len(sides))]
        weights = row_pairs.new_ones(len(row_pairs)) if embedded.weights is None else embedded.weights.to(row_pairs)
        compared = [side.compared.to(weights.dtype) * weights for side in sides]
        sums = torch.stack(
            [
                (w * losses(section, side, temperature)).sum()
                + weighted_positives(section, side, temperature, w, group)
                for w, side in zip(compared, sides, strict=True)
            ]
        )
        seen = observed(embedded, sides[0], there, temperature, self._wanted.scales[0], section.tile)
        counts = torch.stack([w.sum() for w in compared])
        totals = group.all_reduce(torch.cat([counts.double(), sums.detach().double(), seen]))
        counts, loss_sums, seen = totals.tensor_split([len(sides), 2 * len(sides)])
        shares = torch.where(counts > 0, 1 / counts, 0) / len(sides)
        if seen[0] != embedded.global_queries:
            raise ValueError(
                f"global_queries is {embedded.global_queries}, the workers hold {int(seen[0])} queries on axis 0"
            )
        metrics = {"loss": float((shares * loss_sums).sum()), **metrics_of(seen[1:], embedded.global_queries)}
        if not isinstance(section.temperature, float | int):
            metrics["temperature"] = number(temperature)
        return LossShare((shares.to(sums.dtype) * sums).sum(), metrics)


def momentum(embedded: Embedded) -> tuple[Tensor, Tensor]:
    """The momentum encoder's vectors of queries and documents."""
    if embedded.momentum_queries is None or embedded.momentum_documents is None:
        raise ValueError("the loss needs the momentum encoder's vectors: set momentum.decay, and give them to it")
    return embedded.momentum_queries, embedded.momentum_documents


def _masks(section: ContrastiveSection) -> tuple[Mask, ...]:
    masks: list[Mask] = []
    if section.mask_same_document or section.mask_same_query:
        masks.append(SameId(section.mask_same_document, section.mask_same_query))
    if section.mask_same_label:
        masks.append(SameClass("labels"))
    masks += [OtherClass(column) for column in section.only_same]
    if section.ignore_unrelated:
        masks.append(Unrelated())
    if (rule := section.false_negatives) is not None:
        masks.append(AboveCeiling() if rule.reference is None else SimilarReference(rule.reference))
    return tuple(masks)
