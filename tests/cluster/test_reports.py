"""Pages of runs, evaluations and comparisons: everything that was stored is there, in one file that needs no other."""

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.config import load_recipe
from cluster.paths import RunPaths
from cluster.reports.evidence import POINTS, read_steps
from cluster.search.record import Check, Outcome, StudyPaths
from evaluation.excerpts import Excerpt
from evaluation.look import BINS, Example, Histogram, Hit, Look
from evaluation.stored import Excerpts, PerQuery, Result, TaskResult, write
from tests.evaluation.test_page import Nesting

RECIPE = "name: small\nmodel: {path: m}\ndata: {sources: [{path: 'builtin:stdlib-code'}], steps: 9}\n"
EVIL = "<script>alert(1)</script>"
ROWS = {"bm25": {"ndcg@10": 0.3, "mrr@10": 0.2}, "trained": {"ndcg@10": 0.42, "mrr@10": 0.33}}


def step(number):
    noise = {"queue_age_steps": float(number), "queue_rows": 64.0, "my_own": 0.1 * number}
    speed = {"seconds": 2.0, "data_wait_s": 0.5, "pairs_per_s": 8.0, "tokens_per_s": 80.0, "padding_share": 0.1}
    loss = {"loss": 3.0 - number / 10, "accuracy": 0.1, "alignment": 1 - number / 20, "uniformity": -number / 5}
    return {"step": number} | loss | speed | noise | {"mfu": 0.2, "peak_memory_bytes": 1e9, "traffic_bytes": 5.0}


