"""Rows to sides by a hash of what they are: a row never changes side, whatever else is in the source.

    id        the row's id
    query     equal queries stand on one side
    document  rows that share a positive stand on one side
    both      rows that share a query or a positive

Rows that are tied through others are one component, which goes by its smallest id. Where a row has one positive,
`document` is by that; else a new row that ties two components together may move one of them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from data_services.draws import mix
from data_services.rewrite import rewrite_some
from data_services.schema import Column, UsageError, text_id
from data_services.store import StoredSource

By = Literal["id", "query", "document", "both"]


def parse_shares(text: str) -> dict[str, float]:
    """`train=0.9,validation=0.1`; UsageError where the shares aren't positive numbers that sum to 1."""
    shares: dict[str, float] = {}
    for part in text.split(","):
        name, _, share = (piece.strip() for piece in part.partition("="))
        if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name in shares:
            raise UsageError(f"--shares {text}: {part!r} names no new side; write train=0.9,validation=0.1")
        try:
            shares[name] = float(share)
        except ValueError:
            raise UsageError(f"--shares {text}: {share!r} is no number; write train=0.9,validation=0.1") from None
    if not all(share > 0 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise UsageError(f"--shares {text}: shares are above 0 and sum to 1, these to {sum(shares.values()):g}")
    return shares


def sides(keys: np.ndarray, shares: dict[str, float], seed: int = 0) -> np.ndarray:
    """[n] int64, the share that each key [n] int64 falls into, by number; a function of key, shares and seed."""
    salted = mix(keys.astype(np.uint64) ^ mix(np.array([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    uniform = (salted >> np.uint64(11)) * 2.0**-53
    return np.searchsorted(np.cumsum(list(shares.values()))[:-1], uniform, side="right")


def row_keys(source: StoredSource, by: By) -> np.ndarray:
    """[rows] int64, equal where rows have to stand on one side."""
    if by == "id":
        ids = _column(source, Column.ID)
        return np.array([text_id(name) for name in ids.to_pylist()], np.int64)
    queries = _column(source, Column.QUERY_ID).to_numpy()
    if by == "query":
        return queries
    lists = _column(source, Column.POSITIVE_IDS)
    rows = np.repeat(np.arange(source.rows), pc.list_value_length(lists).to_numpy())
    ties = [(rows, pc.list_flatten(lists).to_numpy())]
    if by == "both":
        ties.append((np.arange(source.rows), queries))
    return components(source.rows, np.concatenate([r for r, _ in ties]), np.concatenate([i for _, i in ties]))


def components(rows: int, of: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """[rows] int64, the smallest id of each row's component, where row of[k] has ids[k] [m] and rows tie by ids."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    known, codes = np.unique(ids, return_inverse=True)
    nodes = rows + len(known)
    graph = coo_array((np.ones(len(of), bool), (of, codes + rows)), shape=(nodes, nodes))
    count, component = connected_components(graph, directed=False)
    smallest = np.full(count, np.iinfo(np.int64).max)
    np.minimum.at(smallest, component[rows:], known)
    return smallest[component[:rows]]


def _column(source: StoredSource, name: str) -> pa.ChunkedArray:
    return pa.concat_tables([pq.read_table(path, columns=[name]) for path in source.files]).column(name)


def write_split(source: StoredSource, shares: dict[str, float], by: By, seed: int, folder: Path) -> dict[str, int]:
    """Each side's rows as Parquet in `folder`/side; rows of each side. UsageError where a side gets none."""
    side = sides(row_keys(source, by), shares, seed)
    counts = dict(zip(shares, np.bincount(side, minlength=len(shares)).tolist(), strict=True))
    for number, (name, rows) in enumerate(counts.items()):
        if not rows:
            raise UsageError(f"side {name} gets none of the {source.rows} rows: raise its share in --shares, or --seed")
        rewrite_some(source, folder / name, side == number)
    return counts
