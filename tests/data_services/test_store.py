import errno
import json
import multiprocessing
import pickle
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_services import convert
from data_services import store as storage
from data_services.columns import SCHEMA
from data_services.convert import group_rows
from data_services.fields import Fields
from data_services.origins import RowsPart
from data_services.readers.blocks import Want
from data_services.records import Malformed, Row
from data_services.schema import UNKNOWN, Column, RunError, UsageError, text_id
from data_services.store import Reading, StoredSource, store


def row(i: int) -> Row:
    return Row(
        i,
        {
            "id": f"f:{i}",
            "q": f"query {i}",
            "p": [f"positive {i}", f"other {i}"][: 1 + i % 2],
            "n": [f"negative {i}"] * (i % 3),
        },
    )


FIELDS = Fields("q", "p", ("n",), id="id")


def stored_rows(slot: Path, rows, stamp=None, fields=FIELDS) -> StoredSource:
    """What rows, or a function that yields them, become."""
    part = RowsPart("f", rows if callable(rows) else lambda: rows)
    reading = Reading([part], Want(fields, 1 << 20), "pairs")
    return store("s", slot, None if stamp is None else lambda: stamp, lambda: reading)


def stored(slot: Path, rows: int, stamp=None) -> StoredSource:
    return stored_rows(slot, [row(i) for i in range(rows)], stamp)


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of 4 rows, files of 3 row groups, and nothing regrouped."""
    monkeypatch.setattr(convert, "GROUP_ROWS", 4)
    monkeypatch.setattr(convert, "_WANTED_GROUPS", 1)
    monkeypatch.setattr(convert, "_GROUPS_PER_FILE", 3)


def test_read_gives_the_rows_asked_for_in_that_order(tmp_path, small_groups):
    source = stored(tmp_path / "slot", 30)
    assert source.row_groups == (4, 4, 4, 4, 4, 4, 4, 2)
    assert source.groups_per_file == (3, 3, 2)
    assert source.rows == 30
    whole = source.table().to_pylist()
    rng = np.random.default_rng(0)
    for rows in (rng.permutation(30), rng.integers(0, 30, 50), np.array([29]), np.array([5, 5, 0])):
        assert source.read(rows).to_pylist() == [whole[i] for i in rows]
    assert source.read(np.zeros(0, np.int64)).num_rows == 0
    assert source.read(np.arange(3)).schema == SCHEMA


@pytest.mark.parametrize("groups", [[0], [3, 1, 2], [7, 0, 4, 5, 1], list(range(8))])
def test_ids_of_row_groups_are_the_columns_of_their_rows_in_the_order_asked_for(tmp_path, small_groups, groups):
    source = stored(tmp_path / "slot", 30)
    queries, positives, counts = source.ids(np.array(groups))
    ends = np.cumsum(source.row_groups)
    table = source.read(np.concatenate([np.arange(ends[g] - source.row_groups[g], ends[g]) for g in groups]))
    assert queries.tolist() == table[Column.QUERY_ID].to_pylist()
    lists = table[Column.POSITIVE_IDS].to_pylist()
    assert counts.tolist() == [len(one) for one in lists]
    assert positives.tolist() == [x for one in lists for x in one]


def test_columns_hold_the_texts_and_their_ids(tmp_path):
    row = stored(tmp_path / "slot", 6).read(np.array([5])).to_pylist()[0]
    assert row == {
        Column.ID: "f:5",
        Column.QUERY: "query 5",
        Column.POSITIVES: ["positive 5", "other 5"],
        Column.NEGATIVES: ["negative 5", "negative 5"],
        Column.QUERY_ID: text_id("query 5"),
        Column.POSITIVE_IDS: [text_id("positive 5"), text_id("other 5")],
        Column.NEGATIVE_IDS: [text_id("negative 5")] * 2,
        **dict.fromkeys(Column.OPTIONAL),
    }


def test_columns_that_a_source_has_besides_are_kept_and_named(tmp_path):
    more = {
        Column.POSITIVE_SCORES: [0.5, -2.0],
        Column.NEGATIVE_SCORES: [],
        Column.WEIGHT: 0.25,
        Column.FREQUENCY: 3.0,
        Column.LABEL: -(2**63) + 1,
        Column.TASK: 2**63 - 1,
        Column.LANGUAGE: None,
        Column.CLUSTER: 7,
    }
    rows = [Row(1, {"q": "q", "p": ["p", "P"], "n": [], "id": "1", **more})]
    fields = FIELDS._replace(**{name: name for name in more})
    source = stored_rows(tmp_path / "slot", rows, {"size": 1}, fields)
    wanted = {**more, Column.LANGUAGE: UNKNOWN, Column.MODALITY: None}
    assert source.read(np.array([0, 0])).select(Column.OPTIONAL).to_pylist() == [wanted] * 2
    assert source.columns == frozenset(more)
    assert json.loads((source.folder / "manifest.json").read_text())["columns"] == sorted(more)
    again = stored_rows(tmp_path / "slot", [], {"size": 1}, fields)
    assert again == source == pickle.loads(pickle.dumps(source))


def test_only_the_row_groups_needed_are_read_and_each_once(tmp_path, small_groups, monkeypatch):
    source = stored(tmp_path / "slot", 30)
    reads = []
    read = pq.ParquetFile.read_row_group

    def counted(self, group, **keywords):
        reads.append(group)
        return read(self, group, **keywords)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    source.read(np.array([13, 14, 1]))
    assert sorted(reads) == [0, 0]  # the first group of the first file, the first of the second
    pickle.loads(pickle.dumps(source)).read(np.array([12, 15, 0, 2]))
    assert len(reads) == 2


def test_the_cache_keeps_to_its_limit(tmp_path, small_groups, monkeypatch):
    source = stored(tmp_path / "slot", 30)
    cache = storage._RowGroupCache(limit_bytes=1)
    monkeypatch.setattr(storage, "_CACHE", cache)
    assert source.read(np.arange(30)).to_pylist() == source.table().to_pylist()
    assert len(cache._groups) == 1
    assert cache._bytes == next(iter(cache._groups.values())).nbytes


@pytest.mark.parametrize("row", [-1, 6])
def test_a_row_that_is_not_there_is_named(tmp_path, row):
    with pytest.raises(ValueError, match=f"row {row} is not among the 6 rows of source s"):
        stored(tmp_path / "slot", 6).read(np.array([0, row]))


@pytest.mark.parametrize(
    ("rows", "size"),
    [(0, 64), (64, 64), (6_000, 64), (8_192, 128), (65_535, 512), (65_536, 1024), (10**9, 1024)],
)
def test_small_sources_have_small_row_groups(rows, size):
    assert group_rows(rows) == size


def test_rows_in_are_rows_out_and_quarantined(tmp_path, small_groups):
    rows = [Malformed(i, f"reason {i % 2}", f"row {i}" * 1000) if i % 4 == 0 else row(i) for i in range(21)]
    source = stored_rows(tmp_path / "slot", rows)
    manifest = json.loads((source.folder / "manifest.json").read_text())
    quarantine = pq.read_table(source.folder / "quarantine.parquet").to_pylist()
    assert manifest["rows_in"] == 21 == manifest["rows_out"] + len(quarantine)
    assert manifest["rows_out"] == source.rows == 15
    assert source.quarantined == {"reason 0": 6}
    assert [row["origin"] for row in quarantine] == [f"f:{i}" for i in range(0, 21, 4)]
    assert all(row["reason"] == "reason 0" and len(row["row"]) <= 2_000 for row in quarantine)


def test_a_small_source_is_stored_in_one_file_of_small_row_groups(tmp_path):
    source = stored(tmp_path / "slot", 200)
    assert [file.name for file in source.files] == ["rows.parquet"]
    assert source.row_groups == (64, 64, 64, 8)
    assert sorted(path.name for path in source.folder.iterdir()) == [
        "manifest.json",
        "quarantine.parquet",
        "rows.parquet",
    ]


def unread():
    raise AssertionError("read again")
    yield


def test_an_unchanged_stamp_is_not_converted_again(tmp_path):
    first = stored(tmp_path / "slot", 5, {"size": 1})
    assert stored_rows(tmp_path / "slot", unread, {"size": 1}) == first


def test_a_changed_stamp_with_the_same_content_keeps_the_fingerprint_and_the_folder(tmp_path):
    first = stored(tmp_path / "slot", 5, {"mtime": 1})
    touched = stored(tmp_path / "slot", 5, {"mtime": 2})
    changed = stored(tmp_path / "slot", 6, {"mtime": 3})
    assert touched == first
    assert changed.fingerprint != first.fingerprint
    assert first.read(np.array([4])).num_rows == 1  # what a run is reading stays
    assert stored(tmp_path / "slot", 5, {"mtime": 1}) == first


def test_a_source_that_changes_while_it_is_read_is_told(tmp_path):
    sizes = iter(range(10))
    reading = Reading([RowsPart("f", lambda: [row(1)])], Want(FIELDS, 1 << 20), "pairs")
    with pytest.raises(UsageError, match="source s changed while it was read"):
        store("s", tmp_path / "slot", lambda: next(sizes), lambda: reading)
    assert not (tmp_path / "slot" / "stamp.json").exists()


@pytest.mark.parametrize("change", ["q", "p", "n", "id"])
def test_the_fingerprint_follows_every_field(tmp_path, change):
    value = row(5).fields[change]
    new = Row(5, {**row(5).fields, change: value + "x" if isinstance(value, str) else [*value, "x"]})
    assert len({stored_rows(tmp_path / "slot", [r]).fingerprint for r in (row(5), new)}) == 2


@pytest.mark.parametrize("column", Column.OPTIONAL)
def test_the_fingerprint_follows_every_column_that_a_source_may_have(tmp_path, column):
    values = (
        [[1.0, 2.0], [1.0, 2.5], [2.0, 1.0]]
        if column.endswith("scores")
        else [0.5, 1, 2]
        if column == Column.FREQUENCY
        else [0, 1, 2]
    )
    rows = [Row(1, {"q": "q", "p": ["a", "b"], "n": ["c", "d"], "id": "1", "more": value}) for value in values]
    fields = FIELDS._replace(**{column: "more"})
    found = {stored_rows(tmp_path / "slot", [r], fields=fields).fingerprint for r in rows}
    assert len(found | {stored_rows(tmp_path / "slot", rows[:1]).fingerprint}) == 4


def test_the_fingerprint_follows_the_order_and_the_malformed_rows(tmp_path):
    lists = [
        [row(1), row(2)],
        [row(2), row(1)],
        [row(1), row(2), Malformed(3, "x", "y")],
        [row(1), row(2), Malformed(3, "x", "z")],
    ]
    assert len({stored_rows(tmp_path / "slot", rows).fingerprint for rows in lists}) == 4


def test_a_source_without_a_good_row_tells_why_and_leaves_nothing(tmp_path):
    bad = [Malformed(1, "not JSON", "{"), Malformed(2, "not JSON", "["), Malformed(3, "empty", "")]
    with pytest.raises(UsageError, match=r"source s has no usable row: 2 × not JSON \(first: f:1\); 1 × empty"):
        stored_rows(tmp_path / "data" / "slot", bad, {})
    with pytest.raises(UsageError, match="it is empty"):
        stored_rows(tmp_path / "data" / "slot", [], {})
    assert not list((tmp_path / "data").iterdir())


def test_a_conversion_that_dies_leaves_nothing_half_written(tmp_path):
    def rows():
        yield row(0)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(RunError, match=r"no space left on the disk of .* while converting source s"):
        stored_rows(tmp_path / "data" / "slot", rows, {})
    assert not list((tmp_path / "data").iterdir())


def _convert_at_once(barrier, slot, results):
    def rows():
        yield row(0)
        results.put("read")
        time.sleep(0.2)
        yield from (row(i) for i in range(1, 50))

    barrier.wait()
    source = stored_rows(slot, rows, {"size": 1})
    results.put((source.fingerprint, source.read(np.arange(50)).num_rows))


def test_of_two_conversions_at_once_the_second_waits_and_uses_the_first(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    barrier, results = spawn.Barrier(2), spawn.SimpleQueue()
    both = [spawn.Process(target=_convert_at_once, args=(barrier, tmp_path / "slot", results)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
        assert process.exitcode == 0
    first, *fingerprints = [results.get() for _ in range(3)]
    assert first == "read"  # once
    assert fingerprints[0] == fingerprints[1]
    assert len([path for path in (tmp_path / "slot").iterdir() if path.is_dir()]) == 1


def test_where_files_cannot_be_locked_the_first_to_finish_wins(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    def rows():
        yield row(0)
        stored(tmp_path / "slot", 2, {"size": 1})  # another finishes first
        yield row(1)

    monkeypatch.setattr(storage.fcntl, "flock", no_locks)
    source = stored_rows(tmp_path / "slot", rows, {"size": 1})
    assert source.rows == 2
    assert isinstance(source.table(), pa.Table)
    assert sorted(path.is_dir() for path in (tmp_path / "slot").iterdir()) == [False, True]
