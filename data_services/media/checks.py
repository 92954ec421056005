"""Whether the bytes of an image or a sound can be used, whole."""

from __future__ import annotations

from data_services.items import Kind
from data_services.media.audio import samples_of
from data_services.media.image import decode_image


def check_media(data: bytes, kind: Kind) -> None:
    """Raises Undecodable, as decoding would: the bytes are read to their end. Of a JPEG fewer pixels are made."""
    if kind == "image":
        decode_image(data, least_side=1)
    elif kind == "audio":
        samples_of(data)
