"""`gyre submit`: the same command as a job on a running cluster, with the working tree shipped along."""

from __future__ import annotations

import asyncio
import logging
import os
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD_PORT = 8265
AGENT_TIMEOUT_S = 60.0
# Loggers of Ray that print a line for each file they leave out; the last two set a level of their own.
TALKERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
# Names that are never shipped: what is large, local or rebuilt on the other side.
EXCLUDED = (
    ".git",
    ".venv",
    "runs",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".hypothesis",
    "build",
    "dist",
)
# Variables of this shell that the command means to take along; secrets are the cluster's own business.
PASSED = ("GYRE_HOME", "MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI", "HF_HUB_OFFLINE")
COMMANDS = (
    *("train", "evaluate", "compare", "models", "promote", "rollback", "serve", "export", "query"),
    *("doctor", "checkpoints"),
)


@dataclass(frozen=True)
class Submission:
    """What is handed to the cluster."""

    entrypoint: str
    runtime_env: dict[str, Any]


@dataclass(frozen=True)
class JobResult:
    """A job that was submitted; status is Ray's (SUCCEEDED, FAILED, STOPPED, or PENDING when detached)."""

    job_id: str
    status: str
    exit_code: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def prepare(command: Sequence[str], tree: Path) -> Submission:
    """The entry point and runtime environment of `gyre COMMAND …`, run from `tree`.

    Raises UsageError for a command that isn't one, or a tree without the packages.
    """
    if not command or command[0] not in COMMANDS:
        raise UsageError(f"submit what? Give one of {', '.join(COMMANDS)}, then its arguments")
    if not (tree / "cluster" / "cli.py").is_file():
        raise UsageError(f"{tree} is no working tree of gyre: run `gyre submit` in the folder that has cluster/")
    excludes = [f"**/{name}" for name in EXCLUDED] + [f"/{name}" for name in EXCLUDED]
    return Submission(
        entrypoint=shlex.join(["python", "-m", "cluster.cli", *command]),
        runtime_env={
            "working_dir": str(tree),
            "excludes": excludes,
            "env_vars": {name: os.environ[name] for name in PASSED if name in os.environ},
        },
    )


def dashboard_address(address: str | None = None) -> str:
    """The HTTP address of the cluster's job server, from `address` or RAY_ADDRESS.

    http(s)://… is taken as it is; of another address only the host, with the dashboard's default port.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not given or given == "local":
        raise UsageError("submit where? Set RAY_ADDRESS, or give --address http://head:8265")
    if given.startswith(("http://", "https://")):
        return given
    host = given.rpartition("://")[2].rpartition(":")[0] or given
    return f"http://{'127.0.0.1' if given == 'auto' else host}:{DASHBOARD_PORT}"


def submit(
    command: Sequence[str],
    *,
    address: str | None = None,
    tree: Path | None = None,
    detach: bool = False,
    on_log: Callable[[str], None] = print,
) -> JobResult:
    """Submits, follows the log through `on_log`, and returns how the job ended.

    Token authentication passes through RAY_AUTH_MODE and RAY_AUTH_TOKEN. Raises UsageError where no cluster
    answers, RunError where the job could not be started.
    """
    prepared = prepare(command, tree or Path.cwd())
    where = dashboard_address(address)
    from ray.job_submission import JobSubmissionClient

    for talker in TALKERS:
        logging.getLogger(talker).setLevel(logging.ERROR)
    try:
        client = JobSubmissionClient(where)
        job_id = _accepted(client, prepared)
    except ConnectionError as error:
        raise UsageError(
            f"no job server answers at {where}; is the cluster's dashboard on, and RAY_ADDRESS right?"
        ) from error
    except RuntimeError as error:
        raise RunError(f"the cluster at {where} refused the job: {str(error).splitlines()[0]}") from error
    if detach:
        return JobResult(job_id, "PENDING", None)
    asyncio.run(_follow(client, job_id, on_log))
    return _ended(client, job_id)


def _accepted(client: JobSubmissionClient, prepared: Submission) -> str:
    """The job's id. A head that has just started refuses jobs until its agent is up."""
    deadline = time.monotonic() + AGENT_TIMEOUT_S
    while True:
        try:
            return client.submit_job(entrypoint=prepared.entrypoint, runtime_env=prepared.runtime_env)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
        time.sleep(1)


async def _follow(client: JobSubmissionClient, job_id: str, on_log: Callable[[str], None]) -> None:
    rest = ""
    async for text in client.tail_job_logs(job_id):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            on_log(line)
    if rest:
        on_log(rest)


def _ended(client: JobSubmissionClient, job_id: str) -> JobResult:
    """The log may close a moment before the status is final."""
    while not (status := client.get_job_status(job_id)).is_terminal():
        time.sleep(0.5)
    details = client.get_job_info(job_id)
    return JobResult(job_id, str(status), details.driver_exit_code)
