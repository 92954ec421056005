"""A suite from its YAML and its data: what is read, and what is told where something is wrong."""

import json
from pathlib import Path

import pytest
import yaml

from cluster.evidence.suites import open_suite, parse_suite, read_suite, shipped
from data_services.schema import UsageError
from evaluation.vectors import Vectors
from tests.evaluation.worlds import random_table


def json_lines(path: Path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def beir(folder: Path, qrels, corpus=("sour apples", "green pears", "dry bread")) -> str:
    (folder / "qrels").mkdir(parents=True)
    json_lines(folder / "corpus.jsonl", [{"_id": f"d{i}", "title": "On", "text": t} for i, t in enumerate(corpus)])
    json_lines(folder / "queries.jsonl", [{"_id": "q1", "text": "apples"}, {"_id": "q2", "text": "pears"}])
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    return str(folder)


def every_kind(folder: Path) -> dict:
    pairs = [{"sentence1": f"a {i % 5}", "sentence2": f"b {i}", "score": i / 3, "label": i % 2} for i in range(8)]
    ranked = [{"query": f"a {i}", "positive": f"b {i}", "negatives": [f"b {i + 1}", f"b {i + 2}"]} for i in range(4)]
    labelled = [{"text": f"b {i}", "label": "odd" if i % 2 else "even"} for i in range(8)]
    pair_file, ranked_file, label_file = (
        json_lines(folder / f"{name}.jsonl", rows)
        for name, rows in (("pairs", pairs), ("ranked", ranked), ("labels", labelled))
    )
    tasks = [
        {"kind": "retrieval", "data": beir(folder / "beir", [("q1", "d0", 2), ("q2", "d1", 1), ("q2", "d2", 0)])},
        {"kind": "reranking", "data": ranked_file},
        {"kind": "sts", "data": pair_file},
        {"kind": "pair_classification", "data": pair_file},
        {"kind": "bitext_mining", "data": pair_file},
        {"kind": "classification", "data": label_file, "train": label_file},
        {"kind": "zero_shot", "data": label_file, "template": "a {} number"},
        {"kind": "clustering", "data": label_file, "repeats": 2},
    ]
    return {"name": "small", "tasks": [{"name": task["kind"], **task} for task in tasks]}


def saved(folder: Path, values) -> str:
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_every_kind_is_read_and_scored_with_all_its_metrics(tmp_path):
    suite = open_suite(saved(tmp_path, every_kind(tmp_path)), None, None, tmp_path / "home")
    sides = [text for task in suite.tasks for texts in task.sides().values() for text in texts]
    vectors = Vectors(random_table([*sides, "a odd number", "a even number"]))
    for task in suite.tasks:
        assert task.kind == task.name
        assert tuple(task.score(vectors).metrics) == task.metrics
    retrieval = suite.tasks[0]
    assert retrieval.documents == ["On sour apples", "On green pears", "On dry bread"]  # the whole corpus, titles first
    assert retrieval.grades == [{0: 2.0}, {1: 1.0, 2: 0.0}]


def test_the_fingerprint_is_of_the_data_and_not_of_its_place(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one, two = (saved(tmp_path / name, every_kind(tmp_path / name)) for name in ("one", "two"))
    home = tmp_path / "home"
    same = open_suite(one, None, None, home).fingerprint
    assert same == open_suite(two, None, None, home).fingerprint
    (tmp_path / "two" / "labels.jsonl").write_text('{"text": "x", "label": 1}\n{"text": "y", "label": 0}\n')
    assert same != open_suite(two, None, None, home).fingerprint


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"kind": "retreival"}, "task sts: kind 'retreival' is not known: did you mean 'retrieval'"),
        ({"metrics": ["spearmann"]}, "task sts: .*'spearmann' is not known: did you mean 'spearman'"),
        ({"scores": "x"}, "task sts: unknown key scores; did you mean score"),
        ({"score": "scores"}, "no field 'scores'; did you mean score"),
        ({"first": "label"}, "task sts: row 1: label is '0', not a text"),
        ({"score": "sentence2"}, "row 1: sentence2 is 'b 0', not a number"),
        ({"data": "nothing.jsonl"}, "nothing.jsonl does not exist"),
        ({"data": "builtin:stdlib-coda"}, "nearest: builtin:stdlib-code"),
    ],
)
def test_a_task_that_cannot_be_is_told_with_its_name_and_the_nearest(tmp_path, change, told):
    values = every_kind(tmp_path)
    values["tasks"] = [values["tasks"][2] | change]
    with pytest.raises(UsageError, match=told):
        open_suite(saved(tmp_path, values), None, None, tmp_path / "home")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"metrics": ["ndgc@10"]}, "did you mean 'ndcg@10'"),
        ({"unanswered": "leave_out"}, None),
        ({}, r"query 'q2' \('pears'\) has no relevant document.*unanswered: leave_out"),
        ({"split": "dev"}, "no split 'dev'; it has test"),
    ],
)
def test_a_query_without_an_answer_is_refused_or_left_out(tmp_path, change, told):
    data = beir(tmp_path / "beir", [("q1", "d0", 1), ("q2", "d1", 0)])
    suite = saved(tmp_path, {"name": "s", "tasks": [{"name": "r", "kind": "retrieval", "data": data, **change}]})
    if told is None:
        assert open_suite(suite, None, None, tmp_path / "home").tasks[0].counts == {"queries": 1, "documents": 3}
        return
    with pytest.raises(UsageError, match=told):
        open_suite(suite, None, None, tmp_path / "home")


