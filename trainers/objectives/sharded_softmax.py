"""Queries travel, candidates stay home: the exchange beneath every contrastive loss.

Legend (beside the project's W, b, B, d, D): C_r candidates on worker r, i.e. its d documents and its share of
the queue; l_ij = s(q_i, k_j) / temperature; N_i the candidates that no mask hides from query i, *its positive
left out*. What is reduced is the log-sum-exp over negatives alone,

    row_i = log sum_{j in N_i} exp l_ij           over all documents and the queue
    col_j = log sum_{i in N_j} exp l_ij           of each positive document, over all queries

and a loss adds the positive, which lives beside its query: InfoNCE is softplus(row_i - l_i,pos). A query with
nothing to compare has row_i = -inf and so a loss and a gradient of exactly zero.

Forward. All-gather the queries (B x D) and their keys. Worker r walks C_r tile by tile and keeps a running
maximum and sum per query. All-reduces of B numbers (one maximum, two sums) merge them. A column completes at
home, since every query is there. For the queue, which carries no gradient, the walk also accumulates
sum_j exp(l_ij - m_i) k_j, as attention with V = K.

Backward. The upstream dL/drow of every query is gathered (B numbers). With p_ij = exp(l_ij - row_i) and
c_ij = exp(l_ij - col_j), worker r recomputes its own documents' tiles:

    dL/dl_ij = p_ij dL/drow_i + c_ij dL/dcol_j    complete for its documents, all queries being there
    dL/dk_j  = sum_i dL/dl_ij q_i / temperature   complete
    dL/dq_i  = sum_j dL/dl_ij k_j / temperature   partial: one reduce-scatter (B x D) finishes it

The queue's part of dL/dq_i is the accumulated sum, rescaled by exp(m_i - row_i): no tile is computed twice.

So a step moves about 2 B D numbers and holds about 3 B D and one tile (B x tile), whatever the queue and
however many hard negatives. Source: the online soft-max of Milakov & Gimelshein (arXiv:1805.02867), with
values as in FlashAttention (arXiv:2205.14135), split over workers by candidate.

Precision. Everything is accumulated in float32 (float64 for float64 input). Logits are float32 products even
of bfloat16 rows, which are cast up a tile at a time: a bfloat16 product rounds a cosine of 0.5 to within
2e-3, that is 0.04 in a logit at temperature 0.05. Only the queue's second product, of probabilities and rows,
is in the rows' own type.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainers.collectives import Group

_NOTHING = -torch.inf  # the logarithm of an empty sum


@dataclass(frozen=True)
class Keys:
    """What masks compare, int64 [n] each. Of a query: its own id and the document id of its positive. Of a
    candidate: its document id and the id of the query that it answers."""

    query_ids: Tensor
    document_ids: Tensor

    def __getitem__(self, rows: slice) -> Keys:
        return Keys(self.query_ids[rows], self.document_ids[rows])

    def gathered(self, group: Group, sizes: list[int]) -> Keys:
        """The keys of all workers' queries, [B]."""
        both = group.all_gather(torch.stack([self.query_ids, self.document_ids], 1), sizes)
        return Keys(both[:, 0], both[:, 1])


@dataclass(frozen=True)
class Candidates:
    """Rows that stay on this worker: vectors [n, D] and their keys [n]."""

    vectors: Tensor
    keys: Keys


@dataclass(frozen=True)
class SameIdMask:
    """Hides candidates that are the query's positive in another row, or that answer an equal query."""

    same_document: bool
    same_query: bool

    def hide(self, logits: Tensor, queries: Keys, candidates: Keys) -> None:
        """Sets the hidden entries of logits [B, t] to -inf, in place; queries' keys [B], candidates' [t]."""
        if self.same_document:
            same = queries.document_ids[:, None] == candidates.document_ids[None]
            logits.masked_fill_(same, _NOTHING)
        if self.same_query:
            logits.masked_fill_(queries.query_ids[:, None] == candidates.query_ids[None], _NOTHING)


