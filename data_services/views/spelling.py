"""Views that change words themselves: other words, typing errors, masked identifiers."""

from __future__ import annotations

import re
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from data_services.draws import Draws, ranks
from data_services.schema import Section
from data_services.views.pieces import Pieces
from data_services.views.word_vectors import word_vectors

_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
# Of each letter of a QWERTY keyboard the keys beside it, in its row and above and below.
_BESIDE = {
    letter: "".join(row[max(at - 1, 0) : at + 2] for row in _ROWS[max(r - 1, 0) : r + 2]).replace(letter, "")
    for r, letters in enumerate(_ROWS)
    for at, letter in enumerate(letters)
}
_IDENTIFIER = re.compile(r"\b([^\W\d]\w*)")
# What is written like an identifier and isn't one in any of C, C++, C#, Go, Java, JavaScript, PHP, Python, Ruby, Rust.
_RESERVED = """
abstract and as assert async await begin bool boolean break byte case catch chan char class const continue crate
def default defer del delete do double elif else elsif end ensure enum except export extends extern false final
finally float fn for foreach from func function global go goto if impl implements import in include inline
instanceof int interface is lambda let long loop match mod module move mut namespace new nil None nonlocal not
null nullptr or package pass private protected pub public raise range readonly ref register rescue return self
short signed sizeof static str string struct super switch template then this throw throws trait true try type
typedef typeof union unless unsafe unsigned until use using var virtual void volatile when where while with yield
True False
"""
_KEYWORDS = frozenset(_RESERVED.split())


class Substitute(Section):
    """Each word is replaced with probability `rate`: by one of its `synonyms`, by a word of a similar vector, or by
    another word of its text.

    CLEAR, Wu et al., arXiv:2012.15466, section 3.2, takes words of similar vectors. With `synonyms` or `vectors`, a
    word without one stays; looked up as it stands, then in lower case.
    """

    kind: Literal["substitute"] = "substitute"
    rate: float = Field(0.3, ge=0, le=1, description="probability that a word is replaced")
    synonyms: dict[str, list[Annotated[str, Field(pattern=r"\S")]]] = Field(
        {}, description="words and what may stand for each; none: another word of the same text"
    )
    vectors: str | None = Field(
        None, min_length=1, description="file of word vectors, a line each (word2vec, GloVe, fastText as text)"
    )
    nearest: int = Field(10, ge=1, description="with `vectors`: as many of the most similar words may stand for one")
    vocabulary: int = Field(50_000, ge=2, description="with `vectors`: words that are read, the first ones of the file")

    @model_validator(mode="after")
    def _one_choice(self) -> Substitute:
        if self.synonyms and self.vectors:
            raise ValueError("synonyms and vectors both say what stands for a word: give one of them")
        if not self.vectors and {"nearest", "vocabulary"} & self.model_fields_set:
            raise ValueError("nearest and vocabulary are of word vectors: name their file as `vectors`")
        return self

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        lengths = words.lengths
        chosen = np.flatnonzero(draws.stream(0).each(lengths) < self.rate)
        which = draws.stream(1).each(lengths)[chosen]
        if self.synonyms:
            return self._by_synonyms(words, chosen, which)
        if self.vectors:
            table, bodies = word_vectors(self.vectors, self.vocabulary), [w.rstrip() for w in words.pieces[chosen]]
            return words.replaced(chosen, table.instead(bodies, self.nearest, which.tolist()))
        starts, others = np.repeat(words.offsets[:-1], lengths)[chosen], np.repeat(lengths - 1, lengths)[chosen]
        shift = 1 + (which * others).astype(np.int64)  # of a text of one word, to itself
        donors = words.pieces[starts + (chosen - starts + shift) % (others + 1)]
        return words.replaced(chosen, [donor.rstrip() for donor in donors])

    def _by_synonyms(self, words: Pieces, chosen: np.ndarray, which: np.ndarray) -> Pieces:
        bodies = []
        for word, draw in zip(words.pieces[chosen], which.tolist(), strict=True):
            body = word.rstrip()
            known = self.synonyms.get(body) or self.synonyms.get(body.lower()) or [body]
            bodies.append(known[int(draw * len(known))])
        return words.replaced(chosen, bodies)


class Typos(Section):
    """Each word of two letters or more gets one typing error with probability `rate`.

    One of five, equally probable: a letter put in, left out, replaced by any, by one beside it on the keyboard, or
    changed with the next. Zhuang & Zuccon, "Dealing with Typos for BERT-based Passage Retrieval and Ranking",
    arXiv:2108.12139, section 3.1.
    """

    kind: Literal["typos"] = "typos"
    rate: float = Field(0.1, ge=0, le=1, description="probability that a word has a typing error")

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        lengths = words.lengths
        chosen = np.flatnonzero(draws.stream(0).each(lengths) < self.rate)
        error, place, letter = (draws.stream(i).each(lengths)[chosen].tolist() for i in (1, 2, 3))
        bodies = [word.rstrip() for word in words.pieces[chosen]]
        return words.replaced(chosen, [_misspelt(*of) for of in zip(bodies, error, place, letter, strict=True)])


def _misspelt(word: str, error: float, place: float, letter: float) -> str:
    """A word with one error at one of its letters; all draws in [0, 1)."""
    letters = [i for i, character in enumerate(word) if character.isalpha()]
    if len(letters) < 2:
        return word
    kind, at = int(error * 5), letters[int(place * len(letters))]
    if kind == 0:
        return word[:at] + _LETTERS[int(letter * 26)] + word[at:]
    if kind == 1:
        return word[:at] + word[at + 1 :]
    if kind == 2:
        return word[:at] + _LETTERS[int(letter * 26)] + word[at + 1 :]
    if kind == 3:
        keys = _BESIDE.get(word[at].lower(), word[at])
        return word[:at] + keys[int(letter * len(keys))] + word[at + 1 :]
    first, second = letters[(i := int(place * (len(letters) - 1)))], letters[i + 1]
    return word[:first] + word[second] + word[first + 1 : second] + word[first] + word[second + 1 :]


class MaskIdentifiers(Section):
    """Each identifier of a program is replaced by `mask` with probability `rate`, wherever it stands.

    Every occurrence is drawn by itself; keywords of ten languages stay. CoCoSoDa, Shi et al., arXiv:2204.03293: its
    dynamic masking of a token type.
    """

    kind: Literal["mask_identifiers"] = "mask_identifiers"
    rate: float = Field(0.15, ge=0, le=1, description="probability that an identifier is masked")
    mask: str = Field("[MASK]", pattern=r"^\S+$", description="what stands for it: the tokenizer's mask token, say")

    def __call__(self, words: Pieces, draws: Draws) -> Pieces:
        parts = [_IDENTIFIER.split(text) for text in words.texts()]  # every second part is a name
        counts = np.array([len(of_text) // 2 for of_text in parts])
        masked = np.flatnonzero(draws.each(counts) < self.rate)
        texts, places = np.repeat(np.arange(len(parts)), counts)[masked], 2 * ranks(counts)[masked] + 1
        for text, place in zip(texts.tolist(), places.tolist(), strict=True):
            if parts[text][place] not in _KEYWORDS:
                parts[text][place] = self.mask
        return Pieces.of(["".join(of_text) for of_text in parts])
