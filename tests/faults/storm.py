"""One training run on a cluster of this machine, and what kills parts of it at random moments, from a seed.

    python -m tests.faults.storm --kills 50 --seed 0 --json storm.json

`make faults` runs the same and then compares what the run computed with what nothing disturbed; see test_storm.py.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.commands import PATIENCE_S, Running, Shell, steps_in, training_workers
from tests.e2e.mini import mini_recipe, write_pairs
from tests.e2e.nodes import Nodes

EVERY_STEPS = 5
MOST_STEPS = 24  # between two faults
# Of ten faults: workers are what dies most.
SHARES = {"worker": 6, "node": 2, "driver": 2}
HOW = {
    "worker": "kill -9 of one of the training processes",
    "node": "kill -9 of all processes of a node that trains, the spare one takes over",
    "driver": "kill -9 of the command's process group; `--resume`",
}


@dataclass(frozen=True)
class Fault:
    """Comes `steps` steps after the last one was overcome, and a moment of `delay_s` into the step then."""

    kind: str
    steps: int
    delay_s: float


@dataclass(frozen=True)
class Overcome:
    """lost_steps: computed twice; seconds: from the fault to the first step after it; resumes: commands it took."""

    fault: Fault
    at: int
    lost_steps: int
    seconds: float
    resumes: int
    parts_s: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def drawn(seed: int, kills: int) -> list[Fault]:
    draw = random.Random(seed)
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=kills)
    return [Fault(kind, draw.randint(1, MOST_STEPS), draw.uniform(0, 0.2)) for kind in kinds]


def storm_recipe(pairs: Path, faults: Sequence[Fault]) -> dict[str, Any]:
    """Everything that has state is on; long enough to be under way at the last fault."""
    recipe = mini_recipe(pairs)
    recipe["data"]["steps"] = 2 * MOST_STEPS + sum(fault.steps + MOST_STEPS for fault in faults)
    recipe["checkpoint"] = {"every_steps": EVERY_STEPS, "keep": 2}
    recipe["cluster"] |= {"cpus_per_worker": 2, "max_failures": 10_000}
    recipe["name"] = "storm"
    return recipe


class Storm:
    """The run, from its start to its end through all faults. Nodes of (3, 2, 2): two workers spread, one is spare."""

    def __init__(self, shell: Shell, recipe: Path, nodes: Nodes) -> None:
        self._shell, self._recipe, self._nodes = shell, recipe, nodes
        self._running: Running
        self._missing = False  # whether a node was lost for which none has joined
        self.overcome: list[Overcome] = []

    def weather(self, faults: Sequence[Fault]) -> None:
        """Lets all of it come over the run, and the run end. Raises AssertionError where it doesn't go on."""
        self._running = self._shell.start("train", self._recipe, run="storm", env=self._nodes.env)
        self._running.until_step(1)
        for fault in faults:
            self._running.until_step(len(self._steps()) + fault.steps)
            time.sleep(fault.delay_s)
            self._meet(fault)
        self._to_the_end()

    def _meet(self, fault: Fault) -> None:
        reached, began = len(self._steps()), time.time()
        {"worker": self._kill_worker, "node": self._kill_node, "driver": self._kill_driver}[fault.kind](fault)
        resumes = 0
        deadline = time.monotonic() + PATIENCE_S
        while not (started := self._started(began)) or len(self._steps()) <= started["start"]:
            assert time.monotonic() < deadline, f"not overcome after {PATIENCE_S} s: {fault}, {self._running.wait()}"
            if self._running.process.poll() is not None:
                resumes += 1
                self._resume()
            time.sleep(0.02)
        stepped = time.time()
        if self._missing:
            self._nodes.join(2)
            self._missing = False
        moments = {"detection, placement": started["process"], "process start": started["entered"]}
        moments |= {"model, engine": started["built"], "load": started["restored"], "first step": stepped}
        parts, last = {}, began
        for part, end in moments.items():  # a process that was there before the fault took no time to start
            parts[part], last = max(0.0, end - last), max(last, end)
        lost = reached - started["start"]
        self.overcome.append(Overcome(fault, reached, lost, stepped - began, resumes, parts))
        told = ", ".join(f"{part} {seconds:.1f}" for part, seconds in parts.items())
        print(f"{len(self.overcome):3} {fault.kind:6} at step {reached:4}: {lost} steps again, "
              f"{stepped - began:.1f} s ({told}), {resumes} resumes", flush=True)  # fmt: skip

    def _kill_worker(self, fault: Fault) -> None:
        workers = training_workers(self._nodes.processes())
        if workers:
            workers[fault.steps % len(workers)].kill()

    def _kill_node(self, fault: Fault) -> None:
        """A node that trains and isn't the head; where none is left, any that isn't."""
        others = list(enumerate(self._nodes.on_each()))[1:]
        number = next((i for i, found in others if training_workers(found)), others[0][0])
        self._nodes.lose(number)
        self._missing = True

    def _kill_driver(self, fault: Fault) -> None:
        self._running.kill_group()

    def _resume(self) -> None:
        run = self._shell.run_folder("storm").name
        self._running = self._shell.start("train", self._recipe, "--resume", run, run="storm", env=self._nodes.env)

    def _started(self, after: float) -> dict[str, Any] | None:
        """When the newest group of workers was ready to go on, where it is younger than that."""
        startup = self._shell.run_folder("storm") / "startup.json"
        started = json.loads(startup.read_text()) if startup.exists() else {"restored": 0.0}
        return started if started["restored"] > after else None

    def _steps(self) -> list[dict[str, Any]]:
        return steps_in(self._running.metrics())

    def _to_the_end(self) -> None:
        for _ in range(3):
            ended = self._running.wait()
            if ended.code == 0:
                return
            print(ended.err, flush=True)
            self._resume()
        raise AssertionError(f"the run doesn't end: {ended}")


def table(overcome: Sequence[Overcome]) -> str:
    """A row of Markdown for each kind."""
    rows = ["| fault | injected how | times | lost | seconds to recover |", "|---|---|---|---|---|"]
    for kind, how in HOW.items():
        if its := [o for o in overcome if o.fault.kind == kind]:
            seconds = [o.seconds for o in its]
            lost = f"{statistics.mean(o.lost_steps for o in its):.1f} steps, computed again"
            spread = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            rows.append(f"| {kind} | {how} | {len(its)} | {lost} | {spread} |")
    return "\n".join(rows)


def run_faults(folder: Path, faults: Sequence[Fault]) -> tuple[Path, Path, list[Overcome]]:
    """One run through these faults: (its recipe, its folder, what was overcome)."""
    recipe = folder / "storm.yaml"
    recipe.write_text(yaml.safe_dump(storm_recipe(write_pairs(folder / "pairs"), faults)))
    temporary = Path(tempfile.mkdtemp(prefix="gyre-", dir="/tmp"))
    shell = Shell(folder, temporary)
    nodes = Nodes(shell, (3, 2, 2))
    storm = Storm(shell, recipe, nodes)
    try:
        storm.weather(faults)
        return recipe, shell.run_folder("storm"), storm.overcome
    finally:
        print(table(storm.overcome), flush=True)
        shell.close()
        nodes.close()
        shutil.rmtree(temporary, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--keep", type=Path, help="folder that the run stays in")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp(prefix="gyre-storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    _, run, overcome = run_faults(folder, drawn(args.seed, args.kills))
    print(f"the run is in {run}")
    if args.json:
        args.json.write_text(json.dumps([o.as_dict() for o in overcome], indent=1))


if __name__ == "__main__":
    main()
