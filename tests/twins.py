"""Naive twins: the same computations dense, in float64, in one process, row by row."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from trainers.config import ObjectiveConfig
from trainers.negative_queue import NO_QUERY, QueueRows
from trainers.objectives.contrastive import Ids


@dataclass(frozen=True)
class Share:
    """What one worker holds of a global batch: document j < b is the positive of query j."""

    queries: Tensor  # [b, D]
    documents: Tensor  # [d, D]
    ids: Ids

    def to(self, dtype: torch.dtype) -> Share:
        return replace(self, queries=self.queries.to(dtype), documents=self.documents.to(dtype))


def random_shares(seed: int, counts: list[tuple[int, int]], dim: int, distinct: int = 10**6) -> list[Share]:
    """Unit vectors float64 for workers of (b, d) = counts; ids are drawn below `distinct`: few of them
    make duplicates, between positives and hard negatives and across workers too."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        vectors = torch.randn(rows, dim, generator=generator, dtype=torch.float64)
        return normalize(vectors, dim=1), torch.randint(distinct, (rows,), generator=generator)

    shares = []
    for b, d in counts:
        (queries, query_ids), (documents, document_ids) = draw(b), draw(d)
        shares.append(Share(queries, documents, Ids(query_ids, document_ids)))
    return shares


def random_rows(seed: int, rows: int, dim: int, distinct: int = 10**6) -> QueueRows:
    """Queue rows float64, every third without a query."""
    share = random_shares(seed, [(0, rows)], dim, distinct)[0]
    generator = torch.Generator().manual_seed(seed + 1)
    query_ids = torch.randint(distinct, (rows,), generator=generator)
    query_ids[::3] = NO_QUERY
    return QueueRows(share.documents, share.ids.document_ids, query_ids, torch.zeros(rows, dtype=torch.int64))


def rows_of_worker(rows: QueueRows, rank: int, world_size: int, dtype: torch.dtype) -> QueueRows:
    mine = slice(rank, None, world_size)
    return QueueRows(rows.vectors[mine].to(dtype), rows.document_ids[mine], rows.query_ids[mine], rows.steps[mine])


@dataclass(frozen=True)
class Dense:
    """The global loss, its gradient in every worker's embeddings, and the metrics."""

    loss: float
    query_gradients: list[Tensor]
    document_gradients: list[Tensor]
    metrics: dict[str, float]


def dense_contrastive(shares: list[Share], config: ObjectiveConfig, queue: QueueRows | None) -> Dense:
    """The contrastive loss of the whole batch from its definition, one query and one positive at a time."""
    queries = [s.queries.detach().clone().double().requires_grad_() for s in shares]
    documents = [s.documents.detach().clone().double().requires_grad_() for s in shares]
    q = torch.cat(queries)
    positives = torch.cat([d[: len(x)] for x, d in zip(queries, documents, strict=True)])
    hard = torch.cat([d[len(x) :] for x, d in zip(queries, documents, strict=True)])
    query_ids = torch.cat([s.ids.query_ids for s in shares])
    positive_ids = torch.cat([s.ids.document_ids[: len(s.queries)] for s in shares])
    hard_ids = torch.cat([s.ids.document_ids[len(s.queries) :] for s in shares])
    stored = queue or random_rows(0, 0, q.shape[1])
    candidates = torch.cat([positives, hard, stored.vectors.double()])
    candidate_ids = torch.cat([positive_ids, hard_ids, stored.document_ids])
    answered_ids = torch.cat([query_ids, torch.full_like(hard_ids, NO_QUERY), stored.query_ids])
    is_queue = torch.arange(len(candidates)) >= len(positives) + len(hard)

    rows, columns, correct, hardness, nothing = [], [], [], [], 0
    for i in range(len(q)):
        negative = torch.arange(len(candidates)) != i
        if config.mask_same_document:
            negative &= candidate_ids != positive_ids[i]
        if config.mask_same_query:
            negative &= answered_ids != query_ids[i]
        positive = q[i] @ positives[i] / config.temperature
        logits = candidates @ q[i] / config.temperature
        if negative.any():
            denominator = torch.cat([positive[None], logits[negative]]).logsumexp(0)
            rows.append(denominator - positive)
            correct.append(float(positive > logits[negative].max()))
            hardness.append(float((logits[negative & is_queue] - denominator).exp().sum()))
        nothing += not negative.any()
        others = negative[: len(q)]  # the masks are symmetric between positives
        if others.any():
            logits = q[others] @ positives[i] / config.temperature
            columns.append(torch.cat([positive[None], logits]).logsumexp(0) - positive)

    both = config.directions == "both"
    zero = (q * 0).sum() + (candidates * 0).sum()
    means = [torch.stack(x).mean() if x else zero for x in ((rows, columns) if both else (rows,))]
    loss = sum(means, zero) / len(means)
    gradients = list(torch.autograd.grad(loss, [*queries, *documents]))
    apart = torch.pdist(q.detach()).square().mul(-2).exp()
    metrics = {
        "loss": float(loss),
        "accuracy": sum(correct) / max(1, len(correct)),
        "alignment": float((q - positives).square().sum(1).mean()),
        "uniformity": float(apart.mean().log()) if len(q) > 1 else 0.0,
        "queue_hardness": sum(hardness) / max(1, len(hardness)),
        "nothing_to_compare": float(nothing),
    }
    return Dense(float(loss), gradients[: len(shares)], gradients[len(shares) :], metrics)


class ReplicatedQueue:
    """The queue as one list that every worker would hold whole: the newest K (vector, document id, query id,
    step) in the order of their numbers."""

    def __init__(self, rows: int) -> None:
        self.capacity = rows
        self.entries: list[tuple[Tensor, int, int, int]] = []

    def enqueue(self, workers: list[tuple[Tensor, Tensor, Tensor]], step: int) -> None:
        """(vectors [d, D], document_ids [d], query_ids [d]) of every worker, in rank order."""
        for vectors, document_ids, query_ids in workers:
            for row in zip(vectors, document_ids.tolist(), query_ids.tolist(), strict=True):
                self.entries.append((*row, step))
        self.entries = self.entries[max(0, len(self.entries) - self.capacity) :]
