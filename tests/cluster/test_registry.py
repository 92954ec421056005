"""A model is registered with its evidence, reaches `champion` on it, and goes back with one call."""

import json

import pytest

from cluster.registry import GateFailed, list_models, model_folder, promote, rollback
from cluster.registry.champion import HISTORY, MAX_HISTORY_CHARS, history_of
from cluster.tracking import client
from data_services.schema import Refused, UsageError


def champion(root, name="small"):
    return {a: int(v) for a, v in client(root).get_registered_model(name).aliases.items()}


def test_the_first_version_that_passes_its_gate_becomes_champion(root, add):
    assert add(0.31).aliases == ("candidate",)
    second = add(0.35)
    assert set(second.aliases) == {"candidate", "champion"}
    third = add(0.40)
    assert third.aliases == ("candidate",)
    assert champion(root) == {"candidate": 3, "champion": 2}
    assert third.lineage == {"run": "mini", "data": "f00"}
    assert third.scores["heldout"]["trained"] == {"ndcg@10": 0.40}


def test_no_version_becomes_champion_by_itself_where_its_gate_asks_for_more_than_scores(add):
    from evaluation.gates import GateConfig

    assert add(0.5, gate=GateConfig(minimum=0.1, signed_off_by=["ann"])).aliases == ("candidate",)


def test_registering_a_run_again_gives_the_version_it_has(root, add):
    first = add(0.35)
    assert add(0.35, run_id=first.run_id).version == first.version
    assert len(list_models("small")) == 1


def test_promotion_is_refused_with_what_failed_and_by_how_much(root, add):
    add(0.35)
    add(0.305)
    with pytest.raises(GateFailed, match=r"version 2 .* over BM25 is 0.0050 where 0.0200 .*-0.015") as caught:
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
    left = next(v for v in list_models("small") if v.version == 3)
    assert json.loads(left.tags["gyre.rolled_back"])["to"] == 2
    assert rollback("small").version == 1
    with pytest.raises(UsageError, match="version 1 is its first champion"):
        rollback("small")
    assert champion(root)["champion"] == 1


def test_a_promotion_is_on_record_with_its_evidence(root, add):
    for ndcg in (0.35, 0.36):
        add(ndcg)
    moved = promote("small", 2)
    record = list_models("small")[0].promotion
    assert (record["by"], record["at"], record["previous"], record["override"]) == (moved.by, moved.at, 1, None)
    assert [(row["gate"], row["passed"]) for row in record["gates"]] == [("ndcg@10 over BM25", True)]


def test_a_kill_between_the_history_and_the_alias_is_healed(root, add):
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


def test_a_long_history_loses_its_beginning_and_fits_its_tag(root, add):
    for ndcg in (0.35, 0.36, 0.37):
        add(ndcg)
    long = [{"version": 1, "by": "x" * 50, "at": "y" * 25} for _ in range(45)]
    client(root).set_registered_model_tag("small", HISTORY, json.dumps(long))
    promote("small", 2)
    promote("small", 3)
    model = client(root).get_registered_model("small")
    assert len(model.tags[HISTORY]) <= MAX_HISTORY_CHARS
    assert [entry["version"] for entry in history_of(model)][-3:] == [1, 2, 3]


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
