"""Parts: cut anywhere they give the same rows, a killed conversion goes on, and bad bytes are told."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services import parallel
from data_services.convert import part_folder
from data_services.fields import Fields
from data_services.files import find
from data_services.readers import formats, lines
from data_services.readers.blocks import Want
from data_services.readers.formats import parts_of
from data_services.records import Malformed
from data_services.schema import Column, RunError, UsageError
from data_services.sources import SourceConfig, open_source

WANT = Want(Fields("query", "positive"), 1 << 20)


def json_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def pairs(n):
    return [{"query": f"query {i}", "positive": f"positive {i}"} for i in range(n)]


def opened(path, home, **keys):
    return open_source(SourceConfig(path=str(path), **{"quarantine_share": 1, **keys}), home)


# Ranges of lines.


def lines_of(file, start, stop, want):
    found = []
    for block in lines.blocks(file, want, start, stop):
        rows = list(block.rows())
        assert block.rows_in == len(rows)
        if block.table is not None:
            assert block.table.num_rows == len(rows)
        found += [(r.reason, r.row[:20]) if isinstance(r, Malformed) else r.fields["query"] for r in rows]
    return found


@settings(max_examples=120)
@given(
    data=st.lists(
        st.sampled_from(['{"query": "a", "positive": "b"}', '{"query": "é"}', "", " ", "{", "\xff", "x" * 90, "\r"]),
        max_size=9,
    ),
    end=st.sampled_from(["\n", "\r\n", ""]),
    step=st.integers(1, 60),
    read=st.sampled_from([1, 7, 30, 1 << 20]),
)
def test_ranges_of_bytes_give_every_line_once(tmp_path_factory, data, end, step, read):
    path = tmp_path_factory.getbasetemp() / "ranges.jsonl"
    path.write_bytes((end or "\n").join(data).encode() + end.encode())
    file, want = find(str(path)).files[0], Want(Fields("query", "query"), 50)
    bytes_before, lines.BLOCK_BYTES = lines.BLOCK_BYTES, read
    try:
        whole = lines_of(file, 0, None, want)
        cut = [row for s in range(0, file.size, step) for row in lines_of(file, s, min(s + step, file.size), want)]
    finally:
        lines.BLOCK_BYTES = bytes_before
    assert cut == whole
    assert len(whole) == sum(bool(line.strip()) for line in data)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_ids_quarantine_and_fingerprint_do_not_depend_on_the_parts(tmp_path, monkeypatch, suffix):
    rows = [{"query": f"query {i}", "positive": None if i % 50 == 7 else f"p {i}"} for i in range(300)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".jsonl":
        path.write_bytes(json_lines(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=20)
    found = []
    for part_bytes in (1 << 30, 5_000, 700):
        monkeypatch.setattr(formats, "PART_BYTES", part_bytes)
        found.append(opened(path, tmp_path / f"home-{part_bytes}"))
        assert len(parts_of(find(str(path)).files)) > 1 or part_bytes > 1_000
    first = found[0]
    for source in found[1:]:
        assert source.fingerprint == first.fingerprint
        assert source.row_groups == first.row_groups
        assert source.table().equals(first.table())
        for name in ("origin", "reason", "row"):
            assert quarantine(source)[name] == quarantine(first)[name]
    assert quarantine(first)["origin"].to_pylist() == [f"a{suffix}:{i + 1}" for i in range(7, 300, 50)]


def quarantine(source):
    return pq.read_table(source.folder / "quarantine.parquet")


def test_small_files_go_together_and_large_ones_apart(tmp_path):
    for name, size in (("a", 10), ("b", 30), ("c", 0), ("d", 130), ("e", 50), ("f", 60)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * size)
    parts = parts_of(find(str(tmp_path / "*.jsonl")).files, 100)
    shown = [[(piece.file.name[0], piece.start, piece.stop) for piece in part.pieces] for part in parts]
    assert shown == [
        [("a", 0, None), ("b", 0, None)],
        [("d", 0, 100)],
        [("d", 100, 130)],
        [("e", 0, None)],
        [("f", 0, None)],
    ]


# Killed, at once, in parallel.

SLOW = """
import sys, time
from pathlib import Path
from data_services import convert, parallel
from data_services.readers import formats
from data_services.sources import SourceConfig, open_source

def slowly(*arguments, convert_part=convert.convert_part):
    convert_part(*arguments)
    print("finished", flush=True)
    time.sleep(0.2)