@dataclass(frozen=True)
class InnerProduct:
    """Scores a tile: logits [B, t] = queries [B, D] . candidates [t, D] / temperature, and its derivative."""

    temperature: float

    def logits(self, queries: Tensor, candidates: Tensor) -> Tensor:
        return (queries @ candidates.to(queries.dtype).T).div_(self.temperature)

    def add_query_gradient(self, gradient: Tensor, upstream: Tensor, candidates: Tensor) -> None:
        """Adds to gradient [B, D] that of upstream dL/dlogits [B, t], in place."""
        gradient.addmm_(upstream, candidates.to(upstream.dtype), alpha=1 / self.temperature)

    def candidate_gradient(self, upstream: Tensor, queries: Tensor) -> Tensor:
        """[t, D] from upstream dL/dlogits [B, t]."""
        return (upstream.T @ queries).div_(self.temperature)

    def expected_gradient(self, upstream: Tensor, expected: Tensor) -> Tensor:
        """[B, D] where upstream [B] is dL/drow and expected [B, D] the soft-max average of candidates."""
        return expected * (upstream / self.temperature)[:, None]


class RunningLogSumExp:
    """Per query: the maximum of the logits seen so far, the sum of exp(logit - maximum), and on request the
    sum of exp(logit - maximum) times the candidate (`values` [B, D])."""

    def __init__(self, queries: Tensor, keep_values: bool) -> None:
        self.maximum = queries.new_full((len(queries),), _NOTHING)
        self.total = torch.zeros_like(self.maximum)
        self.values = torch.zeros_like(queries) if keep_values else None

    def add(self, logits: Tensor, candidates: Tensor) -> None:
        """Takes in a tile: logits [B, t], overwritten, of candidates [t, D]."""
        maximum = torch.maximum(self.maximum, logits.amax(1))
        anchor = _finite(maximum)
        decay = (self.maximum - anchor).exp_()
        weights = logits.sub_(anchor[:, None]).exp_()
        self.total.mul_(decay).add_(weights.sum(1))
        if self.values is not None:
            self.values.mul_(decay[:, None]).add_(weights.to(candidates.dtype) @ candidates)
        self.maximum = maximum

    def total_at(self, anchor: Tensor) -> Tensor:
        """[B] sum of exp(logit - anchor)."""
        return self.total * (self.maximum - anchor).exp_()


