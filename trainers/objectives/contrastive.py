"""InfoNCE over the global batch and the queue, in one direction or both.

    row_i   = -log  exp(s_ii/t) / (exp(s_ii/t) + sum_{j in N_i} exp(s_ij/t))     query i among candidates
    col_i   = -log  exp(s_ii/t) / (exp(s_ii/t) + sum_{j in M_i} exp(s_ji/t))     positive i among queries
    L       = mean_i row_i                            directions: query_to_document
    L       = (mean_i row_i + mean_i col_i) / 2       directions: both

s is the inner product (the cosine, of unit vectors), t the temperature. N_i: every worker's documents, hard
negatives included, and the queue, without i's positive and without what the masks hide. M_i: every worker's
queries, without i and without what the masks hide. Each mean is over the queries that have something to be
compared with in that direction.

Sources: van den Oord et al., arXiv:1807.03748, eq. 4; both directions: Radford et al., arXiv:2103.00020,
figure 3; the queue: He et al., arXiv:1911.05722, eq. 1; alignment and uniformity: Wang & Isola,
arXiv:2005.10242, section 4.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from trainers.collectives import Group
from trainers.config import ObjectiveConfig
from trainers.negative_queue import NO_QUERY, QueueRows
from trainers.objectives.sharded_softmax import (
    Candidates,
    InnerProduct,
    Keys,
    NegativeLogits,
    SameIdMask,
    sharded_softmax,
)


@dataclass(frozen=True)
class Ids:
    """query_ids [b] and document_ids [d] int64: equal ids are equal texts, on any worker."""

    query_ids: Tensor
    document_ids: Tensor

    def to(self, device: torch.device | str) -> Ids:
        return Ids(self.query_ids.to(device), self.document_ids.to(device))


@dataclass(frozen=True)
class LossShare:
    """One worker's share of the global loss.

    loss     scalar L_r with L = sum_r L_r. Its backward, called on every worker, leaves in this worker's
             embeddings the gradient of L (see trainers/collectives.py).
    metrics  of the whole global batch, equal on every worker:
             loss                L
             accuracy            share of queries whose positive outscores every negative
             alignment           mean squared distance of a query and its positive
             uniformity          log mean exp(-2 |q_i - q_j|^2) over pairs of queries
             queue_hardness      the queue's share of the soft-max denominator, mean over queries
             nothing_to_compare  queries with no negative; accuracy and hardness leave them out, as L does
    """

    loss: Tensor
    metrics: dict[str, float]


class Contrastive:
    """The loss of `config` over the workers of `group`."""

    def __init__(self, config: ObjectiveConfig, group: Group) -> None:
        self._config, self._group = config, group
        self._score = InnerProduct(config.temperature)
        self._mask = SameIdMask(config.mask_same_document, config.mask_same_query)
        self._both = config.directions == "both"

    def __call__(
        self, queries: Tensor, documents: Tensor, ids: Ids, global_queries: int, queue: QueueRows | None
    ) -> LossShare:
        """queries [b, D] and documents [d, D], unit vectors, document j < b the positive of query j; b and d
        may differ between workers, b = 0 included. Collective, as is the backward of the result.

        Raises ValueError where shapes disagree or `global_queries` isn't the sum of every worker's b.
        """
        _check(queries, documents, ids, queue)
        b = len(queries)
        answers = ids.query_ids.new_full((len(documents),), NO_QUERY)  # a hard negative answers no query
        answers[:b] = ids.query_ids
        negatives = sharded_softmax(
            queries,
            documents,
            query_keys=Keys(ids.query_ids, ids.document_ids[:b]),
            document_keys=Keys(answers, ids.document_ids),
            queue=None if queue is None else Candidates(queue.vectors, Keys(queue.query_ids, queue.document_ids)),
            score=self._score,
            mask=self._mask,
            tile=self._config.tile,
            columns=self._both,
            group=self._group,
        )
        found = sum(negatives.exchange.sizes)
        if found != global_queries:
            raise ValueError(f"global_queries is {global_queries}, the workers hold {found} queries on axis 0")
        return self._reduce(queries, documents[:b], negatives)

    def _reduce(self, queries: Tensor, positives: Tensor, negatives: NegativeLogits) -> LossShare:
        """The loss and the metrics from every query's own positive and its reduced negatives."""
        work = negatives.row.dtype
        positive = (queries.to(work) * positives.to(work)).sum(1) / self._config.temperature
        directions = [negatives.row, negatives.column] if self._both else [negatives.row]
        # -inf negatives give softplus(-inf) = 0, with a gradient of 0
        sums = torch.stack([softplus(direction - positive).sum() for direction in directions])
        compared = torch.stack([(direction != -torch.inf).sum() for direction in directions])
        observed = self._observe(queries, positives, positive, negatives)
        totals = self._group.all_reduce(torch.cat([compared.double(), sums.detach().double(), observed]))
        counts, loss_sums, observed = totals.tensor_split([len(directions), 2 * len(directions)])
        weights = 1 / counts.clamp(min=1) / len(directions)

        b_global, compared_rows = sum(negatives.exchange.sizes), max(1, int(counts[0]))
        correct, hardness, distance, closeness = observed.tolist()
        pairs = b_global * (b_global - 1)
        metrics = {
            "loss": float((weights * loss_sums).sum()),
            "accuracy": correct / compared_rows,
            "alignment": distance / max(1, b_global),
            "uniformity": float(torch.tensor(closeness / pairs).log()) if pairs else 0.0,
            "queue_hardness": hardness / compared_rows,
            "nothing_to_compare": b_global - float(counts[0]),
        }
        return LossShare((weights.to(work) * sums).sum(), metrics)

    @torch.no_grad()
    def _observe(self, queries: Tensor, positives: Tensor, positive: Tensor, negatives: NegativeLogits) -> Tensor:
        """[4] float64, this worker's sums: correct, queue's share of the denominator, squared distance of
        query and positive, exp(-2 squared distance) to the other queries."""
        compared = negatives.row != -torch.inf
        correct = (positive > negatives.hardest)[compared].sum()
        hardness = (negatives.queue - torch.logaddexp(negatives.row, positive)).exp()[compared].sum()
        distance = (queries.to(positive.dtype) - positives.to(positive.dtype)).square().sum()
        return torch.stack([correct.double(), hardness.double(), distance.double(), self._closeness(negatives)])

    def _closeness(self, negatives: NegativeLogits) -> Tensor:
        """Sum over this worker's queries x and all others y of exp(-2 |x - y|^2) = exp(4 (x.y - 1))."""
        everyone = negatives.exchange.queries
        own = everyone[negatives.exchange.own]
        with_self = torch.zeros((), dtype=torch.float64, device=own.device)
        for tile in everyone.split(self._config.tile):
            with_self += (own @ tile.T).sub_(1).mul_(4).exp_().sum()
        return with_self - (own.square().sum(1) - 1).mul_(4).exp_().sum()


def _check(queries: Tensor, documents: Tensor, ids: Ids, queue: QueueRows | None) -> None:
    if queries.ndim != 2 or documents.ndim != 2 or queries.shape[1] != documents.shape[1]:
        shapes = f"{list(queries.shape)} and {list(documents.shape)}"
        raise ValueError(f"queries and documents are {shapes}: [b, D] and [d, D] of one D are needed")
    if len(documents) < len(queries):
        raise ValueError(f"{len(documents)} documents for {len(queries)} queries: each query has its positive")
    if ids.query_ids.shape != queries.shape[:1]:
        raise ValueError(f"query_ids {list(ids.query_ids.shape)} for {len(queries)} queries on axis 0")
    if ids.document_ids.shape != documents.shape[:1]:
        raise ValueError(f"document_ids {list(ids.document_ids.shape)} for {len(documents)} documents on axis 0")
    if queue is not None and queue.vectors.shape[1] != queries.shape[1]:
        raise ValueError(f"queue rows are {queue.vectors.shape[1]} wide, queries {queries.shape[1]}, on axis 1")
