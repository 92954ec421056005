"""Promotion among other promotions, killed ones and failing gates."""

import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import yaml

from cluster.evidence.suites import open_suite
from cluster.models import fingerprint
from cluster.registry import GateFailed, list_models, model_folder, promote, rollback
from cluster.registry.champion import history_of
from cluster.tracking import Tracker, client
from data_services.schema import UsageError
from evaluation.gates import GateConfig
from evaluation.stored import PerQuery, Result, TaskResult, write
from tests.e2e.commands import TREE


def racers(what, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "tests.cluster.racers", what, *arguments],
        cwd=TREE,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_of_eight_promotions_at_once_one_wins_and_seven_are_told(root, add):
    for ndcg in range(9):
        add(0.35 + ndcg / 100)
    told = racers("race")
    assert sorted(t["version"] for t in told) == list(range(2, 10))
    (winner,) = (t for t in told if "refused" not in t)
    assert winner["previous"] == 1
    for loser in (t for t in told if "refused" in t):
        assert f"held against version 1, version {winner['version']} became champion" in loser["refused"]
    model = client(root).get_registered_model("small")
    assert int(model.aliases["champion"]) == winner["version"]
    assert [entry["version"] for entry in history_of(model)] == [1, winner["version"]]
    assert rollback("small").version == 1


def test_a_promotion_killed_at_any_write_has_moved_nothing_and_is_safe_to_run_again(root, add):
    add(0.35)
    add(0.36)
    *killed, again = racers("kill")
    assert [(k["signal"], k["champion"], k["history"]) for k in killed] == [(9, 1, [1])] * 3
    assert again == {"at": "again", "previous": 1, "champion": 2, "history": [1, 2]}


def test_a_registration_killed_before_its_alias_is_whole_when_it_is_run_again(root, tmp_path):
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    run_id = Tracker.start("exp", "run", {}, root).run_id
    killed, again = racers("register", run_id, str(folder))
    assert killed == {"killed": True, "versions": [1], "aliases": {}}
    assert again == {"killed": False, "versions": [1], "aliases": {"candidate": 1, "champion": 1}}


def test_an_override_is_recorded_and_only_where_a_gate_said_no(root, add):
    add(0.35)
    add(0.305)
    with pytest.raises(UsageError, match="--override needs a reason"):
        promote("small", 2, override=" ")
    moved = promote("small", 2, override="the old one leaks personal data")
    assert moved.override == "the old one leaks personal data"
    record = list_models("small")[0].promotion
    assert record["override"] == moved.override
    assert record["gates"][0]["passed"] is False
    add(0.40)
    assert promote("small", 3, override="not needed").override is None


def test_a_teams_gate_holds_beside_the_recipes(root, add, tmp_path, gyre, monkeypatch):
    add(0.35)
    add(0.36)
    file = tmp_path / "gates.yaml"
    file.write_text("minimum: 0.5\nsigned_off_by: [ann]\n")
    code, out, err = gyre("promote", "small", "2", "--gates", file, "--sign-off", "ann", "--json", "r.json")
    assert code == 3
    assert [line.split()[-1] for line in out.splitlines()] == ["by", "passed", "FAILED", "passed"]
    assert "ndcg@10 is 0.3600 where 0.5000 is required (-0.1400)" in err
    assert [row["passed"] for row in json.loads((tmp_path / "r.json").read_text())["gates"]] == [True, False, True]
    file.write_text("minimum: 0.3\nsigned_off_by: [ann]\n")
    code, out, err = gyre("promote", "small", "2", "--gates", file)
    assert (code, out) == (0, "small: champion is version 2; before it: version 1\n"), err
    assert list_models("small")[0].signed_off_by == ["ann"]
    file.write_text("minimun: 0.3\n")
    code, _, err = gyre("promote", "small", "1", "--gates", file)
    assert (code, err) == (2, f"gyre: {file}: unknown key minimun; did you mean minimum?\n")


def test_models_shows_where_a_version_comes_from(root, add, gyre):
    add(0.35)
    add(0.36)
    promote("small", 2)
    code, out, _ = gyre("models", "small")
    assert code == 0
    blocks = out.split("\n\n")
    assert blocks[1].splitlines()[0] == "small version 2"
    assert "  data        f00" in blocks[1].splitlines()
    assert ", after version 1" in blocks[1]


