"""A run whose worker stands still once, and meets a loss that isn't a number, ends well and says what it met."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import yaml

from tests.e2e.commands import Shell, steps_in
from tests.e2e.mini import mini_recipe
from tests.faults.losses import NAN_AT, STUCK_AT

STEPS, PATIENCE_S = 20, 40


@pytest.fixture
def shell(tmp_path):
    temporary = Path(tempfile.mkdtemp(prefix="gyre-", dir="/tmp"))
    shell = Shell(tmp_path, temporary)
    yield shell
    shell.close()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.faults
def test_a_stuck_worker_and_a_loss_that_is_no_number(shell, pairs, tmp_path):
    recipe = mini_recipe(pairs) | {"name": "troubled", "faults": {"timeout_s": PATIENCE_S, "compare_every_steps": 5}}
    recipe["data"]["steps"] = STEPS
    recipe["objective"] = {
        "kind": "custom",
        "path": "tests.faults.losses:Troubled",
        "options": {"marker": str(tmp_path / "stuck")},
    }
    (tmp_path / "troubled.yaml").write_text(yaml.safe_dump(recipe))
    ended = shell("train", tmp_path / "troubled.yaml", "--json", tmp_path / "troubled.json")
    assert ended.code == 0, ended

    run = shell.run_folder("troubled")
    stacks = (run / "failure.log").read_text()
    assert "worker-00000 was stuck" in stacks
    stuck = stacks[stacks.index("worker-00001 was stuck") :]
    assert "losses.py" in stuck.split("worker-00000")[0], "the stack of the one that stood still"
    assert STUCK_AT < NAN_AT

    steps = steps_in(run / "metrics.jsonl")
    assert [step["step"] for step in steps if step["skipped"]] == [NAN_AT]
    assert steps[NAN_AT]["grad_norm"] is None

    result = json.loads((tmp_path / "troubled.json").read_text())
    assert result["faults"]["not_finite"] == 1
    assert [worker["rank"] for worker in result["workers"]] == [0, 1]
    assert f"step {NAN_AT} was skipped" in ended.out
