"""Splitting: a row's side is a function of what it is, and what must not be parted isn't."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.schema import Column, UsageError
from data_services.sources import SourceConfig, open_source
from data_services.splitting import components, parse_shares, row_keys, sides, write_split
from tests.data_services.mining.worlds import source

SHARES = {"train": 0.7, "validation": 0.2, "test": 0.1}


def world(seed: int, rows: int) -> list[tuple[str, list[str], list[str]]]:
    rng = random.Random(seed)
    texts = [f"t{i}" for i in range(rows)]
    return [(rng.choice(texts), rng.sample(texts, rng.choice([1, 1, 1, 2])), []) for _ in range(rows)]


def test_shares_are_kept_and_keys_fall_alike_whatever_else_is_there():
    keys = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, 60_000)
    found = sides(keys, SHARES)
    assert np.bincount(found) / len(keys) == pytest.approx([0.7, 0.2, 0.1], abs=0.01)
    assert np.array_equal(sides(keys[::-1][:100], SHARES), found[::-1][:100])
    assert (sides(keys, SHARES, seed=1) != found).mean() > 0.3
    # A larger first share takes from the others and gives nothing away.
    grown = sides(keys, {"train": 0.8, "rest": 0.2})
    assert (grown[found == 0] == 0).all()


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), by=st.sampled_from(["query", "document", "both"]))
def test_what_rows_share_stands_on_one_side(tmp_path_factory, seed, by):
    stored = source(tmp_path_factory.mktemp("s"), world(seed, 40))
    side = sides(row_keys(stored, by), {"a": 0.5, "b": 0.5})
    at: dict[object, set[int]] = {}
    for row, its in zip(stored.table().to_pylist(), side.tolist(), strict=True):
        queries = [("q", row[Column.QUERY_ID])] if by != "document" else []
        documents = [("d", i) for i in row[Column.POSITIVE_IDS]] if by != "query" else []
        for text in queries + documents:
            at.setdefault(text, set()).add(its)
    assert all(len(its) == 1 for its in at.values())


@settings(max_examples=50)
@given(st.lists(st.lists(st.integers(-5, 5), min_size=1, max_size=3), min_size=1, max_size=12))
def test_components_are_those_of_merging_one_row_after_another(ids):
    groups: list[set[int]] = []
    for its in ids:
        touching = [g for g in groups if g & set(its)]
        groups = [g for g in groups if not g & set(its)] + [set(its).union(*touching)]
    expected = [min(next(g for g in groups if its[0] in g)) for its in ids]
    of = np.repeat(np.arange(len(ids)), [len(its) for its in ids])
    assert components(len(ids), of, np.concatenate(ids)).tolist() == expected


def test_a_row_stays_where_it_was_when_others_come(tmp_path):
    rows = [(f"q{i}", [f"p{i}"], []) for i in range(50)]
    for by in ("query", "document", "id"):
        before = sides(row_keys(source(tmp_path / f"{by}1", rows), by), SHARES)
        after = sides(row_keys(source(tmp_path / f"{by}2", [*rows, *world(1, 30)]), by), SHARES)
        assert np.array_equal(after[:50], before)


def test_the_written_sides_are_splits_of_a_folder(tmp_path):
    stored = source(tmp_path, world(2, 200))
    counts = write_split(stored, {"train": 0.8, "validation": 0.2}, "query", 0, tmp_path / "out")
    assert sum(counts.values()) == 200
    seen = []
    for split, rows in counts.items():
        back = open_source(SourceConfig(path=str(tmp_path / "out"), split=split, positive="positives"), tmp_path)
        assert back.rows == rows
        seen += back.table().column(Column.QUERY).to_pylist()
    assert sorted(seen) == sorted(stored.table().column(Column.QUERY).to_pylist())
    with pytest.raises(UsageError, match="side few gets none of the 200 rows"):
        write_split(stored, {"most": 0.999999, "few": 0.000001}, "query", 0, tmp_path / "other")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("train=0.9", "these to 0.9"),
        ("train=0.9,test=0.2", "these to 1.1"),
        ("train=1.5,test=-0.5", "above 0"),
        ("train=0.5,train=0.5", "names no new side"),
        ("train=half,test=0.5", "'half' is no number"),
        ("../x=0.5,test=0.5", "names no new side"),
        ("", "names no new side"),
    ],
)
def test_shares_that_are_none_are_told_so(text, told):
    with pytest.raises(UsageError, match=told):
        parse_shares(text)
    assert parse_shares("train=0.9, validation=0.1") == {"train": 0.9, "validation": 0.1}
