"""`gyre submit`: the working tree is shipped, the log streamed, the exit code is the job's."""

import json

import pytest

from tests.e2e.commands import differing, results_in
from tests.e2e.conftest import STEPS


@pytest.fixture
def submit(shell, two_nodes):
    def run(*command):
        address = ("--address", two_nodes.job_server())
        return shell("submit", *address, *command, env=two_nodes.env)

    return run


def test_the_log_and_the_exit_code_are_those_of_the_job(submit, recipe):
    ended = submit("train", recipe, "optimizer.lrr=1")
    assert ended.code == 2, ended
    assert "gyre: command line: unknown key optimizer.lrr; did you mean optimizer.lr?" in ended.out
    assert "Traceback" not in ended.out + ended.err


@pytest.mark.proof
def test_a_submitted_recipe_trains_as_one_that_runs_here(submit, recipe, shell, whole, undisturbed, tmp_path):
    """And through Ray without interruption."""
    file = tmp_path / "result.json"
    ended = submit("train", recipe, "name=shipped", "cluster.cpus_per_worker=2", "--json", file)
    assert ended.code == 0, ended
    assert json.loads(file.read_text())["metrics"] == whole[1]["metrics"]
    assert differing(results_in(shell.metrics("shipped")), undisturbed.results) == {}
    assert f"step {STEPS}/{STEPS}" in ended.out
