"""A checkpoint that is damaged while a run goes on: its workers take the one before, and compute the same."""

import pytest
import yaml

from cluster.fit import WOULD_FAIL_AGAIN
from tests.cluster.test_refresh import train
from tests.cluster.test_variants import HERE, merged
from tests.e2e.conftest import mini_recipe, write_pairs
from tests.trainers.test_checkpoint import harm
from trainers.checkpoint import MANIFEST, committed, rank_file, reasons_aside
from trainers.loop import OutOfStep

STEPS = 6


@pytest.fixture
def recipe(tmp_path):
    raw = merged(mini_recipe(write_pairs(tmp_path / "pairs")), HERE | {"checkpoint": {"every_steps": 2, "keep": 9}})
    raw["data"]["steps"], raw["optimizer"]["warmup_steps"] = STEPS, 1
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(raw))
    return file


@pytest.mark.parametrize("name", [rank_file(0, 1), MANIFEST])
def test_workers_go_on_from_the_one_before_with_the_same_losses(gloo, recipe, tmp_path, name):
    home = tmp_path / "home"
    ((undisturbed, _),) = gloo(1, train, recipe, home)
    checkpoints = next(home.glob("*/checkpoints"))
    assert [c.step for c in committed(checkpoints)] == [2, 4, 6]
    for damaged in committed(checkpoints)[1:]:
        harm(damaged.folder / name, "flipped")
    ((healed, _),) = gloo(1, train, recipe, home)
    assert healed == undisturbed
    assert [c.step for c in committed(checkpoints)] == [2, 4, 6]
    assert len(reasons_aside(checkpoints)) == 2


def _read_from(recipe, home, step):
    """As workers whose batches were begun for a newer checkpoint than the one that is whole."""
    from cluster.config import load_recipe
    from cluster.paths import RunPaths
    from cluster.prepare import prepare
    from cluster.worker import Task, train_on_worker
    from data_services.stream import LocalStream

    ready = prepare(load_recipe(recipe), home, RunPaths(next(home.glob("*/recipe.json")).parent))
    task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
    stream = LocalStream(ready.reader, 1, 0, ready.recipe.engine.budget_tokens)
    try:
        train_on_worker(task, lambda start: stream(step))
    except OutOfStep as error:
        return str(error)
    return ""


def test_batches_that_were_begun_for_the_damaged_one_are_not_trained_on(gloo, recipe, tmp_path):
    home = tmp_path / "home"
    gloo(1, train, recipe, home)
    harm(committed(next(home.glob("*/checkpoints")))[-1].folder / rank_file(0, 1), "truncated")
    assert gloo(1, _read_from, recipe, home, 5) == ["batches come from step 5 and training stands at 4: begin again"]
    assert not issubclass(OutOfStep, WOULD_FAIL_AGAIN), "the workers are started again, with a feed from step 4"
