"""What a side of a pair is: a text, an image, a sound, or named parts of these, and how they stand in a stored record.

text    string     str
image   binary     Media, the file's bytes
audio   binary     Media, the file's bytes
parts   struct     {name: str or Media}, without those that the record lacks
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

Kind = str
""" "text", "image", "audio", or a kind of a user's own, whose bytes only its own tower reads."""
Form = Kind | Mapping[str, Kind]
"""Of all items of one side: their kind, or that of each of their parts."""


@dataclass(frozen=True)
class Media:
    """An image or a sound.

    data    its file's bytes; or once a view has decoded it an image [H, W, 3] uint8 in RGB, a sound [samples] float32
    rate    samples a second of a decoded sound
    blanks  rectangles of its spectrogram that aren't shown, each (time from, to, mel from, to), as shares of the whole
    """

    kind: Kind
    data: bytes | np.ndarray
    rate: int = 0
    blanks: tuple[tuple[float, float, float, float], ...] = ()


Item = str | Media | Mapping[str, str | Media]


class Kinds(NamedTuple):
    """Of a source's queries and of its documents, positives and hard negatives alike."""

    query: Form
    document: Form

    @property
    def modality(self) -> str:
        """A name for pairs of such sides: "text-image"."""
        return "-".join(form if isinstance(form, str) else "+".join(sorted(form.values())) for form in self)


TEXT = Kinds("text", "text")


def text_id(text: str) -> int:
    """Stable signed 64-bit id of a text: equal texts are the same query or document everywhere."""
    return _hash(text.encode())


def item_id(item: Item) -> int:
    """`text_id` of a text, the same hash of a medium's bytes; of parts it is over their names and ids."""
    if isinstance(item, str):
        return text_id(item)
    if isinstance(item, Media):
        assert isinstance(item.data, bytes), "a medium has its id before a view changes it"
        return _hash(item.data)
    return _hash(repr([(name, item_id(item[name])) for name in sorted(item)]).encode())


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def items_of(column: pa.ChunkedArray, form: Form) -> list[Item]:
    """The items of a stored column [n]: string, binary, or struct of parts, as `form` says."""
    import pyarrow as pa

    if form == "text":  # binary where it shares a batch with media
        return column.cast(pa.string()).to_pylist()
    if isinstance(form, str):
        return [Media(form, data) for data in column.to_pylist()]
    found = [{name: row[name] for name in form if row[name] is not None} for row in column.to_pylist()]
    return [{name: _part(form[name], value) for name, value in parts.items()} for parts in found]


def _part(kind: Kind, value: str | bytes) -> str | Media:
    if isinstance(value, str):
        return value
    return value.decode() if kind == "text" else Media(kind, value)


def items_of_sources(column: pa.ChunkedArray, forms: Sequence[Form], sources: np.ndarray) -> list[Item]:
    """The same of a column [n] with rows of several sources. forms: of each source; sources [n]: which a row is of"""
    if all(form == forms[0] for form in forms):
        return items_of(column, forms[0])
    items: list[Item] = [""] * len(column)
    for source in np.unique(sources):
        places = np.flatnonzero(sources == source)
        for place, item in zip(places.tolist(), items_of(column.take(places), forms[source]), strict=True):
            items[place] = item
    return items
