"""What the command's own process keeps of a search under way: outcomes, the tracking store, what a person is shown."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.experiment import Trial as TuneTrial

from cluster.fit import Follower
from cluster.search.record import Outcome, State, StudyPaths, TrialRecord
from cluster.search.space import TRAINING_METRICS, Space, shown
from cluster.tracking import Tracker
from data_services.schema import RunError, UsageError
from trainers.checkpoint import write_json

Progress = Callable[[dict[str, Any]], None]


class Journal(Callback):
    """Follows the trials of one search as Tune tells of them; events {"kind": "trial", "record", "ended", "trials",
    "counted", "eta_s"} go to `tell` with each check and outcome that is new; counted: what ends, trials or, in a
    population, generations.

    tracked  the tracking store's side of it
    runs     trials of the whole search; in a population, generations of trials
    """

    def __init__(self, study: StudyPaths, space: Space, tracked: Tracked, runs: int, tell: Progress) -> None:
        self._study, self._space, self.tracked = study, space, tracked
        self._runs, self._tell = runs, tell
        self._in_population = space.config.algorithm == "pbt"
        self._earlier = {record.number: record for record in study.trials()}
        self._held_since: dict[int, float] = {}  # of the trials that hold workers, their start or last check
        self._since = time.monotonic()

    def on_trial_start(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        self._held_since[trial.config["number"]] = time.monotonic()

    def on_trial_result(
        self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, result: Mapping[str, Any], **info: Any
    ) -> None:
        self._held_since[trial.config["number"]] = time.monotonic()
        record = self._study.trial(trial.config["number"]).read()
        if not record.ended and record.checks and record.checks[-1].step < record.checks[-1].steps:
            self._show(record)

    def on_trial_complete(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """In a population that may be the end of a generation only, and the trial goes on."""
        record = self._study.trial(trial.config["number"]).read()
        if record.outcome.state == "failed":
            self._show(record)
        elif record.checks and not record.ended:
            last = record.checks[-1]
            if last.step == last.steps or not self._in_population:
                self._end(record, "completed" if last.step == last.steps else "stopped")
        self._held_since.pop(record.number, None)

    def replaced(self, number: int) -> None:
        """A fork takes the trial's place in the population."""
        self._end(self._study.trial(number).read(), "stopped")

    def on_trial_error(self, iteration: int, trials: list[TuneTrial], trial: TuneTrial, **info: Any) -> None:
        """The trial's own process died, more often than it may."""
        lines = str(trial.get_error() or "its process died").strip().splitlines()
        self._end(self._study.trial(trial.config["number"]).read(), "failed", lines[-1])

    def __reduce__(self) -> Any:
        """See `Ending`."""
        return Callback, ()

    def worker_seconds(self) -> float:
        """Of all trials so far, those under way included."""
        return sum(r.worker_seconds if r.ended else self._so_far(r) for r in self._study.trials())

    def close(self, reason: str) -> None:
        """Ends the trials that the budget left no time for; `reason` is theirs."""
        for record in self._study.trials():
            if not record.ended:
                self._end(record, "stopped", reason)

    def _so_far(self, record: TrialRecord) -> float:
        since = self._held_since.get(record.number)
        held = workers_of(self._space, record) * (time.monotonic() - since) if since else 0.0
        return record.worker_seconds + held

    def _end(self, record: TrialRecord, state: State, reason: str = "") -> None:
        if not record.ended:
            self._study.trial(record.number).end(Outcome(state, reason, self._so_far(record)))
            self._show(self._study.trial(record.number).read())

    def _show(self, record: TrialRecord) -> None:
        """Tells of what is new since an earlier search left off."""
        if self._earlier.get(record.number) == record:
            return
        try:
            self.tracked.take(record)
        except RunError as error:
            self._tell({"kind": "note", "text": f"{error}; the search goes on without"})
        ended = self._done(self._study.trials())
        new = ended - self._done(self._earlier.values())
        eta = (self._runs - ended) * (time.monotonic() - self._since) / new if new > 0 else None
        counted = "generations" if self._in_population else "trials"
        told = {"record": record, "ended": ended, "trials": self._runs, "counted": counted, "eta_s": eta}
        self._tell({"kind": "trial"} | told)

    def _done(self, records: Iterable[TrialRecord]) -> int:
        """Trials that ended; in a population, generations that trials trained or failed in."""
        if self._in_population:
            return sum(len(record.checks) + (record.outcome.state == "failed") for record in records)
        return sum(record.ended for record in records)


