"""A run that isn't on this machine, from its copy; a store that can't be written is told before training."""

import json

import pytest

from cluster.copied import check_store, copy_of, files_to_copy, find_or_fetch
from cluster.paths import RunPaths
from data_services.schema import RunError, UsageError
from tests.trainers.stores import object_store
from trainers.checkpoint import committed
from trainers.collectives import Group
from trainers.config import CheckpointConfig
from trainers.copies import Copies
from trainers.saving import CheckpointStore

COPY_TO = "s3://runs/team"


@pytest.fixture
def faulty(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with object_store(monkeypatch) as faulty:
        yield faulty


@pytest.fixture
def run(tmp_path):
    run = RunPaths(tmp_path / "home" / "quick-1")
    run.model.mkdir(parents=True)
    (run.watched / "step-2").mkdir(parents=True)
    (run.mined / "step-2" / "0.making-7").mkdir(parents=True)
    for file in (run.recipe, run.data, run.tracker, run.model / "config.json", run.watched / "step-2" / "scores.json"):
        file.write_text(json.dumps(file.name))
    (run.mined / "step-2" / "0.making-7" / "half").write_text("half")
    run.failure.write_text("not of the run")
    return run


def test_a_run_that_is_not_here_is_brought_whole(faulty, run, tmp_path):
    import torch

    assert {"recipe.json", "model/config.json", "watched/step-2/scores.json"} <= set(files_to_copy(run))
    assert not any("half" in name or "failure" in name for name in files_to_copy(run))
    copies = Copies(run.checkpoints, copy_of(COPY_TO, run.run_id), Group(), lambda: files_to_copy(run))
    own = CheckpointStore(run.checkpoints, CheckpointConfig(), Group(), copies=copies)
    own.save(4, {"w": torch.ones(2)}, {"step": 4})
    own.settle()
    fresh = tmp_path / "fresh"
    found = find_or_fetch("quick-1", fresh, COPY_TO, None)
    assert found.root == fresh / "quick-1"
    assert [c.step for c in committed(found.checkpoints)] == [4]
    assert found.model.joinpath("config.json").read_text() == '"config.json"'
    assert not found.tracker.exists(), "the MLflow run lies in a store that isn't here"
    assert [p.name for p in fresh.iterdir()] == ["quick-1"]
    assert find_or_fetch("quick-1", fresh, COPY_TO, None) == found


def test_a_run_that_is_nowhere_leaves_nothing(faulty, tmp_path):
    with pytest.raises(
        UsageError, match=r"no run 'quick-9' under .*; there is no copy of a run at s3://runs/team/quick-9"
    ):
        find_or_fetch("quick-9", tmp_path, COPY_TO, None)
    with pytest.raises(UsageError, match=r"no run 'quick-9' under"):
        find_or_fetch("quick-9", tmp_path, None, None)
    assert list(tmp_path.iterdir()) == []


def test_a_store_that_cannot_be_written_is_told(faulty):
    check_store(COPY_TO)
    with pytest.raises(RunError, match=r"checkpoint\.copy_to: s3://no-such-bucket/\.gyre-.* can't be written"):
        check_store("s3://no-such-bucket")
