"""Queries travel, candidates stay home: the exchange beneath every contrastive loss.

Legend (beside the project's W, b, B, d, D): C_r candidates on worker r, in blocks: its documents, its own queries
where a loss compares queries with each other, its share of the queue; l_ij = s(q_i, k_j) / temperature; N_i the
candidates that no mask hides from row i, *what stands on its diagonal left out*: its own positive, or itself. What is
reduced (reductions.py) is, in the plain case, the log-sum-exp over negatives alone,

    row_i = log sum_{j in N_i} exp l_ij           over all blocks of all workers
    col_j = log sum_{i in N_j} exp l_ij           of each positive document, over all queries

and a loss adds the positive, which lives beside its query: InfoNCE is softplus(row_i - l_i,pos). A query with
nothing to compare has row_i = -inf and so a loss and a gradient of exactly zero.

Forward. All-gather the queries (B x D) and their keys, in one message. Worker r walks C_r tile by tile and keeps a
running maximum and sum per query. All-reduces of B numbers (one maximum, a few sums) merge them. A column completes
at home, since every query is there. For the queue, which carries no gradient, the walk also accumulates
sum_j exp(l_ij - m_i) k_j, as attention with V = K.

Backward. The upstream gradient of what was reduced of every query is gathered (B numbers each). With
p_ij = exp(l_ij - row_i) and c_ij = exp(l_ij - col_j), worker r recomputes its own documents' tiles:

    dL/dl_ij = p_ij dL/drow_i + c_ij dL/dcol_j    complete for its documents, all queries being there
    dL/dk_j  = sum_i dL/dl_ij ds_ij/dk_j / t      complete
    dL/dq_i  = sum_j dL/dl_ij ds_ij/dq_i / t      partial: one reduce-scatter (B x D) finishes it
    dL/dt    = -sum_ij dL/dl_ij l_ij / t          partial: the engine adds up parameters' gradients over workers

The queue's part of dL/dq_i is the accumulated sum, rescaled by exp(m_i - row_i): no tile is computed twice. A loss
that reduces more than a plain log-sum-exp, or scores by something that isn't linear, recomputes its tiles too.

So a step moves about 2 B D numbers and holds about 3 B D and one tile (B x tile), whatever the queue and
however many hard negatives. Source: the online soft-max of Milakov & Gimelshein (arXiv:1805.02867), with
values as in FlashAttention (arXiv:2205.14135), split over workers by candidate.

Precision. Everything is accumulated in float32 (float64 for float64 input). Logits are float32 products even
of bfloat16 rows, which are cast up a tile at a time: a bfloat16 product rounds a cosine of 0.5 to within
2e-3, that is 0.04 in a logit at temperature 0.05. Only the queue's second product, of probabilities and rows,
is in the rows' own type. On a GPU, in a run that computes in bfloat16, vectors are rounded to it before their product
(`operands`), which is accumulated in float32: that moves a cosine in D dimensions by about 2^-9 / sqrt(D), 6e-5 where D
is 1,024.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from trainers.collectives import Group
from trainers.objectives import walk
from trainers.objectives.blocks import Block, Exchange
from trainers.objectives.hardest import only_hardest
from trainers.objectives.keys import Keys
from trainers.objectives.reductions import Reduced, Wanted, finite, merge
from trainers.objectives.similarity import InnerProduct, Similarity


class _Reduce(torch.autograd.Function):
    """(queries [b, ...], temperature [], every fresh block's vectors) -> the differentiable parts of the rows' and of
    the columns' reduction, then what carries no gradient. Collective in both passes."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, queries: Tensor, temperature: Tensor, *fresh: Tensor) -> tuple[Any, ...]:
        own, wanted, everyone = exchange.own, exchange.wanted, exchange.queries
        states, columns = [], []
        for block, vectors in zip(exchange.blocks, exchange.vectors(fresh), strict=True):
            running, of_columns = walk.reduced(exchange, block, vectors)
            states.append(running)
            columns += of_columns

        rows, parts = merge(states, exchange.group)
        column = _joined([merge([state], None)[0] for state in columns], len(wanted.scales), everyone)
        expected = [
            None if s.values is None else s.values.mul_((s.anchor - finite(rows.denominators[0])).exp_()[:, None])
            for s in states
        ]
        ctx.exchange, ctx.rows, ctx.columns, ctx.expected = exchange, rows, column, expected
        ctx.query_dtype, ctx.width = queries.dtype, queries.shape[1]
        ctx.save_for_backward(*fresh)
        mine = rows[own]
        rows_fixed, columns_fixed = ((x.ties, x.count, x.target_weight) for x in (mine, column))
        fixed = *rows_fixed, *columns_fixed, parts[:, own].clone()
        ctx.mark_non_differentiable(*fixed)
        # What autograd is given must not be what the backward pass reads: a second backward would find it changed.
        return *mine.differentiable, *(part.clone() for part in column.differentiable), *fixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Any, ...]:
        exchange, fresh = ctx.exchange, ctx.saved_tensors
        queries, wanted, group = exchange.queries, exchange.wanted, exchange.group
        scale = 1 / exchange.temperature
        of_rows = _upstream(group.all_gather(_packed(wanted, upstream[:5]), exchange.sizes), wanted)
        of_columns = _upstream(_packed(wanted, upstream[5:10]), wanted)
        finished = walk.Finished(ctx.rows, of_rows, ctx.columns, of_columns)
        partial = torch.zeros_like(queries)
        of_logits = queries.new_zeros(())  # sum of dL/dl_ij l_ij, where the similarity doesn't give it away
        gradients, blocks = [], zip(exchange.blocks, exchange.vectors(fresh), ctx.expected, strict=True)
        for block, vectors, expected in blocks:
            if expected is not None:
                partial += expected.mul(of_rows.denominators[0][:, None] * scale)
                continue
            gradient = walk.back(exchange, block, vectors, finished, partial, of_logits)
            if gradient is not None:
                gradients.append(gradient)
        if exchange.score.homogeneous:
            of_logits = (partial * queries).sum()
        own = group.reduce_scatter(partial, exchange.sizes)
        if own.ndim == 3:
            own = own[:, : ctx.width]
        return None, own.to(ctx.query_dtype), -of_logits * scale, *gradients


