"""How a tile of queries and candidates is scored, and what an upstream gradient of the scores gives each side.

    inner product        s_ij = q_i . k_j                                    the cosine, of unit vectors
    squared distance     s_ij = -|q_i - k_j|^2
    maxima over tokens   s_ij = sum_l max_m q_il . k_jm                      late interaction

Shapes: queries [B, D] and candidates [t, D], or token vectors [B, Lq, D] and [t, Ld, D] with `Keys.lengths`; scores
and their upstream gradient [B, t]. Queries are float32 or float64; candidates are cast up to that a tile at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from trainers.objectives.keys import Keys


class Similarity(Protocol):
    """linear: the query's gradient is linear in the candidate, and so is known from an average of candidates.
    homogeneous: of degree 1 in the query, so that sum_l ds/dq_l q_l = s."""

    linear: bool
    homogeneous: bool

    def scores(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        """[B, t]"""
        ...

    def of_pairs(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        """[n] of query i and candidate i, of n each; differentiable."""
        ...

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Tensor,
        candidates: Tensor,
        query_keys: Keys,
        candidate_keys: Keys,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        """Adds scale * upstream * ds/dqueries to `into` [B, ...] in place; gives the candidates' gradient [t, ...]."""
        ...


class InnerProduct:
    """s = q . k"""

    linear, homogeneous = True, True

    def scores(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        return queries @ candidates.to(queries.dtype).T

    def of_pairs(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        return (queries * candidates).sum(1)

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Tensor,
        candidates: Tensor,
        query_keys: Keys,
        candidate_keys: Keys,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        into.addmm_(upstream, candidates.to(upstream.dtype), alpha=scale)
        return (upstream.T @ queries).mul_(scale) if of_candidates else None


class NegativeSquaredDistance:
    """s = -|q - k|^2 = 2 q . k - |q|^2 - |k|^2"""

    linear, homogeneous = False, False

    def scores(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        candidates = candidates.to(queries.dtype)
        scores = (queries @ candidates.T).mul_(2)
        return scores.sub_(queries.square().sum(1)[:, None]).sub_(candidates.square().sum(1))

    def of_pairs(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        return -(queries - candidates).square().sum(1)

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Tensor,
        candidates: Tensor,
        query_keys: Keys,
        candidate_keys: Keys,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        candidates = candidates.to(upstream.dtype)
        into.addmm_(upstream, candidates, alpha=2 * scale)
        into.addcmul_(queries, upstream.sum(1)[:, None], value=-2 * scale)
        if not of_candidates:
            return None
        return (upstream.T @ queries).sub_(candidates * upstream.sum(0)[:, None]).mul_(2 * scale)


class NegativeDistance:
    """s = -|q - k|; where both are equal its gradient is taken for 0."""

    linear, homogeneous = False, False
    _squared = NegativeSquaredDistance()

    def scores(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        squared = self._squared.scores(queries, candidates, query_keys, candidate_keys)
        return squared.neg_().clamp_(min=0).sqrt_().neg_()

    def of_pairs(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        return -torch.linalg.vector_norm(queries - candidates, dim=1)

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Tensor,
        candidates: Tensor,
        query_keys: Keys,
        candidate_keys: Keys,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        distances = self.scores(queries, candidates, query_keys, candidate_keys).neg_()
        of_squared = torch.where(distances > 0, upstream / (2 * distances), 0)
        keys = query_keys, candidate_keys
        return self._squared.gradients(of_squared, scale, queries, candidates, *keys, into, of_candidates=of_candidates)


class MaxSim:
    """s = sum over the query's tokens of the largest inner product with a token of the candidate.

    Token similarities of a few candidates are held at once, at most `ELEMENTS` numbers; the backward pass computes
    them again and sends each query token's gradient to the token that was its largest. A candidate without tokens
    scores 0. Khattab & Zaharia, arXiv:2004.12832, eq. 3.
    """

    linear, homogeneous = False, True
    ELEMENTS = 1 << 23

    def scores(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        parts = [
            _largest(queries, few, keys)[0].mul_(_valid(queries, query_keys)[..., None]).sum(1)
            for _, few, keys in self._pieces(queries, candidates, candidate_keys)
        ]
        return torch.cat(parts, 1) if parts else queries.new_zeros(len(queries), 0)

    def of_pairs(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        similar = torch.einsum("nqd,nkd->nqk", queries, candidates)
        similar = similar.masked_fill(~_valid(candidates, candidate_keys)[:, None], -torch.inf)
        largest = similar.amax(2) if similar.shape[2] else similar.new_full(similar.shape[:2], -torch.inf)
        counts = _valid(queries, query_keys) & (largest != -torch.inf)
        return torch.where(counts, largest, 0).sum(1)

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Tensor,
        candidates: Tensor,
        query_keys: Keys,
        candidate_keys: Keys,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        counts = _valid(queries, query_keys)[..., None]
        gradient = torch.zeros(candidates.shape, dtype=upstream.dtype, device=upstream.device)
        for rows, few, keys in self._pieces(queries, candidates, candidate_keys):
            largest, at = _largest(queries, few, keys)
            chosen = (upstream[:, None, rows] * scale * counts).masked_fill_(~_some(keys, few), 0)
            routed = upstream.new_zeros(*largest.shape, few.shape[1]).scatter_(3, at[..., None], chosen[..., None])
            routed = routed.flatten(2).flatten(0, 1)  # [B Lq, t Ld]
            flat = few.to(upstream.dtype).flatten(0, 1)
            into.view(-1, into.shape[2]).addmm_(routed, flat)
            if of_candidates:
                gradient[rows] = (routed.T @ queries.flatten(0, 1)).view(few.shape)
        return gradient if of_candidates else None

    def _pieces(self, queries: Tensor, candidates: Tensor, keys: Keys) -> Iterator[tuple[slice, Tensor, Keys]]:
        each = max(1, queries.shape[0] * queries.shape[1] * candidates.shape[1])
        few = max(1, self.ELEMENTS // each)
        for start in range(0, len(candidates), few):
            rows = slice(start, min(start + few, len(candidates)))
            yield rows, candidates[rows], keys[rows]


class Reversed:
    """A similarity with the sides exchanged: documents are the rows that travel, queries the candidates that stay."""

    linear, homogeneous = False, True

    def __init__(self, score: MaxSim) -> None:
        self._score = score

    def scores(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        return self._score.scores(candidates.to(queries.dtype), queries, candidate_keys, query_keys).T.contiguous()

    def of_pairs(self, queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Tensor:
        return self._score.of_pairs(candidates, queries, candidate_keys, query_keys)

    def gradients(
        self,
        upstream: Tensor,
        scale: float,
        queries: Tensor,
        candidates: Tensor,
        query_keys: Keys,
        candidate_keys: Keys,
        into: Tensor,
        *,
        of_candidates: bool,
    ) -> Tensor | None:
        staying = candidates.to(upstream.dtype)
        gradient = torch.zeros_like(staying)
        of_rows = self._score.gradients(
            upstream.T, scale, staying, queries, candidate_keys, query_keys, gradient, of_candidates=True
        )
        assert of_rows is not None
        into += of_rows
        return gradient if of_candidates else None


def _largest(queries: Tensor, candidates: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """[B, Lq, t] each query token's largest inner product with a candidate's tokens, 0 without any, and its place."""
    tokens, dim = candidates.shape[1:]
    similar = queries.flatten(0, 1) @ candidates.to(queries.dtype).reshape(-1, dim).T
    similar = similar.view(*queries.shape[:2], len(candidates), tokens)
    largest, at = similar.masked_fill_(~_valid(candidates, keys), -torch.inf).max(3)
    return largest.masked_fill_(~_some(keys, candidates), 0), at


def _valid(vectors: Tensor, keys: Keys) -> Tensor:
    """[n, L] bool, tokens that count."""
    if keys.lengths is None:
        raise ValueError("token vectors [n, L, D] need `lengths` among their keys")
    return torch.arange(vectors.shape[1], device=vectors.device) < keys.lengths[:, None]


def _some(keys: Keys, vectors: Tensor) -> Tensor:
    """[n] bool, candidates with any token."""
    return _valid(vectors, keys).any(1)


SIMILARITIES: dict[str, type[Similarity]] = {
    "inner_product": InnerProduct,
    "squared_distance": NegativeSquaredDistance,
    "max_sim": MaxSim,
}
