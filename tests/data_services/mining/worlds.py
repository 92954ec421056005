"""Small sources with known answers, encoders whose vectors are given, and the naive twin of the miner."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from data_services.fields import Fields
from data_services.mine import MiningTexts
from data_services.mining.filters import FilterConfig
from data_services.mining.scorers import VectorMiner
from data_services.mining.search import LocalSearch, SearchConfig, shards
from data_services.mining.texts import plain_id
from data_services.mining.vectors import Vectors
from data_services.origins import RowsPart
from data_services.readers.blocks import Want
from data_services.records import Row
from data_services.store import Reading, StoredSource, store


def source(folder: Path, rows: Sequence[tuple[str, list[str], list[str]]]) -> StoredSource:
    """A source of (query, positives, negatives), whose ids are f:0, f:1, …"""
    names = Fields("query", "positives", ("negatives",), id="id")
    made = [Row(i, {"id": f"f:{i}", "query": q, "positives": p, "negatives": n}) for i, (q, p, n) in enumerate(rows)]
    reading = Reading([RowsPart("f", lambda: made)], Want(names, 1 << 20), "pairs")
    return store("s", folder / "slot", None, lambda: reading)


class Given:
    """An encoder whose vectors are given by text."""

    def __init__(self, vectors: Mapping[str, Sequence[float]]) -> None:
        self.vectors = {text: np.asarray(v, np.float32) for text, v in vectors.items()}
        self.calls: list[int] = []

    def encode(self, texts: Sequence[str], field: str) -> np.ndarray:
        self.calls.append(len(texts))
        return np.stack([self.vectors[text] for text in texts])


def vector_file(path: Path, vectors: np.ndarray) -> Vectors:
    np.asarray(vectors, np.float32).tofile(path)
    return Vectors(path, *vectors.shape)


def vector_miner(texts: MiningTexts, encoder: Given, folder: Path, config: SearchConfig | None = None) -> VectorMiner:
    queries, documents = (
        vector_file(folder / f"{name}.f32", encoder.encode(table.read(0, len(table))[1], name))
        for name, table in (("query", texts.queries), ("document", texts.documents))
    )
    return VectorMiner(queries, documents, LocalSearch(shards(queries, documents, config or SearchConfig())))


def random_world(seed: int, rows: int = 30) -> tuple[list[tuple[str, list[str], list[str]]], dict[str, np.ndarray]]:
    """Rows with repeated queries and documents, several positives, hard negatives, texts equal but for their case;
    vectors of small whole numbers, so that many scores are equal and every sum is exact."""
    rng = random.Random(seed)
    queries = [f"query {i}" for i in range(rows // 2)]
    documents = [f"document {i}" for i in range(rows)] + [f"DOCUMENT {i}" for i in range(0, rows, 3)] + queries[:3]
    made = [
        (rng.choice(queries), rng.sample(documents, rng.randint(1, 3)), rng.sample(documents, rng.randint(0, 2)))
        for _ in range(rows)
    ]
    numbers = np.random.default_rng(seed)
    return made, {text: numbers.integers(-3, 4, 4).astype(float) for text in {*queries, *documents}}


def naive(
    rows: Sequence[tuple[str, list[str], list[str]]],
    vectors: Mapping[str, np.ndarray],
    config: FilterConfig,
    corpus: Sequence[str],
    guide: Mapping[str, np.ndarray] | None = None,
    guide_margin: float = 0.0,
) -> dict[str, list[tuple[str, float]]]:
    """{query: [(negative, score)]} by the definition, one candidate after another; `choose: top` only.

    corpus: its order settles ties
    """
    positives: dict[str, list[str]] = {}
    for query, p, _ in rows:
        positives.setdefault(query, []).extend(p)
    most = max(len(p) for p in positives.values())
    first, behind = config.window(most, guide is not None)
    depth = behind + most

    def score(query: str, text: str, of: Mapping[str, np.ndarray] = vectors) -> float:
        return float(np.dot(of[query], of[text]))

    found = {}
    for query, answers in positives.items():
        near = sorted(corpus, key=lambda text: -score(query, text))[:depth]
        hardest = min(score(query, p) for p in answers)
        left = []
        for text in near:
            s = score(query, text)
            plain = {plain_id(t) for t in [query, *answers]}
            out = text in answers or (config.same_text and plain_id(text) in plain)
            out |= config.absolute_margin is not None and s + config.absolute_margin > hardest
            out |= config.relative_margin is not None and s > hardest - abs(hardest) * config.relative_margin
            out |= config.max_score is not None and s > config.max_score
            out |= config.min_score is not None and s < config.min_score
            if guide is not None:
                line = min(score(query, p, guide) for p in answers) - guide_margin
                out |= score(query, text, guide) > line
            if not out:
                left.append((text, s))
        found[query] = left[first:behind][: config.negatives]
    return found
