"""Views that drop, repeat or move the words of a text: arithmetic on indices, over all texts at once.

N is a text's number of words. A word is a run without white space, and each Chinese or Japanese character. Every
view leaves a text one word or more.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_services.draws import Draws, ranks, smallest
from data_services.schema import Section
from data_services.views.pieces import Pieces


class Crop(Section):
    """A run of ⌊u·N⌋ words, u uniform in [min_share, max_share], that begins anywhere.

    Two of one text are a query and its positive: independent cropping, Izacard et al., "Unsupervised Dense
    Information Retrieval with Contrastive Learning" (Contriever), arXiv:2112.09118, section 3.1, there of tokens.
    """

    kind: Literal["crop"] = "crop"
    min_share: float = Field(0.05, ge=0, le=1, description="of the text's words, at least")
    max_share: float = Field(0.5, gt=0, le=1, description="of the text's words, at most")

    @model_validator(mode="after")
    def _ordered(self) -> Crop:
        if self.min_share > self.max_share:
            raise ValueError(f"min_share ({self.min_share}) is above max_share ({self.max_share})")
        return self

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        lengths = words.lengths
        share = self.min_share + (self.max_share - self.min_share) * draws.stream(0).one()
        kept = np.maximum((lengths * share).astype(np.int64), 1)
        start = draws.stream(1).below(lengths - kept + 1)
        return words.kept(within(lengths, start, kept))


class Delete(Section):
    """Each word is dropped with probability `rate`, the others keep their order.

    Contriever (0.1, after cropping); CLEAR, Wu et al., arXiv:2012.15466, section 3.2.
    """

    kind: Literal["delete"] = "delete"
    rate: float = Field(0.1, ge=0, lt=1, description="probability that a word is dropped")

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        drawn = draws.each(words.lengths)
        largest = np.maximum.reduceat(drawn, words.offsets[:-1])  # of a text that would lose all, this one stays
        return words.kept((drawn >= self.rate) | (drawn == np.repeat(largest, words.lengths)))


class DeleteSpans(Section):
    """Drops `spans` runs of round(share·N) words that don't overlap, fewer where the text has no room for them.

    CLEAR, Wu et al., arXiv:2012.15466, section 3.2.
    """

    kind: Literal["delete_spans"] = "delete_spans"
    spans: int = Field(5, ge=1, description="runs that are dropped")
    share: float = Field(0.05, gt=0, lt=1, description="length of each, of the text's words; one word at least")

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        size = _span_lengths(words.lengths, self.share)
        chosen, lengths = _disjoint(words.lengths, size, np.minimum(self.spans, (words.lengths - 1) // size), draws)
        return words.kept(~np.repeat(chosen, lengths))


class Reorder(Section):
    """Exchanges `pairs` pairs of runs of round(share·N) words that don't overlap, fewer where there is no room.

    CLEAR, Wu et al., arXiv:2012.15466, section 3.2.
    """

    kind: Literal["reorder"] = "reorder"
    pairs: int = Field(5, ge=1, description="pairs of runs that change places")
    share: float = Field(0.05, gt=0, le=0.5, description="length of a run, of the text's words; one word at least")

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        size = _span_lengths(words.lengths, self.share)
        count = 2 * np.minimum(self.pairs, words.lengths // (2 * size))
        chosen, lengths = _disjoint(words.lengths, size, count, draws.stream(0))
        starts, runs = np.cumsum(lengths) - lengths, np.flatnonzero(chosen)
        # In an order of their own within each text, the first run goes with the second, the third with the fourth.
        texts = np.repeat(np.arange(len(count)), count)
        runs = runs[np.lexsort((draws.stream(1).each(count), texts))]
        partner = np.arange(len(lengths))
        partner[runs[0::2]], partner[runs[1::2]] = runs[1::2], runs[0::2]
        return words.taken(np.repeat(starts[partner], lengths) + ranks(lengths))


class Repeat(Section):
    """Writes words twice in a row: k of them, k uniform in 0 … max(2, ⌊rate·N⌋), chosen without replacement.

    ESimCSE, Wu et al., arXiv:2109.04380, section 3.1, there of sub-words.
    """

    kind: Literal["repeat"] = "repeat"
    rate: float = Field(0.32, ge=0, le=1, description="share of the words that are repeated, at most")

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        lengths = words.lengths
        most = np.maximum(2, (self.rate * lengths).astype(np.int64))
        count = np.minimum(draws.stream(0).below(most + 1), lengths)
        return words.repeated(1 + smallest(draws.stream(1).each(lengths), lengths, count))


def within(lengths: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    """[T] bool, the pieces start … start+count-1 of each text; all [n]."""
    rank = ranks(lengths)
    return (rank >= np.repeat(start, lengths)) & (rank < np.repeat(start + count, lengths))


def _span_lengths(lengths: np.ndarray, share: float) -> np.ndarray:
    return np.maximum(np.rint(lengths * share).astype(np.int64), 1)


def _disjoint(lengths: np.ndarray, size: np.ndarray, count: np.ndarray, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Cuts each text of lengths [n] words into `count` spans of `size` words and single words, anywhere among them.

    Gives, for every block of all texts in order, whether it is a span [S] bool and its length [S] int64: every
    arrangement of spans that don't overlap is equally probable.
    """
    blocks = lengths - count * (size - 1)
    chosen = smallest(draws.each(blocks), blocks, count)
    return chosen, np.where(chosen, np.repeat(size, blocks), 1)
