"""Words and those of similar vectors, from a file of the user's: the text format of word2vec, GloVe and fastText."""

from __future__ import annotations

import hashlib
import re
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_services.schema import UsageError

_BARE = re.compile(r"(\W*)(.*?)(\W*)", re.DOTALL)  # what stands around a word: quotes, a comma
_DIGITS = 6  # of a cosine that count: what differs by less, as sums in another order do, is equal
_WORDS_AT_ONCE = 256


class WordVectors:
    """The first `words` words of a file, a line each: the word and its numbers, between spaces.

    A first line of two numbers, word2vec's header, is passed over. Raises UsageError with the line where another isn't
    of that form, or has another number of numbers.
    """

    def __init__(self, path: Path, words: int) -> None:
        self._places: dict[str, int] = {}
        rows: list[np.ndarray] = []
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                for number, line in enumerate(file, start=1):
                    word, _, rest = line.rstrip().partition(" ")
                    if number == 1 and rest.isdecimal():
                        continue
                    rows.append(_numbers(rest, len(rows[0]) if rows else None, f"{path}:{number}"))
                    self._places.setdefault(word, len(rows) - 1)
                    if len(rows) == words:
                        break
        except OSError as error:
            raise UsageError(f"views: word vectors {path} can't be read: {error.strerror}") from error
        if not rows:
            raise UsageError(f"views: {path} holds no word vectors")
        table = np.stack(rows)
        self._unit = table / np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-12)
        self._words, self._own = list(self._places), list(self._places.values())  # of a word twice, the first
        self._near: dict[str, list[str]] = {}

    def near(self, words: list[str], count: int) -> list[list[str]]:
        """For each word the `count` others of the largest cosine, nearest first; none of a word that isn't known."""
        new = [w for w in dict.fromkeys(words) if w in self._places and len(self._near.get(w, ())) < count]
        for first in range(0, len(new), _WORDS_AT_ONCE):
            some = new[first : first + _WORDS_AT_ONCE]
            cosines = self._unit[[self._places[word] for word in some]] @ self._unit[self._own].T
            order = np.argsort(-cosines.round(_DIGITS), axis=1, kind="stable")[:, : count + 1]
            for word, nearest in zip(some, order.tolist(), strict=True):
                self._near[word] = [self._words[i] for i in nearest if self._words[i] != word][:count]
        return [self._near.get(word, [])[:count] for word in words]

    def instead(self, pieces: list[str], count: int, draws: list[float]) -> list[str]:
        """Each piece with another word in the place of its own, by a draw in [0, 1); as it is where that isn't known.

        What stands around the word stays. It is looked up as it stands, then in lower case.
        """
        cut = [match.groups() if (match := _BARE.fullmatch(piece)) else ("", piece, "") for piece in pieces]
        bodies = [word if word in self._places else word.lower() for _, word, _ in cut]
        chosen = []
        for piece, (before, _, behind), near, draw in zip(pieces, cut, self.near(bodies, count), draws, strict=True):
            chosen.append(before + near[int(draw * len(near))] + behind if near else piece)
        return chosen


def _numbers(text: str, width: int | None, where: str) -> np.ndarray:
    try:
        row = np.array(text.split(), np.float32)
    except ValueError:
        row = np.zeros(0, np.float32)
    if not len(row) or (width is not None and len(row) != width):
        wanted = f"{width} numbers" if width else "its numbers"
        raise UsageError(f"views: {where} isn't a word and {wanted} between spaces")
    return row


@lru_cache(maxsize=4)
def word_vectors(path: str, words: int) -> WordVectors:
    """Read once a process."""
    return WordVectors(Path(path).expanduser(), words)


def fingerprint(path: str) -> str:
    """Of the file. Raises UsageError where it isn't there."""
    try:
        with Path(path).expanduser().open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise UsageError(f"views: word vectors {path} can't be read: {error.strerror}") from error
