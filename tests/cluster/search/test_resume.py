"""kill -9 of a search's driver, at three moments: what was done is not done again, what was under way goes on."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import yaml

from cluster.search.record import StudyPaths
from tests.cluster.search import surface
from tests.e2e.commands import PATIENCE_S, SHELL, TREE
from tests.e2e.conftest import mini_recipe, write_pairs
from trainers.checkpoint import write_json

SCRIPT = """
import sys
from cluster.config import load_recipe
from cluster.search.study import search
search(load_recipe(sys.argv[1]), resume=sys.argv[2] or None, work="tests.cluster.search.surface:Surface")
"""


@pytest.fixture
def start(tmp_path, root):
    """Starts the search, of three trials, in a process of its own; `resume` goes on with one."""
    raw = mini_recipe(write_pairs(tmp_path / "pairs"))
    raw["data"]["steps"] = 9
    raw["seed"] = surface.PACED
    space = {"objective.temperature": {"kind": "uniform", "low": 0.05, "high": 0.5}}
    raw["search"] = {"space": space, "trials": 3, "stop_early": False}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    started = []

    def run(resume=""):
        command = [sys.executable, "-c", SCRIPT, str(path), resume]
        env = SHELL | {"GYRE_HOME": str(root), "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=env, cwd=TREE, start_new_session=True))
        return started[-1]

    yield run
    for process in started:
        kill(process)


def kill(process):
    """kill -9; returns when all that it had started is gone as well."""
    if process.poll() is not None:
        return
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    left = psutil.wait_procs(children, timeout=PATIENCE_S)[1]
    assert not left, f"Ray's processes outlive their driver: {left}"


def until(process, true):
    deadline = time.monotonic() + PATIENCE_S
    while not true():
        assert process.poll() is None, "the search ended by itself"
        assert time.monotonic() < deadline
        time.sleep(0.05)


def begun(study, number):
    """The step of each time that the trial was begun."""
    path = study.trial(number).run.root / "begun.jsonl"
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


@pytest.mark.proof
def test_a_search_killed_three_times_does_nothing_twice(start, root):
    """Each kill finds the search where it waits for this test, however long its processes take to die."""

    def study():
        return StudyPaths(next(root.glob("mini-search-*")))

    def allow(**steps):
        """How far each trial may go."""
        write_json(study().root / surface.PACE, {name.removeprefix("trial_"): step for name, step in steps.items()})

    process = start()
    until(process, lambda: list(root.glob("mini-search-*")) and begun(study(), 0))
    kill(process)  # the first trial is before its first check
    settings = study().trials()[0].settings
    allow(trial_0000=5)
    process = start(study().search_id)
    until(process, lambda: len(study().trials()[0].checks) == 2)
    kill(process)  # it is between two checks
    allow(trial_0000=9, trial_0001=2)
    process = start(study().search_id)
    until(process, lambda: len(study().trials()) > 1 and study().trials()[1].checks)
    kill(process)  # one trial is whole, another under way
    first = study().trials()[0]
    whole = os.stat(study().trial(0).checks).st_mtime_ns
    allow(trial_0000=9, trial_0001=9, trial_0002=9)
    assert start(study().search_id).wait(PATIENCE_S) == 0
    done = study().trials()
    assert [t.outcome.state for t in done] == ["completed"] * 3
    assert done[0] == first
    assert done[0].settings == settings
    assert os.stat(study().trial(0).checks).st_mtime_ns == whole
    for trial in done:
        assert [check.step for check in trial.checks] == [1, 3, 9]
        assert trial.worker_seconds >= trial.checks[-1].worker_seconds > 0
    assert [begun(study(), number) for number in range(3)] == [[0, 0, 3], [0, 1], [0]]
    assert len(json.loads(study().result.read_text())["trials"]) == 3
