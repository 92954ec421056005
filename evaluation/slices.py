"""A task's scores by part of its queries: how long their texts are, and in which language."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

# Edges in words: a phrase, a sentence, a paragraph, more.
_LENGTHS = ((1, 8), (9, 32), (33, 128), (129, None))
LEAST_QUERIES = 5  # a mean of fewer says nothing


def by_length(scores: Mapping[str, np.ndarray], texts: Sequence[str]) -> dict[str, dict[str, float]]:
    """{"1 to 8 words (12)": {metric: mean}}; scores {metric: [q]}, texts [q]. Parts of few queries are left out."""
    words = np.array([len(text.split()) for text in texts])
    parts = {}
    for low, high in _LENGTHS:
        named = f"{low} to {high} words" if high else f"{low} words or more"
        parts[named] = (words >= low) & (words <= (high or np.inf))
    parts[f"{_LENGTHS[0][0]} to {_LENGTHS[0][1]} words"] |= words == 0
    return _means(scores, parts)


def by_language(scores: Mapping[str, np.ndarray], languages: Sequence[str]) -> dict[str, dict[str, float]]:
    """{"language de (12)": {metric: mean}}; languages [q]."""
    named = np.array(languages)
    return _means(scores, {f"language {name}": named == name for name in sorted(set(languages))})


def _means(scores: Mapping[str, np.ndarray], parts: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {
        f"{name} ({part.sum()})": {metric: float(x[part].mean()) for metric, x in scores.items()}
        for name, part in parts.items()
        if part.sum() >= LEAST_QUERIES
    }