def test_a_gate_on_the_model_looks_at_its_files(root, add):
    add(0.35)
    add(0.36, gate=GateConfig(safetensors=True, size_mb=1, licence=[]))
    with pytest.raises(GateFailed) as refused:
        promote("small", 2)
    assert [(row["gate"], row["got"], row["passed"]) for row in refused.value.rows()] == [
        ("size_mb", pytest.approx(1.4e-5, rel=0.2), True),
        ("weights", "0 safetensors", False),
        ("licence", "none", False),
    ]


def test_a_version_whose_files_were_changed_is_not_promoted(root, add, gyre):
    add(0.35)
    add(0.36)
    folder, _ = model_folder("models:/small/2")
    (folder / "config.json").write_text("{}")
    code, _, err = gyre("promote", "small", "2")
    assert (code, "aren't those that were registered" in err) == (1, True), err
    assert list_models("small")[1].aliases == ("champion",)


@pytest.fixture
def suite(root, tmp_path):
    """team.yaml: one retrieval task, over nine pairs."""
    lines = [json.dumps({"query": f"question {i}", "positive": f"answer {i}"}) for i in range(9)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    task = {"name": "code", "kind": "retrieval", "data": str(tmp_path / "pairs.jsonl"), "metrics": ["ndcg@10"]}
    (tmp_path / "team.yaml").write_text(yaml.safe_dump({"name": "team", "tasks": [task]}))
    return str(tmp_path / "team.yaml")


@pytest.fixture
def evaluated(root, add, suite):
    """Registers a version whose stored evaluation on team.yaml has these scores of its queries."""
    numbers = itertools.count()  # every version has files of its own

    def _evaluated(scores, **more):
        version = add(0.4 + next(numbers) / 100, **more)
        task = TaskResult(kind="retrieval", main="ndcg@10", metrics={"ndcg@10": scores.mean()}, counts={})
        result = Result(
            id=f"e{version.version}",
            model=f"small/{version.version}",
            model_fingerprint=fingerprint(model_folder(f"models:/small/{version.version}")[0]),
            dim=8,
            suite="team",
            suite_fingerprint=open_suite(suite, None, None, root).fingerprint,
            made="2026-01-01T00:00:00+00:00",
            seconds=1.0,
            tasks={"code": task},
        )
        write(root, result, {"code": PerQuery([f"q{i:03}" for i in range(len(scores))], {"ndcg@10": scores})})
        return version

    return _evaluated


def test_a_planted_regression_is_refused_and_a_planted_improvement_is_promoted(root, evaluated, suite, gyre):
    draw = np.random.default_rng(0)
    champion = draw.beta(2, 2, 200)
    gate = GateConfig(suite=suite, non_inferior={"margin": 0.01}, improvement={"task": "code"})
    for shift in (0.0, -0.03, 0.03):
        evaluated(champion + shift + draw.normal(0, 0.05 * (shift != 0), 200), gate=gate if shift else None)
    with pytest.raises(GateFailed, match=r"code not worse \(ndcg@10, 95%\) is -0\.03.* code better \(ndcg@10, 95%\)"):
        promote("small", 2)
    assert promote("small", 3).previous == 1
    record = list_models("small")[0].promotion
    assert record["evaluations"] == ["e3", "e1"]
    code, out, err = gyre("compare", "models:/small/1", "models:/small@champion", "--suite", suite)
    assert code == 0, err
    assert out.splitlines()[:2] == ["A  small/1 (e1)", "B  small/3 (e3)"]
    assert out.splitlines()[3].split()[:2] == ["code", "nDCG@10"]
    assert "code: the queries that changed most (ndcg@10, A to B)" in out
    code, _, err = gyre("compare", "e1", str(root / "evaluations" / "e2"), "--json", "c.json")
    assert code == 0, err


def test_what_cant_be_compared_is_one_sentence(root, evaluated, add, gyre):
    evaluated(np.zeros(9))
    add(0.49)
    for arguments, told in [
        (("models:/small/1", "models:/small/2"), "are models: name the suite to compare them on"),
        (("e1", "e1", "--suite", "x"), "are stored evaluations, whose suite is known; leave it out"),
        (("e1", "models:/small/2"), "small/2 has no evaluation on team as it was for e1: name the suite with --suite"),
        (("e1", "models:/small/1", "--suite", "no.yaml"), "no.yaml: no such file"),
        (("e9", "e1"), "no run 'e9'"),
        (("e1", "e1", "--metric", "ndcg@5"), "task code has no metric 'ndcg@5'; it has ndcg@10"),
    ]:
        code, _, err = gyre("compare", *arguments)
        assert (code, told in err) == (2, True), err
