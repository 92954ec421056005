import gzip
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from data_services import builtin
from data_services.schema import UNKNOWN, Column, UsageError, text_id
from data_services.sources import (
    SourceConfig,
    builtin_corpus,
    columns_available,
    open_source,
    pool_classes,
    retrieval_pool,
)

# The id of the first of these rows when this was written: no release may change it.
FIRST_ID = "0db211d0252e771e0f850ca7566db32d"
ROWS = [{"query": f"q{i}", "positive": f"p{i}", "hard": [f"n{i}"] * (i % 3), "other": i} for i in range(10)]


def write_jsonl(path, rows=ROWS):
    opener = gzip.open if path.suffix == ".gz" else open
    path.parent.mkdir(parents=True, exist_ok=True)
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    return path


def write_parquet(path, rows=ROWS):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def opened(path, home, **fields):
    """However many of a few rows are malformed."""
    return open_source(SourceConfig(path=str(path), **{"quarantine_share": 1, **fields}), home)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_every_format_gives_the_same_records(tmp_path, name):
    write = write_parquet if name.endswith(".parquet") else write_jsonl
    source = opened(write(tmp_path / name), tmp_path / "home", negatives="hard")
    assert source.name == "a"
    table = source.table().to_pylist()
    assert [(row[Column.QUERY], row[Column.POSITIVES], row[Column.NEGATIVES]) for row in table] == [
        (row["query"], [row["positive"]], row["hard"]) for row in ROWS
    ]
    assert table[0][Column.ID] == FIRST_ID
    assert len({row[Column.ID] for row in table}) == 10


def test_a_list_of_positives_and_absent_negatives_are_fine(tmp_path):
    rows = [
        {"query": "a", "positive": ["x", "y"], "hard": "z"},
        {"query": "b", "positive": "x", "hard": None},
    ]
    table = opened(write_jsonl(tmp_path / "a.jsonl", rows), tmp_path, negatives="hard").table()
    assert table[Column.POSITIVES].to_pylist() == [["x", "y"], ["x"]]
    assert table[Column.NEGATIVES].to_pylist() == [["z"], []]


