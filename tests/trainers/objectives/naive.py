"""What the tests of losses share: the loss on real ranks, and its definition in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.twins import Dense, of_worker
from trainers.collectives import Group
from trainers.negative_queue import QueueRows
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import UNKNOWN

PROGRESS = 0.25

# (whole batch, section, learned scalars) -> (loss, metrics)
Definition = Callable[["Whole", Any, Mapping[str, Tensor]], tuple[Tensor, dict[str, float]]]


class Whole:
    """The batch of all workers with leaves of its own in float64, one query and one document at a time."""

    def __init__(self, shares: list[Embedded], queues: Mapping[str, QueueRows]) -> None:
        self.shares, self.queues = shares, queues
        self.queries = [s.queries.detach().clone().double().requires_grad_() for s in shares]
        self.documents = [s.documents.detach().clone().double().requires_grad_() for s in shares]

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """(worker, number on it) of each query."""
        return ((r, i) for r, s in enumerate(self.shares) for i in range(len(s.queries)))

    def weight(self, r: int, i: int) -> Tensor:
        weights = self.shares[r].weights
        return torch.ones((), dtype=torch.float64) if weights is None else weights[i].double()

    def pair(self, r: int, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Query i and document j of worker r: vectors, of token vectors those that count."""
        s = self.shares[r]
        return _tokens(self.queries[r], s.query_keys, i), _tokens(self.documents[r], s.document_keys, j)

    def own(self, r: int, i: int) -> list[int]:
        """The numbers of a query's own documents."""
        return [j for j, owner in enumerate(self.shares[r].owners.tolist()) if owner == i]

    def negatives(self, r: int, i: int, section: Any) -> list[Tensor]:
        """The candidates that query i of worker r is compared with."""
        pools = [(s.document_keys, self.documents[w], w) for w, s in enumerate(self.shares)]
        if section.queue:
            pools += [(rows.keys, rows.vectors.double(), -1) for rows in self.queues.values()]
        mine, found = self.shares[r].query_keys, []
        for keys, vectors, w in pools:
            for j in range(len(vectors)):
                hidden = (w, j) == (r, i)
                hidden |= section.mask_same_document and int(keys.document_ids[j]) == int(mine.document_ids[i])
                hidden |= section.mask_same_query and int(keys.query_ids[j]) == int(mine.query_ids[i]) != UNKNOWN
                hidden |= section.mask_same_label and int(keys.labels[j]) == int(mine.labels[i])
                if not hidden:
                    found.append(_tokens(vectors, keys, j))
        return found


def similarity(kind: str, q: Tensor, k: Tensor) -> Tensor:
    if q.ndim == 2:
        return torch.stack([(k @ token).max() for token in q]).sum()
    return {
        "inner_product": lambda: q @ k,
        "distance": lambda: -(q - k).square().sum().sqrt(),
        "squared_distance": lambda: -(q - k).square().sum(),
    }[kind]()


def weighted_mean(whole: Whole, values: list[Tensor], weights: list[Tensor]) -> Tensor:
    """0, with a gradient of 0, of no values."""
    zero = sum((x * 0).sum() for x in (*whole.queries, *whole.documents))
    if not values:
        return zero
    return zero + sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)


def check(
    gloo: Any,
    objective: type,
    section: Any,
    definition: Definition,
    shares: list[Embedded],
    queues: Mapping[str, QueueRows] | None = None,
    tolerance: float = 1e-9,
) -> list[dict[str, float]]:
    """Loss, gradients and metrics on as many ranks as there are shares equal those of the definition."""
    queues = queues or {}
    twin = _twin(objective, section, definition, shares, queues)
    arguments = objective, section, shares, queues
    ranks = [_run(*arguments)] if len(shares) == 1 else gloo(len(shares), _run, *arguments)
    assert sum(loss for loss, *_ in ranks) == pytest.approx(twin.loss, rel=tolerance, abs=tolerance)
    for rank, (_, metrics, queries, documents, _) in enumerate(ranks):
        assert metrics == pytest.approx(twin.metrics, rel=tolerance, abs=tolerance)
        pairs = (queries, twin.query_gradients[rank]), (documents, twin.document_gradients[rank])
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    for name, expected in twin.learned_gradients.items():
        found = sum(learned[name] for *_, learned in ranks)
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    return [metrics for _, metrics, *_ in ranks]


def scalars(objective: type, section: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """What the objective learns, at its start."""
    start = objective(section, Group()).learned
    return {name: torch.tensor(value, dtype=dtype, requires_grad=True) for name, value in start.items()}


def _run(objective, section, shares, queues):
    """On a rank: (loss share, metrics, dL/dqueries, dL/ddocuments, this worker's part of dL/dlearned)."""
    group = Group()
    learned = scalars(objective, section)
    share = shares[group.rank]
    share = replace(share, queries=share.queries.detach().clone(), documents=share.documents.detach().clone())
    share = of_worker(share, queues, group.rank, group.size, torch.float64)
    result = objective(section, group)(replace(share, learned=learned, progress=PROGRESS))
    result.loss.backward()
    of_learned = {name: value.grad for name, value in learned.items()}
    grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (share.queries, share.documents)]
    return float(result.loss.detach()), result.metrics, *grads, of_learned


def _twin(objective, section, definition, shares, queues) -> Dense:
    whole, learned = Whole(shares, queues), scalars(objective, section)
    loss, metrics = definition(whole, section, learned)
    leaves = [*whole.queries, *whole.documents, *learned.values()]
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    w = len(shares)
    of_learned = dict(zip(learned, gradients[2 * w :], strict=True))
    return Dense(
        float(loss.detach()), gradients[:w], gradients[w : 2 * w], of_learned, metrics | {"loss": float(loss.detach())}
    )


def _tokens(vectors: Tensor, keys: Any, i: int) -> Tensor:
    return vectors[i] if keys.lengths is None else vectors[i, : int(keys.lengths[i])]
