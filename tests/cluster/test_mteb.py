"""mteb's task classes over local data: by our model object, and by what we export as it is."""

import json

import pytest

from cluster.evidence.evaluating import EvaluationJob, evaluate
from cluster.models import open_encoder
from data_services.schema import RunError, UsageError
from evaluation import mteb_adapter

mteb = pytest.importorskip("mteb")


@pytest.fixture(scope="module")
def tasks():
    """mteb's classes of six kinds, which hold a few texts each instead of loading some."""
    from mteb import mocks

    kinds = ("Retrieval", "STS", "PairClassification", "Classification", "Clustering", "BitextMining")
    known = {name.removeprefix("Mock").removesuffix("Task"): getattr(mocks, name) for name in dir(mocks)}
    found = [known[kind]() for kind in kinds if kind in known]
    assert len(found) >= 5
    return found


@pytest.fixture(scope="module")
def exported(pretrained, tmp_path_factory):
    """A model folder as `gyre export` gives it."""
    from trainers.config import ModelConfig
    from trainers.encoders.model_folder import prepare_model_folder
    from trainers.encoders.text import build_encoder
    from trainers.export import export_sentence_transformer

    folder, config = tmp_path_factory.mktemp("models"), ModelConfig(path=str(pretrained))
    spec = prepare_model_folder(config, folder / "made")
    return export_sentence_transformer(
        build_encoder(config, folder / "made").state_dict(), spec, folder / "made", folder / "exported"
    )


def test_our_model_object_scores_as_what_we_export_does_by_itself(tasks, exported, tmp_path):
    from sentence_transformers import SentenceTransformer

    with open_encoder(exported) as encoder:
        ours = mteb_adapter.score(mteb_adapter.MtebModel(encoder, "gyre/small", "1"), tasks, tmp_path / "results")
    as_it_is = SentenceTransformer(str(exported), device="cpu")
    for task in tasks:
        found = mteb.evaluate(as_it_is, task, cache=None, show_progress_bar=False, co2_tracker=False).task_results[0]
        name = task.metadata.name
        assert ours[name].metrics["main_score"] == pytest.approx(found.get_score(), abs=1e-4), name
        (written,) = (tmp_path / "results").rglob(f"{name}.json")
        assert json.loads(written.read_text())["task_name"] == name


def test_a_suite_of_mteb_tasks_is_stored_beside_a_baseline(tasks, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(mteb_adapter, "tasks_named", lambda names: [t for t in tasks if t.metadata.name in names])
    other = tmp_path / "other"
    other.symlink_to(exported)
    job = EvaluationJob(str(exported), "mteb:MockSTSTask", baselines=(str(other),))
    stored = evaluate(job, tmp_path / "home")
    result = stored.result.tasks["MockSTSTask"]
    assert result.kind == "mteb STS"
    assert result.baselines["other"] == result.metrics
    assert list((tmp_path / "home" / "mteb").rglob("MockSTSTask.json"))


def test_a_task_that_mteb_has_not_and_data_that_cannot_be_had_are_told(exported, tmp_path):
    with pytest.raises(UsageError, match="mteb has no task 'STS-Benchmark': did you mean STSBenchmark"):
        evaluate(EvaluationJob(str(exported), "mteb:STS-Benchmark"), tmp_path)
    with pytest.raises(UsageError, match="--split and --k are for a source"):
        evaluate(EvaluationJob(str(exported), "mteb:STS12", split="test"), tmp_path)
    with pytest.raises(RunError, match="mteb's task STS12 can't load its data"):  # the tests are offline
        evaluate(EvaluationJob(str(exported), "mteb:STS12", baselines=("none",)), tmp_path)
    assert not (tmp_path / "evaluations").exists()
