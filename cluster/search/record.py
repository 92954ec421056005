"""What a search leaves on the disk, and the only authority on what became of it: a resume reads nothing else.

HOME/SEARCH_ID/
  search.json       the recipe with its search section, and where the command read it
  models/           config, tokenizer, initial weights: a folder for each that differs, shared by the trials
  trials/0007/      one trial
    settings.json     what was chosen for it, and the trial that it is a fork of
    donated/          of a fork: its parent as it was then: checkpoint, metrics, mined negatives
    run/              its training, a run like any other (see RunPaths)
    checks.jsonl      a line for each validation: step, values, worker-seconds so far
    outcome.json      how it ended: state, reason
    tracker.json      its run's id in the tracking store
  tracker.json      the parent run's id in the tracking store
  best.yaml         the recipe found
  final.json        what its final runs scored
  result.json       the typed result
  report.html       the same to look at
  stop              there while trials are asked to end
  tune/             Ray Tune's own records
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from cluster.config import Recipe
from cluster.paths import Ambiguous, RunPaths, home
from data_services.schema import UsageError
from trainers.checkpoint import write_json

# completed: trained to its last step; stopped: a scheduler or the budget ended it; failed: it couldn't go on
State = Literal["running", "completed", "stopped", "failed"]


@dataclass(frozen=True)
class Check:
    """A trial seen after `step` of its `steps`. worker_seconds: it has cost so far; values: every metric measured."""

    step: int
    steps: int
    worker_seconds: float
    values: dict[str, float]

    @property
    def measured(self) -> dict[str, float]:
        """All that can be an objective."""
        return self.values | {"worker_seconds": self.worker_seconds}


@dataclass(frozen=True)
class Outcome:
    """worker_seconds  of the whole trial, what came after its last check included."""

    state: State
    reason: str = ""
    worker_seconds: float = 0.0


@dataclass(frozen=True)
class Parent:
    """A trial of which another one is a fork, after `step` of its `steps`."""

    trial: int
    step: int
    steps: int


@dataclass(frozen=True)
class TrialRecord:
    """A trial as its folder tells it. settings: those of its last step; a fork's first ones are its parent's."""

    number: int
    settings: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    outcome: Outcome = Outcome("running")
    parent: Parent | None = None

    @property
    def ended(self) -> bool:
        return self.outcome.state != "running"

    @property
    def last(self) -> dict[str, float]:
        """What was found at its last check; empty before the first."""
        return self.checks[-1].measured if self.checks else {}

    @property
    def worker_seconds(self) -> float:
        checked = self.checks[-1].worker_seconds if self.checks else 0.0
        return max(checked, self.outcome.worker_seconds)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"worker_seconds": self.worker_seconds}


@dataclass(frozen=True)
class TrialPaths:
    """The files of one trial."""

    root: Path

    @property
    def run(self) -> RunPaths:
        return RunPaths(self.root / "run")

    @property
    def settings(self) -> Path:
        return self.root / "settings.json"

    @property
    def checks(self) -> Path:
        return self.root / "checks.jsonl"

    @property
    def outcome(self) -> Path:
        return self.root / "outcome.json"

    @property
    def tracker(self) -> Path:
        return self.root / "tracker.json"

    @property
    def donated(self) -> RunPaths:
        return RunPaths(self.root / "donated")

    def begin(self, number: int, settings: Mapping[str, Any], parent: Parent | None = None) -> None:
        """Claims the folder for these settings. RuntimeError where it is another trial's."""
        self.root.mkdir(parents=True, exist_ok=True)
        chosen = {"number": number, "settings": dict(settings)} | ({"parent": asdict(parent)} if parent else {})
        if self.settings.exists():
            there = json.loads(self.settings.read_text())
            if there != json.loads(json.dumps(chosen)):
                raise RuntimeError(f"{self.root} is the folder of {there}, not of {chosen}")
            return
        write_json(self.settings, chosen)

    def add(self, check: Check) -> None:
        whole = len(self._whole_lines())
        with open(self.checks, "ab") as file:
            file.truncate(whole)  # of what a kill cut short
            file.write(json.dumps(asdict(check)).encode() + b"\n")

    def end(self, outcome: Outcome) -> None:
        write_json(self.outcome, asdict(outcome))

    def _whole_lines(self) -> bytes:
        """Of the checks. A line cut short by a kill is none."""
        text = self.checks.read_bytes() if self.checks.exists() else b""
        return text[: text.rfind(b"\n") + 1]

    def read(self) -> TrialRecord:
        """What is known of the trial; of a check that two attempts found, the later one's."""
        chosen = json.loads(self.settings.read_text())
        found = [Check(**json.loads(line)) for line in self._whole_lines().splitlines()]
        checks = list({check.step: check for check in found}.values())
        outcome = Outcome(**json.loads(self.outcome.read_text())) if self.outcome.exists() else Outcome("running")
        parent = Parent(**chosen["parent"]) if "parent" in chosen else None
        return TrialRecord(chosen["number"], chosen["settings"], checks, outcome, parent)


@dataclass(frozen=True)
class StudyPaths:
    """The files of one search."""

    root: Path

    @property
    def search_id(self) -> str:
        return self.root.name

    @property
    def search(self) -> Path:
        return self.root / "search.json"

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def tracker(self) -> Path:
        return self.root / "tracker.json"

    @property
    def best(self) -> Path:
        return self.root / "best.yaml"

    @property
    def result(self) -> Path:
        return self.root / "result.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    @property
    def final(self) -> Path:
        return self.root / "final.json"

    @property
    def stop(self) -> Path:
        return self.root / "stop"

    @property
    def tune(self) -> Path:
        return self.root / "tune"

    def trial(self, number: int) -> TrialPaths:
        return TrialPaths(self.root / "trials" / f"{number:04d}")

    def trials(self) -> list[TrialRecord]:
        """Every trial that was begun, by number."""
        return [TrialPaths(path.parent).read() for path in sorted(self.root.glob("trials/*/settings.json"))]

    def ancestry(self, number: int) -> list[TrialRecord]:
        """The trial, its parent, that one's parent, …; the first of them first."""
        record = self.trial(number).read()
        return [*(self.ancestry(record.parent.trial) if record.parent else []), record]

    def recipe(self) -> Recipe:
        return Recipe.model_validate(json.loads(self.search.read_text())["recipe"])


def find_search(search: str, root: Path | None = None) -> StudyPaths:
    """The search named by its id, a unique beginning of it (4 characters or more), or its folder. Raises UsageError."""
    folder = Path(search).expanduser()
    if (folder / "search.json").is_file():
        return StudyPaths(folder.absolute())
    base = root or home()
    found = sorted(p.parent for p in base.glob("*/search.json"))
    matches = [p for p in found if p.name == search] or [
        p for p in found if len(search) >= 4 and p.name.startswith(search)
    ]
    if len(matches) == 1:
        return StudyPaths(matches[0])
    there = ", ".join(p.name for p in found[-3:]) or "there are none yet"
    if matches:
        raise Ambiguous(f"search {search!r} is ambiguous: {', '.join(p.name for p in matches)}")
    raise UsageError(f"no search {search!r} under {base}; the newest there: {there}")