@pytest.mark.parametrize(
    ("qrels", "told"),
    [
        ([("q1", "d9", 1)], "qrels/test.tsv names document 'd9' for query 'q1', which isn't in corpus.jsonl"),
        ([("q7", "d0", 1)], "qrels/test.tsv names query 'q7', which isn't in queries.jsonl"),
        ([("q1", "d0", "high")], r"qrels/test.tsv:2: not query-id, corpus-id and score"),
        ([("q1", "d0", 0.5)], "a grade that is no whole number"),
        ([], "task r has no queries"),
    ],
)
def test_qrels_that_do_not_fit_are_told_by_name(tmp_path, qrels, told):
    suite = {"name": "s", "tasks": [{"name": "r", "kind": "retrieval", "data": beir(tmp_path / "beir", qrels)}]}
    with pytest.raises(UsageError, match=told):
        open_suite(saved(tmp_path, suite), None, None, tmp_path / "home")


def test_a_malformed_row_and_a_label_that_is_not_there_are_told(tmp_path):
    values = every_kind(tmp_path)
    labels = {task["name"]: task for task in values["tasks"]}["clustering"]
    with pytest.raises(UsageError, match="label 'od' is not known: did you mean 'odd'"):
        open_suite(saved(tmp_path, values | {"tasks": [labels | {"labels": ["od"]}]}), None, None, tmp_path)
    with open(tmp_path / "labels.jsonl", "a") as file:
        file.write("{broken\n")
    with pytest.raises(UsageError, match=r"labels\.jsonl:9: .*a score needs all of them"):
        open_suite(saved(tmp_path, values | {"tasks": [labels]}), None, None, tmp_path)


def test_what_a_suite_says_twice_or_not_at_all_is_told(tmp_path):
    values = every_kind(tmp_path)
    twice = [values["tasks"][2], values["tasks"][2]]
    for changed, told in [
        (values | {"tasks": twice}, "suite: two of tasks are called 'sts'"),
        (values | {"tasks": []}, "suite: tasks is"),
        (values | {"variants": [{"dims": 4}]}, "suite: variants.0: unknown key dims; did you mean dim"),
        (values | {"variants": [{}]}, "variants.0: a variant has dim, quantise or prompts"),
        (values | {"tasks": ["sts"]}, "suite: tasks.0 is 'sts'"),
    ]:
        with pytest.raises(UsageError, match=told):
            parse_suite(changed, "suite")
    with pytest.raises(UsageError, match="did you mean builtin:code"):
        open_suite("builtin:cod", None, None, tmp_path)
    with pytest.raises(UsageError, match="--k is for a source"):
        open_suite(saved(tmp_path, values), None, 5, tmp_path)


def test_the_shipped_suites_are_whole(tmp_path):
    assert shipped() == ["builtin:code"]
    suite = open_suite("builtin:code", None, None, tmp_path)
    assert {task.kind for task in suite.tasks} == {
        "retrieval", "reranking", "bitext_mining", "classification", "clustering", "zero_shot"
    }  # fmt: skip
    assert read_suite(Path(__file__).parents[2] / "evaluation/suites/code.yaml").name == suite.name
