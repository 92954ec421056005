"""Vectors in fewer bytes, as Sentence Transformers defines it, and back.

    fp32, fp16     as they are
    int8, uint8    ⌊(x − low) / ((high − low) / 255)⌋ in 0 … 255, less 128 for int8; low and high of each dimension
    binary         x > 0, eight dimensions a byte, the first one its highest bit; less 128, so that it is int8
    ubinary        the same, uint8

Legend: n vectors, D dimensions.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Dtype = Literal["fp32", "fp16", "int8", "uint8", "binary", "ubinary"]
STORED: dict[str, type] = {
    "fp32": np.float32,
    "fp16": np.float16,
    "int8": np.int8,
    "uint8": np.uint8,
    "binary": np.int8,
    "ubinary": np.uint8,
}


def is_ranged(dtype: str) -> bool:
    """Whether it needs the range of each dimension."""
    return dtype in ("int8", "uint8")


def width(dtype: str, dimensions: int) -> int:
    """Stored values of a vector."""
    return -(-dimensions // 8) if dtype in ("binary", "ubinary") else dimensions


def quantise(vectors: np.ndarray, dtype: Dtype, ranges: np.ndarray | None = None) -> np.ndarray:
    """[n, D] float32 -> [n, width]. ranges [2, D] float32 lowest and highest of each dimension; beyond is clipped."""
    if dtype in ("fp32", "fp16"):
        return vectors.astype(STORED[dtype])
    if dtype in ("binary", "ubinary"):
        bits = np.packbits(vectors > 0, axis=-1)
        return bits if dtype == "ubinary" else (bits ^ np.uint8(128)).view(np.int8)
    low, step = _grid(ranges)
    cells = np.clip(np.floor((vectors - low) / step), 0, 255).astype(np.uint8)
    return cells if dtype == "uint8" else (cells ^ np.uint8(128)).view(np.int8)


def restore(stored: np.ndarray, dtype: Dtype, dimensions: int, ranges: np.ndarray | None = None) -> np.ndarray:
    """[n, width] -> [n, D] float32: the middle of each cell of int8 and uint8; ±1/√D of binary, of length one."""
    if dtype in ("fp32", "fp16"):
        return stored.astype(np.float32)
    cells = stored.view(np.uint8) ^ np.uint8(128 if dtype in ("int8", "binary") else 0)
    if dtype in ("binary", "ubinary"):
        bits = np.unpackbits(cells, axis=-1, count=dimensions)
        return ((2.0 * bits - 1) / np.sqrt(dimensions)).astype(np.float32)
    low, step = _grid(ranges)
    return (low + (cells + np.float32(0.5)) * step).astype(np.float32)


def ranges_of(vectors: np.ndarray) -> np.ndarray:
    """[2, D] float32, lowest and highest of each dimension."""
    return np.stack([vectors.min(axis=0), vectors.max(axis=0)]).astype(np.float32)


def _grid(ranges: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    assert ranges is not None, "int8 and uint8 need ranges"
    low, high = ranges
    step = (high - low) / 255
    return low, np.where(step == 0, 1, step)
