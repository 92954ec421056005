"""Pictures drawn with the fonts that matplotlib brings (DejaVu), and their bytes."""

from __future__ import annotations

import hashlib
import importlib.util
import io
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image, ImageFont


def stamp(code_version: int, *fonts: str) -> dict[str, Any]:
    """What pictures depend on: the code, the fonts, and the libraries that draw and pack."""
    import PIL
    from PIL import features

    files = {font: hashlib.blake2b(font_path(font).read_bytes(), digest_size=8).hexdigest() for font in fonts}
    libraries = {name: features.version(name) for name in ("freetype2", "zlib")}
    return {"code_version": code_version, "pillow": PIL.__version__, **libraries, "fonts": files}


@cache
def font_path(font: str) -> Path:
    """Where matplotlib has a font: found without importing it."""
    found = importlib.util.find_spec("matplotlib")
    assert found is not None, "matplotlib is a dependency"
    assert found.origin is not None
    return Path(found.origin).parent / "mpl-data" / "fonts" / "ttf" / f"{font}.ttf"


@cache
def load_font(font: str, size: float) -> ImageFont.FreeTypeFont:
    """A font at a size in pixels, laid out glyph by glyph, without a shaper that a machine may lack."""
    from PIL import ImageFont

    return ImageFont.truetype(font_path(font), size, layout_engine=ImageFont.Layout.BASIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=6)
    return file.getvalue()
