"""How a tile of queries and candidates is scored, and what an upstream gradient of the scores gives each side.

    inner product        s_ij = q_i . k_j                                    the cosine, of unit vectors
    squared distance     s_ij = -|q_i - k_j|^2
    maxima over tokens   s_ij = sum_l max_m q_il . k_jm                      late interaction

Shapes: queries [B, D] and candidates [t, D], or token vectors [B, Lq, D] and [t, Ld, D] with `Keys.lengths`; scores
and their upstream gradient [B, t]. Queries are float32 or float64; candidates are cast up to that a tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from trainers.objectives.keys import Keys


@dataclass(frozen=True)
class Keyed:
    """Vectors [n, D] or token vectors [n, L, D], and their keys [n]."""

    vectors: Tensor
    keys: Keys

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, rows: slice) -> Keyed:
        return Keyed(self.vectors[rows], self.keys[rows])


class Similarity(Protocol):
    """linear: the query's gradient is linear in the candidate, and so is known from an average of candidates.
    homogeneous: of degree 1 in the query, so that sum_l ds/dq_l q_l = s."""

    linear: bool
    homogeneous: bool

    def scores(self, queries: Keyed, candidates: Keyed) -> Tensor:
        """[B, t]"""
        ...

    def of_pairs(self, queries: Keyed, candidates: Keyed) -> Tensor:
        """[n] of query i and candidate i, of n each; differentiable."""
        ...

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Keyed,
        candidates: Keyed,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        """Adds scale * upstream * ds/dqueries to `into` [B, ...] in place; gives the candidates' gradient [t, ...]."""
        ...


class InnerProduct:
    """s = q . k"""

    linear, homogeneous = True, True

    def scores(self, queries: Keyed, candidates: Keyed) -> Tensor:
        return queries.vectors @ candidates.vectors.to(queries.vectors.dtype).T

    def of_pairs(self, queries: Keyed, candidates: Keyed) -> Tensor:
        return (queries.vectors * candidates.vectors).sum(1)

    def gradients(
        self, upstream: Tensor, scale: float, queries: Keyed, candidates: Keyed, into: Tensor, *, of_candidates: bool
    ) -> Tensor | None:
        into.addmm_(upstream, candidates.vectors.to(upstream.dtype), alpha=scale)
        return (upstream.T @ queries.vectors).mul_(scale) if of_candidates else None


class NegativeSquaredDistance:
    """s = -|q - k|^2 = 2 q . k - |q|^2 - |k|^2"""

    linear, homogeneous = False, False

    def scores(self, queries: Keyed, candidates: Keyed) -> Tensor:
        q = queries.vectors
        k = candidates.vectors.to(q.dtype)
        return (q @ k.T).mul_(2).sub_(q.square().sum(1)[:, None]).sub_(k.square().sum(1))

    def of_pairs(self, queries: Keyed, candidates: Keyed) -> Tensor:
        return -(queries.vectors - candidates.vectors).square().sum(1)

    def gradients(
        self, upstream: Tensor, scale: float, queries: Keyed, candidates: Keyed, into: Tensor, *, of_candidates: bool
    ) -> Tensor | None:
        q, k = queries.vectors, candidates.vectors.to(upstream.dtype)
        into.addmm_(upstream, k, alpha=2 * scale)
        into.addcmul_(q, upstream.sum(1)[:, None], value=-2 * scale)
        if not of_candidates:
            return None
        return (upstream.T @ q).sub_(k * upstream.sum(0)[:, None]).mul_(2 * scale)


class NegativeDistance:
    """s = -|q - k|; where both are equal its gradient is taken for 0."""

    linear, homogeneous = False, False
    _squared = NegativeSquaredDistance()

    def scores(self, queries: Keyed, candidates: Keyed) -> Tensor:
        return self._squared.scores(queries, candidates).neg_().clamp_(min=0).sqrt_().neg_()

    def of_pairs(self, queries: Keyed, candidates: Keyed) -> Tensor:
        return -torch.linalg.vector_norm(queries.vectors - candidates.vectors, dim=1)

    def gradients(
        self, upstream: Tensor, scale: float, queries: Keyed, candidates: Keyed, into: Tensor, *, of_candidates: bool
    ) -> Tensor | None:
        distances = self.scores(queries, candidates).neg_()
        of_squared = torch.where(distances > 0, upstream / (2 * distances), 0)
        return self._squared.gradients(of_squared, scale, queries, candidates, into, of_candidates=of_candidates)


