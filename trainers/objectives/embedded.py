"""What an objective sees, the embeddings of a global batch and what is known of them, and what it gives back.

Shapes as in data_services/schema.py. For late interaction token vectors [n, L, D] stand where a vector [n, D] does,
with `Keys.lengths` valid tokens each.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.negative_queue import QueueRows
from trainers.objectives.keys import UNKNOWN, Keys

__all__ = ["UNKNOWN", "Embedded", "Keys", "LossShare", "Objective", "gather_scalars", "share_of"]


Counts = tuple[tuple[int, int], ...]
"""(b, d) of every worker, in rank order."""


@dataclass(frozen=True)
class Embedded:
    """One worker's share of a global batch, embedded. Document j < b is the positive of query j.

    queries, documents            [b, D] and [d, D], unit vectors with gradient
    query_keys, document_keys     [b] and [d]
    owners                        [d] int64, the query (0..b-1, on this worker) that each document belongs to
    global_queries                B
    step, progress                number of the step, and the share of the run that is done, 0 to 1
    weights                       [b] of each pair in the means; None: equal
    scores                        [d] float, how well a document answers its owner (a teacher's score, a graded
                                  relevance); None: not known
    momentum_queries, momentum_documents
                                  the same texts by the momentum encoder, without gradient; None: there is none
    teacher_queries, teacher_documents
                                  [b, D'] and [d, D'], the same texts by `data.teacher`; None: it has no vectors
    queues                        by name, this worker's rows; `documents` and `queries` are the usual ones
    learned                       by name, what the objective learns beside the tower: scalars with gradient
    counts                        of every worker; None: whoever needs them asks
    operands                      the type that a GPU multiplies vectors in: the model's own
    """

    queries: Tensor
    documents: Tensor
    query_keys: Keys
    document_keys: Keys
    owners: Tensor
    global_queries: int
    step: int = 0
    progress: float = 0.0
    weights: Tensor | None = None
    scores: Tensor | None = None
    momentum_queries: Tensor | None = None
    momentum_documents: Tensor | None = None
    teacher_queries: Tensor | None = None
    teacher_documents: Tensor | None = None
    queues: Mapping[str, QueueRows] = field(default_factory=dict)
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    counts: Counts | None = None
    operands: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        q, k = self.queries, self.documents
        if q.ndim != k.ndim or q.ndim not in (2, 3) or q.shape[-1] != k.shape[-1]:
            shapes = f"{list(q.shape)} and {list(k.shape)}"
            raise ValueError(f"queries and documents are {shapes}: [b, D] and [d, D] of one D are needed")
        if q.dtype != k.dtype or q.device != k.device:
            raise ValueError(f"queries are {q.dtype} on {q.device}, documents {k.dtype} on {k.device}")
        b, d = len(q), len(k)
        if d < b:
            raise ValueError(f"{d} documents for {b} queries: each query has its positive")
        for name, rows, wanted in (
            ("query_keys", len(self.query_keys), b),
            ("document_keys", len(self.document_keys), d),
            ("owners", len(self.owners), d),
            ("weights", b if self.weights is None else len(self.weights), b),
            ("scores", d if self.scores is None else len(self.scores), d),
        ):
            if rows != wanted:
                raise ValueError(f"{name} has {rows} rows on axis 0, {wanted} are needed")

    @property
    def pooled(self) -> bool:
        """One vector a text, not one a token."""
        return self.queries.ndim == 2

    @property
    def query_counts(self) -> list[int] | None:
        """b of every worker."""
        return None if self.counts is None else [b for b, _ in self.counts]

    @property
    def document_counts(self) -> list[int] | None:
        """d of every worker."""
        return None if self.counts is None else [d for _, d in self.counts]

    @property
    def positives(self) -> Tensor:
        """[b, D] the positive of each query."""
        return self.documents[: len(self.queries)]


@dataclass(frozen=True)
class LossShare:
    """One worker's share of the global loss.

    loss     scalar L_r with L = sum_r L_r. Its backward, called on every worker, leaves in this worker's
             embeddings the gradient of L (see trainers/collectives.py).
    metrics  of the whole global batch, equal on every worker, `loss` = L among them
    """

    loss: Tensor
    metrics: dict[str, float]


class Objective(Protocol):
    """A loss over embeddings, made once a worker with (its config section, the workers' `Group`).

    learned  start values of the scalars that it learns; they come back as `Embedded.learned`
    """

    learned: Mapping[str, float]

    def __call__(self, embedded: Embedded) -> LossShare:
        """Collective, as is the backward of the result."""
        ...


class _GatherRows(torch.autograd.Function):
    """x [n, ...] of every worker, end to end. Backward: this worker's rows of what *this worker* has upstream."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group, sizes: list[int]) -> Tensor:
        start = sum(sizes[: group.rank])
        ctx.own = slice(start, start + sizes[group.rank])
        gathered = group.all_gather(x, sizes)
        return gathered.clone() if gathered is x else gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None]:
        return upstream[0][ctx.own], None, None


def gather_scalars(x: Tensor, group: Group, sizes: list[int] | None = None) -> Tensor:
    """x [n] (or [n, few]) of every worker, end to end in rank order, differentiable in this worker's own rows; `sizes`
    every worker's n, where it is known.

    For a loss over all pairs' scalars, which every worker computes whole: call the total L, then give back
    `share_of(L, group)`. The backward of L with respect to the own rows is already complete, so nothing is sent.
    Collective.
    """
    return _GatherRows.apply(x, group, group.sizes(len(x), x.device) if sizes is None else sizes)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: Tensor, workers: int) -> Tensor:
        return total / workers

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return upstream[0], None


def share_of(total: Tensor, group: Group) -> Tensor:
    """This worker's share, L/W, of a loss that every worker computed whole, with the gradient of the whole L: as
    `LossShare` has it. Only for an L that reached the embeddings through `gather_scalars`."""
    return _Share.apply(total, group.size)


def scores_of(embedded: Embedded, kind: str) -> Tensor:
    """[d] `scores` in the type that losses are computed in; NaN where one isn't known. UsageError without them."""
    if embedded.scores is None:
        raise UsageError(
            f"{kind} needs a score of each document, a grade or a teacher's, and the batch has none: name "
            "data.teacher, or the fields of data.sources.positive_scores and data.sources.negative_scores"
        )
    return embedded.scores.to(torch.promote_types(embedded.queries.dtype, torch.float32))


def weights_of(embedded: Embedded) -> Tensor:
    """[b] of each query."""
    given = embedded.weights
    ones = torch.ones(len(embedded.queries), device=embedded.queries.device)
    return ones if given is None else given


def number(x: float | Tensor) -> float:
    """The value of a number that may be learned."""
    return float(x.detach()) if isinstance(x, Tensor) else x


def wide(x: Tensor) -> Tensor:
    """In the type that losses are computed in: float32, or float64 as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
