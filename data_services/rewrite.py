"""A source written back as Parquet that a recipe reads, row group by row group: all of it or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.columns import schema_of
from data_services.schema import UNKNOWN, Column, UsageError
from data_services.store import StoredSource

# The keys of `data.sources` that don't have the names of their columns.
_KEYS = {
    Column.QUERY: "query",
    Column.POSITIVES: "positive",
    Column.NEGATIVES: "negatives",
    Column.WEIGHT: "pair_weight",
}


def new_folder(out: Path) -> Path:
    """A folder beside `out` to work in, with an empty `source` in it; UsageError where `out` is there and not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} is there already and not empty; name a new folder")
    making = out.with_name(out.name + ".making")
    shutil.rmtree(making, ignore_errors=True)
    (making / "source").mkdir(parents=True)
    return making


def publish(making: Path, out: Path, manifest: dict[str, Any], name: str) -> None:
    """The files of `making`/source at `out`, with the manifest as `name`, all of it or nothing."""
    (making / "source" / name).write_text(json.dumps(manifest, indent=1) + "\n")
    if out.exists():
        out.rmdir()
    (making / "source").rename(out)


def rewrite(source: StoredSource, folder: Path, change: Callable[[pa.Table, int], pa.Table]) -> int:
    """The source's rows as Parquet of their schema, each row group as `change` gives it; how many rows those are.

    change  takes a row group and the number of its first row; it may leave rows out

    UsageError where the source has items of parts, which no field of the result could name.
    """
    if not all(isinstance(form, str) for form in source.kinds):
        raise UsageError(
            f"source {source.name} has items of several parts: it can't be written back as one column a side"
        )
    folder.mkdir(parents=True, exist_ok=True)
    first = written = 0
    schema = schema_of(source.kinds)
    for number, path in enumerate(source.files):
        file = pq.ParquetFile(path)
        with pq.ParquetWriter(folder / f"part-{number:05}.parquet", schema) as writer:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group)
                changed = _without_unknown(change(table, first)).cast(schema)
                first, written = first + len(table), written + len(changed)
                if len(changed):
                    writer.write_table(changed, row_group_size=len(changed))
    return written


def rewrite_some(source: StoredSource, folder: Path, keep: np.ndarray) -> int:
    """The rows where keep [rows] is true; how many those are."""
    return rewrite(source, folder, lambda table, first: table.filter(pa.array(keep[first : first + len(table)])))


def replaced(table: pa.Table, name: str, values: pa.Array | pa.ChunkedArray) -> pa.Table:
    """The table with other values in a column."""
    return table.set_column(table.column_names.index(name), name, values)


def _without_unknown(table: pa.Table) -> pa.Table:
    """A source's field of classes has null where a row has none; the store has UNKNOWN there."""
    for name in Column.CLASSES:
        column = table.column(name)
        known = pc.if_else(pc.not_equal(column, UNKNOWN), column, pa.scalar(None, pa.int64()))
        table = replaced(table, name, known)
    return table


def recipe_keys(columns: frozenset[str]) -> dict[str, str]:
    """Keys of `data.sources` for a source that `rewrite` wrote. columns: the optional ones that it has."""
    there = [Column.ID, Column.QUERY, Column.POSITIVES, Column.NEGATIVES, *sorted(columns)]
    return {_KEYS.get(name, name): name for name in there}
