"""Jobs of a cluster: listed, followed, stopped."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from cluster.jobs.server import JobResult, JobRow, job_server
from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

POLL_S = 0.5
TOLD_CHARACTERS = 400
STOP_TIMEOUT_S = 180.0  # longer than the grace that a job has


def list_jobs(address: str | None = None) -> list[JobRow]:
    """Submitted jobs, newest first."""
    with job_server(address) as client:
        return _listed(client)


def follow(job: str, *, address: str | None = None, on_log: Callable[[str], None] = print) -> JobResult:
    """The log of a job from its beginning until it ends. job: its name, or a unique beginning of it."""
    with job_server(address) as client:
        job_id = _found(client, job)
        follow_log(client, job_id, on_log)
        return ended(client, job_id)


def stop(job: str, *, address: str | None = None) -> JobResult:
    """Asks a job to end (SIGTERM: a training writes a checkpoint first) and waits until it has."""
    with job_server(address) as client:
        job_id = _found(client, job)
        client.stop_job(job_id)
        return ended(client, job_id, STOP_TIMEOUT_S)


def follow_log(client: JobSubmissionClient, job_id: str, on_log: Callable[[str], None]) -> None:
    asyncio.run(_tail(client, job_id, on_log))


async def _tail(client: JobSubmissionClient, job_id: str, on_log: Callable[[str], None]) -> None:
    rest = ""
    async for text in client.tail_job_logs(job_id):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            on_log(line)
    if rest:
        on_log(rest)


def ended(client: JobSubmissionClient, job_id: str, timeout_s: float = float("inf")) -> JobResult:
    """How a job ended. Its log may close a moment before the status is final."""
    deadline = time.monotonic() + timeout_s
    while not (status := client.get_job_status(job_id)).is_terminal():
        if time.monotonic() > deadline:
            raise RunError(f"job {job_id} still runs, {timeout_s:.0f} s after it was asked to end")
        time.sleep(POLL_S)
    details = client.get_job_info(job_id)
    if str(status) == "FAILED" and details.driver_exit_code is None:  # it never ran: its environment, its node
        told = " ".join((details.message or "the cluster doesn't say why").split())
        raise RunError(f"job {job_id} could not be run: {told[:TOLD_CHARACTERS]}")
    return JobResult(job_id, str(status), details.driver_exit_code)


def _listed(client: JobSubmissionClient) -> list[JobRow]:
    found = [
        JobRow(
            job.submission_id,
            str(job.status),
            _command(job.entrypoint),
            None if job.start_time is None else job.start_time / 1e3,
            None if job.end_time is None else job.end_time / 1e3,
        )
        for job in client.list_jobs()
        if job.submission_id is not None
    ]
    return sorted(found, key=lambda row: -(row.started_at or 0))


def _command(entrypoint: str) -> str:
    """As it was typed, where it is one of ours."""
    words = shlex.split(entrypoint)
    return shlex.join(["gyre", *words[3:]]) if words[1:3] == ["-m", "cluster.cli"] else entrypoint


def _found(client: JobSubmissionClient, job: str) -> str:
    names = [row.job_id for row in _listed(client)]
    matches = [job] if job in names else [name for name in names if name.startswith(job)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise UsageError(f"job {job!r} is ambiguous: {', '.join(matches)}")
    there = f"the newest there: {', '.join(names[:3])}" if names else "there are none"
    raise UsageError(f"no job {job!r} on this cluster; {there}")