formats.PART_BYTES = 3000
parallel.convert_part = slowly
open_source(SourceConfig(path=sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_killed_conversion_goes_on_with_its_finished_parts(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(8):
        (data / f"{i}.jsonl").write_bytes(json_lines(pairs(50 + i)))
    home = tmp_path / "home"
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(data), str(home)], stdout=subprocess.PIPE)
    for _ in range(3):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = len(list(home.glob("data/*/.unfinished/part-*")))
    assert kept >= 3
    redone = []

    def noted(part, want, source, folder):
        redone.append(part_folder(folder, part, want).name)
        convert(part, want, source, folder)

    convert = parallel.convert_part
    monkeypatch.setattr(parallel, "convert_part", noted)
    monkeypatch.setattr(formats, "PART_BYTES", 3_000)
    resumed = opened(data, home)
    assert len(redone) == 8 - kept
    monkeypatch.undo()
    whole = opened(data, tmp_path / "another")
    assert resumed.fingerprint == whole.fingerprint
    assert resumed.table().equals(whole.table())
    assert not list(home.glob("data/*/.unfinished"))
    assert not [path for path in resumed.folder.iterdir() if path.is_dir()]


def test_a_conversion_that_failed_keeps_the_parts_of_files_that_stay(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        (data / f"{i}.jsonl.gz").write_bytes(
            gzip.compress(os.urandom(2_000).hex().encode() + b"\n" + json_lines(pairs(20)))
        )
    (data / "2.jsonl.gz").write_bytes((data / "0.jsonl.gz").read_bytes()[:-20])
    monkeypatch.setattr(formats, "PART_BYTES", 3_000)
    with pytest.raises(UsageError, match=r"2\.jsonl\.gz is not a whole gzip file: Truncated"):
        opened(data, tmp_path / "home")
    assert len(list(tmp_path.glob("home/data/*/.unfinished/part-*"))) == 2
    (data / "2.jsonl.gz").write_bytes((data / "0.jsonl.gz").read_bytes())
    seen = []
    open_source(SourceConfig(path=str(data)), tmp_path / "home", lambda done, parts: seen.append((done, parts)))
    assert seen == [(2, 3), (3, 3)]


def test_processes_convert_what_one_converts(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(3):
        (data / f"{i}.jsonl").write_bytes(json_lines(pairs(1000 * i + 10)))
    alone = opened(data, tmp_path / "alone")
    monkeypatch.setattr(formats, "PART_BYTES", 3_000)
    monkeypatch.setattr(parallel, "POOL_BYTES", 0)
    monkeypatch.setattr(parallel.os, "sched_getaffinity", lambda _: {0, 1})
    together = opened(data, tmp_path / "together")
    assert together.fingerprint == alone.fingerprint
    assert together.table().equals(alone.table())
    (data / "3.jsonl").write_bytes(b"\xff" * 10)
    (data / "4.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match=r"4\.parquet is not a whole Parquet file"):
        opened(data, tmp_path / "together")


# Wrong input.

GOOD = json_lines(pairs(3))


def test_a_line_of_50_mb_is_passed_over(tmp_path):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(GOOD + b'{"query": "')
        for _ in range(50):
            file.write(b"x" * (1 << 20))
        file.write(b'", "positive": "p"}\n' + GOOD)
    source = opened(path, tmp_path / "home")
    assert source.rows == 6
    assert source.quarantined == {"its line has more than max_bytes=16777216 bytes": 1}
    (row,) = quarantine(source).to_pylist()
    assert (row["origin"], len(row["row"])) == ("a.jsonl:4", 2_000)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_texts_above_the_limit_are_quarantined(tmp_path, name):
    rows = [*pairs(3), {"query": "q", "positive": "é" * 30}]
    path = tmp_path / name
    path.write_bytes(json_lines(rows)) if name == "a.jsonl" else pq.write_table(pa.Table.from_pylist(rows), path)
    assert opened(path, tmp_path / "home", max_bytes=300).quarantined == {}
    what = "line has" if name == "a.jsonl" else "texts have"
    assert opened(path, tmp_path / "home", max_bytes=60).quarantined == {f"its {what} more than max_bytes=60 bytes": 1}


def test_a_field_of_the_wrong_type_in_the_middle_costs_that_row_alone(tmp_path):
    rows = pairs(5_000)
    rows[2_500]["positive"] = 3
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    source = opened(tmp_path / "a.jsonl", tmp_path / "home")
    assert (source.rows, source.quarantined) == (4_999, {"field 'positive' is a number, not text": 1})
    assert quarantine(source)["origin"].to_pylist() == ["a.jsonl:2501"]


WRONG_CSV = b'query,positive\r\nq,p\r\n"q",p,x\r\nq\r\n"q"x,p\r\n\xff,p\r\n,p\r\n"q\n2",p\r\n"q,p\r\n'


def test_lines_that_are_no_csv_are_quarantined_by_line(tmp_path):
    (tmp_path / "a.csv").write_bytes(WRONG_CSV)
    source = opened(tmp_path / "a.csv", tmp_path / "home")
    assert source.table()[Column.QUERY].to_pylist() == ["q", "q\n2"]
    assert [(row["origin"], row["reason"]) for row in quarantine(source).to_pylist()] == [
        ("a.csv:3", "not 2 cells, as the header has"),
        ("a.csv:4", "not 2 cells, as the header has"),
        ("a.csv:5", "not CSV: ',' expected after '\"'"),
        ("a.csv:6", "not UTF-8"),
        ("a.csv:7", "field 'query' is empty"),
        ("a.csv:10", "not CSV: unexpected end of data"),
    ]


def whole_parquet():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(pairs(2_000)), sink)
    return sink.getvalue().to_pybytes()


def damaged_parquet():
    data = bytearray(whole_parquet())
    data[100:400] = os.urandom(300)
    return bytes(data)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "source a has no usable row: it is empty"),
        ("a.jsonl", b"\n \n", "source a has no usable row: it is empty"),
        ("a.csv", b"", "source a has no usable row: it is empty"),
        ("a.csv", b"query,positive\n", "source a has no usable row: it is empty"),
        ("a.csv", b'"query\n', "a.csv has no header that can be read: not CSV: unexpected end"),
        ("a.parquet", b"", "source a has no usable row: it is empty"),
        ("a.parquet", whole_parquet()[:-9], "a.parquet is not a whole Parquet file: Parquet magic bytes not found"),
        ("a.parquet", damaged_parquet(), "a.parquet is not a whole Parquet file"),
        ("a.arrow", b"ARROW1\0\0xx", "a.arrow is not a whole Arrow file"),
        ("a.jsonl.gz", gzip.compress(GOOD)[:-9], "a.jsonl.gz is not a whole gzip file: Truncated"),
        ("a.jsonl.zst", pa.compress(GOOD * 99, "zstd", asbytes=True)[:-5], "a.jsonl.zst is not a whole zstd file"),
        ("a.tar", b"x" * 2000, "a.tar is not a whole tar file"),
        ("a.json", b'[{"query": "q"}]', r"a.json is one JSON array: write one object a line"),
    ],
)
def test_a_file_that_is_empty_cut_or_damaged_is_one_sentence(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / name, tmp_path / "home", id=None)
    assert not list(tmp_path.glob("home/data/*"))


