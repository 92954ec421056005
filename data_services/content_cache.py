"""Rows of numbers by the content they were computed from: computed once, found again by any run and any process.

    folder/part-<name>/keys.npy     [n] int64, ascending: hashes of the content
                       rows.npy     [n] int64, where in values.npy each key's row is
                       values.npy   [n, D] float32

A part appears whole and never changes; a key of two parts (of two runs at once) has the same row in both. Files are
mapped, so that a reader's memory is what it touches.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from data_services.schema import RunError

log = logging.getLogger(__name__)


class ContentCache:
    """The parts of one folder; pickles as its path."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, keys: np.ndarray) -> np.ndarray:
        """[m] bool, whether each of the keys [m] int64 is there."""
        found = np.zeros(len(keys), bool)
        for part in self._parts():
            found |= part.find(keys) >= 0
        return found

    def take(self, keys: np.ndarray) -> np.ndarray:
        """[m, D] float32, the rows of keys [m] int64. RunError where one isn't there."""
        parts = self._parts()
        rows = np.empty((len(keys), parts[0].values.shape[1] if parts else 0), np.float32)
        missing = np.ones(len(keys), bool)
        for part in parts:
            at = part.find(keys)
            there = at >= 0
            rows[there] = part.values[part.rows[at[there]]]
            missing &= ~there
        if missing.any():
            raise RunError(
                f"{self.folder} lacks {missing.sum()} of {len(keys)} texts that it had when the run began: something "
                "removed files there; resume the run, which computes them anew"
            )
        return rows

    def add(self, name: str, keys: np.ndarray, values: Iterable[np.ndarray], width: int) -> None:
        """Another part: values, [·, width] float32 in blocks, are the rows of keys [n] int64, each key once.

        A part of that name that is there already stays.
        """
        making = self.folder / f".making-{uuid.uuid4().hex}"
        try:
            making.mkdir(parents=True)
            order = np.argsort(keys)
            np.save(making / "keys.npy", keys[order])
            np.save(making / "rows.npy", order)
            written = np.lib.format.open_memmap(making / "values.npy", "w+", np.float32, (len(keys), width))
            at = 0
            for block in values:
                written[at : at + len(block)] = block
                at += len(block)
            written.flush()
            finished = self.folder / f"part-{name}"
            try:
                making.rename(finished)
            except OSError:
                if not finished.exists():  # else another was first, with the same
                    raise
        finally:
            shutil.rmtree(making, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until no other process is here: what it adds needn't be computed twice."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX)
            except OSError:
                log.warning("the file system of %s knows no locks: let one process at a time use it", self.folder)
            yield

    def _parts(self) -> Sequence[_Part]:
        return [_opened(path) for path in sorted(self.folder.glob("part-*"))]


class _Part:
    def __init__(self, path: Path) -> None:
        self._keys, self.rows, self.values = (np.load(path / f"{name}.npy", "r") for name in ("keys", "rows", "values"))

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[m] int64 where the keys stand among this part's, -1 for one that doesn't."""
        at = np.searchsorted(self._keys, keys).clip(max=len(self._keys) - 1)
        return np.where(self._keys[at] == keys, at, -1)


_opened = lru_cache(maxsize=256)(_Part)
