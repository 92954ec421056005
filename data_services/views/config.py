"""`data.sources.0.views:` what a record shows of its texts, drawn anew at every step.

Views are made of raw text before tokenising, by draws keyed by (seed, step, row, field): a pure function of the plan,
so neither resume nor the number of workers changes one. Ids stay those of the stored texts: two views of one text are
a query and its positive, and the same row twice in a batch is a duplicate that the loss masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from pydantic import Field

from data_services.draws import Draws, mix
from data_services.schema import Section
from data_services.views.pairs import Context, Neighbours
from data_services.views.pieces import Pieces
from data_services.views.spelling import MaskIdentifiers, Substitute, Typos
from data_services.views.words import Crop, Delete, DeleteSpans, Reorder, Repeat

View = Annotated[
    Crop | Delete | DeleteSpans | Reorder | Repeat | Substitute | Typos | MaskIdentifiers, Field(discriminator="kind")
]
PairView = Annotated[Neighbours | Context, Field(discriminator="kind")]


class Views(Section):
    """What is shown of a record, field by field; of a text without views all, as it is.

    A source of texts alone names one field as `query` and as `positive`. Without any view the positive is the text
    itself under another dropout: Gao et al., SimCSE, arXiv:2104.08821.
    """

    pair: PairView | None = Field(None, description="takes query and positive from one text, before the other views")
    query: list[View] = Field([], description="views of the query, one after another")
    positive: list[View] = Field([], description="views of each positive, one after another")
    negatives: list[View] = Field([], description="views of each hard negative, one after another")

    @property
    def files(self) -> list[str]:
        """What the views read beside the texts."""
        views = (*self.query, *self.positive, *self.negatives)
        return [view.vectors for view in views if isinstance(view, Substitute) and view.vectors]


@dataclass(frozen=True)
class Shown:
    """The texts of a global batch, and what their draws are keyed by.

    queries       B texts                keys          [B] uint64 of (seed, step, row), `draws.row_keys`
    documents     d texts                document_ids  [d] int64
    owners        [d] int64, the query of whose record a document is
    relations     [d] int8, 1 it answers its owner, -1 it doesn't
    """

    queries: list[str]
    documents: list[str]
    keys: np.ndarray
    document_ids: np.ndarray
    owners: np.ndarray
    relations: np.ndarray

    def viewed(self, views: Sequence[Views | None], sources: np.ndarray) -> Shown:
        """The same batch in the views of its sources. sources [B]: which of `views` is a query's"""
        shown = replace(self, queries=list(self.queries), documents=list(self.documents))
        for source in np.unique(sources):
            if (of := views[source]) is not None:
                shown._show(of, sources == source)
        return shown

    def _show(self, views: Views, rows: np.ndarray) -> None:
        """Changes the texts of the queries in rows [B] bool and of their documents, in place."""
        queries, documents = np.flatnonzero(rows), np.flatnonzero(rows[self.owners])
        of_queries, positive = Draws(self.keys[queries]), self.relations[documents] > 0
        of_documents = Draws(mix(self.keys[self.owners[documents]] + self.document_ids[documents].astype(np.uint64)))
        if views.pair is not None:  # a record of one text has one positive, in the order of the queries
            parts = views.pair([self.queries[i] for i in queries], of_queries.stream(0))
            _put(self.queries, queries, parts[0])
            _put(self.documents, documents[positive], parts[1])
        _apply(views.query, self.queries, queries, of_queries.stream(1))
        _apply(views.positive, self.documents, documents[positive], of_documents.take(positive).stream(2))
        _apply(views.negatives, self.documents, documents[~positive], of_documents.take(~positive).stream(3))


def _apply(views: Sequence[View], texts: list[str], places: np.ndarray, draws: Draws) -> None:
    if not views or not len(places):
        return
    words = Pieces.of([texts[i] for i in places])
    for number, view in enumerate(views):
        words = view(words, draws.stream(number))
    _put(texts, places, words.texts())


def _put(texts: list[str], places: np.ndarray, new: Sequence[str]) -> None:
    for place, text in zip(places.tolist(), new, strict=True):
        texts[place] = text
