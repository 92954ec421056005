"""`builtin:glyphs`: the names of characters and their pictures, in the styles of DejaVu that matplotlib brings.

A row is a Unicode name in small letters (the query) and the character in every style that has it (the positives, one of
which is drawn at each step). Names are held out, not pictures: what a held-out name consists of ("greek", "small
letter", "with acute") stands in names that are trained on. Of held-out names there is one picture each, in the first
style: so recall@1 can be 1. `category` is Unicode's: Lu of capital letters, Sm of mathematical symbols.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from data_services.corpora import drawing
from data_services.corpora.splits import split_of

if TYPE_CHECKING:
    from PIL import Image

# Raised when the same fonts would give other rows.
CODE_VERSION = 2
STYLES = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSerif", "DejaVuSansMono")
SIDE = 32  # pixels
_SIZE, _BASELINE = 24, 24.0  # pixels of an em; where letters stand
_MARGIN = 1
_UNSEEN = "CZM"  # categories of characters without a picture of their own: controls, spaces, combining marks


def stamp() -> dict[str, Any]:
    return drawing.stamp(CODE_VERSION, *STYLES) | {"unicode": unicodedata.unidata_version}


def rows(split: str) -> Iterator[dict[str, Any]]:
    """In the order of the characters; those that leave no ink are left out."""
    styles = [(style, _covered(style)) for style in (STYLES if split == "train" else STYLES[:1])]
    for code in sorted(styles[0][1]):
        name = unicodedata.name(chr(code), "").lower()
        if not name or unicodedata.category(chr(code))[0] in _UNSEEN or split_of(name) != split:
            continue
        pictures = [picture(chr(code), style) for style, covered in styles if code in covered]
        if all(picture.getextrema() != (255, 255) for picture in pictures):
            yield {
                "name": f"U+{code:04X}",
                "query": name,
                "positive": [drawing.png(it) for it in pictures],
                "category": unicodedata.category(chr(code)),
            }


def _covered(style: str) -> set[int]:
    """The characters that a style has."""
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(str(drawing.font_path(style))).get_charmap())


def picture(character: str, style: str = STYLES[0]) -> Image.Image:
    """[SIDE, SIDE] grey, black on white: in the middle, on one baseline, and smaller only where it wouldn't fit."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (SIDE, SIDE), 255)
    font, baseline = drawing.load_font(style, _SIZE), _BASELINE
    left, top, right, bottom = font.getbbox(character, anchor="ls")
    room = SIDE - 2 * _MARGIN
    if right - left > room or bottom - top > room:
        font = drawing.load_font(style, _SIZE * room / max(right - left, bottom - top))
        left, top, right, bottom = font.getbbox(character, anchor="ls")
    baseline = min(max(baseline, _MARGIN - top), SIDE - _MARGIN - bottom)
    ImageDraw.Draw(image).text(((SIDE - left - right) / 2, baseline), character, fill=0, font=font, anchor="ls")
    return image
