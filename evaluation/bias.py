"""Association tests over sentences: do a model's vectors tie groups to attributes? (SEAT: May et al. 2019; the word
test is Caliskan, Bryson & Narayanan 2017.)

An effect near 0 shows no association by this test; it doesn't show that there is none. The first two probes are of
associations that most people have and are there for scale. Word sets: evaluation/words/english.yaml.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from evaluation.vectors import Vectors, unit_length

_WORDS = Path(__file__).parent / "words" / "english.yaml"
_SENTENCES = ("This is {}.", "That is {}.", "Here we speak of {}.")
_PERMUTATIONS = 9_999


class Probe(NamedTuple):
    """Targets x and y, attributes a and b."""

    x: list[str]
    y: list[str]
    a: list[str]
    b: list[str]


@cache
def probes() -> dict[str, Probe]:
    """The word sets that come with the package."""
    return {name: Probe(**sets) for name, sets in yaml.safe_load(_WORDS.read_text("utf-8")).items()}


def associations(vectors: Vectors) -> dict[str, dict[str, float]]:
    """{probe: {"effect": d, "p": p}}: see `association`."""
    return {name: association(*_of_probe(vectors, probe)) for name, probe in probes().items()}


def association(x: np.ndarray, y: np.ndarray, a: np.ndarray, b: np.ndarray, seed: int = 0) -> dict[str, float]:
    """effect: by how many standard deviations x is nearer to a than to b compared with y, −2 … 2; p: the share of
    re-divisions of x and y (drawn, the same every time) with as large a difference, one-sided.

    x, y, a, b [n, D] unit vectors.
    """
    targets = np.concatenate([x, y]).astype(np.float64)
    pulls = (targets @ a.T.astype(np.float64)).mean(axis=1) - (targets @ b.T.astype(np.float64)).mean(axis=1)
    n, observed = len(x), pulls[: len(x)].mean() - pulls[len(x) :].mean()
    deviation = pulls.std(ddof=1)
    generator = np.random.default_rng(seed)
    as_large = sum(_difference(generator.permutation(pulls), n) >= observed - 1e-12 for _ in range(_PERMUTATIONS))
    return {
        "effect": float(observed / deviation) if deviation > 0 else 0.0,
        "p": (as_large + 1) / (_PERMUTATIONS + 1),
    }


def _difference(pulls: np.ndarray, n: int) -> float:
    return float(pulls[:n].mean() - pulls[n:].mean())


def _of_probe(vectors: Vectors, probe: Probe) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y, a, b = (_embedded(vectors, words) for words in probe)
    return x, y, a, b


def _embedded(vectors: Vectors, words: Iterable[str]) -> np.ndarray:
    return unit_length(vectors.of([sentence.format(word) for word in words for sentence in _SENTENCES], "query"))
