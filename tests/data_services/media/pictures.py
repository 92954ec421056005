"""Encoded images and sounds of every kind that comes along, made here."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import soundfile
from PIL import Image


def scene(height: int = 24, width: int = 40) -> np.ndarray:
    """[height, width, 3] uint8, smooth (so that JPEG keeps it) and different in its four corners."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, 255 - x * 200 // width], 2).astype(np.uint8)


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


def turned(image: np.ndarray, orientation: int) -> bytes:
    """The image as a camera held in that way stores it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = {
        1: image,
        2: image[:, ::-1],
        3: np.rot90(image, 2),
        4: image[::-1],
        5: np.rot90(image)[::-1],
        6: np.rot90(image),
        7: np.rot90(image)[:, ::-1],
        8: np.rot90(image, -1),
    }[orientation]
    return encoded(np.ascontiguousarray(stored), exif=exif)


def claims(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header promises so many pixels."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    data = b"IDAT" + zlib.compress(bytes(1000))
    chunks = (len(c[4:]).to_bytes(4, "big") + c + zlib.crc32(c).to_bytes(4, "big") for c in (header, data, b"IEND"))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def tone(hertz: float = 440.0, seconds: float = 0.5, rate: int = 16_000) -> np.ndarray:
    """[S] float32"""
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def sounding(samples: np.ndarray, rate: int = 16_000, kind: str = "WAV", **options: Any) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, samples, rate, format=kind, **options)
    return file.getvalue()
