"""A Ray cluster of two nodes on this machine, started as on two machines: `ray start`, token authentication on."""

from __future__ import annotations

import contextlib
import secrets
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.distributed.pool import free_port
from tests.e2e.commands import PATIENCE_S, Shell

RAY = Path(sys.executable).with_name("ray")


class TwoNodes:
    """Two raylets. A worker of two CPUs fits once on each, so that two workers must spread; data has one CPU more.

    env: what a command needs to reach the cluster.
    """

    def __init__(self, shell: Shell) -> None:
        self._env = shell.env | {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._started: list[subprocess.Popen[bytes]] = []
        self._folder = Path(shell.env["RAY_TMPDIR"])
        head, jobs = free_port(), free_port()
        self.env = {name: self._env[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
        self.env["RAY_ADDRESS"] = f"127.0.0.1:{head}"
        self._jobs = jobs
        dashboard = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={jobs}"]
        self._start(3, "--head", f"--port={head}", "--node-ip-address=127.0.0.1", *dashboard)
        self._start(2, f"--address=127.0.0.1:{head}", "--node-ip-address=127.0.0.1")

    def processes(self) -> set[psutil.Process]:
        """All that runs on the cluster."""
        found: set[psutil.Process] = set()
        for node in self._started:
            found |= set(psutil.Process(node.pid).children(recursive=True))
        return found

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
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(left, timeout=20)

    def _start(self, cpus: int, *options: str) -> None:
        """`ray start` in the foreground, so that the node's processes are its children; returns when it runs."""
        # A temporary folder each, as on two machines: one node removes shipped files that it no longer needs.
        own = self._folder / f"node-{len(self._started)}"
        size = (f"--num-cpus={cpus}", "--object-store-memory=200000000")
        # The agent takes jobs; at its usual port it would find that of any other Ray on this machine.
        places = (f"--temp-dir={own}", "--dashboard-agent-listen-port=0")
        command = [RAY, "start", "--block", *places, *size, *options]
        log = own.with_suffix(".log")
        with open(log, "wb") as out:
            node = subprocess.Popen(command, env=self._env, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
        self._started.append(node)
        deadline = time.monotonic() + PATIENCE_S
        while "Ray runtime started" not in (text := log.read_text()):
            assert node.poll() is None, text
            assert time.monotonic() < deadline, text
            time.sleep(0.1)
