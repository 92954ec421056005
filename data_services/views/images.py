"""Views that crop, mirror and colour images.

Each takes n images [H, W, 3] uint8 and their draws, and gives n images; the i-th depends on its image and its key
alone. None resizes: what a model reads is resized once, at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from data_services.draws import Draws
from data_services.schema import Section

Images = Sequence[np.ndarray]
_GREY = np.array([0.299, 0.587, 0.114])  # luma, ITU-R BT.601, section 2.5.1


class CropImage(Section):
    """A rectangle of some share of the area and some shape, anywhere in the image.

    The share is uniform, the shape log-uniform around that of a square ("Inception" cropping: Szegedy et al.,
    arXiv:1409.4842, section 6). A shape that doesn't fit is cut to the image's own side.
    """

    kind: Literal["crop_image"] = "crop_image"
    min_area: float = Field(0.5, gt=0, le=1, description="least share of the image's area")
    max_area: float = Field(1.0, gt=0, le=1, description="largest share of it")
    max_ratio: float = Field(4 / 3, ge=1, description="width over height is between 1/max_ratio and max_ratio")

    @model_validator(mode="after")
    def _ordered(self) -> CropImage:
        if self.min_area > self.max_area:
            raise ValueError(f"min_area {self.min_area:g} is above max_area {self.max_area:g}")
        return self

    def __call__(self, images: Images, draws: Draws) -> list[np.ndarray]:
        sizes = np.array([image.shape[:2] for image in images], np.int64).reshape(-1, 2)  # [n, 2]
        share = self.min_area + (self.max_area - self.min_area) * draws.stream(0).one()
        ratio = self.max_ratio ** (2 * draws.stream(1).one() - 1)
        wanted = np.sqrt(share * sizes.prod(1))[:, None] * np.stack([ratio**-0.5, ratio**0.5], 1)
        size = np.clip(np.rint(wanted).astype(np.int64), 1, sizes)
        top = draws.stream(2).below(sizes[:, 0] - size[:, 0] + 1)
        left = draws.stream(3).below(sizes[:, 1] - size[:, 1] + 1)
        boxes = zip(images, top.tolist(), left.tolist(), size.tolist(), strict=True)
        return [image[y : y + h, x : x + w] for image, y, x, (h, w) in boxes]


class FlipImage(Section):
    """Mirrored left to right."""

    kind: Literal["flip"] = "flip"
    probability: float = Field(0.5, ge=0, le=1, description="how often")

    def __call__(self, images: Images, draws: Draws) -> list[np.ndarray]:
        flip = draws.stream(0).one() < self.probability
        return [image[:, ::-1] if its else image for image, its in zip(images, flip, strict=True)]


class ColourImage(Section):
    """Brightness, contrast and saturation times factors between 1-x and 1+x, in this order.

    Contrast is the distance to the image's mean grey, saturation that of each pixel to its own grey: Howard,
    arXiv:1312.5402, and SimCLR, Chen et al., arXiv:2002.05709, appendix A.
    """

    kind: Literal["colour"] = "colour"
    brightness: float = Field(0.2, ge=0, le=1, description="x of the brightness")
    contrast: float = Field(0.2, ge=0, le=1, description="x of the contrast")
    saturation: float = Field(0.2, ge=0, le=1, description="x of the saturation")
    grey: float = Field(0.0, ge=0, le=1, description="how often an image loses its colours altogether")

    def __call__(self, images: Images, draws: Draws) -> list[np.ndarray]:
        most = np.array([self.brightness, self.contrast, self.saturation])
        factors = 1 + most * (2 * np.stack([draws.stream(i).one() for i in range(3)], 1) - 1)  # [n, 3]
        factors[draws.stream(3).one() < self.grey, 2] = 0
        return [_coloured(image, *its) for image, its in zip(images, factors.tolist(), strict=True)]


def _coloured(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Each step is cut to 0 … 255, as images are; they are rounded once."""
    pixels = np.clip(image * np.float32(brightness), 0, 255)
    mean = float((pixels @ _GREY.astype(np.float32)).mean())
    pixels = np.clip((pixels - mean) * np.float32(contrast) + mean, 0, 255)
    grey = (pixels @ _GREY.astype(np.float32))[..., None]
    return np.rint(np.clip((pixels - grey) * np.float32(saturation) + grey, 0, 255)).astype(np.uint8)