def test_a_path_that_leaves_its_archive_is_refused(tmp_path):
    import io
    import tarfile

    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../../evil.txt"), io.BytesIO())
    with pytest.raises(UsageError, match=r"a.tar has a member outside of it, '../../evil.txt': don't trust it"):
        opened(tmp_path / "a.tar", tmp_path / "home", query="txt", positive="txt")


def test_a_source_of_one_row_is_a_source(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(json_lines(pairs(1)))
    assert opened(tmp_path / "a.jsonl", tmp_path / "home").row_groups == (1,)


def test_a_source_that_is_gone_is_told(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(GOOD)
    opened(path, tmp_path / "home")
    listed = find(str(path)).files[0]
    path.unlink()
    with pytest.raises(UsageError, match=r"a\.jsonl does not exist"):
        opened(path, tmp_path / "home")
    with pytest.raises(UsageError, match=r"a\.jsonl was there and is gone: bring it back"):
        list(lines.blocks(listed, WANT))


def test_more_malformed_rows_than_the_recipe_allows_stop_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD + b"{\n")
    home = tmp_path / "home"
    assert opened(tmp_path / "a.jsonl", home, quarantine_share=0.25).rows == 3
    message = r"source a: 1 of 4 rows are malformed, more than quarantine_share=0.2 allows; 1 × not JSON; see .*parquet"
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "a.jsonl", home, quarantine_share=0.2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_is_told_and_finished_parts_are_kept(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(2):
        (data / f"{i}.jsonl").write_bytes(json_lines(pairs(50)))
    monkeypatch.setattr(formats, "PART_BYTES", 3_000)
    write = pq.ParquetWriter

    def full_at_the_second(where, schema):
        unfinished = len(list(tmp_path.glob("home/data/*/.unfinished/part-*")))
        return write("/dev/full" if unfinished else where, schema)

    monkeypatch.setattr(pq, "ParquetWriter", full_at_the_second)
    with pytest.raises(RunError, match=r"no space left on the disk of .* source data-train: make room and start again"):
        opened(data, tmp_path / "home")
    assert len(list(tmp_path.glob("home/data/*/.unfinished/part-*"))) == 1
    assert not list(tmp_path.glob("home/data/*/.unfinished/.*"))
