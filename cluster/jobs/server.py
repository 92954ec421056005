"""The job server of a running cluster: where it is, and what its refusals mean in one sentence."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

DASHBOARD_PORT = 8265
CONNECT_TIMEOUT_S = 5.0
# Loggers of Ray that print a line for each file they leave out; the last two set a level of their own.
TALKERS = ("ray", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")


@dataclass(frozen=True)
class JobResult:
    """A job that was submitted; status is Ray's (SUCCEEDED, FAILED, STOPPED, or PENDING when detached)."""

    job_id: str
    status: str
    exit_code: int | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class JobRow:
    """A job as it is listed. started_at, ended_at: seconds since 1970, None before."""

    job_id: str
    status: str
    command: str
    started_at: float | None
    ended_at: float | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def dashboard_address(address: str | None = None) -> str:
    """The HTTP address of the cluster's job server, from `address` or RAY_ADDRESS.

    http(s)://… is taken as it is; of another address only the host, with the dashboard's default port.
    """
    given = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not given or given == "local":
        raise UsageError("which cluster? Set RAY_ADDRESS, or give --address http://head:8265")
    if given.startswith(("http://", "https://")):
        return given.rstrip("/")
    host = given.rpartition("://")[2].rpartition(":")[0] or given
    return f"http://{'127.0.0.1' if given == 'auto' else host}:{DASHBOARD_PORT}"


@contextmanager
def job_server(address: str | None = None) -> Iterator[JobSubmissionClient]:
    """A client of the job server. Token authentication passes through RAY_AUTH_MODE and Ray's own places of a token.

    Raises UsageError within seconds where none answers, or it refuses the token; RunError where it refuses a request.
    """
    where = dashboard_address(address)
    _check_reachable(where)
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    for talker in TALKERS:
        logging.getLogger(talker).setLevel(logging.ERROR)
    try:
        with _instead_of_ray_address(where):
            client = JobSubmissionClient(where)
        yield client
    except AuthenticationError as error:
        raise UsageError(
            f"the job server at {where} doesn't take this shell's token: it wants RAY_AUTH_MODE=token and the "
            "cluster's own token, in RAY_AUTH_TOKEN or the file that RAY_AUTH_TOKEN_PATH names"
        ) from error
    except (ConnectionError, requests.RequestException, KeyError) as error:
        raise UsageError(
            f"what answers at {where} is no job server of Ray; it is the dashboard's address, port "
            f"{DASHBOARD_PORT} unless it was set"
        ) from error
    except RuntimeError as error:
        told = str(error).strip().splitlines() or [repr(error)]
        raise RunError(f"the cluster at {where} refused: {told[0]}") from error


@contextmanager
def _instead_of_ray_address(where: str) -> Iterator[None]:
    """Ray's client puts RAY_ADDRESS before the address that it is given, and this variable before both."""
    name = "RAY_API_SERVER_ADDRESS"
    before = os.environ.get(name)
    os.environ[name] = where
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _check_reachable(where: str) -> None:
    """The client itself waits as long as the network does."""
    parts = urlsplit(where)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as error:
        raise UsageError(
            f"no job server answers at {where} ({error}); is the cluster's dashboard on, its tunnel open (`ray "
            "dashboard`), and RAY_ADDRESS or --address right?"
        ) from error
