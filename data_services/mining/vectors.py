"""Vectors of a text table on disk, float32 row by row, read in blocks so that memory stays bounded."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_services.mining.texts import TextTable
from data_services.schema import Encoder, RunError

_ENCODED_AT_ONCE = 2048  # texts; what is in memory beside the model, and what a killed run loses at most
_PAIRS_AT_ONCE = 512  # both sides in float64 stay in a core's cache


@dataclass(frozen=True)
class Vectors:
    """A file of n vectors; pickles as its path. Blocks are mapped while they are used, and no longer."""

    path: Path
    rows: int
    dimensions: int

    def block(self, start: int, stop: int) -> np.ndarray:
        """[m, D] float32, rows start … stop-1, read-only."""
        shape = (min(stop, self.rows) - start, self.dimensions)
        return np.memmap(self.path, np.float32, "r", offset=4 * self.dimensions * start, shape=shape)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """[m, D] float32."""
        return np.asarray(self.block(0, self.rows)[rows])


def dots(queries: Vectors, of: np.ndarray, documents: Vectors, to: np.ndarray) -> np.ndarray:
    """[m] float32, the inner products of queries `of` [m] with documents `to` [m].

    Summed in float64: the same number for a pair wherever it is computed, so that neither the cutting into blocks
    nor the number of workers decides an order.
    """
    scores = np.empty(len(of), np.float32)
    for at in range(0, len(of), _PAIRS_AT_ONCE):
        part = slice(at, at + _PAIRS_AT_ONCE)
        rows = queries.take(of[part]).astype(np.float64), documents.take(to[part]).astype(np.float64)
        scores[part] = np.einsum("md,md->m", *rows)
    return scores


def encode_to_file(
    texts: TextTable,
    encoder: Callable[[], Encoder],
    field: str,
    folder: Path,
    on_progress: Callable[[int, int], None] = lambda done, of: None,
) -> Vectors:
    """The vectors of all texts in `folder`; what an earlier run left there is kept, whole blocks of it.

    encoder  called only where something is left to encode
    Raises RunError where another process writes there, or where the encoder gives something else than one vector a
    text, or NaN.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, shape = folder / "vectors.f32", folder / "shape.json"
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(f"another process writes the vectors in {folder}; let it finish") from error
        dimensions = json.loads(shape.read_text())["dimensions"] if shape.exists() else 0
        done = path.stat().st_size // (4 * dimensions) if dimensions and path.exists() else 0
        done = done if done == len(texts) else done // _ENCODED_AT_ONCE * _ENCODED_AT_ONCE
        on_progress(done, len(texts))
        if done < len(texts):
            _append(texts, encoder(), field, path, shape, done, on_progress)
    return Vectors(path, len(texts), json.loads(shape.read_text())["dimensions"])


def _append(
    texts: TextTable,
    encoder: Encoder,
    field: str,
    path: Path,
    shape: Path,
    done: int,
    on_progress: Callable[[int, int], None],
) -> None:
    with path.open("ab") as file:
        for start in range(done, len(texts), _ENCODED_AT_ONCE):
            _, block = texts.read(start, start + _ENCODED_AT_ONCE)
            vectors = np.asarray(encoder.encode(block, field), np.float32)
            if vectors.ndim != 2 or len(vectors) != len(block):
                raise RunError(f"the encoder gave {vectors.shape} for {len(block)} {field} texts: one row for each")
            if not np.isfinite(vectors).all():
                raise RunError(f"the model's {field} vectors hold NaN or infinity: its weights are damaged")
            if start == done:
                shape.write_text(json.dumps({"dimensions": vectors.shape[1]}))
                file.truncate(4 * vectors.shape[1] * done)
            file.write(vectors.tobytes())
            file.flush()
            on_progress(start + len(block), len(texts))
