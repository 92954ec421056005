"""`gyre data stats|dedupe|split`: from a command to a source that is read again."""

import json

import pytest

from data_services.schema import Column
from data_services.sources import SourceConfig, open_source

LONG = "the quick brown fox jumps over the lazy dog and then it runs away into the dark forest again"
ROWS = [
    {"q": "first question", "a": LONG},
    {"q": "first question", "a": LONG},
    {"q": "first question", "a": LONG + " !"},
    {"q": "second question", "a": "another answer"},
    {"q": "third question", "a": "one more answer"},
]


@pytest.fixture
def pairs(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (tmp_path / "suite.jsonl").write_text(json.dumps({"query": "third question", "positive": "held out"}))
    return "pairs.jsonl", "query=q", "positive=a"


def test_stats_tell_what_is_in_a_source(gyre, pairs, tmp_path):
    code, out, err = gyre("data", "stats", *pairs, "--against", "suite.jsonl", "--json", "s.json")
    assert (code, err) == (0, "")
    for line in ("5 rows", "duplicates: 1 exact, 1 near", "in the evaluation source: 1 exactly, 0 nearly"):
        assert line in out
    assert "first question" in out
    assert json.loads((tmp_path / "s.json").read_text())["texts"]["query"] == {"texts": 5, "unique": 3}


def test_tokens_are_those_of_a_model(gyre, pairs, pretrained):
    code, out, _ = gyre("data", "stats", *pairs, "--near", "0", "--tokenizer", pretrained)
    assert code == 0
    assert "query     tokens" in out
    assert "duplicates: 1 exact, 0 near" in out


def test_dedupe_leaves_a_source_that_is_read_again(gyre, pairs, tmp_path):
    code, out, err = gyre("data", "dedupe", *pairs, "--against", "suite.jsonl", "--out", "clean", "--json", "d.json")
    assert (code, err) == (0, "")
    counts = {"kept": 2, "exact duplicates": 1, "near duplicates": 1}
    counts |= {"in suite.jsonl, exact": 1, "in suite.jsonl, near": 0}
    assert json.loads((tmp_path / "d.json").read_text())["counts"] == counts
    assert "positive: positives" in out
    back = open_source(SourceConfig(path=str(tmp_path / "clean"), positive="positives"), tmp_path)
    assert back.table().column(Column.QUERY).to_pylist() == ["first question", "second question"]
    assert json.loads((tmp_path / "clean" / "_deduped.json").read_text())["counts"] == counts
    assert gyre("data", "dedupe", *pairs, "--out", "clean")[0] == 2


def test_split_writes_sides_that_a_recipe_names(gyre, pairs, tmp_path):
    code, out, _ = gyre("data", "split", *pairs, "--out", "parts", "--shares", "train=0.5,validation=0.5", "--seed", 3)
    assert code == 0
    assert "split: train" in out
    sides = [
        set(
            open_source(SourceConfig(path=str(tmp_path / "parts"), split=s, positive="positives"), tmp_path)
            .table()
            .column(Column.QUERY)
            .to_pylist()
        )
        for s in ("train", "validation")
    ]
    assert sides[0] | sides[1] == {row["q"] for row in ROWS}
    assert not sides[0] & sides[1]


def test_cluster_writes_a_source_that_a_recipe_of_neighbours_reads(gyre, pairs, pretrained, tmp_path):
    code, out, err = gyre(
        "data", "cluster", pretrained, *pairs, "--clusters", "2", "--out", "alike", "--json", "c.json"
    )
    assert (code, err) == (0, "")
    assert "neighbours: true" in out
    assert "cluster: cluster" in out
    assert json.loads((tmp_path / "c.json").read_text())["counts"] == {"least": 1, "mean": 2, "most": 2}
    keys = {"positive": "positives", "cluster": "cluster"}
    back = open_source(SourceConfig(path=str(tmp_path / "alike"), **keys), tmp_path).table()
    clusters = dict(zip(back.column(Column.QUERY).to_pylist(), back.column(Column.CLUSTER).to_pylist(), strict=True))
    assert set(clusters.values()) == {0, 1}
    about = json.loads((tmp_path / "alike" / "_clustered.json").read_text())
    assert (about["clusters"], about["by"], sum(about["texts"])) == (2, "query", 3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (
            ["cluster", "m", "pairs.jsonl", "query=q", "positive=a", "--out", "x", "--clusters", "1"],
            "--clusters 1: between",
        ),
        (["cluster", "m", "pairs.jsonl", "query=q", "positive=a", "--out", "x", "--clusters", "2"], "no run 'm'"),
        (["stats", "pairs.jsonl"], "fields a, q, which is no known format"),
        (["stats", "pairs.jsonl", "query=q", "positive=a", "--near", "2"], "--near 2: a similarity is between 0"),
        (["stats", "pairs.jsonl", "query=q", "positive=a", "--against", "no.jsonl"], "no.jsonl does not exist"),
        (["split", "pairs.jsonl", "query=q", "positive=a", "--out", "x", "--shares", "a=1,b=1"], "these to 2"),
        (
            ["split", "pairs.jsonl", "query=q", "positive=a", "--out", "x", "--shares", "a=0.999999,b=0.000001"],
            "gets none",
        ),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(gyre, pairs, tmp_path, arguments, told):
    code, _, err = gyre("data", *arguments)
    assert code == 2
    assert told in err
    assert "\n" not in err.strip()
    assert not list(tmp_path.glob("x*"))


def test_nothing_left_is_an_error(gyre, pairs, tmp_path):
    code, _, err = gyre("data", "dedupe", *pairs, "--against", "pairs2.jsonl", "--out", "clean")
    assert code == 2
    (tmp_path / "pairs2.jsonl").write_text("\n".join(json.dumps({"query": r["q"], "positive": r["a"]}) for r in ROWS))
    code, _, err = gyre("data", "dedupe", *pairs, "--against", "pairs2.jsonl", "--out", "clean")
    assert code == 1
    assert "no row of pairs.jsonl would be left" in err
