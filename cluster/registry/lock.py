"""One promotion of a model at a time.

MLflow has no compare-and-set. Beside a SQLite store there is a file to lock, and that is exact. On a server the lease
is a tag of the registered model: written, left to settle, and read a second time, so that of two that wrote at once
only the later one finds itself there. A lease that nobody changed for STALE_S, by the reader's own clock, is a dead
one's.

What remains possible on a server: a holder that sleeps (a suspended machine, a request that hangs) for longer than
STALE_S between its last look at the lease and the write of the alias moves the alias although another has moved it
since. Both promotions are then on record in their versions' tags, and the alias says which one counts.
"""

from __future__ import annotations

import fcntl
import getpass
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.tracking import store_errors
from data_services.schema import Refused, RunError

if TYPE_CHECKING:
    from mlflow import MlflowClient

LEASE = "gyre.lease"
SETTLE_S = 1.0  # longer than two writers' requests lie apart that both saw no lease
STALE_S = 15.0
HOLD_S = STALE_S / 2  # a request that a holder sent in time has arrived before others take over
WAIT_S = 60.0

StillMine = Callable[[], None]
"""Raises Refused where the lease is another's by now, RunError where it may soon be; called before each write that
others see."""


@contextmanager
def alone(mlflow: MlflowClient, name: str) -> Iterator[StillMine]:
    """The only one to move the aliases of model `name`; waits for another, RunError where that takes WAIT_S."""
    uri = str(mlflow._registry_uri)
    if uri.startswith("sqlite:///"):
        with _locked(Path(uri.removeprefix("sqlite:///")).with_suffix(".lock")):
            yield lambda: None
        return
    lease = _Lease(mlflow, name)
    lease.take()
    try:
        yield lease.check
    finally:
        with suppress(RunError):  # a server that is gone: whoever comes next waits until the lease is stale
            lease.leave()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + WAIT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise RunError(f"{path} is held by another promotion for {WAIT_S:.0f} s: try again") from None
                time.sleep(0.05)
        yield


class _Lease:
    def __init__(self, mlflow: MlflowClient, name: str) -> None:
        self._mlflow, self._name = mlflow, name
        self._own = f"{who()}@{socket.gethostname()} {uuid.uuid4().hex}"
        self._taken_at = 0.0

    def take(self) -> None:
        deadline = time.monotonic() + WAIT_S
        seen, since = self._read(), time.monotonic()
        while True:
            now = time.monotonic()
            if not seen or now - since > STALE_S:
                self._taken_at = now
                self._write(self._own)
                time.sleep(SETTLE_S)
            there = self._read()
            if there == self._own:
                return
            if there != seen:
                seen, since = there, time.monotonic()
            if now > deadline:
                holder = seen.rpartition(" ")[0]
                raise RunError(f"{holder} has been promoting {self._name} for {WAIT_S:.0f} s: try again")
            time.sleep(random.uniform(0.1, 0.4))

    def check(self) -> None:
        if self._read() != self._own:
            raise Refused(f"another promotion of {self._name} took over; nothing was moved, run it again")
        if (taken := time.monotonic() - self._taken_at) > HOLD_S:
            raise RunError(f"the server took {taken:.0f} s for what takes one; nothing was moved, run it again")

    def leave(self) -> None:
        if self._read() == self._own:
            self._write("")

    def _read(self) -> str:
        with store_errors(self._mlflow.tracking_uri):
            return self._mlflow.get_registered_model(self._name).tags.get(LEASE, "")

    def _write(self, value: str) -> None:
        with store_errors(self._mlflow.tracking_uri):
            self._mlflow.set_registered_model_tag(self._name, LEASE, value)


def who() -> str:
    """The user of this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"
