"""Where state lies: everything a command writes is under one home, and this file alone knows its layout.

HOME/                     GYRE_HOME, else ./runs
  mlflow.db mlartifacts/  the tracking store, unless MLFLOW_TRACKING_URI names a server
  data/                   sources converted to Parquet
  logs/                   tracebacks of commands that failed before, or outside, a run
  RUN_ID/                 one run: see RunPaths
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from data_services.schema import UsageError


def home() -> Path:
    """GYRE_HOME, else `runs` in the working directory; absolute."""
    return Path(os.environ.get("GYRE_HOME") or "runs").expanduser().absolute()


def run_home(storage: str | None) -> Path:
    """Home of a run: the recipe's shared storage where it names one."""
    return Path(storage).expanduser().absolute() if storage else home()


def log_folder(root: Path | None = None) -> Path:
    """Where a command leaves the traceback of an unexpected error."""
    return (root or home()) / "logs"


class Ambiguous(UsageError):
    """The beginning of several ids."""


@dataclass(frozen=True)
class RunPaths:
    """The files of one run.

    recipe       the recipe as it was read, defaults filled in (JSON)
    result       the typed result of the finished run (JSON)
    model        config, tokenizer and initial weights, prepared before training
    checkpoints  committed checkpoints, newest last
    export       the Sentence Transformers folder
    metrics      one JSON line a step, written by rank 0 as training goes
    data         fingerprint of every source (JSON)
    parent       the weights that training began from: folder, hub id, NAME/VERSION, or "random weights"
    tracker      id of the run in the tracking store (JSON)
    startup      when rank 0's process began, when it entered training, when its model and engine stood, and when it
                 was ready to go on from step `start`, seconds since 1970; what the run chose: cached, precision,
                 reduction (JSON)
    environment  versions, cores, memory and accelerators of the machine that the command ran on (JSON)
    report       what `gyre report` made of all this
    failure      a worker's last sentence, where it failed in a way that a restart would repeat
    faults       one JSON line for each step that was skipped, loss that jumped, worker that diverged or was slow
    workers      every worker's time a step, at the last comparison (JSON)
    stacks       where stuck workers stood, a file each, until they are taken into failure.log
    failure_log  tracebacks and stacks of workers that failed
    quarantine   rows that could not be decoded while training, a JSON file each
    mined        hard negatives mined while training, a folder for each step they were mined after
    watched      models scored while training, and their scores, a folder for each step
    ended        the step at which training ended before its last, since no score was better for long (JSON)
    stop_request created to ask the workers to checkpoint and stop
    """

    root: Path

    @property
    def recipe(self) -> Path:
        return self.root / "recipe.json"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def data(self) -> Path:
        return self.root / "data.json"

    @property
    def parent(self) -> Path:
        return self.root / "parent.txt"

    @property
    def tracker(self) -> Path:
        return self.root / "tracker.json"

    @property
    def failure(self) -> Path:
        return self.root / "failure.txt"

    @property
    def failure_log(self) -> Path:
        return self.root / "failure.log"

    @property
    def faults(self) -> Path:
        return self.root / "faults.jsonl"

    @property
    def workers(self) -> Path:
        return self.root / "workers.json"

    @property
    def stacks(self) -> Path:
        return self.root / "stacks"

    @property
    def startup(self) -> Path:
        return self.root / "startup.json"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"

    @property
    def quarantine(self) -> Path:
        return self.root / "quarantine"

    @property
    def mined(self) -> Path:
        return self.root / "mined"

    @property
    def watched(self) -> Path:
        return self.root / "watched"

    @property
    def ended(self) -> Path:
        return self.root / "ended.json"

    @property
    def stop_request(self) -> Path:
        return self.root / "stop"

    def evaluation(self, split: str) -> Path:
        """Every model's score on every query of a split (Parquet)."""
        return self.root / "evaluation" / f"{split}.parquet"

    def look(self, split: str) -> Path:
        """What a report shows of a split beside the scores: `evaluation.look.Look` (JSON)."""
        return self.root / "evaluation" / f"{split}.json"

    @property
    def environment(self) -> Path:
        return self.root / "environment.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def run_id(self) -> str:
        return self.root.name


def find_run(run: str, root: Path | None = None) -> RunPaths:
    """The run named by its id, a unique beginning of it (4 characters or more), or its folder.

    Raises UsageError where there is none or more than one.
    """
    folder = Path(run).expanduser()
    if (folder / "recipe.json").is_file():
        return RunPaths(folder.absolute())
    base = root or home()
    found = sorted(p.parent for p in base.glob("*/recipe.json"))
    exact = [p for p in found if p.name == run]
    matches = exact or [p for p in found if len(run) >= 4 and p.name.startswith(run)]
    if len(matches) == 1:
        return RunPaths(matches[0])
    if matches:
        raise Ambiguous(f"run {run!r} is ambiguous: {', '.join(p.name for p in matches)}")
    newest = sorted(found, key=lambda p: (p / "recipe.json").stat().st_mtime, reverse=True)[:3]
    there = f"the newest there: {', '.join(p.name for p in newest)}" if newest else "there are none yet"
    raise UsageError(f"no run {run!r} under {base}; {there}")
