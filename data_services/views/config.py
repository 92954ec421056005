"""`data.sources.0.views:` what a record shows of its texts, images and sounds, drawn anew at every step.

Views are made of raw items before tokenising, by draws keyed by (seed, step, row, field): a pure function of the plan,
so neither resume nor the number of workers changes one. Ids stay those of the stored items: two views of one text are
a query and its positive, and the same row twice in a batch is a duplicate that the loss masks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data_services.draws import Draws, mix
from data_services.items import Form, Item, Kinds, Media, text_id
from data_services.media.image import decode_image
from data_services.schema import Section, UsageError
from data_services.views.images import ColourImage, CropImage, FlipImage
from data_services.views.pairs import Context, Neighbours
from data_services.views.pieces import Pieces
from data_services.views.sounds import SpecAugment
from data_services.views.spelling import MaskIdentifiers, Substitute, Typos
from data_services.views.words import Crop, Delete, DeleteSpans, Reorder, Repeat

TextView = Crop | Delete | DeleteSpans | Reorder | Repeat | Substitute | Typos | MaskIdentifiers
ImageView = CropImage | FlipImage | ColourImage
View = Annotated[TextView | ImageView | SpecAugment, Field(discriminator="kind")]
PairView = Annotated[Neighbours | Context, Field(discriminator="kind")]


class Views(Section):
    """What is shown of a record, field by field; of an item without views all, as it is.

    A view acts on items of its kind, and on the parts of its kind where items have parts.

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
    """The items of a global batch, and what their draws are keyed by.

    queries       B items                keys          [B] uint64 of (seed, step, row), `draws.row_keys`
    documents     d items                document_ids  [d] int64
    owners        [d] int64, the query of whose record a document is
    relations     [d] int8, 1 it answers its owner, -1 it doesn't
    """

    queries: list[Item]
    documents: list[Item]
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
        """Changes the items of the queries in rows [B] bool and of their documents, in place."""
        queries, documents = np.flatnonzero(rows), np.flatnonzero(rows[self.owners])
        of_queries, positive = Draws(self.keys[queries]), self.relations[documents] > 0
        of_documents = Draws(mix(self.keys[self.owners[documents]] + self.document_ids[documents].astype(np.uint64)))
        if views.pair is not None:  # a record of one text has one positive, in the order of the queries
            parts = views.pair([str(self.queries[i]) for i in queries], of_queries.stream(0))
            _put(self.queries, queries, parts[0])
            _put(self.documents, documents[positive], parts[1])
        _apply(views.query, self.queries, queries, of_queries.stream(1))
        _apply(views.positive, self.documents, documents[positive], of_documents.take(positive).stream(2))
        _apply(views.negatives, self.documents, documents[~positive], of_documents.take(~positive).stream(3))


def _apply(views: Sequence[View], items: list[Item], places: np.ndarray, draws: Draws) -> None:
    """Changes the items at `places` [m], in place; draws [m]"""
    for kind, shown in _SHOWN.items():
        its = [(number, view) for number, view in enumerate(views) if _kind(view) == kind]
        where = _parts_of(items, places, kind) if its else []
        if where:
            of_parts = draws.take(np.array([nth for nth, _ in where]))
            named = np.array([text_id(part) if part else 0 for _, part in where], np.int64).view(np.uint64)
            keys = np.where(named == 0, of_parts.keys, mix(of_parts.keys + named))
            values = [_part(items[places[nth]], part) for nth, part in where]
            for (nth, part), new in zip(where, shown(its, values, Draws(keys)), strict=True):
                item = items[places[nth]]
                items[places[nth]] = {**item, part: new} if isinstance(item, Mapping) else new


def _kind(view: View) -> str:
    """What a view acts on."""
    if isinstance(view, SpecAugment):
        return "audio"
    return "image" if isinstance(view, ImageView) else "text"


def _parts_of(items: Sequence[Item], places: np.ndarray, kind: str) -> list[tuple[int, str]]:
    """(which of the places, which part; "" of an item without parts) of everything of a kind."""
    found = []
    for nth, place in enumerate(places.tolist()):
        item = items[place]
        parts = item.items() if isinstance(item, Mapping) else [("", item)]
        found += [(nth, name) for name, part in parts if (part.kind if isinstance(part, Media) else "text") == kind]
    return found


def _part(item: Item, part: str) -> Any:
    return item[part] if isinstance(item, Mapping) else item


def _texts(views: Sequence[tuple[int, Any]], texts: Sequence[str], draws: Draws) -> Sequence[str]:
    words = Pieces.of(texts)
    for number, view in views:
        words = view(words, draws.stream(number))
    return words.texts()


def _images(views: Sequence[tuple[int, Any]], images: Sequence[Media], draws: Draws) -> Sequence[Media]:
    pixels = [image.data if isinstance(image.data, np.ndarray) else decode_image(image.data) for image in images]
    for number, view in views:
        pixels = view(pixels, draws.stream(number))
    return [replace(image, data=np.ascontiguousarray(its)) for image, its in zip(images, pixels, strict=True)]


def _sounds(views: Sequence[tuple[int, Any]], sounds: Sequence[Media], draws: Draws) -> Sequence[Media]:
    for number, view in views:
        sounds = view(sounds, draws.stream(number))
    return sounds


_SHOWN: dict[str, Callable[[Sequence[tuple[int, Any]], Any, Draws], Sequence[Any]]] = {
    "text": _texts,
    "image": _images,
    "audio": _sounds,
}


def _put(items: list[Item], places: np.ndarray, new: Sequence[str]) -> None:
    for place, text in zip(places.tolist(), new, strict=True):
        items[place] = text


def check_views(views: Views | None, kinds: Kinds, source: str) -> None:
    """UsageError where a view would act on nothing: of images where a side is texts, say."""
    if views is None:
        return
    sides = {"query": kinds.query, "positive": kinds.document, "negatives": kinds.document}
    if views.pair is not None and any(form != "text" for form in sides.values()):
        raise UsageError(f"source {source}: views.pair takes parts of a text, and its items are other than texts")
    for side, form in sides.items():
        for view in getattr(views, side):
            if _kind(view) not in _kinds_in(form):
                raise UsageError(
                    f"source {source}: views.{side} has {view.kind}, a view of {_kind(view)}, but {side} is of kind "
                    f"{' and '.join(sorted(_kinds_in(form)))}"
                )


def _kinds_in(form: Form) -> set[str]:
    return {form} if isinstance(form, str) else set(form.values())