class MaxSim:
    """s = sum over the query's tokens of the largest inner product with a token of the candidate.

    Token similarities of a few candidates are held at once, at most `ELEMENTS` numbers; the backward pass computes
    them again and sends each query token's gradient to the token that was its largest. A candidate without tokens
    scores 0. Khattab & Zaharia, arXiv:2004.12832, eq. 3.
    """

    linear, homogeneous = False, True
    ELEMENTS = 1 << 23

    def scores(self, queries: Keyed, candidates: Keyed) -> Tensor:
        counts = _valid(queries)[..., None]
        parts = [_largest(queries, few)[0].mul_(counts).sum(1) for _, few in self._pieces(queries, candidates)]
        return torch.cat(parts, 1) if parts else queries.vectors.new_zeros(len(queries), 0)

    def of_pairs(self, queries: Keyed, candidates: Keyed) -> Tensor:
        similar = torch.einsum("nqd,nkd->nqk", queries.vectors, candidates.vectors)
        similar = similar.masked_fill(~_valid(candidates)[:, None], -torch.inf)
        largest = similar.amax(2) if similar.shape[2] else similar.new_full(similar.shape[:2], -torch.inf)
        counts = _valid(queries) & (largest != -torch.inf)
        return torch.where(counts, largest, 0).sum(1)

    def gradients(
        self, upstream: Tensor, scale: float, queries: Keyed, candidates: Keyed, into: Tensor, *, of_candidates: bool
    ) -> Tensor | None:
        counts = _valid(queries)[..., None]
        gradient = torch.zeros(candidates.vectors.shape, dtype=upstream.dtype, device=upstream.device)
        for rows, few in self._pieces(queries, candidates):
            largest, at = _largest(queries, few)
            chosen = (upstream[:, None, rows] * scale * counts).masked_fill_(~_some(few), 0)
            routed = upstream.new_zeros(*largest.shape, few.vectors.shape[1])
            routed = routed.scatter_(3, at[..., None], chosen[..., None]).flatten(2).flatten(0, 1)  # [B Lq, t Ld]
            into.view(-1, into.shape[2]).addmm_(routed, few.vectors.to(upstream.dtype).flatten(0, 1))
            if of_candidates:
                gradient[rows] = (routed.T @ queries.vectors.flatten(0, 1)).view(few.vectors.shape)
        return gradient if of_candidates else None

    def _pieces(self, queries: Keyed, candidates: Keyed) -> Iterator[tuple[slice, Keyed]]:
        each = max(1, queries.vectors.shape[0] * queries.vectors.shape[1] * candidates.vectors.shape[1])
        few = max(1, self.ELEMENTS // each)
        for start in range(0, len(candidates), few):
            rows = slice(start, min(start + few, len(candidates)))
            yield rows, candidates[rows]


class Reversed:
    """A similarity with the sides exchanged: documents are the rows that travel, queries the candidates that stay."""

    linear, homogeneous = False, True

    def __init__(self, score: MaxSim) -> None:
        self._score = score

    def scores(self, queries: Keyed, candidates: Keyed) -> Tensor:
        staying = Keyed(candidates.vectors.to(queries.vectors.dtype), candidates.keys)
        return self._score.scores(staying, queries).T.contiguous()

    def of_pairs(self, queries: Keyed, candidates: Keyed) -> Tensor:
        return self._score.of_pairs(candidates, queries)

    def gradients(
        self, upstream: Tensor, scale: float, queries: Keyed, candidates: Keyed, into: Tensor, *, of_candidates: bool
    ) -> Tensor | None:
        staying = Keyed(candidates.vectors.to(upstream.dtype), candidates.keys)
        gradient = torch.zeros_like(staying.vectors)
        of_rows = self._score.gradients(upstream.T, scale, staying, queries, gradient, of_candidates=True)
        assert of_rows is not None
        into += of_rows
        return gradient if of_candidates else None


def _largest(queries: Keyed, candidates: Keyed) -> tuple[Tensor, Tensor]:
    """[B, Lq, t] each query token's largest inner product with a candidate's tokens, 0 without any, and its place."""
    q, k = queries.vectors, candidates.vectors
    similar = q.flatten(0, 1) @ k.to(q.dtype).reshape(-1, k.shape[2]).T
    similar = similar.view(*q.shape[:2], *k.shape[:2])
    largest, at = similar.masked_fill_(~_valid(candidates), -torch.inf).max(3)
    return largest.masked_fill_(~_some(candidates), 0), at


def _valid(of: Keyed) -> Tensor:
    """[n, L] bool, tokens that count."""
    if of.keys.lengths is None:
        raise ValueError("token vectors [n, L, D] need `lengths` among their keys")
    return torch.arange(of.vectors.shape[1], device=of.vectors.device) < of.keys.lengths[:, None]


def _some(of: Keyed) -> Tensor:
    """[n] bool, candidates with any token."""
    return _valid(of).any(1)


SIMILARITIES: dict[str, type[Similarity]] = {
    "inner_product": InnerProduct,
    "squared_distance": NegativeSquaredDistance,
    "max_sim": MaxSim,
}
