"""deploy/slurm.sh, with `srun` and `scontrol` that start real Ray nodes on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.pool import free_port
from tests.e2e.commands import PATIENCE_S, TREE

SCRIPT = TREE / "deploy" / "slurm.sh"
# A step runs here; a node has its own temporary folder and its share of the CPUs.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in --nodelist=*) node=${1#*=} ;; esac; shift; done
[[ -e $STUBS/$node.down ]] && { echo "srun: error: $node is down" >&2; exit 1; }
mkdir -p "$STUBS/$node" && export TMPDIR=$STUBS/$node SLURM_CPUS_ON_NODE=2
exec "$@"
"""
SCONTROL = "#!/bin/sh\nprintf 'one\\ntwo\\n'\n"


@pytest.fixture
def sbatch(shell, tmp_path):
    """Runs the script as sbatch does."""
    # Ray's sockets lie under the temporary folder of a node, and their paths are limited to 107 bytes.
    stubs = Path(shell.env["RAY_TMPDIR"]) / "s"
    stubs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    job = {"SLURM_JOB_ID": str(free_port()), "SLURM_JOB_NODELIST": "node[1-2]", "HEAD_IP": "127.0.0.1"}
    # Kept as it is, not resolved: the interpreter behind the link knows nothing of the environment.
    environment = shell.env | job | {"STUBS": str(stubs), "VENV": str(Path(sys.executable).parents[1])}
    environment["PATH"] = f"{stubs}{os.pathsep}{environment['PATH']}"

    def run(*command):
        words = [SCRIPT, *map(str, command)]
        done = subprocess.run(words, cwd=TREE, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        assert not list(shell.home.glob(".slurm-*")), "the token is gone with the job"
        return done

    run.stubs = stubs
    return run


@pytest.mark.proof
def test_a_command_runs_on_a_node_for_each_machine_and_ends_as_it_ends(sbatch, tmp_path):
    file = tmp_path / "found.json"
    done = sbatch("doctor", "--cluster", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ray on 2 nodes: one two" in done.stdout
    assert [node["cpus"] for node in json.loads(file.read_text())["nodes"].values()] == [2, 2]


@pytest.mark.proof
def test_a_node_that_does_not_start_is_told_with_its_log(sbatch):
    (sbatch.stubs / "one.down").touch()
    done = sbatch("doctor")
    (sbatch.stubs / "one.down").unlink()
    assert done.returncode == 1
    assert "no Ray node on one:\nsrun: error: one is down" in done.stderr


def test_outside_of_a_job_the_script_says_how_it_is_run(tmp_path):
    environment = {"PATH": os.environ["PATH"]}
    for arguments, told in (([], "usage: sbatch deploy/slurm.sh COMMAND"), (["doctor"], "run it with sbatch")):
        done = subprocess.run([SCRIPT, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode != 0
        assert told in done.stderr
    assert not any(tmp_path.iterdir())


def test_shellcheck_has_nothing_to_say():
    tool = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([tool, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
