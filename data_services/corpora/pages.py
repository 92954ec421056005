"""`builtin:pages`: pages of printed words, and queries for them.

A page has a heading and two columns of words; a query asks for the heading and two of the words. Every page of the
split that has all three is among its positives. Whole pages are held out; their words stand on others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from data_services.corpora import drawing
from data_services.corpora.splits import split_of
from data_services.draws import Draws
from data_services.schema import text_id

if TYPE_CHECKING:
    from PIL import Image

# Raised when the same libraries would give other rows.
CODE_VERSION = 1
HEIGHT, WIDTH = 96, 128  # pixels
HEADINGS = (
    "Accounts",
    "Bridges",
    "Castles",
    "Deserts",
    "Engines",
    "Forests",
    "Glaciers",
    "Harbours",
    "Islands",
    "Journeys",
    "Kitchens",
    "Letters",
)
_WORDS = """
    amber anchor apple arrow autumn basket beacon bottle branch bronze button candle canvas carpet cedar cherry
    cloud copper coral cotton crystal desk dolphin eagle ember falcon feather fiddle garden ginger granite hammer
    hazel honey indigo ivory jacket jasmine kettle ladder lantern lemon linen maple marble meadow mirror needle
    nickel olive orchid oyster paddle pepper pigeon planet quartz rabbit raven ribbon saddle salmon silver spider
    sugar thunder timber tulip turtle valley velvet violet walnut willow window winter wolf yarn yellow zinc
"""
WORDS = tuple(_WORDS.split())
PAGES_A_HEADING = 160
WORDS_A_PAGE = 8
QUERIES_A_PAGE = 2
_HEADING_FONT, _FONT = ("DejaVuSans-Bold", 15.0), ("DejaVuSans", 12.0)


def stamp() -> dict[str, Any]:
    return drawing.stamp(CODE_VERSION, _HEADING_FONT[0], _FONT[0])


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Heading by heading, the queries of a page next to each other."""
    for heading in HEADINGS:
        names = [f"{heading} {number}" for number in range(PAGES_A_HEADING)]
        pages = [_words(name) for name in names if split_of(name) == split]
        pictures = [drawing.png(draw(heading, page)) for page in pages]
        for number, page in enumerate(pages):
            for asked in range(QUERIES_A_PAGE):
                words = page[2 * asked : 2 * asked + 2]
                found = [picture for its, picture in zip(pages, pictures, strict=True) if set(words) <= set(its)]
                yield {
                    "name": f"{heading.lower()}-{number}-{asked}",
                    "query": f"{heading.lower()} with {words[0]} and {words[1]}",
                    "positive": found,
                }


def _words(page: str) -> list[str]:
    """The words of a page, none twice, by a hash of its name."""
    numbers = Draws(np.array([text_id(page)], np.int64).view(np.uint64)).each(np.array([len(WORDS)]))
    return [WORDS[i] for i in np.argsort(numbers, kind="stable")[:WORDS_A_PAGE]]


def draw(heading: str, words: list[str]) -> Image.Image:
    """[HEIGHT, WIDTH] grey, black on white."""
    from PIL import Image, ImageDraw

    image = Image.new("L", (WIDTH, HEIGHT), 255)
    pen = ImageDraw.Draw(image)
    pen.text((6, 3), heading, fill=0, font=drawing.load_font(*_HEADING_FONT))
    pen.line((6, 22, WIDTH - 6, 22), fill=0)
    for place, word in enumerate(sorted(words)):
        row, column = divmod(place, 2)
        pen.text((6 + column * 60, 26 + 17 * row), word, fill=0, font=drawing.load_font(*_FONT))
    return image
