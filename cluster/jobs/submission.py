"""What is handed to the cluster: the command as it was typed, the working tree, and where asked its packages."""

from __future__ import annotations

import difflib
import os
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.jobs.running import ended, follow_log
from cluster.jobs.secrets import refuse_in_command, refuse_password, secrets_here
from cluster.jobs.server import JobResult, job_server
from cluster.jobs.tree import collect, pack
from data_services.schema import UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

AGENT_TIMEOUT_S = 60.0
# Variables of this shell that the command means to take along; secrets are the cluster's own business.
PASSED = ("GYRE_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "HF_HUB_OFFLINE")
# `gyre stop` is SIGTERM: time for a last checkpoint before Ray kills. Its own choice is three seconds.
GRACE = {"RAY_JOB_STOP_WAIT_TIME_S": "120"}
LOCK = "requirements.lock"
ENTRYPOINT = ("python", "-m", "cluster.cli")
# They speak to the job server themselves.
NOT_SUBMITTED = ("submit", "jobs", "stop")


@dataclass(frozen=True)
class Submission:
    """entrypoint: the job's command line; runtime_env: Ray's, but for the working directory."""

    entrypoint: str
    runtime_env: dict[str, Any]


def commands() -> list[str]:
    """Names of the commands that can be submitted: all but those that speak to the job server."""
    import typer.main

    from cluster.cli import app

    return [name for name in typer.main.get_group(app).commands if name not in NOT_SUBMITTED]


def prepare(command: Sequence[str], tree: Path, install: bool = False) -> Submission:
    """The entry point and runtime environment of `gyre COMMAND …`, run from `tree`.

    install: in an environment made of the tree's requirements.lock, once for each node and lock; Ray keeps it.
    Raises UsageError for a command that isn't one, a tree without the packages, or a secret in the command.
    """
    known = commands()
    if not command or command[0] not in known:
        near = difflib.get_close_matches(command[0], known, 1) if command else []
        told = f"did you mean {near[0]}?" if near else f"give one of {', '.join(known)}, then its arguments"
        raise UsageError(
            f"submit what? {command[0]!r} can't be submitted; {told}" if command else f"submit what? {told}"
        )
    if not (tree / "cluster" / "cli.py").is_file():
        raise UsageError(f"{tree} is no working tree of gyre: run `gyre submit` in the folder that has cluster/")
    refuse_in_command(command, secrets_here())
    passed = {name: os.environ[name] for name in PASSED if name in os.environ}
    for name, value in passed.items():
        refuse_password(name, value)
    environment: dict[str, Any] = {"env_vars": passed | GRACE}
    if install:
        environment["pip"] = {"packages": _locked(tree), "pip_install_options": ["--disable-pip-version-check"]}
    return Submission(shlex.join([*ENTRYPOINT, *command]), environment)


def _locked(tree: Path) -> list[str]:
    """Requirements of the lock file, one each. Ray names the environment by them: the same lock, the same one."""
    lock = tree / LOCK
    if not lock.is_file():
        raise UsageError(f"--install makes the job's environment of {lock}, which isn't there")
    lines = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    return [line for line in lines if line]


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    tree: Path | None = None,
    name: str | None = None,
    install: bool = False,
    detach: bool = False,
    on_log: Callable[[str], None] = print,
) -> JobResult:
    """Ships the tree, submits, follows the log through `on_log`, and returns how the job ended.

    name: of the job, None: one is given. Raises UsageError where no cluster answers, the name is taken or the tree is
    over the limit, RunError where the job could not be started.
    """
    root = tree or Path.cwd()
    prepared, shipped = prepare(command, root, install), collect(root)
    with tempfile.TemporaryDirectory() as folder:
        package = pack(shipped, Path(folder) / "tree.zip", secrets_here())
        with job_server(address) as client:
            on_log(f"shipping {shipped}")
            job_id = _accepted(client, prepared, package, name)
            on_log(f"job {job_id} submitted")
            if detach:
                return JobResult(job_id, "PENDING", None)
            follow_log(client, job_id, on_log)
            return ended(client, job_id)


def _accepted(client: JobSubmissionClient, prepared: Submission, package: Path, name: str | None) -> str:
    """The job's id. A head that has just started refuses jobs until its agent is up."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            environment = prepared.runtime_env | {"working_dir": str(package)}
            return client.submit_job(entrypoint=prepared.entrypoint, runtime_env=environment, submission_id=name)
        except RuntimeError as error:
            if name and "already exists" in str(error):
                raise UsageError(
                    f"there is a job {name!r} already: choose another --name, or see `gyre jobs`"
                ) from error
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)
