"""A block by whole columns is what its rows are one by one, or isn't tried."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_services.columns import clean, record_table, row_hashes, with_ids
from data_services.fields import Fields
from data_services.files import find
from data_services.readers import lines
from data_services.readers.blocks import Want
from data_services.records import Malformed, Record, Row, record

FIELDS = Fields(
    "q",
    "p",
    ("n", "m"),
    "ps",
    weight="w",
    frequency="f",
    label="l",
    task="=nli",
    language="g",
    id="i",
    prompt="r",
)
LIMIT = 60


def by_rows(rows, fields):
    """(record table, malformed) row by row."""
    results = [record(row, fields, LIMIT) if isinstance(row, Row) else row for row in rows]
    return record_table([r for r in results if isinstance(r, Record)]), [r for r in results if isinstance(r, Malformed)]


good_text = st.sampled_from(["a", "b c", "über", "日本", "\U0001f600", " x "])
good = st.fixed_dictionaries(
    {"q": good_text, "p": good_text, "w": st.sampled_from([0, 1, 2.5]), "i": st.sampled_from(["1", "x"])}
    | {"f": st.sampled_from([1, 0.25, 8])},
    optional={
        "n": st.none() | good_text,
        "m": st.none() | st.lists(good_text, max_size=3),
        "l": st.none() | st.integers(-5, 5),
        "g": st.none() | st.sampled_from(["en", "de"]),
        "r": st.none() | st.sampled_from(["", "find: "]),
        "other": st.integers() | st.text() | st.lists(st.none()),
    },
).map(lambda row: row | {"ps": 0.5 + len(row["q"])})
faults = st.sampled_from(
    [
        {"q": " "},
        {"q": "\u3000"},
        {"q": None},
        {"q": 3},
        {"q": ["a"]},
        {"q": "\x1c"},
        {"q": "\ud800"},
        {"p": []},
        {"p": [""]},
        {"p": ["a", None]},
        {"p": "x" * 70},
        {"p": {"text": "x", "title": "t"}},
        {"m": ["a", 3]},
        {"ps": None},
        {"ps": [1, 2]},
        {"ps": "1"},
        {"ps": True},
        {"ps": 1e39},
        {"ps": float("nan")},
        {"w": -1},
        {"f": 0},
        {"f": "often"},
        {"w": float("inf")},
        {"l": 2**63},
        {"l": -(2**63)},
        {"l": 1.5},
        {"g": " "},
        {"i": None},
        {"i": ""},
        {"i": 5},
    ]
)


@settings(max_examples=150)
@given(rows=st.lists(good, min_size=1, max_size=8), wrong=st.none() | faults, place=st.integers(0, 7))
def test_json_lines_by_columns_are_what_they_are_row_by_row(tmp_path_factory, rows, wrong, place):
    if wrong is not None:
        rows[place % len(rows)] = rows[place % len(rows)] | wrong
    path = tmp_path_factory.getbasetemp() / "columns.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (block,) = lines.blocks(find(str(path)).files[0], Want(FIELDS, LIMIT * 20))
    table = clean(block.table, FIELDS, LIMIT) if block.table is not None else None
    twin, malformed = by_rows(block.rows(), FIELDS)
    assert block.rows_in == len(twin) + len(malformed)
    if table is not None:
        assert not malformed
        assert table.equals(twin)
        assert with_ids(table).equals(with_ids(twin))


def test_what_has_no_fault_goes_by_columns(tmp_path):
    rows = [
        {"q": f"q{i}", "p": ["a", "b"], "n": None, "m": ["x"] * (i % 3), "ps": [1, 2], "w": 1, "f": 2, "i": i}
        for i in range(9)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row | {"l": 1, "g": None, "r": "x"}) + "\r\n" for row in rows))
    (block,) = lines.blocks(find(str(path)).files[0], Want(FIELDS, LIMIT * 20))
    assert block.table is not None
    table = clean(block.table, FIELDS, LIMIT)
    assert table is not None
    assert table.equals(by_rows(block.rows(), FIELDS)[0])


PASSAGES = pa.struct([("title", pa.string()), ("text", pa.string())])
TYPED = [
    pa.array(["a", "b"], pa.large_string()),
    pa.array(["a", "b"]).dictionary_encode(),
    pa.array([["a"], ["b", "c"]], pa.large_list(pa.large_string())),
    pa.array([["a", "x"], ["b", "c"]], pa.list_(pa.string(), 2)),
    pa.array(
        [[{"title": "t", "text": "a"}], [{"title": None, "text": "b"}, {"title": "", "text": "c"}]], pa.list_(PASSAGES)
    ),
    pa.array([{"title": "t", "text": "a"}, {"title": "", "text": "b"}], PASSAGES),
    pa.array([["a"], ["b"], ["c"]]).slice(1),
]


@pytest.mark.parametrize("column", TYPED, ids=lambda column: str(column.type)[:30])
def test_every_type_of_text_column_gives_what_its_rows_give(column):
    table = pa.table({"q": ["q", "r"], "p": column})
    fields = Fields("q", "p")
    found = clean(table, fields, LIMIT)
    assert found is not None
    assert found.equals(by_rows([Row(i, row) for i, row in enumerate(table.to_pylist())], fields)[0])


def rows_of(n, **change):
    rows = [Record(None, f"q{i}", [f"p{i}", "x"][: 1 + i % 2], ["n"] * (i % 3), [1.0] * (1 + i % 2)) for i in range(n)]
    return with_ids(record_table([row._replace(**change) for row in rows]))


def test_hashes_of_rows_do_not_depend_on_where_a_table_is_cut():
    table = rows_of(20)
    whole = row_hashes(table, True)
    for cut in (1, 7, 19):
        parts = [row_hashes(table.slice(0, cut), True), row_hashes(table.slice(cut), True)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    assert len(set(whole.tolist())) == 20


def test_an_empty_list_is_not_a_missing_one():
    some, none = (row_hashes(rows_of(3, negative_scores=scores), False) for scores in ([], None))
    assert not (some == none).any()


def reference_ids(query, positives):
    """The id of a row, in plain integers."""
    from data_services.schema import text_id

    def mix(x):
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    total = mix(len(positives))
    for place, text in enumerate(positives, start=1):
        total += mix((text_id(text) + place * 0x9E3779B97F4A7C15) % 2**64)
    return f"{text_id(query) % 2**64:016x}{mix(total % 2**64):016x}"


def test_the_id_of_a_row_is_of_its_query_and_positives():
    table = rows_of(4)
    assert table["id"].to_pylist() == [reference_ids(f"q{i}", [f"p{i}", "x"][: 1 + i % 2]) for i in range(4)]