BAD_LINES = [
    ('{"query": 1', "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("[1]", "a list, not an object of fields"),
    ('{"query": "q"}', "no field 'positive'"),
    ('{"query": 3, "positive": "p"}', "field 'query' is a number, not text"),
    ('{"query": null, "positive": "p"}', "field 'query' is null, not text"),
    ('{"query": " ", "positive": "p"}', "field 'query' is empty"),
    ('{"query": ["a", "b"], "positive": "p"}', "field 'query' is a list, not one text"),
    ('{"query": "q", "positive": []}', "field 'positive' is an empty list"),
    ('{"query": "q", "positive": ["p", {}]}', "field 'positive' is an object, not text"),
    ('{"query": "\\ud800", "positive": "p"}', "field 'query' has half of a surrogate pair, which is no text"),
    ('{"query": "q", "positive": "p", "hard": [true]}', "field 'hard' is a boolean, not text"),
]


@pytest.mark.parametrize(("line", "reason"), BAD_LINES)
def test_a_malformed_row_is_quarantined_with_its_place_and_reason(tmp_path, line, reason):
    good = {"query": "q", "positive": "p", "hard": []}
    path = write_jsonl(tmp_path / "a.jsonl", [good, "", line, good])
    source = opened(path, tmp_path / "home", negatives="hard")
    quarantine = pq.read_table(source.folder / "quarantine.parquet").to_pylist()
    assert [(row["origin"], row["reason"]) for row in quarantine] == [("a.jsonl:3", reason)]
    assert source.quarantined == {reason: 1}
    assert source.table()[Column.QUERY].to_pylist() == ["q", "q"]


def test_bytes_that_are_no_text_are_quarantined_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"query": "q", "positive": "p"}\r\n{"query": "\xff", "positive": "p"}\n')
    source = opened(path, tmp_path / "home")
    assert (source.rows, source.quarantined) == (1, {"not UTF-8": 1})


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([], {}, "source a has no usable row: it is empty"),
        (["{", "["], {}, r"no usable row: 2 × not JSON \(first: a.jsonl:1\)"),
        (ROWS, {"query": "docstring"}, "no field 'docstring'; its fields are hard, other, positive, query"),
        (ROWS, {"negatives": "hrad"}, "no field 'hrad'; its fields are .*; did you mean hard?"),
        (ROWS, {"label": "class"}, "no field 'class'; its fields are hard, other, positive, query$"),
        (ROWS, {"positive_scores": "othr"}, "no field 'othr'; its fields are .*; did you mean other?"),
        (ROWS, {"query": "other"}, "10 × field 'other' is a number, not text"),
        (ROWS, {"split": "test"}, "is a single file and has no split 'test'; leave `split` out"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_sentence(tmp_path, rows, fields, message):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(UsageError, match=message):
        opened(path, tmp_path / "home", **fields)
    assert not list((tmp_path / "home").glob("data/*"))


def test_a_wrong_field_of_a_large_source_is_told_early(tmp_path, monkeypatch):
    (tmp_path / "early_source.py").write_text(
        "def rows():\n"
        "    yield from ({'text': 'q', 'positive': 'p'} for _ in range(5_000))\n"
        "    raise AssertionError('read on')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UsageError, match="no field 'query'; its fields are positive, text"):
        opened("early_source:rows", tmp_path / "home")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("pairs.jsnl", r"pairs.jsnl does not exist; beside it is pairs.jsonl"),
        ("nowhere/pairs.jsonl", "nowhere/pairs.jsonl does not exist"),
        ("notes.txt", r"is none of .parquet, .arrow, .*nor a folder of them"),
        ("nothing", "is a folder without .parquet, .arrow, .* files"),
        ("broken.parquet", "broken.parquet is not a whole Parquet file"),
        ("broken.jsonl.gz", "broken.jsonl.gz is not a whole gzip file"),
        ("cut.jsonl.gz", "cut.jsonl.gz is not a whole gzip file"),
    ],
)
def test_a_path_that_cannot_be_read_is_named(tmp_path, path, message):
    write_jsonl(tmp_path / "pairs.jsonl")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "broken.parquet").write_text("x")
    (tmp_path / "broken.jsonl.gz").write_text("x")
    (tmp_path / "cut.jsonl.gz").write_bytes(write_jsonl(tmp_path / "whole.jsonl.gz").read_bytes()[:40])
    with pytest.raises(UsageError, match=message):
        opened(tmp_path / path, tmp_path / "home")


def test_a_missing_column_of_a_parquet_file_is_named(tmp_path):
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match="no field 'anchor'; its fields are hard, other, positive, query"):
        opened(path, tmp_path / "home", query="anchor")


def test_a_folder_gives_its_files_in_order_and_a_split_is_the_files_named_so(tmp_path):
    plain, named = tmp_path / "plain", tmp_path / "named"
    for folder, names in ((plain, ["b", "a"]), (named, ["train-0", "train-1", "test", "sub/dev/x"])):
        for name in names:
            write_jsonl(folder / f"{name}.jsonl", [{"query": name, "positive": "p"}])
    (plain / ".hidden.jsonl").write_text("{")

    def queries(folder, split):
        return opened(folder, tmp_path / "home", split=split).table()[Column.QUERY].to_pylist()

    assert queries(plain, "train") == ["a", "b"]
    assert queries(named, "train") == ["train-0", "train-1"]
    assert queries(named, "test") == ["test"]
    assert queries(named, "dev") == ["sub/dev/x"]
    with pytest.raises(UsageError, match="has no split 'heldout'; it has train, dev, test"):
        queries(named, "heldout")
    with pytest.raises(UsageError, match="its files name no splits; leave `split` out"):
        queries(plain, "test")


