"""Hard negatives mined while training, without Ray: what enters when, and that a killed run goes on exactly."""

import json

import pytest
import yaml

from data_services.refresh import MINED, step_folder
from data_services.schema import UsageError
from tests.cluster.test_variants import HERE, merged
from tests.e2e.conftest import mini_recipe, write_pairs

STEPS, EVERY, DELAY = 8, 3, 2  # mined after step 3, read from step 5 on


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refresh")
    raw = mini_recipe(write_pairs(folder / "pairs"))
    raw["data"] |= {"steps": STEPS, "negatives": 2}
    filters = {"negatives": 2, "relative_margin": None, "from_rank": 1}
    raw["mine"] = {"every_steps": EVERY, "delay_steps": DELAY, "filters": filters}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(merged(raw, HERE | {"checkpoint": {"every_steps": 1, "asynchronous": False}})))
    return path


def train(recipe, home, dies_at=None):
    """Trains on this rank; at `dies_at` the feed ends as if the process had. (losses by step, negatives by step)."""
    import torch.distributed as dist

    from cluster.config import load_recipe
    from cluster.paths import RunPaths
    from cluster.prepare import prepare
    from cluster.worker import Task, train_on_worker
    from data_services.stream import LocalStream
    from tests.e2e.commands import steps_in

    rank, size = dist.get_rank(), dist.get_world_size()
    found = [None]
    if rank == 0:
        runs = sorted(path.parent for path in home.glob("*/recipe.json"))
        found = [str((RunPaths(runs[0]) if runs else prepare(load_recipe(recipe), home, None).run).root)]
    dist.broadcast_object_list(found)
    ready = prepare(load_recipe(recipe), home, RunPaths(home / found[0]))
    task = Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())
    stream = LocalStream(ready.reader, size, rank, ready.recipe.engine.budget_tokens)
    shown = {}

    def batches(start):
        for batch in stream(start):
            if batch.step == dies_at:
                raise ConnectionError("the reader's machine is gone")
            shown[batch.step] = int((batch.relations < 0).sum())
            yield batch

    try:
        train_on_worker(task, batches)
    except ConnectionError:
        return None, shown
    return [step["loss"] for step in steps_in(ready.run.metrics)], shown


def mined_folder(home):
    (run,) = (path.parent for path in home.glob("*/recipe.json"))
    return step_folder(run / "mined", EVERY)


def test_a_run_that_dies_while_it_mines_goes_on_with_the_same_losses(gloo, recipe, tmp_path):
    ((losses, shown),) = gloo(1, train, recipe, tmp_path / "whole")
    assert [shown[t] for t in range(STEPS)] == [0] * (EVERY + DELAY) + [64] * (STEPS - EVERY - DELAY)
    assert not step_folder(mined_folder(tmp_path / "whole").parent, 6).exists()  # nothing would read it
    ((nothing, before),) = gloo(1, train, recipe, tmp_path / "cut", EVERY + 1)
    assert nothing is None
    assert max(before) == EVERY
    ((again, after),) = gloo(1, train, recipe, tmp_path / "cut")
    assert min(after) == EVERY + 1
    assert again == losses
    told = [json.loads((mined_folder(tmp_path / name) / MINED).read_text()) for name in ("whole", "cut")]
    assert told[0] == told[1]


@pytest.mark.proof
def test_two_workers_read_what_one_of_them_mined(gloo, recipe, tmp_path):
    both = gloo(2, train, recipe, tmp_path / "two")
    shown = [sum(counts) for counts in zip(*(s.values() for _, s in both), strict=True)]
    assert shown == [0] * (EVERY + DELAY) + [64] * (STEPS - EVERY - DELAY)


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("data.negatives=0", "needs data.negatives above 0"),
        ("model.pooling=tokens", "mine.every_steps needs one vector"),
    ],
)
def test_what_would_mine_for_nothing_is_refused(recipe, key, told):
    from cluster.config import load_recipe

    with pytest.raises(UsageError, match=told):
        load_recipe(recipe, [key, "model.token_dim=16", "objective.similarity=max_sim"] if "tokens" in key else [key])
