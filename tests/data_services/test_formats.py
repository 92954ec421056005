"""Every format and layout gives the records it describes."""

import csv
import gzip
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from data_services.readers import joined
from data_services.schema import Column, RunError, UsageError, text_id
from data_services.sources import SourceConfig, open_source

ROWS = [{"query": f"q{i}", "positive": f"p{i}", "more": i} for i in range(10)]
TEXTS = [(f"q{i}", [f"p{i}"], []) for i in range(10)]


def opened(path, home, **keys):
    return open_source(SourceConfig(path=path if isinstance(path, list) else str(path), **keys), home)


def texts(source):
    table = source.table()
    return list(
        zip(*(table[name].to_pylist() for name in (Column.QUERY, Column.POSITIVES, Column.NEGATIVES)), strict=True)
    )


def json_lines(rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows).encode()


def delimited(rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def arrow_stream(rows):
    sink = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue()


def feather(rows):
    sink = io.BytesIO()
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def parquet(rows):
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=3)
    return sink.getvalue()


def tar(members):
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()


def zst(data):
    return pa.compress(data, "zstd", asbytes=True)


FILES = {
    "a.jsonl": json_lines(ROWS),
    "crlf.jsonl": json_lines(ROWS, "\r\n"),
    "no_end.jsonl": json_lines(ROWS)[:-1],
    "mark.jsonl": b"\xef\xbb\xbf" + json_lines(ROWS),
    "blank.jsonl": json_lines(ROWS, "\n\n \n"),
    "a.jsonl.gz": gzip.compress(json_lines(ROWS)),
    "two.jsonl.gz": gzip.compress(json_lines(ROWS[:4])) + gzip.compress(json_lines(ROWS[4:])),
    "a.jsonl.zst": zst(json_lines(ROWS)),
    "a.json": json_lines(ROWS),
    "a.ndjson": json_lines(ROWS),
    "a.csv": delimited(ROWS, ","),
    "mark.csv": b"\xef\xbb\xbf" + delimited(ROWS, ","),
    "a.tsv": delimited(ROWS, "\t"),
    "a.csv.gz": gzip.compress(delimited(ROWS, ",")),
    "a.parquet": parquet(ROWS),
    "stream.arrow": arrow_stream(ROWS),
    "file.arrow": feather(ROWS),
    "a.feather": feather(ROWS),
    "a.tar": tar([(f"s/{i}.json", json.dumps(row).encode()) for i, row in enumerate(ROWS)]),
    "a.tar.gz": gzip.compress(tar([(f"{i}.json", json.dumps(row).encode()) for i, row in enumerate(ROWS)])),
}


def test_every_format_gives_the_same_records_ids_and_fingerprint(tmp_path):
    fingerprints = set()
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
        source = opened(tmp_path / name, tmp_path / "home")
        assert texts(source) == TEXTS, name
        assert source.layout == "pairs"
        fingerprints.add(source.fingerprint)
    assert len(fingerprints) == 1


def test_cells_of_csv_may_hold_line_ends_quotes_and_nothing(tmp_path):
    rows = [
        {"query": 'a "word"', "positive": "one\ntwo,\r\nthree", "negative": "", "score": "0.5", "kind": "3"},
        {"query": "b", "positive": "x", "negative": "y", "score": "-1", "kind": "c"},
    ]
    (tmp_path / "a.csv").write_bytes(delimited(rows, ","))
    source = opened(tmp_path / "a.csv", tmp_path / "home", positive_scores="score", label="kind")
    assert texts(source) == [('a "word"', ["one\ntwo,\r\nthree"], []), ("b", ["x"], ["y"])]
    assert source.table()[Column.POSITIVE_SCORES].to_pylist() == [[0.5], [-1]]
    assert source.table()[Column.LABEL].to_pylist() == [3, text_id("c")]


