"""Items as a person is shown them: the beginning of a text, a small picture."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from data_services.items import Item, Media

CHARACTERS = 400
SIDE = 96  # pixels of a picture's longer side


@dataclass(frozen=True)
class Excerpt:
    """Of one item. picture: a PNG in base64, empty where there is nothing to see."""

    text: str = ""
    picture: str = ""


def excerpt(item: Item) -> Excerpt:
    """Of parts: what their texts and first picture show. A sound is told by its length in bytes."""
    if isinstance(item, str):
        text = item.strip()
        return Excerpt(text if len(text) <= CHARACTERS else text[: CHARACTERS - 1] + "…")
    if isinstance(item, Media):
        if item.kind == "image":
            return Excerpt(picture=_picture(item))
        return Excerpt(f"{item.kind}, {len(item.data):,} bytes")
    parts = {name: excerpt(part) for name, part in item.items()}
    texts = [f"{name}: {part.text}" for name, part in parts.items() if part.text]
    return Excerpt("\n".join(texts), next((part.picture for part in parts.values() if part.picture), ""))


def _picture(item: Media) -> str:
    from PIL import Image

    from data_services.media.image import decode_image

    pixels = decode_image(item.data, least_side=SIDE) if isinstance(item.data, bytes) else item.data
    image = Image.fromarray(pixels)
    image.thumbnail((SIDE, SIDE))
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()