def test_a_function_of_the_user_is_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_pairs.py").write_text(
        "number = 3\n"
        "def pairs(split):\n    return ({'query': f'{split} {i}', 'positive': 'p'} for i in range(number))\n"
        "def plain():\n    yield {'query': 'q', 'positive': 'p'}\n    yield 'no mapping'\n"
        "text = 'x'\n"
    )
    home = tmp_path / "home"
    source = opened("my_pairs:pairs", home, split="dev")
    assert source.table()[Column.QUERY].to_pylist() == ["dev 0", "dev 1", "dev 2"]
    assert opened("my_pairs:pairs", home, split="dev") == source
    import my_pairs

    my_pairs.number = 4
    assert opened("my_pairs:pairs", home, split="dev").rows == 4  # what it yields is what counts
    assert opened("my_pairs:plain", home).quarantined == {"a text, not an object of fields": 1}
    for path, split, message in [
        ("my_pairs:plain", "dev", "takes no argument `split`, but split is 'dev'"),
        ("my_pairs:pears", "train", "source my_pairs:pears: module 'my_pairs' has no 'pears'; did you mean pairs"),
        ("my_pairs:text", "train", "'my_pairs:text' is a str, not a function"),
        ("no_such_module:pairs", "train", "no module 'no_such_module'"),
    ]:
        with pytest.raises(UsageError, match=message):
            opened(path, home, split=split)


def test_a_changed_file_is_noticed_and_a_touched_one_keeps_its_fingerprint(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    first = opened(path, tmp_path / "home")
    os.utime(path, (1, 1))
    assert opened(path, tmp_path / "home") == first
    write_jsonl(path, ROWS[:-1])
    changed = opened(path, tmp_path / "home")
    assert changed.fingerprint != first.fingerprint
    assert (first.table().num_rows, changed.table().num_rows) == (10, 9)


def test_fields_and_splits_have_slots_of_their_own(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl")
    folders = {opened(path, tmp_path / "home", **fields).folder for fields in ({}, {"query": "positive"})}
    assert len(folders) == 2


@pytest.mark.parametrize("wrong", [{"weight": 0.0}, {"query": ""}, {"positives": "x"}, {"task": ""}, {"task": "="}])
def test_wrong_config_is_refused(wrong):
    with pytest.raises(ValidationError):
        SourceConfig(path="x", **wrong)


def test_scores_of_hard_negatives_need_the_field_of_the_negatives():
    with pytest.raises(ValidationError, match=r"negative_scores \(s\) needs `negatives`"):
        SourceConfig(path="x", negative_scores="s")


RICH = [
    {
        "query": "a",
        "positive": ["x", "y"],
        "hard": ["z"],
        "p": [1, 0.5],
        "n": [0.25],
        "w": 2,
        "f": 1,
        "class": 3,
        "lang": "en",
    },
    {"query": "b", "positive": "x", "hard": None, "p": 1.5, "n": None, "w": 0.5, "f": 9, "class": "c", "lang": "de"},
    {"query": "c", "positive": "x", "hard": "z", "p": [0], "n": -1, "w": 0, "f": 0.5, "class": None, "lang": None},
]
RICH_FIELDS = {
    "negatives": "hard",
    "positive_scores": "p",
    "negative_scores": "n",
    "pair_weight": "w",
    "frequency": "f",
    "label": "class",
    "task": "=nli",
    "language": "lang",
}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_scores_weights_and_classes_come_from_the_fields_that_the_recipe_names(tmp_path, name):
    rows = RICH
    if name.endswith("parquet"):  # a column has one type there
        rows = [{**row, **{k: listed(row[k]) for k in ("positive", "hard", "p", "n")}, "class": 3} for row in RICH]
    path = (write_parquet if name.endswith("parquet") else write_jsonl)(tmp_path / name, rows)
    source = opened(path, tmp_path / "home", **RICH_FIELDS)
    assert source.rows == 3
    assert source.columns == set(Column.OPTIONAL) - {Column.MODALITY, Column.CLUSTER}
    table = source.table()
    assert table[Column.POSITIVE_SCORES].to_pylist() == [[1, 0.5], [1.5], [0]]
    assert table[Column.NEGATIVE_SCORES].to_pylist() == [[0.25], [], [-1]]
    assert table[Column.WEIGHT].to_pylist() == [2, 0.5, 0]
    assert table[Column.FREQUENCY].to_pylist() == [1, 9, 0.5]
    labels = [3, text_id("c"), UNKNOWN] if name == "a.jsonl" else [3, 3, 3]
    assert table[Column.LABEL].to_pylist() == labels
    assert table[Column.TASK].to_pylist() == [text_id("nli")] * 3
    assert table[Column.LANGUAGE].to_pylist() == [text_id("en"), text_id("de"), UNKNOWN]
    assert table[Column.MODALITY].to_pylist() == [None] * 3


def listed(value):
    return value if isinstance(value, list) or value is None else [value]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"p": [1]}, "field 'p' has 1 scores for 2 texts of 'positive'"),
        ({"p": 1}, "field 'p' has 1 scores for 2 texts of 'positive'"),
        ({"p": None}, "field 'p' is null, not a number"),
        ({"p": [1, "2"]}, "field 'p' is a text, not a number"),
        ({"p": [1, True]}, "field 'p' is a boolean, not a number"),
        ({"p": [1, float("nan")]}, "field 'p' is a number that isn't finite in 32 bits"),
        ({"p": [1, 1e39]}, "field 'p' is a number that isn't finite in 32 bits"),
        ({"n": []}, "field 'n' has 0 scores for 1 texts of 'hard'"),
        ({"hard": None}, "field 'n' has 1 scores for 0 texts of 'hard'"),
        ({"w": None}, "field 'w' is null, not a number"),
        ({"w": -1}, "field 'w' is a negative weight"),
        ({"w": float("inf")}, "field 'w' is a number that isn't finite in 32 bits"),
        ({"class": 1.5}, "field 'class' is a number, not a text or a whole number"),
        ({"class": True}, "field 'class' is a boolean, not a text or a whole number"),
        ({"class": 2**63}, "field 'class' is a number beyond 64 bits"),
        ({"class": [1]}, "field 'class' is a list, not a text or a whole number"),
        ({"lang": " "}, "field 'lang' is empty"),
        ({"lang": "\ud800"}, "field 'lang' has half of a surrogate pair, which is no text"),
    ],
)
def test_a_row_whose_scores_weight_or_class_cannot_be_used_is_quarantined_with_the_reason(tmp_path, change, reason):
    path = write_jsonl(tmp_path / "a.jsonl", [RICH[0], RICH[0] | change])
    assert opened(path, tmp_path / "home", **RICH_FIELDS).quarantined == {reason: 1}