@pytest.fixture
def made(tmp_path, monkeypatch):
    """A run that has taken nine steps, in a home."""
    home = tmp_path / "home"
    run = RunPaths(home / "small-2026-1")
    run.root.mkdir(parents=True)
    (tmp_path / "r.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("r.yaml")
    run.recipe.write_text(json.dumps(recipe.model_dump(mode="json")))
    run.metrics.write_text("".join(json.dumps(step(i)) + "\n" for i in range(9)) + '{"step": 9, "lo')
    return run


@pytest.fixture
def ended(made):
    """The same run at its end, scored."""
    result = {
        "model_name": "small",
        "model_version": 3,
        "aliases": ["candidate"],
        "gate": "every gate passed",
        "metrics": ROWS,
        "validation": ROWS,
        "over_bm25": {"heldout": {"difference": 0.12, "low": 0.1, "high": 0.14, "p": 0.001}},
        "throughput": {"pairs_per_s": 8.0, "peak_memory_bytes": 2e9},
        "seconds": {"to_first_step": 30.0, "total": 90.0},
    }
    made.result.write_text(json.dumps(result))
    made.environment.write_text(json.dumps({"python": "3.11", "cores": 2, "versions": {"torch": "2.13"}}))
    counts = Histogram(positives=[0] * 60 + [5] * 20, negatives=[3] * BINS)
    hit = Hit(Excerpt(EVIL, "cGljdHVyZQ=="), False, 0.5)
    shown = Example(Excerpt("a question"), Excerpt("its answer"), 0.0, None, [hit])
    look = Look(
        metric="ndcg@10",
        similarities={"trained": counts},
        geometry={"untrained": {"modality_gap": 0.9}, "trained": {"modality_gap": 0.125}},
        best=[shown],
        worst=[shown],
    )
    made.look("heldout").parent.mkdir()
    made.look("heldout").write_text(look.model_dump_json())
    scores = {"query": list("abcd"), "bm25 ndcg@10": [0.1, 0.2, 0.3, 0.4], "trained ndcg@10": [0.2, 0.3, 0.4, 0.6]}
    pq.write_table(pa.table(scores), made.evaluation("heldout"))
    return made


def check_page(html):
    parser = Nesting()
    parser.feed(html.removeprefix("<!doctype html>"))
    assert parser.open == []
    assert "script" not in parser.seen
    assert not re.search(r'(src="(?!data:image/png;base64,)|href=|url\(|@import)', html)
    assert not re.search(r">(nan|None|inf)<", html)


def test_a_finished_run_shows_all_that_it_wrote(ended, gyre):
    code, out, err = gyre("report", "small-2026", "--json", "r.json")
    assert (code, err) == (0, "")
    assert out.splitlines() == ["run small-2026-1", str(ended.report)]
    html = ended.report.read_text()
    check_page(html)
    for heading in (
        "Scores on heldout",
        "Scores on validation",
        "Training",
        "Speed",
        "Negative queue",
        "The space",
        "Queries it answers best and worst",
        "Cost",
        "Environment",
        "Recipe",
    ):
        assert f"<h2>{heading}</h2>" in html, heading
    for text in (
        "small version 3",
        "0.4200",
        "+0.1250",  # trained less BM25, from the stored queries
        "Every gate passed",
        "my own",  # a metric of a loss that the page doesn't know
        "padding",
        "mean age of a queue row",
        "step 0",
        "step 8",
        "modality gap",
        "a question",
        "data:image/png;base64,cGljdHVyZQ==",
        "right answer not found",
        "its answer",
        "worker-hours",
        "torch",
        "builtin:stdlib-code",
    ):
        assert text in html, text
    assert json.loads((ended.root.parents[1] / "r.json").read_text())["path"] == str(ended.report)


def test_a_run_under_way_shows_how_far_it_is(made, gyre):
    code, _, err = gyre("report", made.root, "--out", "page.html")
    assert (code, err) == (0, "")
    html = (made.root.parents[1] / "page.html").read_text()
    check_page(html)
    assert "under way, or stopped, after step 9" in html
    assert "<h2>Training</h2>" in html
    assert "Scores on" not in html
    assert not made.report.exists()


def test_a_run_before_its_first_step_has_a_page_too(made, gyre):
    made.metrics.unlink()
    code, _, err = gyre("report", "small")
    assert (code, err) == (0, "")
    check_page(made.report.read_text())


def test_long_curves_are_means_and_end_where_the_run_ended(tmp_path):
    lines = [json.dumps({"step": i, "loss": float(i), "rare": float("nan") if i % 2 else 1.0}) for i in range(5000)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    steps = read_steps(tmp_path / "m.jsonl")
    curve = steps.curve("loss")
    assert len(curve) == POINTS
    assert curve[0][0] == curve[0][1] < 20
    assert curve[-1][0] > 4980
    assert {value for _, value in steps.curve("rare")} == {1.0}
    assert steps.curve("nothing") == []
    points, names = steps.path("loss", "rare", 10)
    assert (points[0], names[0], names[-1]) == ((0.0, 1.0), "step 0", "step 4998")


@pytest.fixture
def evaluations(tmp_path):
    """e0 and e1: twelve queries, of which B answers three better."""
    queries, found = (
        [f"q{i:02}" for i in range(12)],
        Excerpts({"q00": Excerpt("how?"), "q11": Excerpt(EVIL)}, {"d1": Excerpt("so")}),
    )
    for number in range(2):
        scores = np.linspace(0, 0.5, 12) + number * (np.arange(12) % 4 == 3) * 0.4
        task = TaskResult(
            kind="retrieval",
            main="ndcg@10",
            metrics={"ndcg@10": float(scores.mean())},
            counts={"queries": 12},
            baselines={"bm25": {"ndcg@10": 0.1}},
            slices={"length short": {"ndcg@10": 0.2}},
        )
        result = Result(
            id=f"e{number}",
            model=f"small/{number}",
            model_fingerprint=str(number),
            dim=8,
            suite="team",
            suite_fingerprint="s",
            made="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            tasks={"code": task},
            geometry={"code": {"hubness": 2.5}},
        )
        per_query = PerQuery(queries, {"ndcg@10": scores}, [["d1", "d2"]] * 12)
        write(tmp_path / "home", result, {"code": per_query}, {"code": found})
    return tmp_path / "home"


def test_a_stored_evaluation_shows_scores_intervals_and_queries_with_their_hits(evaluations, gyre):
    code, out, err = gyre("report", "e1")
    assert (code, err) == (0, "")
    page = evaluations / "evaluations" / "e1" / "report.html"
    assert out.splitlines()[-1] == str(page)
    html = page.read_text()
    check_page(html)
    for text in ("small/1 on team", "95 % interval", "length short", "hubness", "how?", "so", "d2", "nDCG@10 0.0000"):
        assert text in html, text


def test_a_comparison_is_kept_and_shown_with_what_changed(evaluations, gyre, tmp_path):
    code, out, err = gyre("compare", "e0", "e1", "--html", "c.html", "--json", "c.json")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == f"page    {tmp_path / 'c.html'}"
    html = (tmp_path / "c.html").read_text()
    check_page(html)
    for text in ("3 queries are better in B, 0 worse, 9 equal", "A: hit 1", "B: hit 1", "+0.4000", "alert(1)"):
        assert text in html, text
    for named in ("e0..e1", "c.json"):
        assert gyre("report", named, "--out", "again.html")[0] == 0
        assert (tmp_path / "again.html").read_text() == html
    code, out, _ = gyre("compare", "e0", "e1")
    assert out.splitlines()[-1] == "next    gyre report e0..e1"


def test_a_search_under_way_has_a_page(tmp_path, monkeypatch, gyre):
    study = StudyPaths(tmp_path / "home" / "small-search-1")
    study.root.mkdir(parents=True)
    space = {"optimizer.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-2}}
    recipe = json.loads(json.dumps({"name": "small", "model": {"path": "m"}}))
    recipe |= {"data": {"sources": [{"path": "builtin:stdlib-code"}], "steps": 9}, "search": {"space": space}}
    study.search.write_text(json.dumps({"recipe": recipe}))
    for number in range(2):
        trial = study.trial(number)
        trial.begin(number, {"optimizer.lr": 1e-3 * (number + 1)})
        trial.add(Check(9, 9, 12.0, {"ndcg@10": 0.1 + number / 10}))
    study.trial(0).end(Outcome("completed", "", 12.0))
    code, _, err = gyre("report", "small-search-1")
    assert (code, err) == (0, "")
    html = study.report.read_text()
    check_page(html)
    assert "under way, or was interrupted" in html
    assert "trial 1" in html


def test_what_has_no_page_is_one_sentence(ended, evaluations, gyre, tmp_path):
    twin = RunPaths(ended.root.with_name("small-2026-2"))
    twin.root.mkdir()
    twin.recipe.write_text(ended.recipe.read_text())
    (tmp_path / "bad.json").write_text("[]")
    for arguments, told in [
        (("nothing",), "no run, search, evaluation or comparison 'nothing' under"),
        (("small-2026",), "run 'small-2026' is ambiguous: small-2026-1, small-2026-2"),
        (("bad.json",), "bad.json is no comparison; `gyre compare A B --json FILE` writes one"),
        (("small-2026-1", "--out", "no/page.html"), "--out no/page.html: no such folder; name a file"),
        (("small-2026-1", "--out", tmp_path), "this is a folder; name a file"),
    ]:
        code, _, err = gyre("report", *arguments)
        assert (code, told in err, err.count("\n")) == (2, True, 1), err
    values = json.loads(ended.recipe.read_text()) | {"surprise": 1}
    ended.recipe.write_text(json.dumps(values))
    code, _, err = gyre("report", "small-2026-1")
    assert (code, "is of another version of gyre: surprise" in err) == (2, True), err
    assert not ended.report.exists()