def workers_of(space: Space, record: TrialRecord) -> int:
    """Workers of a trial; where its settings make no recipe, as the recipe has it."""
    try:
        return space.trial_recipe(record.settings).cluster.workers
    except UsageError:
        return space.recipe.cluster.workers


class Tracked:
    """The search in the tracking store: a run of its own, whose children are the trials' runs."""

    def __init__(self, study: StudyPaths, space: Space, root: Path) -> None:
        self._study, self._space, self._root = study, space, root
        self._children: dict[int, Tracker] = {}
        self.parent = self._open(study.tracker, study.search_id, {"gyre.search": study.search_id}, {})

    def take(self, record: TrialRecord) -> None:
        """A trial's curves so far: of training by step, and of its checks."""
        paths = self._study.trial(record.number)
        child = self._children.get(record.number) or self._child(record)
        if paths.run.metrics.exists() and record.checks:
            recipe = self._space.trial_recipe(record.settings)
            Follower(paths.run, record.checks[-1].steps, recipe.data.batch, child, lambda event: None).poll()
            child.flush()
        if record.checks:
            child.log_result({k: v for k, v in record.last.items() if k not in TRAINING_METRICS})  # those have a curve
        if record.ended:
            child.tag({"gyre.state": record.outcome.state, "gyre.reason": record.outcome.reason})
            if paths.run.recipe.exists():
                child.log_artifacts(paths.run.recipe)
            child.finish("FAILED" if record.outcome.state == "failed" else "FINISHED")

    def conclude(
        self, best: TrialRecord | None, before: int | None, artifacts: list[Path], totals: Mapping[str, float]
    ) -> None:
        """The best trial is tagged, the search's files are kept beside its figures.

        before  number of the trial that was best when the search was concluded an earlier time
        """
        if before is not None and (best is None or best.number != before):
            self._tag(self._study.trial(before).read(), "false")
        if best is not None:
            run_id = self._tag(best, "true")
            self.parent.tag({"gyre.best": run_id, "gyre.settings": shown(best.settings)})
            self.parent.log_result(best.last)
        self.parent.log_result(totals)
        for path in artifacts:
            self.parent.log_artifacts(path)
        self.parent.finish()

    def _tag(self, record: TrialRecord, best: str) -> str:
        child = self._children.get(record.number) or self._child(record)
        child.tag({"gyre.best": best})
        child.finish("FAILED" if record.outcome.state == "failed" else "FINISHED")
        return child.run_id

    def _child(self, record: TrialRecord) -> Tracker:
        tags = {"mlflow.parentRunId": self.parent.run_id, "gyre.search": self._study.search_id}
        if record.parent:
            tags["gyre.fork_of"] = f"trial {record.parent.trial} after step {record.parent.step}"
        name = f"{self._study.search_id}-{record.number:04d}"
        child = self._open(self._study.trial(record.number).tracker, name, tags, record.settings)
        self._children[record.number] = child
        return child

    def _open(self, marker: Path, name: str, tags: Mapping[str, str], values: Mapping[str, Any]) -> Tracker:
        if marker.exists():
            return Tracker.resume(json.loads(marker.read_text())["run_id"], self._root)
        tracker = Tracker.start(self._space.recipe.name, name, tags, self._root)
        tracker.log_values(values)
        write_json(marker, {"run_id": tracker.run_id})
        return tracker