def test_numbers_of_numpy_are_numbers_and_a_missing_class_is_unknown(tmp_path, monkeypatch):
    (tmp_path / "numpy_source.py").write_text(
        "import numpy as np\n"
        "def rows():\n"
        "    yield {'query': 'q', 'positive': 'p', 's': np.float32(0.5), 'class': np.int32(4)}\n"
        "    yield {'query': 'q', 'positive': 'p', 's': np.int64(2)}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    table = opened("numpy_source:rows", tmp_path / "home", positive_scores="s", label="class").table()
    assert table[Column.POSITIVE_SCORES].to_pylist() == [[0.5], [2]]
    assert table[Column.LABEL].to_pylist() == [4, UNKNOWN]


def test_a_field_may_serve_twice(tmp_path):
    source = opened(write_parquet(tmp_path / "a.parquet"), tmp_path, positive="query", label="other", language="other")
    table = source.table()
    assert table[Column.POSITIVES].to_pylist() == [[query] for query in table[Column.QUERY].to_pylist()]
    assert table[Column.LABEL].to_pylist() == table[Column.LANGUAGE].to_pylist() == list(range(10))


def test_what_every_source_has_is_available():
    named = {"query": "q", "positive": "p"}
    one = SourceConfig(path="x", label="l", language="=en", negatives="n", negative_scores="s", **named)
    other = SourceConfig(path="y", label="=l", pair_weight="w", task="t", **named)
    sides = [source.possible_columns for source in (one, other)]
    assert columns_available(sides) == {Column.LABEL, Column.TASK}
    assert columns_available(sides[:1]) == {Column.LABEL, Column.LANGUAGE, Column.NEGATIVE_SCORES, Column.TASK}
    scores = {Column.POSITIVE_SCORES, Column.NEGATIVE_SCORES}
    assert SourceConfig(path="x").possible_columns == scores, "a layout with scores may be recognised"
    assert SourceConfig(path="x", format="flagembedding", positive="p").possible_columns == scores
    assert SourceConfig(path="x", format="triplets").possible_columns == set()


def test_a_pool_of_the_same_fields_needs_texts_alone(tmp_path):
    config = SourceConfig(path="x", query="q", positive="p", weight=2, **RICH_FIELDS)
    assert config.texts_alone("y", "dev") == SourceConfig(path="y", split="dev", query="q", positive="p")


def test_what_an_earlier_version_stored_is_made_anew(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl")
    monkeypatch.setattr("data_services.sources.CODE_VERSION", 1)
    earlier = opened(path, tmp_path / "home")
    (earlier.folder / "manifest.json").write_text("{}")  # of another form
    monkeypatch.undo()
    assert opened(path, tmp_path / "home").rows == 10


def test_the_builtin_corpus_is_stored_as_it_is(tmp_path):
    source = opened("builtin:stdlib-code", tmp_path, split="validation")
    pairs = builtin.stdlib_code()["validation"]
    assert source.name == "stdlib-code-validation"
    assert source.rows == len(pairs)
    assert len(source.row_groups) > 4
    rows = np.array([len(pairs) - 1, 0])
    assert source.read(rows)[Column.QUERY].to_pylist() == [pairs[i].query for i in rows]
    assert source.read(rows)[Column.ID].to_pylist() == [pairs[i].name for i in rows]
    assert opened("builtin:stdlib-code", tmp_path, split="validation") == source


def test_unknown_builtin_and_split_name_what_there_is(tmp_path):
    with pytest.raises(UsageError, match="no built-in source builtin:stdlib; nearest: builtin:stdlib-code"):
        opened("builtin:stdlib", tmp_path)
    with pytest.raises(UsageError, match="no split 'test'; it has heldout, train, validation"):
        opened("builtin:stdlib-code", tmp_path, split="test")


def test_the_corpus_to_search_is_every_text_once(tmp_path):
    corpus = builtin_corpus(tmp_path)
    everything = {pair.positive for pairs in builtin.stdlib_code().values() for pair in pairs}
    assert set(corpus.texts) == everything
    assert len(corpus.texts) == len(everything) == len(corpus.names)
    assert corpus.names == sorted(corpus.names)


def test_a_retrieval_pool_is_unique_by_text(tmp_path):
    rows = [("a", ["x", "y"]), ("b", ["y"]), ("a", ["z"]), ("c", ["x"])]
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": q, "positive": p} for q, p in rows])
    pool = retrieval_pool(opened(path, tmp_path / "home"))
    assert pool.queries == ["a", "b", "c"]
    assert pool.documents == ["x", "y", "z"]
    assert pool.relevant == [{0: 1, 1: 1, 2: 1}, {1: 1}, {0: 1}]


@pytest.mark.parametrize(("scores", "grades"), [([[3, 1], [2]], {0: 3, 1: 2}), ([[0.9, 1], [2]], {0: 1, 1: 1})])
def test_whole_scores_are_grades_of_which_the_best_counts_and_others_are_not(tmp_path, scores, grades):
    rows = [{"query": "a", "positive": ["x", "y"]}, {"query": "a", "positive": ["y"]}]
    path = write_jsonl(tmp_path / "a.jsonl", [row | {"s": its} for row, its in zip(rows, scores, strict=True)])
    assert retrieval_pool(opened(path, tmp_path / "home", positive_scores="s")).relevant == [grades]


def test_items_have_the_class_of_the_first_row_they_stand_in(tmp_path):
    rows = [("a", ["x", "y"], "one"), ("b", ["y"], "two"), ("a", ["z"], "two")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"query": q, "positive": p, "topic": t} for q, p, t in rows])
    source = opened(path, tmp_path / "home", label="topic")
    side, (first, second, third) = pool_classes(source)
    assert side == "document"
    assert first == second != third
    assert retrieval_pool(source).documents == ["x", "y", "z"]
