"""Wrong input: one sentence on standard error, the right exit code, no traceback, nothing half-written."""

import json
import shutil
import sys

import pytest

from cluster import cli

WRONG = 2


@pytest.fixture(scope="module")
def ray_here(tmp_path_factory):
    """A connection that commands of this process use: 3 CPUs, room for two workers and the data."""
    from cluster.config import ClusterConfig
    from cluster.session import connect

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        with connect(ClusterConfig(), tmp_path_factory.mktemp("storage")) as session:
            yield session


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """Runs a command in this process that must end with one sentence, which it returns, and leave nothing behind."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("GYRE_HOME", str(home))

    def run(*arguments, code=WRONG):
        before = everything_in(home)
        file = tmp_path / "result.json"
        monkeypatch.setattr(sys, "argv", ["gyre", *map(str, arguments), "--json", str(file)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        told = capfd.readouterr().err
        (sentence,) = told.splitlines()
        assert caught.value.code == code, told
        assert sentence.startswith("gyre: ")
        assert everything_in(home) == before
        assert not file.exists()
        return sentence.removeprefix("gyre: ")

    return run


def everything_in(home):
    """Files by path and time, but for converted sources: the next run takes them up."""
    files = (p for p in home.rglob("*") if p.is_file() and not p.is_relative_to(home / "data"))
    return {(p, p.stat().st_mtime_ns) for p in files}


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("optimizer.lrr=1", "unknown key optimizer.lrr; did you mean optimizer.lr?"),
        ("data.batch=many", "data.batch is 'many'"),
        ("data.batch=1", "data.batch (1) is smaller than cluster.workers (2)"),
        ("objective.temperature=0", "objective.temperature: a temperature of 0"),
        ("engine.zero_stage=5", "engine.zero_stage is 5"),
    ],
)
def test_a_wrong_key_of_the_recipe(refused, recipe, override, told):
    assert told in refused("train", recipe, override)


def test_a_recipe_that_is_not_there(refused, recipe):
    missing = recipe.with_name("minni.yaml")
    assert refused("train", missing) == f"{missing}: no such file; there are {recipe}"


def test_more_workers_than_this_machine_can_ever_place(refused, recipe, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    told = refused("train", recipe, "data.batch=100000", "cluster.workers=99999")
    assert "cluster.workers=99999 of 1 CPU can't be placed: this machine has" in told


def test_more_workers_than_the_cluster_can_ever_place(refused, recipe, ray_here):
    told = refused("train", recipe, "cluster.workers=4")
    assert "cluster.workers=4 of 1 CPU can never be placed: the cluster can have 3 CPUs and 0 GPUs on 1 node" in told


def test_a_source_that_is_not_there_is_told_before_a_cluster_is_started(refused, recipe, pairs, monkeypatch):
    monkeypatch.setattr("cluster.session.connect", None)
    told = refused("train", recipe, f"data.sources.0.path={pairs / 'trian.jsonl'}")
    assert told.startswith(f"source {pairs / 'trian.jsonl'} does not exist")


def test_an_empty_source(refused, recipe, pairs, ray_here, tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    told = refused("train", recipe, f"data.sources.0.path={empty}", f"evaluation.pool={pairs}")
    assert "no usable row: it is empty" in told


def test_a_text_field_that_is_not_there(refused, recipe, ray_here):
    told = refused("train", recipe, "data.sources.0.query=question")
    assert "has no field 'question'; its fields are positive, query" in told


@pytest.fixture
def earlier(whole, shell, tmp_path):
    """A copy of a finished run, in the home that `refused` uses."""
    run = shell.run_folder("mini")
    return shutil.copytree(run, tmp_path / "home" / run.name)


def test_a_resume_with_another_recipe_lists_what_differs(refused, recipe, earlier):
    told = refused("train", recipe, "--resume", earlier.name, "model.config.layers=2", "optimizer.lr=0.02")
    assert f"run {earlier.name} was made with another recipe" in told
    assert "model.config.layers was 1, is 2; optimizer.lr was 0.01, is 0.02" in told


def test_a_resume_with_other_data_names_the_source(refused, recipe, earlier, ray_here):
    (source,) = json.loads((earlier / "data.json").read_text())
    (earlier / "data.json").write_text(json.dumps({source: "0123456789abcdef"}))
    told = refused("train", recipe, "--resume", earlier.name)
    assert f"run {earlier.name} was made with other data: {source} changed since" in told


@pytest.mark.parametrize("lost", ["data.json", "model/config.json"])
def test_an_incomplete_run_is_refused_with_what_is_missing(refused, recipe, earlier, lost):
    (earlier / lost).unlink()
    assert refused("train", recipe, "--resume", earlier) == (
        f"run {earlier.name} is incomplete, {lost} missing: it can't be resumed"
    )


def test_a_run_whose_recipe_was_cut_short_is_refused(refused, recipe, earlier):
    saved = earlier / "recipe.json"
    saved.write_text(saved.read_text()[:40])
    assert f"{saved} is no recipe of this version" in refused("train", recipe, "--resume", earlier)


def test_a_run_that_is_not_there_is_refused_with_those_that_are(refused, recipe, earlier):
    told = refused("train", recipe, "--resume", "nothing-like-it")
    assert "no run 'nothing-like-it'" in told
    assert earlier.name in told
