"""Models scored beside training: the run is what it is without, the best is exported, and a stalled run ends."""

import json

import pytest
import yaml

from cluster.config import load_recipe
from cluster.evidence.watching import (
    FAILED,
    MODEL,
    SCORES,
    best_of,
    is_stalled,
    keep_best,
    scores_by,
    scores_of,
    step_folder,
)
from cluster.fit import is_trained
from cluster.paths import RunPaths
from cluster.prepare import prepare
from data_services.schema import UsageError
from tests.cluster.test_refresh import train
from tests.cluster.test_variants import HERE, merged
from tests.e2e.commands import steps_in
from tests.e2e.conftest import mini_recipe, write_pairs

STEPS, EVERY, METRIC = 4, 2, "mrr@10"
SCORED = {1: {METRIC: 0.2}, 2: {METRIC: 0.5}, 3: {METRIC: 0.5}, 4: {METRIC: 0.4}}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """The same run unwatched, watched, and with patience."""
    folder = tmp_path_factory.mktemp("watching")
    raw = merged(mini_recipe(write_pairs(folder / "pairs")), HERE | {"checkpoint": {"every_steps": 2}})
    raw["data"]["steps"], raw["optimizer"]["warmup_steps"] = STEPS, 1
    watched = {"every_steps": EVERY, "best_by": METRIC}
    made = {}
    for name, keys in (("plain", {}), ("watched", watched), ("patient", watched | {"patience": 1})):
        made[name] = folder / f"{name}.yaml"
        made[name].write_text(yaml.safe_dump(merged(raw, {"evaluation": keys})))
    return made


def test_the_best_is_the_first_of_the_highest_and_patience_counts_from_it():
    assert best_of(SCORED, METRIC) == 2
    assert best_of({}, METRIC) is None
    assert [is_stalled(SCORED, METRIC, patience) for patience in (1, 2, 3)] == [True, True, False]
    assert not is_stalled({}, METRIC, 1)


def test_watching_changes_no_step_and_every_due_step_and_the_last_are_scored(gloo, recipes, tmp_path):
    ((losses, _),) = gloo(1, train, recipes["plain"], tmp_path / "plain")
    ((again, _),) = gloo(1, train, recipes["watched"], tmp_path / "watched")
    assert again == losses
    (run,) = (RunPaths(path.parent) for path in (tmp_path / "watched").glob("*/recipe.json"))
    scores = keep_best(run, load_recipe(recipes["watched"]), STEPS, lambda event: None)
    assert list(scores) == [EVERY, STEPS]
    assert all(0 <= told[METRIC] <= 1 for told in scores.values())
    assert not (step_folder(run, STEPS) / MODEL).exists()


def test_a_run_whose_scores_are_no_better_for_long_ends_with_an_export(gloo, recipes, tmp_path):
    home = tmp_path / "home"
    recipe = load_recipe(recipes["patient"])
    ready = prepare(recipe, home, None)
    for step, scores in ((1, 0.5), (2, 0.4)):  # as if they had been scored when the first step ends
        plant(ready.run, step, {METRIC: scores})
    ((losses, _),) = gloo(1, train, recipes["patient"], home)
    assert len(losses) == 1
    assert len(steps_in(ready.run.metrics)) == 1
    assert json.loads(ready.run.ended.read_text()) == {"step": 1}
    assert is_trained(ready)


def plant(run, step, scores, model=None):
    folder = step_folder(run, step)
    folder.mkdir(parents=True)
    (folder / SCORES).write_text(json.dumps(scores))
    if model:
        (folder / MODEL).mkdir()
        (folder / MODEL / "weights").write_text(model)


@pytest.mark.parametrize(("best_by", "exported", "kept"), [(METRIC, "of step 2", [2]), (None, "the last", [])])
def test_the_best_model_becomes_the_export_and_the_others_go(recipes, tmp_path, best_by, exported, kept):
    run = RunPaths(tmp_path / "run")
    for step, scores in SCORED.items():
        plant(run, step, scores, None if step == STEPS else f"of step {step}")
    run.export.mkdir()
    (run.export / "weights").write_text("the last")
    recipe = load_recipe(recipes["watched"], [f"evaluation.best_by={best_by or 'null'}"])
    told = []
    for _ in range(2):  # a driver that died goes over it again
        assert keep_best(run, recipe, STEPS, told.append) == scores_of(run) == SCORED
        assert (run.export / "weights").read_text() == exported
        assert [step for step in SCORED if (step_folder(run, step) / MODEL).exists()] == kept
    assert bool(told) == (best_by is not None)


def test_checkpoints_are_told_their_scores_and_those_that_are_still_to_come(recipes, tmp_path):
    run, config = RunPaths(tmp_path / "run"), load_recipe(recipes["watched"]).evaluation
    plant(run, 2, SCORED[2], "scored")
    plant(run, 6, {}, "failed")
    (step_folder(run, 6) / SCORES).unlink()
    (step_folder(run, 6) / FAILED).write_text("why")
    # Step 3 isn't watched, 4 waits for its score, that of 6 won't come, and the last is scored after training.
    assert scores_by(run, config, 8, [2, 3, 4, 6, 8]) == {2: 0.5, 4: None}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (["evaluation.best_by=ndgc@10"], "did you mean 'ndcg@10'"),
        (["evaluation.every_steps=null"], "best_by chooses among the models of every_steps"),
        (["evaluation.best_by=null", "evaluation.patience=2"], "name the metric in `best_by`"),
        (["evaluation.validation=null"], "every_steps scores the validation split"),
        (["evaluation.best_by=null", "checkpoint.keep_best=1"], "keep_best chooses by scores beside training"),
        (["evaluation.every_steps=3", "checkpoint.keep_best=1"], "no multiple of checkpoint.every_steps"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(recipes, keys, told):
    with pytest.raises(UsageError, match=told):
        load_recipe(recipes["watched"], keys)
