"""Images and sounds from every kind of file: the same records, and what can't be used in the quarantine."""

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_services.inspection import inspect_source, validate
from data_services.items import TEXT, Kinds, Media, item_id, text_id
from data_services.schema import Column, UsageError
from data_services.sources import SourceConfig, open_source, retrieval_pool
from tests.data_services.media.pictures import claims, encoded, scene, sounding, tone

PICTURES = [encoded(scene(20 + i, 30), kind) for i, kind in enumerate(["PNG", "JPEG", "WEBP", "GIF", "PNG"])]
NAMES = ["a.png", "b.jpg", "c.webp", "deep/d.gif", "e.png"]
CAPTIONS = [f"caption {i}" for i in range(5)]


def opened(path, home, **keys):
    return open_source(SourceConfig(path=str(path), **{"quarantine_share": 1, **keys}), home)


def write_lines(folder, rows, name="pairs.jsonl"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / name


def write_beside(folder):
    for name, data in zip(NAMES, PICTURES, strict=True):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def jsonl(folder):
    write_beside(folder)
    rows = [{"query": text, "positive": name} for text, name in zip(CAPTIONS, NAMES, strict=True)]
    return write_lines(folder, rows), {"kinds": {"positive": "image"}}


def csv(folder):
    folder.mkdir()
    write_beside(folder)
    lines = [f"{text},{name}" for text, name in zip(CAPTIONS, NAMES, strict=True)]
    (folder / "pairs.csv").write_text("\n".join(["query,positive", *lines]) + "\n")
    return folder / "pairs.csv", {"kinds": {"positive": "image"}}


def parquet(folder):
    folder.mkdir()
    pq.write_table(pa.table({"query": CAPTIONS, "positive": PICTURES}), folder / "pairs.parquet")
    return folder / "pairs.parquet", {}


def hugging_face(folder):
    folder.mkdir()
    write_beside(folder)
    # As `datasets` stores images: with bytes, or, not embedded, with a path.
    files = [{"bytes": data if i % 2 else None, "path": NAMES[i]} for i, data in enumerate(PICTURES)]
    pq.write_table(pa.table({"query": CAPTIONS, "positive": files}), folder / "pairs.parquet", row_group_size=2)
    return folder / "pairs.parquet", {"kinds": {"positive": "image"}}


def tar(folder):
    folder.mkdir()
    with tarfile.open(folder / "pairs.tar", "w") as archive:
        for i, (text, name, data) in enumerate(zip(CAPTIONS, NAMES, PICTURES, strict=True)):
            for extension, content in (("txt", text.encode()), (name.rpartition(".")[2], data), ("xyz", b"?")):
                member = tarfile.TarInfo(f"{i:03}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return folder / "pairs.tar", {"query": "txt", "positive": "image"}


@pytest.mark.parametrize("write", [jsonl, csv, parquet, hugging_face, tar])
def test_every_format_gives_the_same_records(tmp_path, write):
    path, keys = write(tmp_path / "source")
    source = opened(path, tmp_path / "home", **keys)
    assert source.kinds == Kinds("text", "image")
    table = source.table()
    assert table[Column.QUERY].to_pylist() == CAPTIONS
    assert table[Column.POSITIVES].to_pylist() == [[data] for data in PICTURES]
    assert table[Column.POSITIVE_IDS].to_pylist() == [[item_id(Media("image", data))] for data in PICTURES]
    assert source.read(np.array([3, 3, 0]))[Column.POSITIVES].to_pylist() == [[PICTURES[i]] for i in (3, 3, 0)]
    assert source.read(np.array([], int)).schema == table.schema
    pool = retrieval_pool(source)
    assert pool.documents == [Media("image", data) for data in PICTURES]
    # What comes from elsewhere has the same fingerprint.
    other = opened(jsonl(tmp_path / "other")[0], tmp_path / "home", kinds={"positive": "image"})
    assert source.fingerprint == other.fingerprint


@pytest.mark.parametrize("extension", ["png", "image"])
def test_an_archive_names_its_images_by_extension_or_by_kind(tmp_path, extension):
    path, _ = tar(tmp_path / "source")
    source = opened(path, tmp_path, query="txt", positive=extension)
    assert source.rows == (2 if extension == "png" else 5)
    assert sum(source.quarantined.values()) == 5 - source.rows
    assert opened(path, tmp_path, query="txt", positive="txt").kinds == TEXT


def test_members_of_a_kind_of_ones_own_are_kept_as_they_are(tmp_path):
    path, _ = tar(tmp_path / "source")
    source = opened(path, tmp_path, query="txt", positive="xyz", kinds={"xyz": "points"})
    assert source.kinds == Kinds("text", "points")
    assert source.table()[Column.POSITIVES].to_pylist() == [[b"?"]] * 5


def test_a_kind_of_ones_own_is_kept_as_text_or_json_and_names_no_file(tmp_path):
    write_beside(tmp_path)
    rows = [{"query": "q", "positive": value} for value in ([[0, 1], [2.5, 7]], "a.png", {"a": None}, None)]
    source = opened(write_lines(tmp_path, rows), tmp_path, kinds={"positive": "events"})
    assert source.table()[Column.POSITIVES].to_pylist() == [[b"[[0,1],[2.5,7]]"], [b"a.png"], [b'{"a":null}']]
    assert source.quarantined == {"field 'positive' is null, not the bytes of a file": 1}


def test_several_captions_of_an_image_and_several_images_of_a_caption(tmp_path):
    write_beside(tmp_path)
    path = write_lines(tmp_path, [{"query": "a.png", "positive": ["one", "two"]}])
    source = opened(path, tmp_path, kinds={"query": "image"})
    assert source.kinds == Kinds("image", "text")
    assert source.table()[Column.POSITIVES].to_pylist() == [["one", "two"]]
    path = write_lines(tmp_path, [{"query": "one", "positive": ["a.png", "b.jpg"], "hard": ["c.webp"]}], "other.jsonl")
    source = opened(path, tmp_path, kinds={"positive": "image", "hard": "image"}, negatives="hard")
    assert source.table()[Column.POSITIVES].to_pylist() == [PICTURES[:2]]
    assert source.table()[Column.NEGATIVES].to_pylist() == [PICTURES[2:3]]


def test_items_of_parts_lack_what_their_row_lacks(tmp_path):
    write_beside(tmp_path)
    rows = [
        {"query": "q", "title": "t", "photo": "a.png"},
        {"query": "q", "title": None, "photo": "b.jpg"},
        {"query": "q", "title": "t"},
        {"query": "q", "title": "", "photo": None},
        {"query": "q", "title": "t", "photo": 7},
    ]
    keys = {"query": "query", "positive_parts": ["title", "photo"], "kinds": {"photo": "image"}}
    source = opened(write_lines(tmp_path, rows), tmp_path, **keys)
    assert source.kinds == Kinds("text", {"title": "text", "photo": "image"})
    assert retrieval_pool(source).documents == [
        {"title": "t", "photo": Media("image", PICTURES[0])},
        {"photo": Media("image", PICTURES[1])},
        {"title": "t"},
    ]
    ids = [ids for (ids,) in source.table()[Column.POSITIVE_IDS].to_pylist()]
    assert ids == [item_id(item) for item in retrieval_pool(source).documents]
    assert source.quarantined == {
        "it has none of the fields title, photo": 1,
        "field 'photo' is a number, not the bytes of a file": 1,
    }


WRONG = {
    "empty.png": (b"", "an image is declared and the bytes are none at all"),
    "text.png": (b"a cat", "an image is declared and the bytes are text"),
    "cut.png": (PICTURES[0][:-40], "the image is truncated or damaged"),
    "cut.jpg": (PICTURES[1][:-40], "the image is truncated or damaged"),
    "one.png": (encoded(scene(1, 1)), "the image has a side of fewer than 2 pixels"),
    "huge.png": (claims(20_000, 20_000), "the image has more than 67,108,864 pixels"),
    "sound.png": (sounding(tone()), "an image is declared and the bytes are a sound"),
}


def test_what_cannot_be_used_is_quarantined_with_its_place_and_reason(tmp_path):
    write_beside(tmp_path)
    (tmp_path / "large.png").write_bytes(PICTURES[0] + bytes(10_000))
    (tmp_path / "lying.jpg").write_bytes(PICTURES[0])  # a wrong extension is no fault
    for name, (data, _) in WRONG.items():
        (tmp_path / name).write_bytes(data)
    outside = "field 'positive' names a file outside of the folder that its paths are relative to"
    missing = "field 'positive' names a file that isn't there"
    expected = {name: reason for name, (_, reason) in WRONG.items()} | {
        "nowhere.png": missing,
        "deep": missing,
        "a caption " * 50: missing,
        "a\0b.png": missing,
        "../secret.png": outside,
        "deep/../../secret.png": outside,
        str(tmp_path / "a.png"): outside,
        "large.png": "field 'positive' names a file of more than max_bytes=9000 bytes",
    }
    rows = [{"query": "q", "positive": name} for name in ["a.png", *expected, "lying.jpg"]]
    config = SourceConfig(
        path=str(write_lines(tmp_path, rows)), kinds={"positive": "image"}, max_bytes=9_000, quarantine_share=1
    )
    source = open_source(config, tmp_path / "home")
    quarantine = pq.read_table(source.folder / "quarantine.parquet").to_pylist()
    assert [row["reason"] for row in quarantine] == list(expected.values())
    assert [row["origin"] for row in quarantine] == [f"pairs.jsonl:{i + 2}" for i in range(len(expected))]
    assert source.rows == 2
    found = validate(config, tmp_path / "home")
    assert found.rows_in == found.rows_out + sum(count for count, _ in found.reasons.values()) == len(rows)


def test_a_link_out_of_the_folder_is_no_way_out(tmp_path):
    (tmp_path / "secret.png").write_bytes(PICTURES[0])
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "b.png").write_bytes(PICTURES[4])
    path = write_lines(folder, [{"query": "q", "positive": name} for name in ("link.png", "b.png")])
    source = opened(path, tmp_path, kinds={"positive": "image"})
    assert source.table()[Column.POSITIVES].to_pylist() == [[PICTURES[4]]]
    assert source.quarantined == {
        "field 'positive' names a file outside of the folder that its paths are relative to": 1
    }


def test_root_is_what_paths_are_relative_to(tmp_path):
    write_beside(tmp_path / "pictures")
    path = write_lines(tmp_path / "lists", [{"query": "q", "positive": "deep/d.gif"}])
    source = opened(path, tmp_path, kinds={"positive": "image"}, root=str(tmp_path / "pictures"))
    assert source.table()[Column.POSITIVES].to_pylist() == [[PICTURES[3]]]


def test_bytes_are_counted_in_the_quarantine_not_copied(tmp_path):
    table = pa.table({"query": ["q", "q"], "positive": [PICTURES[0], b"\x00" * 5_000]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = opened(tmp_path / "a.parquet", tmp_path)
    (row,) = pq.read_table(source.folder / "quarantine.parquet")["row"].to_pylist()
    assert row == "{'query': 'q', 'positive': '(5,000 bytes)'}"


def test_row_groups_of_images_are_small_and_parts_change_nothing(tmp_path, monkeypatch):
    from data_services import convert

    rng = np.random.default_rng(0)
    noise = [encoded(rng.integers(0, 255, (40, 40, 3)).astype(np.uint8)) for _ in range(150)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": [f"q{i}" for i in range(150)], "positive": noise}), path)
    whole = opened(path, tmp_path / "home")
    assert set(whole.row_groups[:-1]) == {64}
    monkeypatch.setattr(convert, "_MEDIA_GROUP_BYTES", 100_000)
    small = opened(path, tmp_path / "small")
    assert small.fingerprint == whole.fingerprint
    assert max(small.row_groups) * len(noise[0]) < 120_000
    assert small.table().equals(whole.table())
    monkeypatch.setattr(convert, "_REGROUPED_MEDIA_BYTES", 0)
    assert opened(path, tmp_path / "as-they-are").table().equals(whole.table())


def test_a_source_of_texts_is_stored_as_ever(tmp_path):
    source = opened(write_lines(tmp_path, [{"query": "q", "positive": "p"}]), tmp_path)
    manifest = json.loads((source.folder / "manifest.json").read_text())
    assert "kinds" not in manifest
    assert source.kinds == TEXT
    assert source.table()[Column.POSITIVE_IDS].to_pylist() == [[text_id("p")]]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kinds": {"photo": "image"}}, r"kinds has 'photo', but the sides are positive, query"),
        ({"kinds": {"query": "image"}, "prompt": "p"}, r"prompt 'p' goes before a text, and there is none"),
        ({"kinds": {"positive": "image"}, "title": "t"}, r"title 't' goes before a text, and there is none"),
        (
            {"kinds": {"positive": "image"}, "negatives": "n"},
            r"its positives are of kind image, but negatives 'n' of kind text",
        ),
    ],
)
def test_fields_that_cannot_be_media_are_one_sentence(tmp_path, keys, message):
    row = {"query": "q", "positive": "p", "p": "x", "t": "x", "n": "x"}
    with pytest.raises(UsageError, match=message):
        opened(write_lines(tmp_path, [row]), tmp_path, **keys)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kinds": {"a": "imgae"}}, "'a' is of kind imgae; did you mean image"),
        ({"kinds": {"a": "text"}}, "'a' is of kind text: name the fields that are no texts"),
        ({"query": "a", "query_parts": ["b"]}, "query and query_parts exclude each other"),
        ({"positive_parts": ["b"], "negatives": "n"}, "negatives and positive_parts exclude each other"),
    ],
)
def test_keys_that_contradict_each_other_are_refused(keys, message):
    with pytest.raises(ValidationError, match=message):
        SourceConfig(path="a", **keys)


def test_sounds_are_told_from_images_in_columns_of_bytes(tmp_path):
    table = pa.table({"query": [sounding(tone()), sounding(tone(500))], "positive": ["a", "b"]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert opened(tmp_path / "a.parquet", tmp_path).kinds == Kinds("audio", "text")


def test_a_data_set_that_was_saved_with_images_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"query": datasets.Value("string"), "positive": datasets.Image()})
    rows = {"query": CAPTIONS, "positive": [{"bytes": data, "path": None} for data in PICTURES]}
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved", tmp_path)
    assert source.kinds == Kinds("text", "image")
    assert source.table()[Column.POSITIVES].to_pylist() == [[data] for data in PICTURES]


def test_an_inspection_says_what_images_are(tmp_path):
    path, keys = jsonl(tmp_path / "source")
    found = inspect_source(SourceConfig(path=str(path), **keys), tmp_path, 1)
    assert found.examples[0]["positives"] == [f"image, 30 x 20, {len(PICTURES[0]):,} bytes"]
    assert json.dumps(found.as_dict())
