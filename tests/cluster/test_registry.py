"""A model reaches `champion` on the evidence it was registered with, and goes back with one call."""

import json

import pytest

from cluster import registry
from cluster.registry import HISTORY, GateFailed, list_models, model_folder, promote, register, rollback
from cluster.tracking import Tracker, client
from data_services.schema import Refused, UsageError
from evaluation.gates import GateConfig

GATE = GateConfig(over_bm25=0.02)


@pytest.fixture
def add(root, tmp_path):
    """Registers a run whose trained model stands at `ndcg`, BM25 at 0.30."""

    def _add(ndcg: float, name: str = "small", gate: GateConfig | None = GATE, run_id: str | None = None):
        folder = tmp_path / "export"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps({"ndcg": ndcg}))
        run_id = run_id or Tracker.start("exp", "run", {}, root).run_id
        rows = {"bm25": {"ndcg@10": 0.30}, "trained": {"ndcg@10": ndcg}}
        scores = {"validation": rows, "heldout": rows}
        return register(name, folder, run_id=run_id, scores=scores, gate=gate, tags={"gyre.data": "f00"})

    return _add


def champion(root, name="small"):
    return {a: int(v) for a, v in client(root).get_registered_model(name).aliases.items()}


def test_the_first_version_that_passes_its_gate_becomes_champion(root, add):
    assert add(0.31).aliases == ("candidate",)
    second = add(0.35)
    assert set(second.aliases) == {"candidate", "champion"}
    third = add(0.40)
    assert third.aliases == ("candidate",)
    assert champion(root) == {"candidate": 3, "champion": 2}
    assert third.tags["gyre.data"] == "f00"
    assert third.scores["heldout"]["trained"] == {"ndcg@10": 0.40}


def test_registering_a_run_again_gives_the_version_it_has(root, add):
    first = add(0.35)
    assert add(0.35, run_id=first.run_id).version == first.version
    assert len(list_models("small")) == 1


def test_promotion_is_refused_with_what_failed_and_by_how_much(root, add):
    add(0.35)
    add(0.305)
    with pytest.raises(GateFailed, match=r"version 2 .* over BM25 is 0.0050 where 0.0200 .*-0.0150") as caught:
        promote("small", 2)
    assert caught.value.rows()[0]["passed"] is False
    assert champion(root)["champion"] == 1


def test_promotion_remembers_and_rollback_walks_back(root, add):
    for ndcg in (0.35, 0.36, 0.37):
        add(ndcg)
    moved = promote("small", 2)
    assert (moved.version, moved.previous) == (2, 1)
    assert promote("small", 3).previous == 2
    assert promote("small", 3).previous == 2, "promoting the champion changes nothing"
    back = rollback("small")
    assert (back.version, back.previous) == (2, 3)
    assert rollback("small").version == 1
    with pytest.raises(UsageError, match="version 1 is its first champion"):
        rollback("small")
    assert champion(root)["champion"] == 1


def test_a_kill_between_the_history_and_the_alias_is_healed(root, add, monkeypatch):
    for ndcg in (0.35, 0.36, 0.37):
        add(ndcg)
    promote("small", 2)
    history = json.loads(client(root).get_registered_model("small").tags[HISTORY])
    half = [*history, {"version": 3, "by": "me", "at": "now"}]
    client(root).set_registered_model_tag("small", HISTORY, json.dumps(half))
    assert rollback("small").version == 1


def test_an_alias_moved_by_other_means_joins_the_history(root, add):
    add(0.35)
    add(0.36)
    client(root).set_registered_model_alias("small", "champion", "2")
    assert rollback("small").version == 1


def test_a_version_without_evidence_is_refused(root, add):
    run = add(0.35).run_id
    client(root).create_model_version("small", "/nowhere", run)
    with pytest.raises(Refused, match="no evidence"):
        promote("small", 2)


def test_without_a_gate_every_version_may_become_champion(root, add):
    assert "champion" in add(0.1, gate=None).aliases
    add(0.05, gate=None)
    assert promote("small", 2).version == 2


def test_unknown_names_versions_and_aliases_name_what_there_is(root, add):
    with pytest.raises(UsageError, match="there are none yet"):
        promote("small", 1)
    add(0.35)
    for call, told in [
        (lambda: promote("smal", 1), "did you mean small"),
        (lambda: promote("other-thing", 1), "there are small"),
        (lambda: promote("small", 9), "no version 9; it has 1"),
        (lambda: rollback("smal"), "did you mean small"),
        (lambda: list_models("smal"), "did you mean small"),
        (lambda: model_folder("models:/small@prod"), "no alias 'prod'; it has"),
        (lambda: model_folder("models:/small/7"), "no version 7"),
        (lambda: model_folder("models:/small"), "write models:/NAME@ALIAS"),
    ]:
        with pytest.raises(UsageError, match=told):
            call()


def test_a_model_uri_is_the_registered_folder(root, add):
    add(0.35)
    add(0.36, name="other")
    folder, version = model_folder("models:/small@candidate")
    assert json.loads((folder / "config.json").read_text()) == {"ndcg": 0.35}
    assert model_folder("models:/small/1")[0] == folder
    assert version.version == 1
    assert [v.name for v in list_models()] == ["other", "small"]
    (folder / "config.json").unlink()
    folder.rmdir()
    with pytest.raises(UsageError, match="is gone"):
        model_folder("models:/small@candidate")


def test_remote_artifacts_are_fetched_once(root, add, monkeypatch):
    add(0.35)
    real, seen = registry._version, []
    monkeypatch.setattr(
        registry,
        "_version",
        lambda *a: registry.Version(**{**real(*a).as_dict(), "source": "mlflow-artifacts:/1/model"}),
    )
    made = client(root)
    fetch = type(made).download_artifacts
    monkeypatch.setattr(type(made), "download_artifacts", lambda *a: (seen.append(a), fetch(*a))[1])
    for _ in range(2):
        folder, _version = model_folder("models:/small/1")
        assert json.loads((folder / "config.json").read_text()) == {"ndcg": 0.35}
    assert len(seen) == 1
    assert folder.is_relative_to(root / "models")
