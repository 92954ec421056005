"""From `gyre train recipes/quickstart.yaml` to the first optimizer step, and where the time goes.

Measured as a user sees it: from the start of the command until the first line of the run's metrics, in turns for a
cluster that the command starts and for one that is running (`ray start --head` on this machine). The parts come from
the command's own lines, from when it wrote its files, and from what the first worker notes. The very first run in an
empty home also converts the corpus and makes MLflow's tables; it is given apart.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from benchmarks.common import (
    QUICKSTART,
    REPOSITORY,
    in_turns,
    machine,
    machine_line,
    options,
    shown,
    spread,
    write,
)

BIN = Path(sys.executable).parent
LIMIT_S = 300.0
# Ends of the parts, in order, with what a reader calls the part.
PARTS = {
    "connecting": "interpreter and first imports",
    "connected": "Ray: started or joined, and checked",
    "prepared": "data, tokenizer, model folder",
    "tracked": "MLflow run",
    "entered": "Ray Train: controller, workers placed and connected",
    "built": "worker: imports, model, DeepSpeed",
    "fed": "first batch",
    "stepped": "first step",
}
LINES = {"connecting to Ray": "connecting", "preparing data and model": "connected"}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each kind")
    parser.add_argument("--workers", type=int, default=2, help="cluster.workers")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-startup-") as home:
        figures = measure(args, Path(home))
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    rounds = 1 if args.quick else args.rounds
    runs: dict[str, list[dict[str, float]]] = {"starts_a_cluster": [], "running_cluster": []}
    cpu: dict[str, list[float]] = {kind: [] for kind in runs}
    first = parts_of(start(home, args.workers, {}))
    print(f"  first run in an empty home: {sum(first.values()):.1f} s", flush=True)
    for i, kind in in_turns(list(runs), rounds):
        if kind == "running_cluster":
            with cluster(args.workers + 2) as env:
                ends = start(home, args.workers, env)
        else:
            ends = start(home, args.workers, {})
        runs[kind].append(parts_of(ends))
        cpu[kind].append(ends["cpu_s"])
        print(f"  round {i + 1}, {kind}: {sum(runs[kind][-1].values()):.1f} s", flush=True)
    figures: dict[str, Any] = {
        kind: {
            "to_first_step_s": spread([sum(run.values()) for run in its]),
            "parts_s": {part: spread([run[part] for run in its]) for part in PARTS},
            "cpu_s": spread(cpu[kind]),
        }
        for kind, its in runs.items()
    }
    figures["first_run"] = {"to_first_step_s": sum(first.values()), "parts_s": first}
    figures["setting"] = {
        "workers": args.workers,
        "rounds": rounds,
        **{name: version(name) for name in ("ray", "deepspeed", "torch", "transformers", "mlflow")},
    }
    show(figures)
    return figures


def show(figures: dict[str, Any]) -> None:
    print(", ".join(f"{name} {value}" for name, value in figures["setting"].items()))
    for kind in ("starts_a_cluster", "running_cluster"):
        print(f"{kind.replace('_', ' ')}: {shown(figures[kind]['to_first_step_s'], '{:.1f}')} s to the first step")
        cpu, cores = figures[kind]["cpu_s"], os.cpu_count() or 1
        print(f"  {shown(cpu, '{:.1f}')} s of CPU by then, {cpu['median'] / cores:.1f} s if it kept {cores} cores busy")
        for part, what in PARTS.items():
            print(f"  {shown(figures[kind]['parts_s'][part], '{:5.1f}'):>24} s  {what}")
    print(f"first run in an empty home: {figures['first_run']['to_first_step_s']:.1f} s")


def parts_of(ends: dict[str, float]) -> dict[str, float]:
    """Seconds of each part, from the ends of all and the `began` of the first; they sum to the whole.

    A part that ended before the one it is listed after ran beside it and took no time of its own.
    """
    parts, last = {}, ends["began"]
    for part in PARTS:
        end = max(last, ends[part])
        parts[part], last = end - last, end
    return parts


def start(home: Path, workers: int, env: dict[str, str]) -> dict[str, float]:
    """One run until its first step, then stopped; returns when each part ended, seconds since 1970."""
    earlier = set(home.glob("*/recipe.json"))
    shell = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "GYRE_"))}
    ends = {"began": time.time()}
    process = subprocess.Popen(
        [BIN / "gyre", "train", QUICKSTART, f"cluster.workers={workers}"],
        env=shell | {"GYRE_HOME": str(home), "PYTHONUNBUFFERED": "1"} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said: list[str] = []
    threading.Thread(target=_read, args=(process, ends, said), daemon=True).start()
    try:
        while (run := _stepped(home, earlier)) is None:
            if process.poll() is not None or time.time() - ends["began"] > LIMIT_S:
                sys.exit("the run came to no first step:\n" + "".join(said[-15:]))
            time.sleep(0.02)
        ends["stepped"] = time.time()
        ends["cpu_s"] = cpu_seconds(process.pid)
    finally:
        _stop(process)
    return ends | ends_in(run, ends["stepped"])


def cpu_seconds(pid: int) -> float:
    """What a process and all that it has started have computed; a cluster that was there before isn't among it."""
    total = 0.0
    for process in (command := psutil.Process(pid), *command.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
    return total


def _stepped(home: Path, earlier: set[Path]) -> Path | None:
    """The new run's folder, once its first step is in its metrics."""
    for recipe in set(home.glob("*/recipe.json")) - earlier:
        metrics = recipe.with_name("metrics.jsonl")
        if metrics.exists() and metrics.stat().st_size:
            return recipe.parent
    return None


def _stop(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()


def _read(process: subprocess.Popen[str], ends: dict[str, float], said: list[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        said.append(line)
        if (part := LINES.get(line.strip())) is not None:
            ends[part] = time.time()


def ends_in(run: Path, stepped: float) -> dict[str, float]:
    """The ends that a run's folder tells of."""
    worker = json.loads((run / "startup.json").read_text())
    with open(run / "metrics.jsonl") as file:
        first = json.loads(file.readline())
    return {
        "prepared": (run / "recipe.json").stat().st_mtime,
        "tracked": (run / "tracker.json").stat().st_mtime,
        "entered": worker["entered"],
        "built": worker["built"],
        "fed": stepped - (first["seconds"] - first["data_wait_s"]),
    }


@contextmanager
def cluster(cpus: int) -> Iterator[dict[str, str]]:
    """A head of its own on this machine; yields the environment of a command that joins it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [
        BIN / "ray",
        "start",
        "--head",
        "--block",
        f"--port={port}",
        f"--num-cpus={cpus}",
        "--node-ip-address=127.0.0.1",
        "--include-dashboard=false",
        "--dashboard-agent-listen-port=0",
        f"--object-store-memory={1 << 30}",
    ]
    with tempfile.TemporaryFile("w+") as log:
        head = subprocess.Popen(
            [*map(str, command)], cwd=REPOSITORY, env=os.environ | env, stdout=log, stderr=log, start_new_session=True
        )
        try:
            _wait_for(port, head, log)
            yield env | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
        finally:
            _stop(head)


def _wait_for(port: int, head: subprocess.Popen[bytes], log: Any) -> None:
    """Until the head's raylet runs: the line that says so comes after it."""
    end = time.time() + 120
    while time.time() < end and head.poll() is None:
        log.seek(0)
        if "Ray runtime started" in log.read():
            return
        time.sleep(0.2)
    log.seek(0)
    sys.exit(f"ray start --head on port {port} failed:\n{log.read()[-2000:]}")


if __name__ == "__main__":
    main()