@dataclass(frozen=True)
class Reductions:
    """What the exchange gives this worker.

    rows      of its b queries over all blocks of all workers
    columns   of its first b candidates of the block with `columns`, over all queries; empty without one
    parts     [blocks, b] each block's part of the rows' first denominator, without gradient
    exchange  the gathered queries and what else was shared
    """

    rows: Reduced
    columns: Reduced
    parts: Tensor
    exchange: Exchange


def exchange(
    queries: Tensor,
    keys: Keys,
    blocks: Sequence[Block],
    *,
    temperature: float | Tensor,
    tile: int,
    group: Group,
    score: Similarity | None = None,
    wanted: Wanted | None = None,
    sizes: list[int] | None = None,
    operands: torch.dtype = torch.float32,
) -> Reductions:
    """Reduces queries [b, D] (or token vectors [b, L, D]), any b on each worker, over every worker's blocks.

    sizes     b of every worker, in rank order; None: it is asked for, in a message of its own
    operands  float32 or bfloat16, the type that a GPU's kernels multiply float32 vectors in (they always accumulate in
              float32); on a CPU it changes nothing

    Collective, as is its backward, which leaves the gradient of the sum of all workers' losses in queries and fresh
    blocks, and this worker's part of it in a temperature that is a tensor. The same blocks, by order, on every worker.
    Raises ValueError where shapes disagree.
    """
    for block in blocks:
        _check(queries, keys, block)
    sizes = group.sizes(len(queries), queries.device) if sizes is None else sizes
    everyone, query_keys = keys.gathered_with(_equally_long(queries.detach(), group), group, sizes)
    tau = torch.as_tensor(temperature, dtype=torch.promote_types(everyone.dtype, torch.float32))
    shared = Exchange(
        group=group,
        sizes=sizes,
        queries=everyone.to(tau.dtype),
        query_keys=query_keys,
        blocks=tuple(blocks),
        score=score or InnerProduct(),
        temperature=float(tau.detach()),
        wanted=wanted or Wanted(),
        tile=tile,
        operands=operands,
    )
    if any(block.share < 1 for block in blocks):
        shared = replace(shared, blocks=tuple(only_hardest(shared, b) if b.share < 1 else b for b in shared.blocks))
    fresh = [block.vectors for block in blocks if block.fresh]
    outputs = _Reduce.apply(shared, queries, tau.to(everyone.device), *fresh)
    rows, columns, fixed = outputs[:5], outputs[5:10], outputs[10:]
    return Reductions(_reduced(rows, *fixed[:3]), _reduced(columns, *fixed[3:6]), fixed[6], shared)


