"""Batches and queue rows drawn for tests, and the dense float64 twin of the contrastive loss over them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.contrastive_twin import ContrastiveTwin
from trainers.negative_queue import QueueRows
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import UNKNOWN, Keys
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.objectives.sections.numbers import Learned, value_at

CLASSES = 3  # of labels and tasks that are drawn


def random_shares(
    seed: int,
    counts: list[tuple[int, int]],
    dim: int,
    distinct: int = 10**6,
    tokens: int = 0,
    of_documents: int = 0,
) -> list[Embedded]:
    """Unit vectors float64 for workers of (b, d) = counts, with every key, weights, scores and momentum vectors; ids
    are drawn below `distinct`: few of them make duplicates, between positives and hard negatives and across workers
    too. With `tokens`, token vectors [n, tokens, dim] of lengths from 1; of documents [n, of_documents, dim] where that
    is given."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(b for b, _ in counts)

    def vectors(rows: int, tokens: int = tokens) -> Tensor:
        shape = (rows, tokens, dim) if tokens else (rows, dim)
        return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)

    def draw(rows: int, below: int) -> Tensor:
        return torch.randint(below, (rows,), generator=generator)

    def classes(rows: int, tokens: int = tokens) -> dict[str, Tensor]:
        lengths = {"lengths": 1 + draw(rows, tokens)} if tokens else {}
        return {"labels": draw(rows, CLASSES), "tasks": draw(rows, CLASSES), **lengths}

    shares = []
    for b, d in counts:
        query_ids, document_ids = draw(b, distinct), draw(d, distinct)
        owners = torch.cat([torch.arange(b), draw(d - b, max(b, 1))])
        answers, rejects = torch.full((d,), UNKNOWN), torch.full((d,), UNKNOWN)
        answers[:b] = query_ids
        if b:
            rejects[b:] = query_ids[owners[b:]]
        shares.append(
            Embedded(
                queries=vectors(b),
                documents=vectors(d, of_documents or tokens),
                query_keys=Keys(query_ids, document_ids[:b], **classes(b)),
                document_keys=Keys(answers, document_ids, rejects=rejects, **classes(d, of_documents or tokens)),
                owners=owners,
                global_queries=total,
                weights=0.5 + torch.rand(b, generator=generator, dtype=torch.float64),
                scores=torch.rand(d, generator=generator, dtype=torch.float64),
                momentum_queries=vectors(b),
                momentum_documents=vectors(d, of_documents or tokens),
            )
        )
    return shares


def random_rows(seed: int, rows: int, dim: int, distinct: int = 10**6, tokens: int = 0) -> QueueRows:
    """Queue rows float64, every third without a query."""
    share = random_shares(seed, [(0, rows)], dim, distinct, tokens)[0]
    query_ids = torch.randint(distinct, (rows,), generator=torch.Generator().manual_seed(seed + 1))
    query_ids[::3] = UNKNOWN
    keys = replace(share.document_keys, query_ids=query_ids, rejects=None)
    return QueueRows(share.documents, keys, torch.zeros(rows, dtype=torch.int64), torch.arange(rows))


def rows_of_worker(rows: QueueRows, rank: int, world_size: int, dtype: torch.dtype) -> QueueRows:
    mine = slice(rank, None, world_size)
    return QueueRows(rows.vectors[mine].to(dtype), rows.keys[mine], rows.steps[mine], rows.numbers[mine])


def in_type(share: Embedded, dtype: torch.dtype) -> Embedded:
    """Its vectors in `dtype`."""
    names = ("queries", "documents", "weights", "scores", "momentum_queries", "momentum_documents")
    return replace(share, **{n: v.to(dtype) for n in names if (v := getattr(share, n)) is not None})


def of_worker(share: Embedded, queues: Mapping[str, QueueRows], rank: int, size: int, dtype: torch.dtype) -> Embedded:
    """A worker's share with its part of the queues, vectors in `dtype` and gradients wanted."""
    mine = {name: rows_of_worker(rows, rank, size, dtype) for name, rows in queues.items()}
    share = replace(in_type(share, dtype), queues=mine)
    share.queries.requires_grad_()
    share.documents.requires_grad_()
    return share


@dataclass(frozen=True)
class Dense:
    """The global loss, its gradient in every worker's embeddings and learned scalars, and the metrics."""

    loss: float
    query_gradients: list[Tensor]
    document_gradients: list[Tensor]
    learned_gradients: dict[str, Tensor]
    metrics: dict[str, float]


def dense_contrastive(
    shares: list[Embedded],
    section: ContrastiveSection,
    queues: Mapping[str, QueueRows] | None = None,
    learned: Mapping[str, float] | None = None,
    progress: float = 0.0,
) -> Dense:
    """The contrastive loss of the whole batch from its definition, one query and one positive at a time."""
    queries = [s.queries.detach().clone().double().requires_grad_() for s in shares]
    documents = [s.documents.detach().clone().double().requires_grad_() for s in shares]
    scalars = {k: torch.tensor(v, dtype=torch.float64, requires_grad=True) for k, v in (learned or {}).items()}
    twin = ContrastiveTwin(shares, queries, documents, section, queues or {})
    if isinstance(section.temperature, Learned):
        twin.temperature = scalars["log_temperature"].exp()
    else:
        twin.temperature = torch.tensor(value_at(section.temperature, progress), dtype=torch.float64)
    loss, metrics = twin.loss()
    inputs = [*queries, *documents, *scalars.values()]
    gradients = list(torch.autograd.grad(loss, inputs, allow_unused=True))
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, gradients, strict=True)]
    w = len(shares)
    of_learned = dict(zip(scalars, gradients[2 * w :], strict=True))
    return Dense(float(loss.detach()), gradients[:w], gradients[w : 2 * w], of_learned, metrics)
