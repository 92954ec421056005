"""Texts cut into pieces (words, sentences, lines), on which views are index arithmetic over all texts at once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Scripts that write no spaces between words: each character is a word.
_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
# Every pattern takes the white space behind a piece along, so that pieces end to end are the text.
WORD = re.compile(r"\S+\s*")
_MIXED_WORD = re.compile(rf"[{_UNSPACED}]\s*|[^\s{_UNSPACED}]+\s*")
SENTENCE = re.compile(r"""\S.*?(?:[.!?…]+["'”’)\]]*\s+|[。！？]+\s*|\n\s*\n\s*|\Z)""", re.DOTALL)
LINE = re.compile(r"^[^\S\n]*\S[^\n]*\n?", re.MULTILINE)
PATTERNS = {"sentence": SENTENCE, "line": LINE}


@dataclass(frozen=True)
class Pieces:
    """n texts of T pieces, end to end; a text has one or more. pieces [T] str objects; offsets [n+1] int64

    Each piece has the white space that follows it, the last one of a text a space: pieces can be dropped, repeated
    and moved, and `texts` puts together what is left.
    """

    pieces: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], pattern: re.Pattern[str] = WORD) -> Pieces:
        """texts  each with a character that isn't white space"""
        mixed = _MIXED_WORD if pattern is WORD else pattern
        lists = [(pattern if text.isascii() else mixed).findall(text + " ") for text in texts]
        offsets = np.zeros(len(lists) + 1, np.int64)
        np.cumsum([len(pieces) for pieces in lists], out=offsets[1:])
        pieces = np.empty(offsets[-1], object)
        pieces[:] = list(itertools.chain.from_iterable(lists))
        return cls(pieces, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64, pieces of each text."""
        return np.diff(self.offsets)

    def kept(self, keep: np.ndarray) -> Pieces:
        """The pieces where keep [T] bool is set."""
        return Pieces(self.pieces[keep], np.concatenate([[0], np.cumsum(keep)])[self.offsets])

    def repeated(self, times: np.ndarray) -> Pieces:
        """Each piece times [T] int64 in a row."""
        return Pieces(np.repeat(self.pieces, times), np.concatenate([[0], np.cumsum(times)])[self.offsets])

    def taken(self, order: np.ndarray) -> Pieces:
        """The pieces at order [T], which stay in their texts."""
        return Pieces(self.pieces[order], self.offsets)

    def replaced(self, places: np.ndarray, bodies: Sequence[str]) -> Pieces:
        """Other words at places [m], the white space behind them as it was."""
        changed = self.pieces.copy()
        for place, body in zip(places.tolist(), bodies, strict=True):
            old = changed[place]
            changed[place] = body + old[len(old.rstrip()) :]
        return Pieces(changed, self.offsets)

    def texts(self) -> list[str]:
        pieces, edges = self.pieces.tolist(), self.offsets.tolist()
        return ["".join(pieces[a:b]).strip() for a, b in itertools.pairwise(edges)]
