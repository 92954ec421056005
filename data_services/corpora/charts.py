"""`builtin:charts`: small drawings, and captions that are more or less of what they show.

A picture is two objects side by side or one above the other, or a chart of three to five bars. Its captions have
scores: 3 says everything, 2 leaves the sizes out (of a chart, the number of bars), 1 speaks of a part. Every caption of
the split that is true of a picture is among its positives, so that no candidate is judged wrong that isn't; for
training, the parts are left out. Held out are pairs of objects, and pairs of a chart's extremes: their words stand
elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

from data_services.corpora import drawing
from data_services.corpora.splits import split_of
from data_services.schema import text_id

if TYPE_CHECKING:
    from PIL import Image

# Raised when the same libraries would give other rows.
CODE_VERSION = 1
SIDE = 64  # pixels
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 150, 30),
    "yellow": (235, 215, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 220),
    "purple": (140, 60, 190),
    "pink": (245, 150, 190),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
SIZES = {"small": 9, "large": 14}  # half of the width, in pixels
RELATIONS = {"left of": "right of", "above": "below"}  # each with what it is from the other side
_DRAWN_ONE_IN = 4  # of all pairs of objects, by a hash
_CHARTS_A_PAIR = 6


def stamp() -> dict[str, Any]:
    return drawing.stamp(CODE_VERSION)


def rows(split: str) -> Iterator[dict[str, Any]]:
    """Scenes, then charts."""
    for name, picture in _pictures():
        if split_of(picture.key) == split:
            captions = [(text, score) for text, score in picture.captions() if score > 1 or split != "train"]
            texts, scores = zip(*captions, strict=True)
            yield {
                "name": name,
                "query": drawing.png(picture.draw()),
                "positive": list(texts),
                "scores": [float(score) for score in scores],
            }


def _pictures() -> Iterator[tuple[str, Scene | Bars]]:
    things = [Thing(*its) for its in product(SIZES, COLOURS, SHAPES)]
    for first, second, relation in product(things, things, RELATIONS):
        scene = Scene(first, second, relation)
        name = f"{first} {relation} {second}"
        if first[1:] != second[1:] and text_id(name) % _DRAWN_ONE_IN == 0:
            yield name, scene
    for tallest, shortest in product(COLOURS, COLOURS):
        for number in range(_CHARTS_A_PAIR if tallest != shortest else 0):
            yield f"bars {tallest} {shortest} {number}", Bars.of(tallest, shortest, number)


class Thing(NamedTuple):
    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return " ".join(self)


class Scene(NamedTuple):
    """Two things, the first `relation` the second."""

    first: Thing
    second: Thing
    relation: str

    @property
    def key(self) -> str:
        """The pair of things, in either order and at any size: what is on one side of a split only."""
        return " and ".join(sorted(f"{thing.colour} {thing.shape}" for thing in (self.first, self.second)))

    def captions(self) -> Iterator[tuple[str, int]]:
        """(caption, score)"""
        seen_otherwise = RELATIONS[self.relation]
        for score, (first, second) in ((3, (str(self.first), str(self.second))), (2, self._without_sizes())):
            yield f"{_a(first)} {self.relation} {_a(second)}", score
            yield f"{_a(second)} {seen_otherwise} {_a(first)}", score
        yield _a(str(self.first)), 1
        yield _a(str(self.second)), 1

    def _without_sizes(self) -> tuple[str, str]:
        first, second = (f"{thing.colour} {thing.shape}" for thing in (self.first, self.second))
        return first, second

    def draw(self) -> Image.Image:
        """[SIDE, SIDE, 3] on white; a hash of the scene moves each thing a little."""
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        moved = text_id(f"{self.first} {self.relation} {self.second}") % 7**4
        for place, thing in ((SIDE // 4, self.first), (SIDE - SIDE // 4, self.second)):
            along, across = place, SIDE // 2
            x, y = (along, across) if self.relation == "left of" else (across, along)
            _draw_thing(draw, x + moved % 7 - 3, y + moved // 7 % 7 - 3, thing)
            moved //= 49
        return image


def _draw_thing(draw: Any, x: int, y: int, thing: Thing) -> None:
    """A thing around (x, y)."""
    r, fill = SIZES[thing.size], COLOURS[thing.colour]
    box, third = (x - r, y - r, x + r, y + r), r // 3
    if thing.shape == "circle":
        draw.ellipse(box, fill=fill)
    elif thing.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(third, 2))
    elif thing.shape == "square":
        draw.rectangle(box, fill=fill)
    elif thing.shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill=fill)
    elif thing.shape == "diamond":
        draw.polygon([(x, y - r), (x - r, y), (x, y + r), (x + r, y)], fill=fill)
    else:
        draw.rectangle((x - r, y - third, x + r, y + third), fill=fill)
        draw.rectangle((x - third, y - r, x + third, y + r), fill=fill)


def _a(thing: str) -> str:
    return f"an {thing}" if thing.startswith("orange") else f"a {thing}"


class Bars(NamedTuple):
    """A chart of bars, each (colour, height 1 … 9), from left to right; one is tallest, one shortest."""

    bars: tuple[tuple[str, int], ...]

    @classmethod
    def of(cls, tallest: str, shortest: str, number: int) -> Bars:
        """One of the charts with these extremes: how many bars, their order and heights come of a hash."""
        left = text_id(f"{tallest} {shortest} {number}") % (1 << 63)
        count, left = 3 + left % 3, left // 3
        bars = [(tallest, 9), (shortest, 1 + left % 2)]
        others = [colour for colour in COLOURS if colour not in (tallest, shortest)]
        for _ in range(count - 2):
            left //= 8
            bars.append((others.pop(left % len(others)), 4 + left % 4))
        left //= 8
        start = left % count
        return cls(tuple(bars[start:] + bars[:start]))

    @property
    def key(self) -> str:
        return f"{self._extremes[0]} over {self._extremes[1]}"

    @property
    def _extremes(self) -> tuple[str, str]:
        """Colours of the tallest and of the shortest bar."""
        by_height = sorted(self.bars, key=lambda bar: bar[1])
        return by_height[-1][0], by_height[0][0]

    def captions(self) -> Iterator[tuple[str, int]]:
        tallest, shortest = self._extremes
        numbers = {3: "three", 4: "four", 5: "five"}
        yield f"a chart of {numbers[len(self.bars)]} bars, the tallest {tallest}, the shortest {shortest}", 3
        yield f"{numbers[len(self.bars)]} bars, of which {shortest} is the shortest and {tallest} the tallest", 3
        yield f"a chart with {tallest} above all and {shortest} at the bottom", 2
        yield f"a chart whose tallest bar is {tallest}", 1
        yield f"a chart whose shortest bar is {shortest}", 1

    def draw(self) -> Image.Image:
        from PIL import Image, ImageDraw

        image = Image.new("RGB", (SIDE, SIDE), "white")
        draw = ImageDraw.Draw(image)
        floor, step = SIDE - 6, (SIDE - 10) // len(self.bars)
        for place, (colour, height) in enumerate(self.bars):
            left = 7 + place * step
            draw.rectangle((left, floor - 5 * height, left + step - 4, floor), fill=COLOURS[colour])
        draw.line((4, floor + 1, SIDE - 4, floor + 1), fill=(120, 120, 120))
        draw.line((4, 6, 4, floor + 1), fill=(120, 120, 120))
        return image