TRIPLETS = [
    {"anchor": "a", "positive": "p", "negative_2": "n2", "negative_10": "n10", "negative_1": "n1"},
    {"anchor": "b", "positive": "q", "negative_2": "m2", "negative_10": None, "negative_1": "m1"},
]
TEVATRON = [
    {
        "query_id": 7,
        "query": "a",
        "positive_passages": [{"docid": "1", "title": "T", "text": "p"}, {"docid": "2", "title": "", "text": "q"}],
        "negative_passages": [{"docid": "3", "title": None, "text": "n"}],
    },
    {"query_id": 8, "query": "b", "positive_passages": [{"docid": "1", "text": "p"}], "negative_passages": []},
]
FLAG = [
    {"query": "a", "pos": ["p", "q"], "neg": ["n"], "pos_scores": [1, 0.5], "neg_scores": [0], "prompt": "find: "},
    {"query": "b", "pos": ["p"], "neg": [], "pos_scores": [0.25], "neg_scores": [], "prompt": ""},
]
LAYOUTS = [
    ("triplets", TRIPLETS, [("a", ["p"], ["n1", "n2", "n10"]), ("b", ["q"], ["m1", "m2"])]),
    ("triplets", [{"query": "a", "positive": "p", "negative": "n"}], [("a", ["p"], ["n"])]),
    ("triplets", [{"anchor": "a", "positive": "p"}], [("a", ["p"], [])]),
    ("pairs", [{"query": "a", "positive": "p", "negatives": ["n", "m"]}], [("a", ["p"], ["n", "m"])]),
    ("tevatron", TEVATRON, [("a", ["T p", "q"], ["n"]), ("b", ["p"], [])]),
    ("flagembedding", FLAG, [("find: a", ["p", "q"], ["n"]), ("b", ["p"], [])]),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("layout", "rows", "wanted"), LAYOUTS)