@dataclass(frozen=True)
class Exchange:
    """What both passes need: every worker's queries [B, D] and keys, this worker's candidates, and how tiles
    are scored, masked and cut. `own` is where this worker's b queries stand among the B; its document j < b
    is the positive of its query j. `columns` asks for the other direction too."""

    group: Group
    sizes: list[int]
    queries: Tensor
    query_keys: Keys
    document_keys: Keys
    queue: Candidates | None
    score: InnerProduct
    mask: SameIdMask
    tile: int
    columns: bool

    @property
    def own(self) -> slice:
        start = sum(self.sizes[: self.group.rank])
        return slice(start, start + self.sizes[self.group.rank])

    def document_tiles(self, documents: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows of documents [t], those of them that are positives, masked logits [B, t]), tile by tile."""
        own = self.own
        for rows in self._cuts(len(documents)):
            logits = self.score.logits(self.queries, documents[rows])
            self.mask.hide(logits, self.query_keys, self.document_keys[rows])
            positives = slice(rows.start, max(rows.start, min(rows.stop, own.stop - own.start)))
            among_queries = slice(own.start + positives.start, own.start + positives.stop)
            logits[among_queries, : positives.stop - positives.start].diagonal().fill_(_NOTHING)
            yield rows, positives, logits

    def queue_tiles(self, queue: Candidates) -> Iterator[tuple[Tensor, Tensor]]:
        """(queue rows [t, D], masked logits [B, t]), tile by tile."""
        for rows in self._cuts(len(queue.vectors)):
            logits = self.score.logits(self.queries, queue.vectors[rows])
            self.mask.hide(logits, self.query_keys, queue.keys[rows])
            yield queue.vectors[rows], logits

    def _cuts(self, rows: int) -> Iterator[slice]:
        return (slice(start, min(start + self.tile, rows)) for start in range(0, rows, self.tile))


class _ShardedSoftmax(torch.autograd.Function):
    """(queries [b, D], documents [d, D]) -> row [b], column [b], hardest [b], queue [b]; the last two without
    gradient. Collective in both passes."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, documents: Tensor, exchange: Exchange) -> tuple[Tensor, ...]:
        group, own = exchange.group, exchange.own
        fresh = RunningLogSumExp(exchange.queries, keep_values=False)
        stored = RunningLogSumExp(exchange.queries, keep_values=exchange.queue is not None)
        column = fresh.maximum.new_full((len(queries),), _NOTHING)
        for rows, positives, logits in exchange.document_tiles(documents):
            if exchange.columns and positives.stop > positives.start:
                column[positives] = logits[:, : positives.stop - positives.start].logsumexp(0)
            fresh.add(logits, documents[rows])
        if exchange.queue is not None:
            for vectors, logits in exchange.queue_tiles(exchange.queue):
                stored.add(logits, vectors)

        hardest = group.all_reduce(torch.maximum(fresh.maximum, stored.maximum), "max")
        anchor = _finite(hardest)
        totals = group.all_reduce(torch.stack([fresh.total_at(anchor), stored.total_at(anchor)]))
        row = anchor + totals.sum(0).log()
        queue = anchor + totals[1].log()
        if stored.values is not None:
            stored.values.mul_((stored.maximum - _finite(row)).exp_()[:, None])

        ctx.exchange, ctx.query_dtype = exchange, queries.dtype
        ctx.save_for_backward(documents, row, column, stored.values)
        outputs = row[own].clone(), column, hardest[own].clone(), queue[own].clone()
        ctx.mark_non_differentiable(*outputs[2:])
        return outputs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        exchange, (documents, row, column, expected) = ctx.exchange, ctx.saved_tensors
        queries, score = exchange.queries, exchange.score
        row_upstream = exchange.group.all_gather(upstream[0], exchange.sizes)
        if expected is None:
            partial = torch.zeros_like(queries)
        else:
            partial = score.expected_gradient(row_upstream, expected)
        documents_gradient = torch.empty_like(documents)
        row_anchor, column_anchor = _finite(row)[:, None], _finite(column)
        for rows, positives, logits in exchange.document_tiles(documents):
            among = slice(0, positives.stop - positives.start)
            weights = (logits - row_anchor).exp_().mul_(row_upstream[:, None])
            if exchange.columns:
                shares = (logits[:, among] - column_anchor[positives]).exp_()
                weights[:, among] += shares.mul_(upstream[1][positives])
            documents_gradient[rows] = score.candidate_gradient(weights, queries).to(documents.dtype)
            score.add_query_gradient(partial, weights, documents[rows])
        queries_gradient = exchange.group.reduce_scatter(partial, exchange.sizes)
        return queries_gradient.to(ctx.query_dtype), documents_gradient, None


@dataclass(frozen=True)
class NegativeLogits:
    """The negatives of this worker's b queries, over all workers, reduced. -inf where there are none.

    row      [b] log-sum-exp over the query's negatives, documents and queue; differentiable
    column   [b] log-sum-exp over the other queries, of the query's positive; differentiable
    hardest  [b] largest logit of a negative
    queue    [b] the queue's part of `row`
    exchange     the gathered queries and what else was shared
    """

    row: Tensor
    column: Tensor
    hardest: Tensor
    queue: Tensor
    exchange: Exchange


def sharded_softmax(
    queries: Tensor,
    documents: Tensor,
    query_keys: Keys,
    document_keys: Keys,
    queue: Candidates | None,
    *,
    score: InnerProduct,
    mask: SameIdMask,
    tile: int,
    columns: bool,
    group: Group,
) -> NegativeLogits:
    """Reduces the negatives of queries [b, D], any b on each worker, over every worker's documents [d, D],
    d >= b, document j < b being the positive of query j, and over the queue's rows. Collective, as is its
    backward, which leaves the gradient of the sum of all workers' losses."""
    sizes = group.sizes(len(queries), queries.device)
    gathered = group.all_gather(queries.detach(), sizes)
    exchange = Exchange(
        group=group,
        sizes=sizes,
        queries=gathered.to(torch.promote_types(gathered.dtype, torch.float32)),
        query_keys=query_keys.gathered(group, sizes),
        document_keys=document_keys,
        queue=queue,
        score=score,
        mask=mask,
        tile=tile,
        columns=columns,
    )
    row, column, hardest, stored = _ShardedSoftmax.apply(queries, documents, exchange)
    return NegativeLogits(row, column, hardest, stored, exchange)


def _finite(logarithm: Tensor) -> Tensor:
    """The logarithm, or 0 where it is that of an empty sum: something safe to subtract from -inf."""
    return logarithm.masked_fill(logarithm == _NOTHING, 0)
