"""`gyre mine`: from a command to a source that a recipe reads; in this process and on a cluster."""

import json
import shutil
from pathlib import Path

import pytest

from cluster.commands.show_data import Counts
from cluster.mining import MiningJob, mine
from data_services.mining.filters import FilterConfig
from data_services.schema import Column, UsageError
from data_services.sources import SourceConfig, open_source

PAIRS = [
    ("how tall is the tower", "the tower is 300 metres tall"),
    ("who wrote the book", "the book was written by a sailor"),
    ("when does the train leave", "the train leaves at noon"),
    ("where is the tower", "the tower stands by the river"),
    ("what does the train cost", "a ticket for the train costs ten"),
]


@pytest.fixture
def pairs(tmp_path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps({"query": q, "answer": a}) + "\n" for q, a in PAIRS))
    return file


def test_the_command_writes_a_source_and_says_how_a_recipe_names_it(gyre, pairs, tmp_path):
    code, out, err = gyre("mine", "bm25", pairs, "positive=answer", "--out", "mined", "--json", "r.json")
    assert (code, err) == (0, "")
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["rows"], result["queries"], result["documents"]) == (5, 5, 5)
    assert "path: " + str(tmp_path / "mined") in out
    assert all(line in out for line in ("query: query", "positive: positives", "negatives: negatives"))
    assert "  + " in out
    assert "  - " in out
    manifest = json.loads((tmp_path / "mined" / "_mined.json").read_text())
    assert manifest["source"]["positive"] == "answer"
    assert manifest["filters"] == FilterConfig().model_dump()
    keys = {"positive": "positives", "negatives": "negatives"}
    table = open_source(SourceConfig(path=str(tmp_path / "mined"), **keys), tmp_path / "home").table()
    assert table.column(Column.QUERY).to_pylist() == [q for q, _ in PAIRS]
    assert table.column(Column.NEGATIVES)[0].as_py()[0] == "the tower stands by the river"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["bm25", "pairs.jsonl"], "fields answer, query, which is no known format"),
        (["bm25", "pairs.jsonl", "positiv=answer"], "unknown key positiv; did you mean positive?"),
        (["bm25", "nothing.jsonl"], "does not exist"),
        (["bm25", "pairs.jsonl", "positive=answer", "--choose", "best"], "command line: choose is 'best'"),
        (["bm25", "pairs.jsonl", "positive=answer", "--to-rank", "2"], "ranks 0 to 2 hold 2 candidates"),
        (["bm25", "pairs.jsonl", "positive=answer", "--index", "ivf"], "bm25 has none"),
        (["bm25", "pairs.jsonl", "--guide", "a", "--cross-encoder", "b"], "give one"),
        (["nothing", "pairs.jsonl", "positive=answer"], "no run 'nothing'"),
        (["bm25", "pairs.jsonl", "positive=answer", "--corpus", "no.jsonl"], "no.jsonl does not exist"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_written(gyre, pairs, tmp_path, arguments, told):
    code, _, err = gyre("mine", *arguments, "--out", "mined")
    assert code == 2
    assert told in err
    assert "\n" not in err.strip()
    assert not list(tmp_path.glob("mined*"))


def test_a_model_mines_and_its_vectors_are_kept_for_other_filters_and_for_a_cluster(
    pretrained,
    pairs,
    tmp_path,
    monkeypatch,
):
    from cluster.config import ClusterConfig
    from cluster.session import connect

    def job(out: str, **keys) -> MiningJob:
        return MiningJob(str(pretrained), SourceConfig(path=str(pairs), positive="answer"), tmp_path / out, **keys)

    first = mine(job("first"), tmp_path / "home")
    assert first.report.negatives_a_query == {4: 5}
    monkeypatch.setattr("cluster.embedding.open_encoder", None)  # not needed again
    other = mine(job("other", filters=FilterConfig(relative_margin=0.5), guide=str(pretrained)), tmp_path / "home")
    assert other.report.fates["relative_margin"] > 0
    with connect(ClusterConfig(workers=2), tmp_path / "home"):
        mine(job("cluster", workers=2), tmp_path / "home")
    tables = [(tmp_path / out / "part-00000.parquet").read_bytes() for out in ("first", "cluster")]
    assert tables[0] == tables[1]
    shutil.rmtree(tmp_path / "home" / "vectors")


def test_vectors_of_tokens_are_refused(monkeypatch, pairs, tmp_path):
    from contextlib import nullcontext
    from types import SimpleNamespace

    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "config.json").write_text("{}")
    of_tokens = SimpleNamespace(gives_tokens=True)
    monkeypatch.setattr("cluster.embedding.open_encoder", lambda folder, device: nullcontext(of_tokens))
    job = MiningJob(str(tmp_path / "late"), SourceConfig(path=str(pairs), positive="answer"), tmp_path / "out")
    with pytest.raises(UsageError, match="a vector for each token"):
        mine(job, tmp_path / "home")
    assert not (tmp_path / "out").exists()


def test_counts_are_plain_lines_with_an_eta(capsys):
    from rich.console import Console

    clock = iter([0.0, 1.0, 6.0, 9.0, 10.0])
    with Counts(Console(), lambda: next(clock)) as counts:
        for done in (0, 10, 60, 90, 100):
            counts("encoding", done, 100)
    assert capsys.readouterr().out.splitlines() == [
        "encoding 0/100",
        "encoding 60/100 · ETA 4 s",
        "encoding 100/100",
    ]