def test_the_layouts_of_other_tools_are_recognised(tmp_path, layout, rows, wanted, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(json_lines(rows) if suffix == ".jsonl" else parquet(rows))
    source = opened(path, tmp_path / "home")
    assert source.layout == layout
    assert texts(source) == wanted
    assert texts(opened(path, tmp_path / "home", format=layout)) == wanted


def test_scores_and_ids_of_other_tools_are_kept(tmp_path):
    (tmp_path / "flag.jsonl").write_bytes(json_lines(FLAG))
    flag = opened(tmp_path / "flag.jsonl", tmp_path / "home")
    assert flag.columns == {Column.POSITIVE_SCORES, Column.NEGATIVE_SCORES}
    assert flag.table()[Column.POSITIVE_SCORES].to_pylist() == [[1, 0.5], [0.25]]
    assert flag.table()[Column.NEGATIVE_SCORES].to_pylist() == [[0], []]
    (tmp_path / "tevatron.jsonl").write_bytes(json_lines(TEVATRON))
    assert opened(tmp_path / "tevatron.jsonl", tmp_path / "home").table()[Column.ID].to_pylist() == ["7", "8"]


NEW_TEVATRON = [
    {"query_id": "1", "query_text": "a", "positive_document_ids": ["d1", "d2"], "negative_document_ids": ["d3"]},
    {"query_id": "2", "query_text": "b", "positive_document_ids": ["d3"], "negative_document_ids": []},
    {"query_id": "3", "query_text": "c", "positive_document_ids": ["d9"], "negative_document_ids": []},
]
CORPUS = [
    {"docid": "d1", "title": "T", "text": "one"},
    {"docid": "d2", "text": "two"},
    {"docid": "d3", "title": "", "text": "three"},
    {"docid": "d4", "text": "four"},
]


def test_documents_that_rows_name_by_id_come_from_the_corpus(tmp_path):
    (tmp_path / "train.jsonl").write_bytes(json_lines(NEW_TEVATRON))
    for name, data in (("corpus.jsonl", json_lines(CORPUS)), ("corpus.parquet", parquet(CORPUS))):
        (tmp_path / name).write_bytes(data)
        keys = {"corpus": str(tmp_path / name), "quarantine_share": 0.5}
        source = opened(tmp_path / "train.jsonl", tmp_path / "home", **keys)
        assert texts(source) == [("a", ["T one", "two"], ["three"]), ("b", ["three"], [])]
        assert source.quarantined == {f"a document of it isn't in {name}": 1}
    with pytest.raises(UsageError, match=r"names its documents by id .* set `corpus`"):
        opened(tmp_path / "train.jsonl", tmp_path / "home")


@pytest.fixture
def beir(tmp_path):
    folder = tmp_path / "beir"
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": "T" if i == 1 else "", "text": f"text {i}", "metadata": {}} for i in range(5)]
    (folder / "corpus.jsonl.gz").write_bytes(gzip.compress(json_lines(corpus)))
    (folder / "queries.jsonl").write_bytes(json_lines([{"_id": f"q{i}", "text": f"query {i}"} for i in range(5)]))
    judged = ["query-id\tcorpus-id\tscore", "q1\td1\t2", "q2\td0\t1", "q1\td3\t1", "q1\td4\t0"]
    (folder / "qrels" / "train.tsv").write_text("\n".join(judged) + "\n")
    wrong = ["query-id\tcorpus-id\tscore", "q1\td1\t1", "q9\td1\t1", "q2\td9\t1", "q3\td1\t0", "q4\td1", "q4\td1\tx"]
    (folder / "qrels" / "test.tsv").write_text("\n".join(wrong) + "\n")
    return folder


def test_a_beir_folder_gives_queries_with_graded_positives(beir, tmp_path):
    source = opened(beir, tmp_path / "home")
    assert source.layout == "beir"
    assert texts(source) == [("query 1", ["T text 1", "text 3"], ["text 4"]), ("query 2", ["text 0"], [])]
    table = source.table()
    assert table[Column.ID].to_pylist() == ["q1", "q2"]
    assert table[Column.POSITIVE_SCORES].to_pylist() == [[2, 1], [1]]
    assert table[Column.NEGATIVE_SCORES].to_pylist() == [[0], []]
    assert SourceConfig(path="x", format="beir").possible_columns == {Column.POSITIVE_SCORES, Column.NEGATIVE_SCORES}


def test_judgements_of_a_beir_folder_that_cannot_be_used_are_quarantined(beir, tmp_path):
    source = opened(beir, tmp_path / "home", split="test", quarantine_share=1)
    assert texts(source) == [("query 1", ["T text 1"], [])]
    assert source.quarantined == {
        "not query-id, corpus-id and score between tabs": 2,
        "its query isn't in queries.jsonl": 1,
        "a document of it isn't in corpus.jsonl.gz": 1,
        "field 'positive' is an empty list": 1,
    }
    with pytest.raises(UsageError, match=r"has no split 'dev'; it has test, train"):
        opened(beir, tmp_path / "home", split="dev")


def many_judgements(folder, rows=300):
    """A folder like `beir` of many queries, a few judgements wrong; what becomes of it, as `texts` gives it."""
    (folder / "qrels").mkdir(parents=True)
    corpus = [{"_id": f"d{i}", "title": f"T{i}" if i % 3 else "", "text": f"text {i}"} for i in range(rows)]
    (folder / "corpus.jsonl").write_bytes(json_lines(corpus))
    (folder / "queries.jsonl").write_bytes(json_lines([{"_id": f"q{i}", "text": f"query {i}"} for i in range(rows)]))
    judged = [f"q{i}\td{i}\t1" for i in range(rows)] + [f"q{i}\td{(i + 1) % rows}\t0" for i in range(rows)]
    (folder / "qrels" / "train.tsv").write_text("\n".join([*judged, "q7\tno such document\t1", "nonsense"]) + "\n")
    shown = [f"T{i} text {i}" if i % 3 else f"text {i}" for i in range(rows)]
    return [(f"query {i}", [shown[i]], [shown[(i + 1) % rows]]) for i in range(rows) if i != 7]


def test_a_beir_folder_is_the_same_in_any_number_of_parts(tmp_path, monkeypatch):
    expected = many_judgements(tmp_path / "beir")
    whole = opened(tmp_path / "beir", tmp_path / "one")
    monkeypatch.setattr(joined, "QRELS_BYTES", 2000)
    parts = opened(tmp_path / "beir", tmp_path / "many")
    assert texts(whole) == texts(parts) == expected
    assert whole.fingerprint == parts.fingerprint
    assert whole.quarantined == parts.quarantined
    assert sum(parts.quarantined.values()) == 2


def test_text_members_of_a_webdataset_are_joined_by_key_and_others_passed_over(tmp_path):
    members = [
        ("a/1.json", b'{"positive": "p1"}'),
        ("a/1.txt", b"q1"),
        ("a/1.png", b"\x89PNG"),
        ("a/2.txt", b"q2"),
        ("a/2.json", b'{"positive": "p2"}'),
        ("a/3.json", b"{"),
        ("a/3.txt", b"q3"),
    ]
    (tmp_path / "a.tar").write_bytes(tar(members))
    keys = {"query": "txt", "positive": "positive", "id": "__key__", "quarantine_share": 0.5}
    source = opened(tmp_path / "a.tar", tmp_path / "home", **keys)
    assert texts(source) == [("q1", ["p1"], []), ("q2", ["p2"], [])]
    assert source.table()[Column.ID].to_pylist() == ["a/1", "a/2"]
    assert source.quarantined == {"its member .json is not JSON": 1}


def test_a_folder_that_datasets_saved_is_read_in_its_order(tmp_path):
    datasets = pytest.importorskip("datasets")
    train, test = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:2])
    train.save_to_disk(tmp_path / "one", num_shards=3)
    assert texts(opened(tmp_path / "one", tmp_path / "home")) == TEXTS
    datasets.DatasetDict(train=train.select([3, 1]), test=test).save_to_disk(tmp_path / "both")
    assert texts(opened(tmp_path / "both", tmp_path / "home")) == [TEXTS[3], TEXTS[1]]
    assert texts(opened(tmp_path / "both", tmp_path / "home", split="test")) == TEXTS[:2]
    with pytest.raises(UsageError, match="has no split 'dev'; it has train, test"):
        opened(tmp_path / "both", tmp_path / "home", split="dev")
    (tmp_path / "one" / "data-00001-of-00003.arrow").unlink()
    with pytest.raises(UsageError, match=r"lacks data-00001-of-00003\.arrow: save it again"):
        opened(tmp_path / "one", tmp_path / "home")


