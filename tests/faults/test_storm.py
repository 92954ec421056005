"""50 random kills of workers, nodes and the command over one run on three nodes change nothing of what it computes."""

from __future__ import annotations

import os

import pytest

from data_services.schema import SOURCE_SHIFT
from tests.e2e.commands import differing, results_in
from tests.e2e.plain import plain_run, train_without_ray
from tests.faults.storm import drawn, run_faults, storm_recipe

KILLS = int(os.environ.get("GYRE_KILLS", 50))


def test_a_storm_is_drawn_from_its_seed_and_the_run_outlasts_it(tmp_path):
    faults = drawn(3, 50)
    assert faults == drawn(3, 50) != drawn(4, 50)
    assert {fault.kind for fault in faults} == {"worker", "node", "driver"}
    assert storm_recipe(tmp_path / "pairs", faults)["data"]["steps"] > sum(fault.steps for fault in faults)


@pytest.mark.faults
def test_fifty_kills_leave_the_weights_of_an_undisturbed_run(gloo, tmp_path):
    from trainers.loop import rows_hash

    recipe, run, overcome = run_faults(tmp_path, drawn(int(os.environ.get("GYRE_SEED", 0)), KILLS))
    assert len(overcome) == KILLS
    (tmp_path / "quiet").mkdir()
    ready, task = plain_run(recipe, tmp_path / "quiet")
    assert gloo(2, train_without_ray, task, ready.reader) == [task.steps] * 2
    assert differing(results_in(run / "metrics.jsonl"), results_in(task.run.metrics)) == {}
    weights = [folder / "export" / "model.safetensors" for folder in (run, task.run.root)]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    taken = [step["rows_hash"] for step in results_in(run / "metrics.jsonl")]
    planned = [ready.plan.rows(t) for t in range(task.steps)]
    assert taken == [rows_hash(rows[:, 0] << SOURCE_SHIFT | rows[:, 1]) for rows in planned]
