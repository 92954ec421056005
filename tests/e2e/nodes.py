"""A Ray cluster of several nodes on this machine, started as on several: `ray start`, token authentication on."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.distributed.pool import free_port
from tests.e2e.commands import PATIENCE_S, Shell

RAY = Path(sys.executable).with_name("ray")


class Nodes:
    """A head and further raylets, of so many CPUs each.

    Of (3, 2) a worker of two CPUs fits once on each, so that two workers must spread; data has one CPU more.
    env: what a command needs to reach the cluster.
    """

    def __init__(self, shell: Shell, cpus: Sequence[int] = (3, 2)) -> None:
        self._env = shell.env | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._made = 0
        self._folder = Path(shell.env["RAY_TMPDIR"])
        head, jobs = free_port(), free_port()
        self.env = {name: self._env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        self.env["RAY_ADDRESS"] = f"127.0.0.1:{head}"
        self._jobs = jobs
        dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}"]
        self._start(cpus[0], "--head", f"--port={head}", "--node-ip-address=127.0.0.1", *dashboard)
        for more in cpus[1:]:
            self.join(more)

    def join(self, cpus: int) -> None:
        """A node more."""
        self._start(cpus, f"--address={self.env['RAY_ADDRESS']}", "--node-ip-address=127.0.0.1")

    def on_each(self) -> list[set[psutil.Process]]:
        """What runs on each node, the head first."""
        return [set(psutil.Process(node.pid).children(recursive=True)) for node in self._started]

    def lose(self, number: int) -> None:
        """kill -9 of all that runs on a node, as a power failure does; the nodes after it count one less."""
        assert number, "the head is not a node among others"
        left = self.on_each()[number]
        node = self._started.pop(number)
        node.kill()
        node.wait()
        _kill(left)

    def processes(self) -> set[psutil.Process]:
        """All that runs on the cluster."""
        return set().union(*self.on_each())

    def job_server(self) -> str:
        """Its address, once it answers: the dashboard starts in the background."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                socket.create_connection(("127.0.0.1", self._jobs), 1).close()
            except OSError:
                assert time.monotonic() < deadline, "the dashboard didn't start"
                time.sleep(0.1)
            else:
                return f"http://127.0.0.1:{self._jobs}"

    def close(self) -> None:
        left = self.processes()
        for node in self._started:
            node.kill()
            node.wait()
        _kill(left)

    def _start(self, cpus: int, *options: str) -> None:
        """`ray start` in the foreground, so that the node's processes are its children; returns when it runs."""
        # A temporary folder each, as on two machines: one node removes shipped files that it no longer needs.
        self._made += 1
        own = self._folder / f"node-{self._made}"
        size = (f"--num-cpus={cpus}", "--object-store-memory=200000000")
        # The agent takes jobs; at its usual port it would find that of any other Ray on this machine.
        places = (f"--temp-dir={own}", "--dashboard-agent-listen-port=0")
        command: list[str | Path] = [RAY, "start", "--block", *places, *size, *options]
        log = own.with_suffix(".log")
        with open(log, "wb") as out:
            node = subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._started.append(node)
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (text := log.read_text()):
            assert node.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)


def _kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=20)