def _joined(columns: list[Reduced], scales: int, like: Tensor) -> Reduced:
    """The columns of all tiles, end to end."""
    if not columns:
        return Reduced(like.new_zeros(scales, 0), *(like.new_zeros(0) for _ in range(7)))
    return Reduced(**{name: torch.cat([getattr(c, name) for c in columns], -1) for name in vars(columns[0])})


def _reduced(differentiable: Sequence[Tensor], ties: Tensor, count: Tensor, target_weight: Tensor) -> Reduced:
    denominators, hardest, pointwise, target_lse, target_sum = differentiable
    return Reduced(denominators, hardest, ties, count, pointwise, target_lse, target_sum, target_weight)


def _packed(wanted: Wanted, upstream: Sequence[Tensor]) -> Tensor:
    """[n, channels] of the upstream gradients that can be other than zero."""
    denominators, hardest, pointwise, target_lse, target_sum = upstream
    channels = [*denominators, *([hardest] if wanted.hardest else []), *([pointwise] if wanted.pointwise else [])]
    channels += [target_lse] if wanted.together else []
    return torch.stack([*channels, *([target_sum] if wanted.targets else [])], 1)


def _upstream(packed: Tensor, wanted: Wanted) -> Reduced:
    """The inverse of `_packed`, zero where nothing was packed."""
    n, scales = len(packed), len(wanted.scales)
    zero, rest = packed.new_zeros(n), iter(packed.T[scales:])
    hardest = next(rest) if wanted.hardest else zero
    pointwise = next(rest) if wanted.pointwise else zero
    target_lse = next(rest) if wanted.together else zero
    target_sum = next(rest) if wanted.targets else zero
    return Reduced(packed.T[:scales], hardest, zero, zero, pointwise, target_lse, target_sum, zero)


def _equally_long(queries: Tensor, group: Group) -> Tensor:
    """Token vectors padded to the longest of all workers; vectors as they are."""
    if queries.ndim == 2:
        return queries
    longest = int(group.all_reduce(torch.tensor([queries.shape[1]], device=queries.device), "max"))
    return pad(queries, (0, 0, 0, longest - queries.shape[1]))


def _check(queries: Tensor, keys: Keys, block: Block) -> None:
    vectors = block.vectors
    if len(keys) != len(queries):
        raise ValueError(f"keys: {len(keys)} rows for {len(queries)} queries on axis 0")
    if len(block.keys) != len(vectors):
        raise ValueError(f"keys: {len(block.keys)} rows for {len(vectors)} candidates on axis 0")
    if vectors.ndim != queries.ndim or vectors.shape[-1] != queries.shape[-1]:
        raise ValueError(
            f"candidates are {list(vectors.shape)}, queries {list(queries.shape)}: the last axis must agree, "
            "and both be vectors or both token vectors"
        )
