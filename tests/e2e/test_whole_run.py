"""A run from a recipe to a registered, exported model: that of conftest.py, whatever it went through."""

from pathlib import Path

from tests.e2e.commands import steps_in
from tests.e2e.conftest import STEPS

MODELS, METRICS = ("bm25", "untrained", "trained"), ("ndcg@10", "mrr@10", "recall@1", "recall@10")


def test_the_json_says_what_was_made_where_and_how_good_it_is(whole, shell):
    ended, result = whole
    assert {model: set(row) for model, row in result["metrics"].items()} == {m: set(METRICS) for m in MODELS}
    assert result["metrics"]["trained"]["ndcg@10"] != result["metrics"]["untrained"]["ndcg@10"]
    assert result["throughput"]["pairs_per_s"] > 0
    assert 0 <= result["throughput"]["data_wait_fraction"] < 1
    assert 0 < result["seconds"]["to_first_step"] < result["seconds"]["total"]
    assert (result["world_size"], result["zero_stage"], result["model_version"]) == (2, 2, 1)
    assert (Path(result["checkpoint"]) / "manifest.json").is_file()
    assert (Path(result["export"]) / "modules.json").is_file()
    assert "Traceback" not in ended.out + ended.err
    assert result["run_id"] == shell.run_folder("mini").name
    assert result["run_id"] in ended.out


def test_the_run_has_a_page_with_its_curves_scores_and_queries(whole, shell):
    ended = shell("report", "mini")
    assert ended.code == 0, ended
    html = (shell.run_folder("mini") / "report.html").read_text()
    for text in ("Scores on heldout", "95 % interval", "Negative queue", "Queries it answers best and worst", "torch"):
        assert text in html, text
    assert html.count("<svg") > 10


def test_each_step_is_in_the_metrics_file_once(whole, shell):
    steps = steps_in(shell.metrics("mini"))
    assert [s["step"] for s in steps] == list(range(STEPS))
    assert steps[-1]["loss"] < steps[0]["loss"]


def test_each_step_is_in_mlflow_once_with_the_recipe_and_the_data(whole, shell):
    from cluster.tracking import client

    run_folder = shell.run_folder("mini")
    mlflow = client(shell.home)
    (run,) = mlflow.search_runs([mlflow.get_experiment_by_name("mini").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == run_folder.name
    logged = mlflow.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in logged] == [(s["step"], s["loss"]) for s in steps_in(shell.metrics("mini"))]
    assert run.data.params["optimizer.lr"] == "0.01"
    assert run.data.metrics["heldout.trained.ndcg_at_10"] == whole[1]["metrics"]["trained"]["ndcg@10"]
    assert {"gyre.recipe", "gyre.data"} <= run.data.tags.keys()


def test_the_model_is_registered_with_its_evidence_as_candidate_and_first_champion(whole, shell):
    from cluster.registry import list_models

    (version,) = list_models("mini", shell.home)
    assert set(version.aliases) == {"candidate", "champion"}
    assert version.scores["heldout"] == whole[1]["metrics"]
    assert version.tags["gyre.run"] == whole[1]["run_id"]
