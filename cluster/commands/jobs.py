"""`gyre submit`, `jobs` and `stop`, commands as jobs of a running cluster: thin calls of typed functions."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.options import Json, check_json, open_console, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from cluster.jobs import JobResult, JobRow

# Options after the command are the command's own.
REST_OF_THE_LINE = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
FAILED = 1

Address = Annotated[str | None, typer.Option(metavar="URL", help="The job server; else from RAY_ADDRESS.")]
Job = Annotated[str, typer.Argument(metavar="JOB", help="A job's name, or the beginning of one.")]


def submit(
    command: Annotated[list[str], typer.Argument(metavar="COMMAND …", help="Any gyre command and its arguments.")],
    address: Address = None,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Of the job; else one is given.")] = None,
    install: Annotated[
        bool, typer.Option("--install", help="In an environment of requirements.lock, made once on each node.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Don't follow the log.")] = False,
    json_file: Json = None,
) -> None:
    """Run a command as a job on a running cluster: ships the working tree, streams the log, ends as it ends."""
    from cluster.jobs import submit as submit_job

    check_json(json_file)
    job = submit_job(command, address=address, name=name, install=install, detach=detach)
    write_json(json_file, job.as_dict())
    _end_as(job)


def jobs(
    job: Annotated[str | None, typer.Argument(metavar="[JOB]", help="Follow the log of this one.")] = None,
    address: Address = None,
    json_file: Json = None,
) -> None:
    """List the jobs of a cluster, newest first; with JOB: its log, until it ends, and its exit code."""
    from cluster.jobs import follow, list_jobs

    check_json(json_file)
    if job is not None:
        followed = follow(job, address=address)
        write_json(json_file, followed.as_dict())
        _end_as(followed)
        return
    listed = list_jobs(address)
    write_json(json_file, [row.as_dict() for row in listed])
    _show_jobs(open_console(), listed)


def stop(job: Job, address: Address = None, json_file: Json = None) -> None:
    """End a job as SIGTERM ends a command: a training writes a checkpoint first. Returns when it has ended."""
    from cluster.jobs import stop as stop_job

    check_json(json_file)
    stopped = stop_job(job, address=address)
    write_json(json_file, stopped.as_dict())
    _show_job(open_console(), stopped)


def _end_as(job: JobResult) -> None:
    """With the job's exit code; one that was stopped has failed."""
    _show_job(open_console(), job)
    if job.status not in ("SUCCEEDED", "PENDING"):
        raise typer.Exit(job.exit_code or FAILED)


def _show_job(console: Console, job: JobResult) -> None:
    running = f"; follow it with `gyre jobs {job.job_id}`, end it with `gyre stop {job.job_id}`"
    follow = running if job.status == "PENDING" else ""
    console.print(f"job {job.job_id} {job.status.lower()}{follow}", highlight=False, soft_wrap=True)


def _show_jobs(console: Console, listed: list[JobRow]) -> None:
    from rich.markup import escape

    from cluster.console import duration, show_table

    if not listed:
        console.print("no jobs yet; `gyre submit COMMAND …` makes one")
        return
    now = time.time()
    rows = []
    for job in listed:
        took = "" if job.started_at is None else duration((job.ended_at or now) - job.started_at)
        began = "" if job.started_at is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(job.started_at))
        rows.append((job.job_id, job.status.lower(), began, took, escape(job.command)))
    show_table(console, ("job", "state", "began", "took", "command"), rows)
