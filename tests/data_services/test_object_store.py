"""Sources in an object store, against a server that speaks S3."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from data_services.files import find
from data_services.readers import formats
from data_services.schema import Column, RunError, UsageError
from data_services.sources import SourceConfig, open_source

ROWS = [{"query": f"q{i}", "positive": f"p{i}"} for i in range(200)]


@pytest.fixture(scope="module")
def server():
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(server, monkeypatch):
    """A bucket with files, as the environment of a user names its server."""
    for name, value in {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "x",
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }.items():
        monkeypatch.setenv(name, value)
    store = fs.S3FileSystem(endpoint_override=server, region="us-east-1", allow_bucket_creation=True)
    store.create_dir("pairs/train")
    lines = [json.dumps(row) + "\n" for row in ROWS]
    for name, some in (("a", lines[:100]), ("b", lines[100:])):
        with store.open_output_stream(f"pairs/train/{name}.jsonl") as file:
            file.write("".join(some).encode())
    pq.write_table(pa.Table.from_pylist(ROWS), "pairs/test.parquet", filesystem=store, row_group_size=50)
    return store


def queries(path, home, **keys):
    return open_source(SourceConfig(path=path, **keys), home).table()[Column.QUERY].to_pylist()


def test_files_folders_globs_and_ranges_of_a_bucket_are_sources(bucket, tmp_path, monkeypatch):
    every = [row["query"] for row in ROWS]
    assert queries("s3://pairs/train/a.jsonl", tmp_path) == every[:100]
    assert queries("s3://pairs/train/*.jsonl", tmp_path) == every
    assert queries("s3://pairs", tmp_path, split="train") == every
    assert queries(["s3://pairs/train/b.jsonl", "s3://pairs/train/a.jsonl"], tmp_path) == every[100:] + every[:100]
    monkeypatch.setattr(formats, "PART_BYTES", 1_000)
    assert len(formats.parts_of(find("s3://pairs/train/").files)) > 2
    assert queries("s3://pairs", tmp_path / "parts", split="train") == every
    assert queries("s3://pairs/test.parquet", tmp_path / "parts") == every


def test_a_changed_object_is_noticed(bucket, tmp_path):
    assert len(queries("s3://pairs/train/a.jsonl", tmp_path)) == 100
    with bucket.open_output_stream("pairs/train/a.jsonl") as file:
        file.write(json.dumps(ROWS[0]).encode())
    assert queries("s3://pairs/train/a.jsonl", tmp_path) == ["q0"]


def test_what_is_not_there_and_a_store_that_does_not_answer_are_sentences(bucket, tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"source s3://pairs/train/c\.jsonl does not exist"):
        queries("s3://pairs/train/c.jsonl", tmp_path)
    with pytest.raises(UsageError, match=r"source s3://pairs/\*\.csv matches no file"):
        queries("s3://pairs/*.csv", tmp_path)
    with pytest.raises((UsageError, RunError), match=r"source s3://no-such-bucket/a\.jsonl"):
        queries("s3://no-such-bucket/a.jsonl", tmp_path)
