"""Which of the documents that a search found are negatives of the query, and which of those are taken.

Legend: q queries of a block, k candidates of each, best first.

Everything is a pure function of the block: a candidate's fate doesn't depend on how the queries were cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_services.draws import mix
from data_services.mining.texts import Lists
from data_services.schema import Section


class Fate(IntEnum):
    """What became of a candidate; the first reason that applies."""

    TAKEN = 0
    NOT_NEEDED = 1  # a negative like those that were taken, but there were enough
    POSITIVE = 2  # answers the query in some row
    SAME_TEXT = 3  # the query's text or a positive's, but for case and white space
    ABSOLUTE_MARGIN = 4
    RELATIVE_MARGIN = 5
    MAX_SCORE = 6
    MIN_SCORE = 7
    GUIDE = 8
    BEFORE_WINDOW = 9
    BEHIND_WINDOW = 10
    NOT_THERE = 11  # fewer documents than places


class FilterConfig(Section):
    """Which candidates are negatives, and how many are taken.

    A positive's score is that of the query's hardest one, the smallest. Ranks count what the other filters let through,
    from 0, the nearest. The relative margin is the one of Moreira et al. 2024 (NV-Retriever, arXiv 2407.15831),
    TopK-PercPos.
    """

    negatives: int = Field(5, ge=1, description="negatives of a query")
    from_rank: int = Field(0, ge=0, description="ranks below this are left out: the nearest are often false negatives")
    to_rank: int | None = Field(
        None,
        ge=1,
        description="first rank left out; none: from_rank + negatives (ten times as many with a filter) + the most "
        "positives of a query",
    )
    absolute_margin: float | None = Field(None, description="a negative scores at least so much below the positive")
    relative_margin: float | None = Field(None, description="the same as a share of the positive's score: 0.05 is 5 %")
    max_score: float | None = Field(None, description="largest score of a negative")
    min_score: float | None = Field(None, description="smallest score of a negative")
    same_text: bool = Field(True, description="leave out the query's and positives' texts in other case or spacing")
    choose: Literal["top", "random"] = Field("top", description="the nearest of the window, or any")
    seed: int = Field(0, ge=0, description="of the random choice, a function of it, the query and the document")

    @model_validator(mode="after")
    def _window_has_room(self) -> FilterConfig:
        if self.to_rank is not None and self.to_rank - self.from_rank < self.negatives:
            raise ValueError(
                f"ranks {self.from_rank} to {self.to_rank} hold {max(self.to_rank - self.from_rank, 0)} candidates and "
                f"negatives is {self.negatives}: raise to_rank, or lower from_rank or negatives"
            )
        return self

    def window(self, most_positives: int, guided: bool) -> tuple[int, int]:
        """(first rank, first rank behind). most_positives: of any query; guided: whether there is a guide."""
        if self.to_rank is not None:
            return self.from_rank, self.to_rank
        filtered = guided or {self.absolute_margin, self.relative_margin, self.max_score, self.min_score} != {None}
        return self.from_rank, self.from_rank + self.negatives * (10 if filtered else 1) + most_positives


@dataclass(frozen=True)
class Block:
    """Candidates of q queries, and what tells negatives from positives.

    candidates [q, k] int64 positions of documents, best first, -1 behind the last; scores [q, k] float32
    positives  of each query, positions of documents; positive_scores [their number] float32
    query_ids  [q] int64; query_plain [q] and document_plain [n] int64, `texts.plain_id`
    document_ids [n] int64
    """

    candidates: np.ndarray
    scores: np.ndarray
    positives: Lists
    positive_scores: np.ndarray
    query_ids: np.ndarray
    query_plain: np.ndarray
    document_ids: np.ndarray
    document_plain: np.ndarray

    def of_hardest(self, scores: np.ndarray) -> np.ndarray:
        """[q] the smallest of each query's positives' scores."""
        return np.minimum.reduceat(scores, self.positives.offsets[:-1])


def known_false(block: Block, config: FilterConfig) -> np.ndarray:
    """[q, k] Fate, by ids and texts alone."""
    fates = np.zeros(block.candidates.shape, np.int8)
    if config.same_text:
        texts, owners = block.document_plain[block.positives.values], block.positives.owners
        same = _among(block.document_plain[block.candidates], texts, owners)
        same |= block.document_plain[block.candidates] == block.query_plain[:, None]
        fates[same] = Fate.SAME_TEXT
    fates[_among(block.candidates, block.positives.values, block.positives.owners)] = Fate.POSITIVE
    fates[block.candidates < 0] = Fate.NOT_THERE
    return fates


def by_score(block: Block, fates: np.ndarray, config: FilterConfig) -> None:
    """Marks in `fates` what margins and bounds leave out."""
    scores, positive = block.scores, block.of_hardest(block.positive_scores)[:, None]
    if config.absolute_margin is not None:
        _mark(fates, scores + np.float32(config.absolute_margin) > positive, Fate.ABSOLUTE_MARGIN)
    if config.relative_margin is not None:
        # |positive|: a share of a negative score has to lower the threshold too.
        threshold = positive - np.abs(positive) * np.float32(config.relative_margin)
        _mark(fates, scores > threshold, Fate.RELATIVE_MARGIN)
    if config.max_score is not None:
        _mark(fates, scores > config.max_score, Fate.MAX_SCORE)
    if config.min_score is not None:
        _mark(fates, scores < config.min_score, Fate.MIN_SCORE)


def by_guide(fates: np.ndarray, scores: np.ndarray, positive: np.ndarray, margin: float) -> None:
    """Marks what the guide scores [q, k] above its score of the hardest positive [q] less the margin."""
    _mark(fates, scores + np.float32(margin) > positive[:, None], Fate.GUIDE)


def choose(block: Block, fates: np.ndarray, window: tuple[int, int], config: FilterConfig) -> np.ndarray:
    """[q, k] bool, which are taken; completes `fates`."""
    alive = fates == 0
    rank = np.cumsum(alive, axis=1) - 1
    _mark(fates, rank < window[0], Fate.BEFORE_WINDOW)
    _mark(fates, rank >= window[1], Fate.BEHIND_WINDOW)
    inside = fates == 0
    order = np.cumsum(inside, axis=1) - 1
    if config.choose == "random":
        keys = _keys(block.query_ids, block.document_ids[block.candidates], config.seed)
        keys[~inside] = np.iinfo(np.uint64).max
        order = np.argsort(np.argsort(keys, axis=1, kind="stable"), axis=1)
    taken = inside & (order < config.negatives)
    fates[inside & ~taken] = Fate.NOT_NEEDED
    return taken


def _mark(fates: np.ndarray, which: np.ndarray, fate: Fate) -> None:
    fates[(fates == 0) & which] = fate


def _among(candidates: np.ndarray, values: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """[q, k] bool, whether a candidate is among the values of its own query's list."""
    rows = np.repeat(np.arange(len(candidates)), candidates.shape[1])
    # Values as small numbers, so that (query, value) is one number.
    known, codes = np.unique(values, return_inverse=True)
    at = np.searchsorted(known, candidates.ravel()).clip(max=len(known) - 1)
    pairs = rows * len(known) + at
    return ((known[at] == candidates.ravel()) & np.isin(pairs, owners * len(known) + codes)).reshape(candidates.shape)


def _keys(queries: np.ndarray, documents: np.ndarray, seed: int) -> np.ndarray:
    """[q, k] uint64 of each pair, a keyed hash."""
    of_query = mix(queries.astype(np.uint64) + mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return mix(documents.astype(np.uint64) ^ of_query[:, None])
