"""Encoded images to pixels. Pillow decodes; this says what may be decoded, and how it becomes 8-bit RGB.

Legend: H height, W width, in pixels; image [H, W, 3] uint8, red, green, blue.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data_services.media.kinds import kind_of
from data_services.schema import Undecodable

if TYPE_CHECKING:
    from PIL import Image, ImageCms

# Pillow reads more, among it formats that start other programs (EPS) or name other files.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MAX_PIXELS = 1 << 26  # height x width, by the header; below what Pillow takes for a decompression bomb
MIN_SIDE = 2  # pixels: a single one shows nothing
MAX_RATIO = 100  # longer side over shorter side
_TOO_LARGE = f"the image has more than {MAX_PIXELS:,} pixels"
_ORIENTATION = 0x0112  # EXIF
_LARGEST_16_BIT = 65_535
# What Pillow raises over damaged files.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    MemoryError,
    struct.error,
)


class Size(NamedTuple):
    height: int
    width: int


def image_size(data: bytes) -> Size:
    """(H, W) of an encoded image as it is shown, by its header: nothing is decoded. Undecodable as `decode_image`."""
    image = _open(data)
    width, height = image.size
    return Size(width, height) if _orientation(image) >= 5 else Size(height, width)


def decode_image(data: bytes, least_side: int | None = None) -> np.ndarray:
    """The image [H, W, 3] uint8, upright by its EXIF orientation, the first frame of an animation.

    What is transparent is laid on white; 16 bits a channel are cut to 8; CMYK, grey and palettes become RGB; colours
    of another profile that the file brings become sRGB's. least_side: a JPEG may be decoded at 1/2, 1/4 or 1/8 of its
    size, as long as its shorter side keeps so many pixels: what is resized to that afterwards needs no more.

    Raises Undecodable where the bytes are no image of `FORMATS`, are truncated or damaged, too large, too small or
    too long.
    """
    image = _open(data)
    try:
        if least_side is not None:
            width, height = image.size
            scale = least_side / min(width, height)
            image.draft("RGB", (round(width * scale), round(height * scale)))
        upright = _UPRIGHT[_orientation(image)]
        image.load()
        pixels = np.asarray(_rgb(image))
    except Undecodable:
        raise
    except _DAMAGED as error:
        raise Undecodable("the image is truncated or damaged") from error
    return np.ascontiguousarray(upright(pixels))


def _open(data: bytes) -> Image.Image:
    """The image, its header read and within the limits."""
    from PIL import Image

    kind = kind_of(data)
    if kind != "image":
        raise Undecodable(f"an image is declared and the bytes are {'a sound' if kind == 'audio' else kind}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise Undecodable(_TOO_LARGE) from error
    except _DAMAGED as error:
        raise Undecodable("the image's header is truncated or damaged") from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise Undecodable(_TOO_LARGE)
    shorter, longer = sorted((width, height))
    if shorter < MIN_SIDE:
        raise Undecodable(f"the image has a side of fewer than {MIN_SIDE} pixels")
    if longer > MAX_RATIO * shorter:
        raise Undecodable(f"the image has one side more than {MAX_RATIO} times as long as the other")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's 1 (upright) … 8; 1 where it says nothing sound: a photograph with a broken header is one still."""
    try:
        found = image.getexif().get(_ORIENTATION)
    except _DAMAGED:
        return 1
    return found if isinstance(found, int) and found in _UPRIGHT else 1


# What puts an image [H, W, 3] of each orientation upright: 2, 4, 5 and 7 are mirrored, 5 to 8 lie on their side.
_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda image: image,
    2: lambda image: image[:, ::-1],
    3: lambda image: image[::-1, ::-1],
    4: lambda image: image[::-1],
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: image.swapaxes(0, 1)[:, ::-1],
    7: lambda image: image.swapaxes(0, 1)[::-1, ::-1],
    8: lambda image: image.swapaxes(0, 1)[::-1],
}


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB of any mode, on white."""
    from PIL import Image

    if image.mode == "F":
        raise Undecodable("the image has floating-point pixels, whose range isn't known: write it with 8 bits")
    if image.mode == "I" or image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > _LARGEST_16_BIT:
            raise Undecodable("the image has 32-bit pixels, whose range isn't known: write it with 8 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = _in_srgb(image.convert("RGBA"), image.info)
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    image = _in_srgb(image.convert("RGB") if image.mode == "P" else image, image.info)
    return image if image.mode == "RGB" else image.convert("RGB")


def _in_srgb(image: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """The image by the ICC profile that its file brings; as it is without one, or with one that isn't sound."""
    from PIL import ImageCms

    transform = _to_srgb(info.get("icc_profile") or b"", image.mode)
    if transform is None:
        return image
    try:
        found = ImageCms.applyTransform(image, transform)
    except ImageCms.PyCMSError:
        return image
    assert found is not None, "it isn't done in place"
    return found


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """What brings an image's colours to sRGB; None where they are sRGB's already, or the profile isn't of this mode."""
    from PIL import ImageCms

    if not profile or mode not in ("RGB", "RGBA", "L", "CMYK"):
        return None
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "sRGB" in ImageCms.getProfileDescription(own):
            return None
        target = "RGBA" if mode == "RGBA" else "RGB"
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), mode, target)
    except (ImageCms.PyCMSError, OSError):
        return None


# Sizes.


def resized(
    image: np.ndarray, height: int, width: int, box: tuple[float, float, float, float] | None = None
) -> np.ndarray:
    """[height, width, 3], bicubic with antialiasing. box: (top, left, height, width) of the part that is taken."""
    from PIL import Image

    edges = None if box is None else (box[1], box[0], box[1] + box[3], box[0] + box[2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box=edges))


def fitted(image: np.ndarray, side: int) -> np.ndarray:
    """[side, side, 3]: the middle square of the image, resized."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    return resized(image, side, side, ((height - shorter) / 2, (width - shorter) / 2, shorter, shorter))


def bounded(image: np.ndarray, max_pixels: int) -> np.ndarray:
    """The image, smaller in both directions alike where it has more pixels than that."""
    height, width = image.shape[:2]
    if height * width <= max_pixels:
        return image
    scale = (max_pixels / (height * width)) ** 0.5
    return resized(image, max(int(height * scale), 1), max(int(width * scale), 1))
