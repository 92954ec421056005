"""The run's record: each step once, whatever is replayed, and a store that fails doesn't stop the training."""

import math

import pytest

from cluster.config import load_recipe
from cluster.tracking import LAST_STEP, Tracker, client, metric_name, tracking_uri
from data_services.schema import RunError


def steps(root, run_id, metric="loss"):
    return [(m.step, m.value) for m in client(root).get_metric_history(run_id, metric)]


def test_steps_are_sent_in_batches_and_once(root):
    tracker = Tracker.start("exp", "run", {"a": "b"}, root, every=4)
    for step in range(6):
        tracker.log(step, {"loss": step / 2, "recall@1": 0.5, "bad": math.nan})
    assert len(steps(root, tracker.run_id)) == 4
    tracker.log(3, {"loss": 99})
    tracker.finish()
    assert steps(root, tracker.run_id) == [(s, s / 2) for s in range(6)]
    assert len(steps(root, tracker.run_id, "recall_at_1")) == 6
    run = client(root).get_run(tracker.run_id)
    assert "bad" not in run.data.metrics
    assert run.data.tags["a"] == "b"
    assert run.info.status == "FINISHED"
    assert str(root / "mlartifacts") in run.info.artifact_uri


def test_a_resumed_run_logs_only_what_the_store_lacks(root):
    first = Tracker.start("exp", "run", {}, root, every=2)
    for step in range(5):
        first.log(step, {"loss": step})
    # Killed here: step 4 never left the process. The replay begins at the checkpoint of step 2.
    second = Tracker.resume(first.run_id, root, every=2)
    assert second.last_step == 3
    for step in range(2, 8):
        second.log(step, {"loss": step})
    second.finish("FAILED")
    assert [s for s, _ in steps(root, first.run_id)] == list(range(8))
    assert client(root).get_run(first.run_id).info.status == "FAILED"


def test_a_kill_between_metrics_and_their_tag_repeats_nothing(root):
    first = Tracker.start("exp", "run", {}, root, every=1)
    first.log(0, {"loss": 1.0})
    first.log(1, {"loss": 1.0})
    client(root).set_tag(first.run_id, LAST_STEP, "0")
    assert Tracker.resume(first.run_id, root).last_step == 1


def test_many_metrics_are_sent_in_whole_steps(root):
    tracker = Tracker.start("exp", "run", {}, root, every=3)
    for step in range(3):
        tracker.log(step, {f"m{i}": float(step) for i in range(400)})
    assert [s for s, _ in steps(root, tracker.run_id, "m399")] == list(range(3))


def test_training_goes_on_while_the_store_is_away(root, monkeypatch, caplog):
    tracker = Tracker.start("exp", "run", {}, root, every=2)
    real = tracker._client.log_batch

    def away(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(tracker._client, "log_batch", away)
    for step in range(3):
        tracker.log(step, {"loss": step})
    assert "2 steps wait" in caplog.text
    with pytest.raises(RunError, match="no route to host"):
        tracker.flush()
    monkeypatch.setattr(tracker._client, "log_batch", real)
    tracker.flush()
    assert len(steps(root, tracker.run_id)) == 3


def test_parameters_are_the_leaves_of_the_recipe(root, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nmodel: {path: m}\ndata: {sources: [{path: 'builtin:stdlib-code'}], steps: 3}\n")
    tracker = Tracker.start("exp", "run", {}, root)
    tracker.log_params(load_recipe(path))
    tracker.log_result({"heldout.trained.ndcg@10": 0.4})
    data = client(root).get_run(tracker.run_id).data
    assert data.params["data.sources.0.path"] == "builtin:stdlib-code"
    assert data.params["optimizer.lr"] == "0.002"
    assert data.metrics["heldout.trained.ndcg_at_10"] == 0.4


def test_an_unknown_run_and_a_broken_store_are_one_sentence(root, tmp_path, monkeypatch):
    with pytest.raises(RunError, match="not found"):
        Tracker.resume("0" * 32, root)
    (tmp_path / "mlflow.db").write_text("no database at all")
    with pytest.raises(RunError, match="tracking store sqlite:///"):
        Tracker.start("exp", "run", {}, tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert tracking_uri() == "http://me:secret@127.0.0.1:1"
    with pytest.raises(RunError) as caught:
        Tracker.start("exp", "run", {}, root)
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_metric_names_are_what_mlflow_accepts():
    assert metric_name("heldout.bm25.ndcg@10") == "heldout.bm25.ndcg_at_10"
