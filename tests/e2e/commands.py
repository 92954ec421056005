"""`gyre` as a user runs it: a process of its own, with its own home and its own Ray sessions."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

TREE = Path(__file__).parents[2]
PATIENCE_S = 420  # for anything that an idle machine does in seconds: test machines are shared
# The user's shell, without what would point a test at the user's own cluster, stores or proxies.
SHELL = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "GYRE_"))}
# What a step's metrics hold beside its result: times, and what is derived from them.
TIMED = {"seconds", "data_wait_s", "pairs_per_s", "tokens_per_s", "mfu", "peak_memory_bytes"}


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


@dataclass
class Running:
    """A `gyre` process that leads its own process group. Its children are known after it is dead, too."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path
    metrics: Callable[[], Path | None]
    seen: set[psutil.Process] = field(default_factory=set)

    def until_step(self, steps: int) -> None:
        """Returns once so many steps of the run are in its metrics file."""
        deadline = time.monotonic() + PATIENCE_S
        while len(steps_in(self.metrics())) < steps:
            assert self.process.poll() is None, f"ended before step {steps}: {self._ended()}"
            assert time.monotonic() < deadline, f"not at step {steps} after {PATIENCE_S} s: {self._ended()}"
            time.sleep(0.01)

    def until_line(self, text: str) -> None:
        """Returns once the command has printed that."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.out.read_text():
            assert self.process.poll() is None, f"ended before {text!r}: {self._ended()}"
            assert time.monotonic() < deadline, f"no {text!r} after {PATIENCE_S} s: {self._ended()}"
            time.sleep(0.01)

    def descendants(self) -> set[psutil.Process]:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.seen |= set(psutil.Process(self.process.pid).children(recursive=True))
        return self.seen

    def signal(self, number: signal.Signals) -> None:
        """To this process alone, as `kill` does."""
        self.process.send_signal(number)

    def kill_group(self) -> None:
        """kill -9 of the whole process group; returns when what Ray had started is gone as well."""
        left = self.descendants()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _, left = psutil.wait_procs(left, timeout=30)
        assert not left, f"Ray's processes outlive their driver: {left}"

    def wait(self) -> Ended:
        try:
            self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running after {PATIENCE_S} s: {self._ended()}") from None
        return self._ended()

    def stop(self) -> None:
        """Leaves nothing behind, whatever the test did."""
        left = self.descendants()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for child in psutil.wait_procs(left, timeout=20)[1]:
            child.kill()

    def _ended(self) -> Ended:
        return Ended(self.process.returncode, self.out.read_text(), self.err.read_text())


class Shell:
    """A working directory from which commands are started; `close` ends those that still run."""

    def __init__(self, folder: Path, temporary: Path) -> None:
        self.home = folder / "home"
        self._folder = folder
        self._started: list[Running] = []
        # Ray's sockets lie under its temporary folder and their paths are limited to 107 bytes.
        self.env = SHELL | {
            "GYRE_HOME": str(self.home),
            "RAY_TMPDIR": str(temporary),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        }

    def start(self, *arguments: str | Path, run: str = "", env: dict[str, str] | None = None) -> Running:
        """`gyre ARGUMENTS` in the background; `run` begins the name of the run whose steps it will be asked for."""
        log = self._folder / f"command-{len(self._started)}"
        out, err = log.with_suffix(".out"), log.with_suffix(".err")
        with open(out, "wb") as to_out, open(err, "wb") as to_err:
            process = subprocess.Popen(
                [sys.executable, "-m", "cluster.cli", *map(str, arguments)],
                cwd=TREE,
                env=self.env | (env or {}),
                stdin=subprocess.DEVNULL,
                stdout=to_out,
                stderr=to_err,
                start_new_session=True,
            )
        home = Path((env or {}).get("GYRE_HOME", self.home))
        running = Running(process, out, err, lambda: metrics_of(home, run))
        self._started.append(running)
        return running

    def __call__(self, *arguments: str | Path, env: dict[str, str] | None = None) -> Ended:
        return self.start(*arguments, env=env).wait()

    def run_folder(self, run: str) -> Path:
        (folder,) = (p.parent for p in self.home.glob(f"{run}*/recipe.json"))
        return folder

    def metrics(self, run: str) -> Path | None:
        return metrics_of(self.home, run)

    def close(self) -> None:
        for running in self._started:
            running.stop()


def metrics_of(home: Path, run: str) -> Path | None:
    """The metrics file of the run whose name begins so, None before there is one."""
    return next(iter(home.glob(f"{run}*/metrics.jsonl")), None)


def steps_in(metrics: Path | None) -> list[dict[str, Any]]:
    """The whole lines of a metrics file."""
    if metrics is None or not metrics.exists():
        return []
    text = metrics.read_text()
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def results_in(metrics: Path) -> list[dict[str, Any]]:
    """What every step computed, to the last bit, without what depends on the clock."""
    return [{k: v for k, v in step.items() if k not in TIMED} for step in steps_in(metrics)]


def differing(results: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[int, list[str]]:
    """{step: metrics that aren't the same to the last bit}, empty where all are."""
    assert len(results) == len(others)
    pairs = ((a, [k for k in a | b if a.get(k) != b.get(k)]) for a, b in zip(results, others, strict=True))
    return {a["step"]: keys for a, keys in pairs if keys}


def training_workers(processes: set[psutil.Process]) -> list[psutil.Process]:
    """Ray Train's workers among some processes; Ray puts the actor's class in the title."""
    found = []
    for process in processes:
        try:
            title = process.cmdline()
        except psutil.NoSuchProcess:
            continue
        if title and title[0].startswith("ray::RayTrainWorker"):
            found.append(process)
    return sorted(found, key=lambda p: p.pid)
