"""Whatever ends the attempts of a run, and whenever: the weights are those of a run that nothing disturbed."""

from __future__ import annotations

import collections
import contextlib
import os
import statistics

import numpy as np
import pytest
import yaml

from data_services.schema import SOURCE_SHIFT
from tests.e2e.commands import differing, results_in
from tests.e2e.disk import small_disk
from tests.e2e.mini import mini_recipe
from tests.e2e.plain import plain_run, train_without_ray
from tests.faults.attempts import HOW, Attempts, drawn

EVERY_STEPS, MOST_STEPS = 5, 20  # a fault that waits for the fourth checkpoint takes so many
SAMPLE, ALL = 6, 48


@pytest.fixture
def disk(tmp_path):
    """(folder, whether it is a disk of its own that can be filled)"""
    with contextlib.ExitStack() as mounted:
        try:
            yield mounted.enter_context(small_disk(tmp_path / "disk", 48)), True
        except pytest.skip.Exception:
            yield tmp_path, False


def recipe_at(folder, pairs, steps):
    recipe = mini_recipe(pairs)
    recipe["data"]["steps"] = steps
    recipe["checkpoint"] = {"every_steps": EVERY_STEPS, "keep": 2}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def through_faults(gloo, pairs, disk, folder, seed, count):
    """What was met on the way to weights, results and rows that are the undisturbed run's."""
    from trainers.checkpoint import committed
    from trainers.loop import rows_hash

    place, own = disk
    faults = drawn(seed, count, own)
    recipe = recipe_at(folder, pairs, steps=2 * MOST_STEPS + sum(fault.steps + MOST_STEPS for fault in faults))
    ready, task = plain_run(recipe, place)
    attempts = Attempts(task, ready.reader, place)
    attempts.through(faults)
    (folder / "quiet").mkdir()
    quiet, quiet_task = plain_run(recipe, folder / "quiet")
    assert gloo(2, train_without_ray, quiet_task, quiet.reader) == [task.steps] * 2

    assert differing(results_in(task.run.metrics), results_in(quiet_task.run.metrics)) == {}
    weights = [t.run.export / "model.safetensors" for t in (task, quiet_task)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for one, other in zip(*(committed(t.run.checkpoints) for t in (task, quiet_task)), strict=True):
        one.verify()
        assert [f.read_bytes() for f in sorted(one.folder.glob("*.safetensors"))] == [
            f.read_bytes() for f in sorted(other.folder.glob("*.safetensors"))
        ]
    taken = [step["rows_hash"] for step in results_in(task.run.metrics)]
    planned = [ready.plan.rows(t) for t in range(task.steps)]
    assert taken == [rows_hash(rows[:, 0] << SOURCE_SHIFT | rows[:, 1]) for rows in planned]
    assert len(np.unique(np.concatenate(planned[: 480 // 32]), axis=0)) == 480, "an epoch takes every row once"
    return attempts.met


@pytest.mark.proof  # four minutes
def test_a_run_in_attempts_gives_the_weights_of_an_undisturbed_one(gloo, pairs, disk, tmp_path):
    through_faults(gloo, pairs, disk, tmp_path, seed=0, count=SAMPLE)


@pytest.mark.faults
def test_many_attempts_give_the_weights_of_an_undisturbed_run(gloo, pairs, disk, tmp_path, capsys):
    met = through_faults(gloo, pairs, disk, tmp_path, seed=int(os.environ.get("GYRE_SEED", 1)), count=ALL)
    by_kind = collections.defaultdict(list)
    for fault in met:
        by_kind[fault.kind].append(fault)
    with capsys.disabled():
        print("\n| fault | injected how | times | lost | seconds to recover |\n|---|---|---|---|---|")
        for kind, its in by_kind.items():
            lost, seconds = statistics.mean(m.lost_steps for m in its), sorted(m.seconds for m in its)
            spread = f"{statistics.median(seconds):.1f} ({seconds[0]:.1f} to {seconds[-1]:.1f})"
            print(f"| {kind} | {HOW[kind]} | {len(its)} | {lost:.1f} steps, computed again | {spread} |")
