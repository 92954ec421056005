"""A Ray cluster of two nodes on this machine, started as on two machines: `ray start`, token authentication on."""

from __future__ import annotations

import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.e2e.commands import PATIENCE_S, Shell

RAY = Path(sys.executable).with_name("ray")


class TwoNodes:
    """Two raylets. A worker of two CPUs fits once on each, so that two workers must spread; data has one CPU more.

    env: what a command needs to reach the cluster, and its job server.
    """

    def __init__(self, shell: Shell) -> None:
        self._env = shell.env | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._log = Path(shell.env["RAY_TMPDIR"]) / "nodes.log"
        head, jobs = free_port(), free_port()
        self.env = {name: self._env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        self.env["RAY_ADDRESS"] = f"127.0.0.1:{head}"
        self.jobs = f"http://127.0.0.1:{jobs}"
        dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}"]
        self._start(3, "--head", f"--port={head}", "--node-ip-address=127.0.0.1", *dashboard)
        self._answering(head)
        self._start(2, f"--address=127.0.0.1:{head}", "--node-ip-address=127.0.0.1")
        self._answering(jobs)

    def processes(self) -> set[psutil.Process]:
        """All that runs on the cluster."""
        found: set[psutil.Process] = set()
        for node in self._started:
            found |= set(psutil.Process(node.pid).children(recursive=True))
        return found

    def close(self) -> None:
        left = self.processes()
        for node in reversed(self._started):
            node.terminate()
        for node in self._started:
            node.wait(30)
        for process in psutil.wait_procs(left, timeout=10)[1]:
            process.kill()

    def _start(self, cpus: int, *options: str) -> None:
        command = [RAY, "start", "--block", f"--num-cpus={cpus}", "--object-store-memory=200000000", *options]
        with open(self._log, "ab") as log:
            self._started.append(
                subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            )

    def _answering(self, port: int) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            assert all(node.poll() is None for node in self._started), self._log.read_text()
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
            except OSError:
                assert time.monotonic() < deadline, self._log.read_text()
                time.sleep(0.1)
            else:
                return


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
