"""One small recipe on a GPU, from the data to a registered, exported model, as a user runs it."""

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
import yaml

from tests.e2e.commands import Shell, steps_in
from tests.e2e.conftest import mini_recipe, write_pairs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

STEPS = 24


@pytest.fixture
def shell(tmp_path):
    temporary = Path(tempfile.mkdtemp(prefix="gyre-", dir="/tmp"))  # Ray's sockets need a short path
    shell = Shell(tmp_path, temporary)
    yield shell
    shell.close()
    shutil.rmtree(temporary, ignore_errors=True)


def test_a_recipe_trains_on_a_gpu(shell, tmp_path):
    recipe = mini_recipe(write_pairs(tmp_path / "pairs"))
    recipe["data"]["steps"] = STEPS
    recipe["cluster"] |= {"workers": 1, "gpus_per_worker": 1}
    path, result = tmp_path / "recipe.yaml", tmp_path / "result.json"
    path.write_text(yaml.safe_dump(recipe))
    ended = shell("train", path, "--json", result)
    assert ended.code == 0, ended
    steps = steps_in(shell.metrics("mini"))
    assert len(steps) == STEPS
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (Path(json.loads(result.read_text())["export"]) / "modules.json").is_file()
