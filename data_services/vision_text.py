"""What a vision–language model reads of an item: one list of tokens, in which each image has so many places, and the
images' patches. Shapes: n items, T patches of all their images."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_services.fronts import PREPROCESSOR
from data_services.media.image import decode_image
from data_services.ragged import Inputs, Ragged
from data_services.schema import Item, Media, Undecodable
from data_services.tokenizer import FolderTokenizer

PATCHES, GRIDS = "patches", "grids"  # the arrays' names
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"
IMAGE_TOKEN = "<|image_pad|>"


@dataclass(frozen=True)
class Patches:
    """An image to the patches of Qwen-VL's family, [T, 3·side²] uint8 in the order in which they are merged.

    side         pixels of a patch
    merge        so many patches by so many become one token
    least, most  pixels of an image after resizing

    Resized by Pillow to multiples of merge · side, the ratio kept as nearly as they allow; as Transformers' processor
    does it, to the bit.
    """

    side: int
    merge: int
    least: int
    most: int
    resample: int = 3

    @classmethod
    def of(cls, folder: Path) -> Patches:
        """By the folder's preprocessor_config.json."""
        config = json.loads((folder / PREPROCESSOR).read_text())
        size = config["size"]
        sides = config["patch_size"], config["merge_size"], size["shortest_edge"], size["longest_edge"]
        return cls(*sides, int(config.get("resample", 3)))

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """image [H, W, 3] uint8 -> (patches [T, 3·side²], (rows, columns) of patches)."""
        from PIL import Image

        height, width = self.size(*image.shape[:2])
        if (height, width) != image.shape[:2]:
            resized = Image.fromarray(image).resize((width, height), Image.Resampling(self.resample))
            image = np.asarray(resized)
        rows, columns = height // self.side, width // self.side
        m, s = self.merge, self.side
        blocks = image.reshape(rows // m, m, s, columns // m, m, s, 3).transpose(0, 3, 1, 4, 6, 2, 5)
        return blocks.reshape(rows * columns, 3 * s * s), (rows, columns)

    def size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) that an image is resized to."""
        unit = self.side * self.merge
        high, wide = (round(length / unit) * unit for length in (height, width))
        if high * wide > self.most:
            shrink = math.sqrt(height * width / self.most)
            high, wide = (max(unit, math.floor(length / shrink / unit) * unit) for length in (height, width))
        elif high * wide < self.least:
            grow = math.sqrt(self.least / (height * width))
            high, wide = (math.ceil(length * grow / unit) * unit for length in (height, width))
        return high, wide


@dataclass(frozen=True)
class VisionText:
    """A `Tokenize` of texts, images, and items of both; `patches` [T, 3·side²] uint8, `grids` [images, 2] int32.

    template  names of parts in braces, where an item of several stands: "{photo} {title}"; None: in their order
    """

    text: FolderTokenizer
    patches: Patches
    image_id: int
    template: str | None = None

    def __call__(self, items: Sequence[Item], field: str, tasks: Sequence[int] | None = None) -> Inputs:
        """Raises Undecodable where an image is damaged, or an item's images don't fit into the model's tokens."""
        shown = [self._shown(item) for item in items]
        tokens = self.text([text for text, _ in shown], field, tasks)
        lists, patches, grids = [], [], []
        for i, (_, images) in enumerate(shown):
            made = [self.patches(_pixels(image)) for image in images]
            lists.append(self._expanded(tokens[i], [len(its) // self.patches.merge**2 for its, _ in made]))
            patches.append([its for its, _ in made])
            grids.append([grid for _, grid in made])
        width = 3 * self.patches.side**2
        arrays = {
            PATCHES: _lists([np.concatenate(its) if its else np.zeros((0, width), np.uint8) for its in patches]),
            GRIDS: _lists([np.array(its, np.int32).reshape(-1, 2) for its in grids]),
        }
        found = Ragged.of(lists)
        return Inputs(found.values, found.offsets, arrays)

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        return self.text.prompt_tokens(field, task)

    def _shown(self, item: Item) -> tuple[str, list[Media]]:
        """The item as a text with a placeholder for each image, and the images in their order."""
        if isinstance(item, str):
            return item, []
        if isinstance(item, Media):
            return PLACEHOLDER, [item]
        order = list(item) if self.template is None else _names(self.template)
        images = [part for name in order if isinstance(part := item.get(name), Media)]
        texts = {name: PLACEHOLDER if isinstance(part, Media) else part for name, part in item.items()}
        if self.template is None:
            return "".join(texts.values()), images
        return self.template.format_map(_Absent(texts)), images

    def _expanded(self, ids: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """The ids with each image's token as many times as `sizes` says; a text that is too long ends earlier."""
        places = np.flatnonzero(ids == self.image_id)
        if len(places) != len(sizes):
            raise Undecodable(f"{len(sizes)} images, but {len(places)} places for them among the tokens that are kept")
        times = np.ones(len(ids), np.int64)
        times[places] = sizes
        whole = np.repeat(ids, times)
        kept = whole[: self.text.max_tokens]
        if (kept == self.image_id).sum() < sum(sizes):
            raise Undecodable("its images take more tokens than model.max_tokens leaves them")
        return kept


class _Absent(dict[str, str]):
    """A part that an item lacks is an empty text."""

    def __missing__(self, key: str) -> str:
        return ""


def _names(template: str) -> list[str]:
    """The parts that a template names, in order."""
    from string import Formatter

    return [name for _, name, _, _ in Formatter().parse(template) if name]


def _pixels(image: Media) -> np.ndarray:
    if image.kind != "image":
        raise Undecodable(f"a part is {image.kind}; a vision–language model reads texts and images")
    return decode_image(image.data) if isinstance(image.data, bytes) else image.data


def _lists(arrays: Sequence[np.ndarray]) -> Ragged:
    return Ragged(np.concatenate(arrays), np.cumsum([0, *map(len, arrays)]))