def test_a_data_set_of_the_hub_comes_through_datasets(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "owner" / "name"  # `datasets` takes a folder of that name before it asks the hub
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_bytes(json_lines(ROWS))
    source = opened("hf:owner/name", tmp_path / "home")
    assert source.name == "owner-name-train"
    assert texts(source) == TEXTS
    assert opened("hf:owner/name", tmp_path / "home") == source
    with pytest.raises(UsageError, match=r"source hf:owner/name: .*dev"):
        opened("hf:owner/name", tmp_path / "home", split="dev")
    with pytest.raises((UsageError, RunError), match="source hf:owner/another"):
        opened("hf:owner/another", tmp_path / "home")


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([{"text": "x", "label": 1}], {}, "has fields label, text, which is no known format: name those of the texts"),
        ([{"query": "a", "pos": ["p"], "positive": "p"}], {}, "fits several formats: set `format` to pairs or flag"),
        ([{"query": "a", "positive": "p"}], {"format": "tevatron"}, "isn't of format tevatron, which has query and"),
        ([{"query": "a", "positive": "p"}], {"format": "beir"}, "isn't of format beir, which has a folder"),
    ],
)
def test_a_layout_that_does_not_fit_is_told(tmp_path, rows, keys, message):
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / "a.jsonl", tmp_path / "home", **keys)


def test_files_globs_and_lists_of_them_are_one_source(tmp_path):
    data = tmp_path / "data"
    for part, name in enumerate(["x/b.jsonl", "x/a.jsonl.gz", "y/c.parquet"]):
        path = data / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ROWS[part * 3 : part * 3 + 3]
        lines = json_lines(rows)
        path.write_bytes(gzip.compress(lines) if name.endswith("gz") else parquet(rows) if "parquet" in name else lines)

    def queries(path):
        return [query for query, _, _ in texts(opened(path, tmp_path / "home"))]

    assert queries(data / "x" / "*.jsonl*") == ["q3", "q4", "q5", "q0", "q1", "q2"]
    assert queries(data / "**" / "*.parquet") == ["q6", "q7", "q8"]
    assert queries(data / "[x-y]" / "?.jsonl") == ["q0", "q1", "q2"]
    assert queries([str(data / "y" / "c.parquet"), str(data / "x" / "*.jsonl")]) == [
        *("q6", "q7", "q8"),
        *("q0", "q1", "q2"),
    ]
    with pytest.raises(UsageError, match=r"\*.csv matches no file"):
        queries(data / "x" / "*.csv")
    with pytest.raises(UsageError, match="x is a folder in a list of files"):
        queries([str(data / "x"), str(data / "y" / "c.parquet")])


def test_a_row_keeps_its_id_when_its_file_is_moved_cut_or_mined_anew(tmp_path):
    (tmp_path / "all.jsonl").write_bytes(json_lines(ROWS))
    (tmp_path / "cut").mkdir()
    for i, row in enumerate(ROWS):
        (tmp_path / "cut" / f"{i}.jsonl").write_bytes(json_lines([{**row, "negative": f"n{i}"}]))
    whole, cut = (opened(tmp_path / name, tmp_path / "home").table()[Column.ID] for name in ("all.jsonl", "cut"))
    assert whole.to_pylist() == cut.to_pylist()
    assert len(set(whole.to_pylist())) == len(ROWS)


def test_the_id_may_be_a_field_and_relations_sort_the_documents(tmp_path):
    rows = [
        {"n": 1, "query": "a", "positive": ["x", "y", "z"], "r": [1, -1, 0]},
        {"n": 2, "query": "b", "positive": "x", "r": 1},
        {"n": None, "query": "b", "positive": "x", "r": 1},
        {"n": "4", "query": "b", "positive": ["x"], "r": [2]},
        {"n": "5", "query": "b", "positive": ["x"], "r": [-1]},
    ]
    (tmp_path / "a.jsonl").write_bytes(json_lines(rows))
    source = opened(tmp_path / "a.jsonl", tmp_path / "home", id="n", relations="r", quarantine_share=1)
    assert texts(source) == [("a", ["x"], ["y"]), ("b", ["x"], [])]
    assert source.table()[Column.ID].to_pylist() == ["1", "2"]
    assert source.quarantined == {
        "field 'n' is null, not text": 1,
        "field 'r' has another number than 1, -1 and 0": 1,
        "field 'positive' is an empty list": 1,
    }
