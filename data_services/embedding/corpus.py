"""An embedding on disk: which files it has, and reading it.

    manifest.json            what the folder is made of, written first: another run must agree with it
    ranges.json              of int8 and uint8: [2, D] lowest and highest of each dimension, from a sample
    vectors-00000.parquet …  shards of `shard_rows` rows: id int64, name string (where texts have names), vector
    committed.json           written last: rows, dimensions, metric. Without it the folder isn't finished

Legend: n rows, D dimensions of a stored vector.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_services.embedding.quantise import STORED, Dtype, is_ranged, restore, width
from data_services.embedding.texts import Field
from data_services.schema import RunError, UsageError

MANIFEST, RANGES, COMMITTED, MAKING = "manifest.json", "ranges.json", "committed.json", ".making-"
DIMENSIONS, METRIC, MADE_OF = "gyre.dimensions", "gyre.metric", "gyre.made_of"  # keys of a shard's metadata


@dataclass(frozen=True)
class EmbeddedCorpus:
    """A finished embedding; pickles as its path and counts.

    dimensions  D of `vectors`
    metric      "cosine": the vectors have length one (before they were quantised), and inner products are cosines;
                "dot": they don't, and the model is trained for inner products
    """

    folder: Path
    rows: int
    dimensions: int
    dtype: Dtype
    metric: Literal["cosine", "dot"]
    field: Field
    shard_rows: int

    @classmethod
    def open(cls, folder: Path) -> EmbeddedCorpus:
        """Raises UsageError where the folder is no embedding, or one that isn't finished."""
        if not (folder / MANIFEST).exists():
            raise UsageError(f"{folder} holds no embedding; make one with `gyre embed`")
        if not (folder / COMMITTED).exists():
            raise UsageError(f"the embedding in {folder} isn't finished; run the same `gyre embed` again")
        made_of, found = (json.loads((folder / name).read_text()) for name in (MANIFEST, COMMITTED))
        return cls(folder, **found, **{key: made_of[key] for key in ("dtype", "field", "shard_rows")})

    def ids(self, start: int, stop: int) -> np.ndarray:
        """[m] int64 of rows start … stop-1, `schema.text_id`."""
        return np.concatenate([np.zeros(0, np.int64), *(c.to_numpy() for c in self._column("id", start, stop))])

    def names(self, start: int, stop: int) -> list[str]:
        """Of rows start … stop-1; KeyError where the texts have none."""
        return [name for column in self._column("name", start, stop) for name in column.to_pylist()]

    def stored(self, start: int, stop: int) -> np.ndarray:
        """[m, width] of rows start … stop-1, in the type that is on disk."""
        wide = width(self.dtype, self.dimensions)
        parts = [c.flatten().to_numpy().reshape(-1, wide) for c in self._column("vector", start, stop)]
        return np.concatenate([np.zeros((0, wide), STORED[self.dtype]), *parts])

    def vectors(self, start: int, stop: int) -> np.ndarray:
        """[m, D] float32 of rows start … stop-1; `quantise.restore` of what is stored."""
        ranges = read_ranges(self.folder / RANGES) if is_ranged(self.dtype) else None
        return restore(self.stored(start, stop), self.dtype, self.dimensions, ranges)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}

    def _column(self, name: str, start: int, stop: int) -> Iterator[pa.Array]:
        stop = min(stop, self.rows)
        for number in range(start // self.shard_rows, math.ceil(stop / self.shard_rows) if stop > start else 0):
            first = number * self.shard_rows
            column = pq.read_table(shard_file(self.folder, number), columns=[name]).column(name).combine_chunks()
            yield column[max(start - first, 0) : stop - first]


def shard_file(folder: Path, number: int) -> Path:
    return folder / f"vectors-{number:05}.parquet"


@contextlib.contextmanager
def renamed(path: Path) -> Iterator[Path]:
    """A name to write under, which becomes `path` at the end: there is all of it or nothing."""
    making = path.with_name(f"{MAKING}{uuid.uuid4().hex}")
    try:
        yield making
        making.replace(path)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            told = f"no space left on the disk of {path.parent}; what is finished stays, run it again"
            raise RunError(told) from error
        raise
    finally:
        making.unlink(missing_ok=True)


def write_whole(path: Path, value: Any) -> None:
    """JSON, all of it or nothing."""
    with renamed(path) as making:
        making.write_text(json.dumps(value, indent=1))


def read_ranges(path: Path) -> np.ndarray:
    return np.array(json.loads(path.read_text()), np.float32)
