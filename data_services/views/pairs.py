"""Views that take a query and its positive from one text: parts of it that stand near each other.

N is a text's number of units: sentences, or lines that aren't blank. A text of one unit is its own positive. A
sentence ends with . ! ? … and white space, with 。！？, or with a blank line; abbreviations aren't known.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field

from data_services.draws import Draws
from data_services.schema import Section
from data_services.views.pieces import PATTERNS, Pieces
from data_services.views.words import within


class Neighbours(Section):
    """Two runs of `size` units with fewer than `window` units between them; a coin says which is the query.

    A text with fewer than 2·size units has shorter runs. Sentences and the next one: Quick-Thoughts, Logeswaran & Lee,
    arXiv:1803.02893; a sentence and any in its window: CCP, Wu et al., "Unsupervised Context Aware Sentence
    Representation Pretraining for Multi-lingual Dense Retrieval", arXiv:2206.03281.
    """

    kind: Literal["neighbours"] = "neighbours"
    unit: Literal["sentence", "line"] = Field("sentence", description="what a text consists of")
    size: int = Field(1, ge=1, description="units of the query and of the positive")
    window: int = Field(1, ge=1, description="1: they adjoin; else fewer units than this stand between them")

    def __call__(self, texts: Sequence[str], draws: Draws) -> tuple[list[str], list[str]]:
        units = Pieces.of(texts, PATTERNS[self.unit])
        lengths = units.lengths
        size = np.minimum(self.size, np.maximum(lengths // 2, 1))
        free = np.maximum(lengths - 2 * size, 0)
        gap = draws.stream(0).below(np.minimum(self.window, free + 1))
        first = draws.stream(1).below(free - gap + 1)
        second = np.where(lengths > 1, first + size + gap, first)
        swap = draws.stream(2).one() < 0.5
        query, positive = np.where(swap, second, first), np.where(swap, first, second)
        return _texts(units, query, size), _texts(units, positive, size)


class Context(Section):
    """A run of `size` units, and what stands around it: up to `around` units before and as many behind it.

    With probability `keep` the positive holds the run itself too. Inverse cloze task, Lee et al., "Latent Retrieval
    for Weakly Supervised Open Domain Question Answering", arXiv:1906.00300, section 4; of lines, a window of code and
    its context.
    """

    kind: Literal["context"] = "context"
    unit: Literal["sentence", "line"] = Field("sentence", description="what a text consists of")
    size: int = Field(1, ge=1, description="units of the query; all but one at most")
    around: int = Field(8, ge=1, description="units of the positive before the query, and as many behind it")
    keep: float = Field(0.1, ge=0, le=1, description="probability that the positive holds the query too")

    def __call__(self, texts: Sequence[str], draws: Draws) -> tuple[list[str], list[str]]:
        units = Pieces.of(texts, PATTERNS[self.unit])
        lengths = units.lengths
        size = np.clip(lengths - 1, 1, self.size)
        start = draws.stream(0).below(lengths - size + 1)
        run = within(lengths, start, size)
        near = within(lengths, start - self.around, size + 2 * self.around)
        whole = (draws.stream(1).one() < self.keep) | (lengths == 1)
        return units.kept(run).texts(), units.kept(near & (~run | np.repeat(whole, lengths))).texts()


def _texts(units: Pieces, start: np.ndarray, size: np.ndarray) -> list[str]:
    return units.kept(within(units.lengths, start, size)).texts()
