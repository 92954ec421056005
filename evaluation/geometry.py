"""What a model's vectors look like as a cloud: figures that tell why a score is what it is.

Legend: n vectors, D dimensions, q queries, k neighbours. All take vectors [n, D] of length 1 (`vectors.unit_length`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.search import rank
from evaluation.vectors import unit_length

MOST_VECTORS = 4096  # drawn from more: every figure is a mean or a spectrum, and pairs grow with the square
_BLOCKS = 8


def alignment(queries: np.ndarray, documents: np.ndarray) -> float:
    """Mean squared distance of the n pairs; 0 is best (Wang & Isola 2020, eq. 3, α = 2)."""
    return float(((queries.astype(np.float64) - documents) ** 2).sum(axis=1).mean())


def uniformity(vectors: np.ndarray) -> float:
    """log mean exp(−2 squared distance) over distinct pairs; lower is more even (Wang & Isola 2020, eq. 4, t = 2)."""
    distances = np.maximum(2 - 2 * _pair_cosines(vectors), 0)
    return float(np.log(np.exp(-2 * distances).mean()))


def anisotropy(vectors: np.ndarray) -> float:
    """Mean cosine of distinct pairs: 0 where directions spread evenly (Ethayarajh 2019, section 3)."""
    return float(_pair_cosines(vectors).mean())


def effective_rank(vectors: np.ndarray) -> float:
    """exp of the entropy of the centred vectors' singular values, 1 … D (Roy & Vetterli 2007, "The effective rank")."""
    values = np.linalg.svd(vectors - vectors.mean(axis=0, dtype=np.float64), compute_uv=False)
    share = values[values > 0] / values.sum() if values.sum() > 0 else np.ones(1)
    return float(np.exp(-(share * np.log(share)).sum()))


def hubness(queries: np.ndarray, documents: np.ndarray, k: int = 10) -> float:
    """Skewness of how often a document is among a query's k nearest (Radovanović, Nanopoulos & Ivanović 2010, eq. 1).

    0 where all are alike often; large where a few hubs answer everything.
    """
    found, _ = rank(queries, documents, min(k, len(documents)))
    counts = np.bincount(found.ravel(), minlength=len(documents)).astype(np.float64)
    deviation = counts.std()
    return float((((counts - counts.mean()) / deviation) ** 3).mean()) if deviation > 0 else 0.0


def modality_gap(queries: np.ndarray, documents: np.ndarray) -> float:
    """Distance of the two sides' means (Liang et al. 2022, "Mind the gap"): 0 where they share a region."""
    return float(np.linalg.norm(queries.mean(axis=0, dtype=np.float64) - documents.mean(axis=0, dtype=np.float64)))


def probe_dimensions(queries: np.ndarray, documents: np.ndarray, blocks: int = _BLOCKS) -> np.ndarray:
    """[blocks] share of the n pairs whose document is the nearest by one block of neighbouring dimensions alone.

    Even for most models; falling from the first block on for a Matryoshka model; 0 in a block that carries nothing.
    Of equally near documents the first counts; equal documents are one.
    """
    same = np.unique(documents, axis=0, return_inverse=True)[1].ravel()
    shares = []
    for part in np.array_split(np.arange(documents.shape[1]), min(blocks, documents.shape[1])):
        found, _ = rank(unit_length(queries[:, part]), unit_length(documents[:, part]), 1)
        shares.append(np.mean(same[found[:, 0]] == same))
    return np.array(shares)


def stability(hits: Sequence[Sequence[str]], others: Sequence[Sequence[str]]) -> float:
    """Mean over queries of |A ∩ B| / |A ∪ B| of two models' nearest documents: 1 where nothing moved."""
    shares = [len({*a} & {*b}) / len({*a} | {*b}) for a, b in zip(hits, others, strict=True) if a or b]
    return float(np.mean(shares)) if shares else 1.0


def figures(queries: np.ndarray, documents: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> dict[str, float]:
    """All of the above by name. pairs: [n, D] queries, and a document that answers each."""
    blocks = probe_dimensions(*pairs)
    return {
        "alignment": alignment(*pairs),
        "uniformity_queries": uniformity(queries),
        "uniformity_documents": uniformity(documents),
        "effective_rank": effective_rank(documents),
        "anisotropy": anisotropy(documents),
        "hubness": hubness(queries, documents),
        "modality_gap": modality_gap(queries, documents),
        **{f"block_{i}_of_{len(blocks)}": float(share) for i, share in enumerate(blocks, start=1)},
    }


def drawn(count: int) -> list[int]:
    """Of so many rows all, or MOST_VECTORS that are the same every time; ascending."""
    if count <= MOST_VECTORS:
        return list(range(count))
    return sorted(np.random.default_rng(0).choice(count, MOST_VECTORS, replace=False).tolist())


def _pair_cosines(vectors: np.ndarray) -> np.ndarray:
    """[n(n−1)/2] of the distinct pairs; one vector is a pair with itself."""
    if len(vectors) < 2:
        return np.ones(1)
    wide = vectors.astype(np.float64)
    return (wide @ wide.T)[np.triu_indices(len(vectors), 1)]
