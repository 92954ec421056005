"""Whether the bytes of an image or a sound can be used, whole; and what they are, in words."""

from __future__ import annotations

from typing import Any

from data_services.items import Form, Kind
from data_services.media.audio import audio_seconds, samples_of
from data_services.media.image import decode_image, image_size
from data_services.schema import Undecodable

MEDIA_KINDS = ("image", "audio")
"""What is decoded here; bytes of another kind are kept as they are, for the tower that reads them."""


def check_media(data: bytes, kind: Kind) -> None:
    """Raises Undecodable, as decoding would: the bytes are read to their end. Of a JPEG fewer pixels are made."""
    if kind == "image":
        decode_image(data, least_side=1)
    elif kind == "audio":
        samples_of(data)


def readable(item: Any, form: Form) -> Any:
    """A stored item for a person to read: texts as they are, in the place of other bytes what they are."""
    if isinstance(item, dict):
        assert not isinstance(form, str)
        return {name: readable(part, form[name]) for name, part in item.items() if part is not None}
    if isinstance(item, str):
        return item
    return item.decode() if form == "text" else described(item, str(form))


def described(data: bytes, kind: Kind) -> str:
    """ "image, 640 x 480, 12,345 bytes"; why not, of one that can't be decoded."""
    what = [kind]
    try:
        if kind == "image":
            height, width = image_size(data)
            what.append(f"{width} x {height}")
        elif kind == "audio":
            what.append(f"{audio_seconds(data):.2f} s")
    except Undecodable as error:
        what.append(str(error))
    return ", ".join([*what, f"{len(data):,} bytes"])
