"""One run of two workers in many attempts: each ends in an injected fault, drawn from a seed; the last one ends well.

The workers are started as a launcher without Ray starts them, forked from a process that has imported everything, so
that an attempt takes a second or two and many fit into a test.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.distributed.pool import free_port
from tests.e2e.commands import steps_in
from tests.e2e.disk import fill
from tests.e2e.plain import train_without_ray

WORLD_SIZE = 2
PATIENCE_S = 300
IMPORTED = ["torch", "deepspeed", "transformers", "safetensors.torch", "tests.e2e.plain", "trainers.step"]
HOW = {
    "worker": "kill -9 of one of two workers",
    "both": "kill -9 of both workers at once",
    "starting": "kill -9 of a worker that starts or restores",
    "saving": "kill -9 of a worker that writes a checkpoint",
    "slow disk": "each fsync takes 0.3 s; then kill -9",
    "clock skew": "one worker's clock is hours ahead or behind; then kill -9",
    "disk full": "a tmpfs filled to its last 64 KiB until a checkpoint fails",
    "read-only": "the folder of checkpoints mounted read-only until one fails",
}
DISKS = ("disk full", "read-only")


@dataclass(frozen=True)
class Fault:
    """Comes `steps` steps into an attempt and `delay_s` later, to worker `rank`."""

    kind: str
    rank: int
    steps: int
    delay_s: float
    skew_s: float


@dataclass(frozen=True)
class Met:
    """lost_steps: computed again; seconds: from the fault to the first step after it."""

    kind: str
    lost_steps: int
    seconds: float


def drawn(seed: int, count: int, disks: bool) -> list[Fault]:
    """All kinds, then all again in another order, and so on; without `disks` those that need a mount are left out."""
    draw = random.Random(seed)
    possible, kinds = [kind for kind in HOW if disks or kind not in DISKS], list[str]()
    while len(kinds) < count:
        kinds += draw.sample(possible, len(possible))
    return [
        Fault(kind, draw.randrange(WORLD_SIZE), draw.randint(1, 9), draw.uniform(0, 0.1), draw.choice([-1, 1]) * 36e3)
        for kind in kinds[:count]
    ]


def work(rank: int, port: int, task: Any, reader: Any, fault: Fault | None) -> None:
    """A worker; whatever leaves it ends its process."""
    import torch.distributed as dist

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD_SIZE)}
    inject(rank, fault)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD_SIZE)
    train_without_ray(task, reader)


def inject(rank: int, fault: Fault | None) -> None:
    """What is wrong with this worker from the start."""
    from trainers import saving

    if fault is None:
        return
    if fault.kind == "slow disk":
        sync = os.fsync
        os.fsync = lambda file: (time.sleep(0.3), sync(file))[1]
    if fault.kind == "clock skew" and rank == fault.rank:
        now = time.time
        time.time = lambda: now() + fault.skew_s
    if fault.kind == "saving" and rank == fault.rank:
        begun = itertools.count(1)  # a share, the state, the marker: on rank 0 all of them, else the shares
        for name in ("write_tensors", "write_json", "write_manifest"):
            setattr(saving, name, _killed_at(fault.steps % 4 + 1, begun, getattr(saving, name)))


def _killed_at(number: int, begun: Iterator[int], write: Callable[..., Any]) -> Callable[..., Any]:
    def write_until_killed(path: Path, *args: Any) -> Any:
        from trainers import saving

        if path.name != saving.LEASE and next(begun) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, *args)

    return write_until_killed


class Attempts:
    """The run of `task`, whose home is on `disk` where that is a small one of its own."""

    def __init__(self, task: Any, reader: Any, disk: Path | None) -> None:
        self._task, self._reader, self._disk = task, reader, disk
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(IMPORTED)
        self._workers: list[Any] = []
        self._first_step_at = 0.0
        self.met: list[Met] = []

    def through(self, faults: list[Fault]) -> None:
        """All faults in turn, then to the end."""
        unmet: list[tuple[str, int, float]] = []  # kind, steps reached, time of faults since the last step
        for fault in [*faults, None]:
            asked = time.time()
            self._start(fault)
            try:
                if fault and fault.kind == "starting":
                    time.sleep(fault.delay_s * 10)
                else:
                    start = self._until_step(asked, fault.steps if fault and fault.kind != "saving" else 1)
                    self.met += [Met(kind, reached - start, self._first_step_at - at) for kind, reached, at in unmet]
                    unmet.clear()
                if fault:
                    at = self._meet(fault)
                    unmet.append((fault.kind, len(steps_in(self._task.run.metrics)), at))
                else:
                    self._wait(0)
            finally:
                self._kill(range(WORLD_SIZE))

    def _start(self, fault: Fault | None) -> None:
        port = free_port()
        self._workers = [
            self._context.Process(target=work, args=(rank, port, self._task, self._reader, fault))
            for rank in range(WORLD_SIZE)
        ]
        for worker in self._workers:
            worker.start()

    def _until_step(self, asked: float, steps: int) -> int:
        """Returns once the attempt has taken so many steps, the step that it began with."""
        run, deadline = self._task.run, time.monotonic() + PATIENCE_S
        self._first_step_at = 0.0
        while True:
            assert time.monotonic() < deadline, "no step after a fault"
            dead = [w.exitcode for w in self._workers if w.exitcode not in (None, 0)]
            if run.startup.exists() and run.startup.stat().st_mtime >= asked:  # the file system's clock isn't skewed
                start = json.loads(run.startup.read_text())["start"]
                now = len(steps_in(run.metrics))
                if now > start and not self._first_step_at:
                    self._first_step_at = time.time()
                if now >= start + steps or dead or all(w.exitcode == 0 for w in self._workers):
                    return start
            assert not dead, f"a worker ended before its first step: {dead}"
            time.sleep(0.005)

    def _meet(self, fault: Fault) -> float:
        """Brings the fault about and returns when, once the attempt has ended."""
        time.sleep(fault.delay_s)
        began = time.time()
        if fault.kind in DISKS:
            assert self._disk is not None
            with full(self._disk) if fault.kind == "disk full" else read_only(self._task.run.checkpoints):
                self._wait(1)
        elif fault.kind == "saving":
            self._workers[fault.rank].join(PATIENCE_S)
        else:
            self._kill([fault.rank] if fault.kind != "both" else range(WORLD_SIZE))
        return began

    def _wait(self, code: int) -> None:
        for worker in self._workers:
            worker.join(PATIENCE_S)
            assert worker.exitcode == code, f"a worker ended with {worker.exitcode}, {code} was expected"

    def _kill(self, ranks: Any) -> None:
        for rank in ranks:
            self._workers[rank].kill()
        for rank in ranks:
            self._workers[rank].join()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """A mount of the folder over itself: what is open for writing stays so, nothing new can be made."""
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    ballast = fill(disk)
    try:
        yield
    finally:
        ballast.unlink()
