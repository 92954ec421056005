"""Real runs, each made once for the whole session and looked at by several tests.

One run goes through everything, because every start of workers costs a minute on a slow machine. Across two nodes a
worker is killed and the command asked to stop; resumed on a cluster of its own, the driver is killed; resumed once
more, on the two nodes, it ends. What it computed must be, bit for bit, what workers compute that nothing interrupts
and Ray has no part in.
"""

from __future__ import annotations

import json
import shutil
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from tests.e2e.commands import Ended, Shell, results_in, steps_in, training_workers
from tests.e2e.mini import STEPS, mini_recipe, write_pairs
from tests.e2e.nodes import Nodes
from tests.e2e.plain import plain_run, train_without_ray

# None is a multiple of checkpoint.every_steps: there is always something to replay.
WORKER_KILLED, ASKED_TO_STOP, DRIVER_KILLED = 8, 19, 32


@pytest.fixture(scope="session")
def shell(tmp_path_factory):
    temporary = Path(tempfile.mkdtemp(prefix="gyre-", dir="/tmp"))
    shell = Shell(tmp_path_factory.mktemp("e2e"), temporary)
    yield shell
    shell.close()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="session")
def recipe(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("recipes") / "mini.yaml"
    path.write_text(yaml.safe_dump(mini_recipe(pairs)))
    return path


@pytest.fixture(scope="session")
def two_nodes(shell):
    nodes = Nodes(shell)
    yield nodes
    nodes.close()


@dataclass(frozen=True)
class Stopped:
    """workers, nodes: of the run before one of them was killed, and the node of each; healed: its workers then."""

    workers: list[psutil.Process]
    nodes: list[int]
    healed: list[psutil.Process]
    ended: Ended


@pytest.fixture(scope="session")
def stopped(shell, recipe, two_nodes):
    """Workers on two nodes; one is killed, later the command gets SIGTERM."""
    running = shell.start("train", recipe, "cluster.cpus_per_worker=2", run="mini", env=two_nodes.env)
    running.until_step(WORKER_KILLED)
    workers = training_workers(two_nodes.processes())
    nodes = [worker.ppid() for worker in workers]
    workers[-1].kill()
    running.until_step(ASKED_TO_STOP)
    healed = training_workers(two_nodes.processes())
    running.signal(signal.SIGTERM)
    return Stopped(workers, nodes, healed, running.wait())


@pytest.fixture(scope="session")
def driver_killed(shell, recipe, stopped):
    """The same run, resumed on a cluster in the process until its process group is killed: steps there were then."""
    running = shell.start("train", recipe, "--resume", shell.run_folder("mini").name, run="mini")
    running.until_step(DRIVER_KILLED)
    running.kill_group()
    return len(steps_in(shell.metrics("mini")))


@pytest.fixture(scope="session")
def whole(shell, recipe, two_nodes, driver_killed, tmp_path_factory) -> tuple[Ended, dict[str, Any]]:
    """The same run, resumed by the beginning of its name, at its end: (what the command said, its JSON)."""
    file = tmp_path_factory.mktemp("json") / "whole.json"
    ended = shell("train", recipe, "--resume", "mini", "--json", file, env=two_nodes.env)
    assert ended.code == 0, ended
    return ended, json.loads(file.read_text())


@dataclass(frozen=True)
class Undisturbed:
    """results: of every step, see `results_in`; export: the model's folder."""

    results: list[dict[str, Any]]
    export: Path


@pytest.fixture(scope="session")
def undisturbed(gloo, recipe, tmp_path_factory):
    """What two workers compute that nothing interrupts, without Ray."""
    ready, task = plain_run(recipe, tmp_path_factory.mktemp("plain"))
    assert gloo(2, train_without_ray, task, ready.reader) == [STEPS, STEPS]
    return Undisturbed(results_in(ready.run.metrics), ready.run.export)
