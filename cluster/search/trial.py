"""One trial as Ray Tune sees it: each call of `step` trains to the next check and reports what it found there.

Tune keeps the actor, and with it the crew of workers, for the next trial that needs the same of the cluster.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.tune import Trainable

from cluster.config import Recipe
from cluster.fit import WOULD_FAIL_AGAIN
from cluster.prepare import Prepared, make_model_folder, on_this_machine, prepare
from cluster.search.config import SearchConfig
from cluster.search.crew import Crew, wait
from cluster.search.fork import course_of, take_up
from cluster.search.placement import DATA
from cluster.search.record import Check, Outcome, StudyPaths, TrialPaths
from cluster.search.space import TRAINING_METRICS, Space
from data_services.imports import import_object
from data_services.schema import RunError

if TYPE_CHECKING:
    from data_services.store import StoredSource

# Keys of a result beside the metrics. TIME is what ASHA compares trials at: reduction ** (number of the check).
STEP, TIME, FAILED = "step", "check_time", "failed"


def checks_of(steps: int, search: SearchConfig) -> list[tuple[int, float]]:
    """(step, time) of each check of a trial of so many steps: the last step, and a `reduction`-th of each before it;
    in a population the end of each generation."""
    if search.algorithm == "pbt":
        parts = search.population.generations
        return [(step, k) for step, k in {round(steps * k / parts): float(k) for k in range(1, parts + 1)}.items()]
    shares = [1.0]
    while shares[-1] / search.reduction >= search.first_check * (1 - 1e-9):
        shares.append(shares[-1] / search.reduction)
    at = {max(1, round(steps * share)): k for k, share in enumerate(reversed(shares))}
    return [(step, search.reduction**k) for step, k in at.items()]


class Trial(Trainable):
    """The driver of a trial: config is {"study", "root": folders, "work": "module:Name", "number", "settings"}; in a
    population also "parent", if it has one, and "generation", at whose end the trial is done for Tune.

    What was recorded of the trial before, by a search that was interrupted, is reported again and not trained again.
    """

    _crew: Crew | None = None
    _crew_size = 0

    def setup(self, config: dict[str, Any]) -> None:
        keep_data_tasks_in_group()
        self._adopt(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        if self._crew is not None:
            self._crew.end()
        self._adopt(new_config)
        return True

    def cleanup(self) -> None:
        self._dismiss()

    def step(self) -> dict[str, Any]:
        if self._recorded:
            check = self._recorded.pop(0)
            ended = self._before.outcome.state in ("completed", "stopped") or self._is_last(check)
            return self._result(check, done=ended and not self._recorded)
        if self._before.outcome.state == "failed":
            return self._failed(self._before.outcome.reason)
        try:
            return self._train_on()
        except WOULD_FAIL_AGAIN as error:
            return self._failed(str(error) or repr(error))

    def _adopt(self, config: dict[str, Any]) -> None:
        self._since = time.monotonic()
        self._study, self._root = StudyPaths(Path(config["study"])), Path(config["root"])
        self._paths: TrialPaths = self._study.trial(config["number"])
        self._paths.begin(config["number"], config["settings"], config.get("parent"))
        self._before = self._paths.read()
        self._space = Space(self._study.recipe())
        self._search = self._space.config
        self._generation: int | None = config.get("generation")
        self._recorded = [check for check in self._before.checks if self._generation is None or self._is_last(check)]
        self._ready: Prepared | None = None
        inherited = self._before.parent.step if self._before.parent else 0
        self._checked = self._before.checks[-1].step if self._before.checks else inherited
        self._begun, self._at, self._deaths = False, 0, 0
        self._work: Any = import_object(config["work"], "work")  # a Work's class
        self._settings = config["settings"]

    def _is_last(self, check: Check) -> bool:
        """Whether it is the trial's last one, or that of the generation."""
        time_of = dict(checks_of(check.steps, self._search))
        return check.step == check.steps if self._generation is None else time_of[check.step] == self._generation

    def _train_on(self) -> dict[str, Any]:
        """To the next check, with a new crew where one dies. One of which a member failed isn't used again either: the
        others may wait for it in a collective."""
        while True:
            try:
                return self._to_check()
            except ray.exceptions.RayTaskError as error:
                self._dismiss()
                cause = error.cause
                if isinstance(cause, WOULD_FAIL_AGAIN):
                    raise cause from error
                self._count_death(str(cause) or repr(cause))
            except (ray.exceptions.RayError, RunError) as error:
                self._dismiss()
                self._count_death(str(error).splitlines()[0])

    def _count_death(self, reason: str) -> None:
        self._deaths += 1
        if self._deaths > self._search.retries:
            raise RunError(reason if self._deaths == 1 else f"{reason} (tried {self._deaths} times)")

    def _to_check(self) -> dict[str, Any]:
        if self._ready is None:
            course = course_of(self._study.ancestry(self._before.number))
            self._ready = ready_trial(self._space.trial_course(course), self._study, self._paths, self._root)
        ready = self._ready
        crew = self._crew_for(ready.recipe)
        if not self._begun:
            begun = self._wait(crew.begin(ready, self._work.shards(ready), self._search))
            if begun is None:
                return self._abandoned()
            self._begun, self._at = True, begun[0]
        # A check is due even where the checkpoint of its step was saved and what it found wasn't.
        steps = ready.plan.steps
        due = next((s for s, _ in checks_of(steps, self._search) if s > self._checked and s >= self._at), steps)
        measured = self._wait(crew.advance(due))
        if measured is None:
            return self._abandoned()
        self._at = self._checked = due
        check = Check(due, steps, self._worker_seconds(), measured[0] | training_metrics(ready.run.metrics))
        self._refuse_infinite(check)
        self._paths.add(check)
        return self._result(check, done=self._is_last(check))

    def _crew_for(self, recipe: Recipe) -> Crew:
        """The crew that is there; where there is none a new one, with which nothing has begun."""
        if self._crew is None:
            self._begun, self._crew_size = False, recipe.cluster.workers
            group = ray.util.get_current_placement_group()
            assert group is not None, "Tune places a trial in a group"
            self._crew = Crew(recipe.cluster, group, self._work)
        return self._crew

    def _wait(self, calls: list[Any]) -> list[Any] | None:
        metrics = self._paths.run.metrics

        def pulse() -> int:
            return metrics.stat().st_size if metrics.exists() else 0

        return wait(calls, lambda: not self._study.stop.exists(), pulse, self._search.stalled_s)

    def _abandoned(self) -> dict[str, Any]:
        """The search ends: the workers are let go of at once."""
        self._dismiss()
        return {"done": True}

    def _dismiss(self) -> None:
        if self._crew is not None:
            self._crew.kill()
        self._crew = None

    def _worker_seconds(self) -> float:
        return self._before.worker_seconds + self._crew_size * (time.monotonic() - self._since)

    def _refuse_infinite(self, check: Check) -> None:
        for objective in self._space.objectives:
            value = check.measured.get(objective)
            if value is None:
                raise LookupError(f"{objective} was not measured; there is {', '.join(check.measured)}")
            if not math.isfinite(value):
                raise ArithmeticError(f"{objective} is {value} at step {check.step}")

    def _result(self, check: Check, done: bool) -> dict[str, Any]:
        time_of = dict(checks_of(check.steps, self._search))
        return check.measured | {STEP: check.step, TIME: time_of.get(check.step, 1.0), "done": done}

    def _failed(self, reason: str) -> dict[str, Any]:
        sentence = " ".join(reason.split())
        if not self._before.ended:
            self._paths.end(Outcome("failed", sentence, self._worker_seconds()))
        return {FAILED: sentence, "done": True}


def keep_data_tasks_in_group() -> None:
    """Ray Data's tasks of this process run in its placement group: what the trial reserved for them is theirs."""
    from ray.data import DataContext
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    if (group := ray.util.get_current_placement_group()) is not None:
        strategy = PlacementGroupSchedulingStrategy(group, DATA)
        context = DataContext.get_current()
        context.scheduling_strategy = context.scheduling_strategy_large_args = strategy


def ready_trial(recipe: Recipe, study: StudyPaths, paths: TrialPaths, root: Path) -> Prepared:
    """A trial's run, new or as it was left. The first trial that needs other data or another model folder makes it."""

    def link_model(recipe: Recipe, folder: Path, sources: tuple[StoredSource, ...]) -> str:
        folder.symlink_to(shared_model(recipe, study, sources, root))
        return on_this_machine(recipe.model, root)[1]

    if recipe.mine.every_steps is not None and not (paths.root / "data").exists():
        (paths.root / "data").symlink_to(root / "data")  # a miner looks for converted data beside its run
    earlier = paths.run if paths.run.recipe.exists() else None
    ready = prepare(recipe, root, earlier, new=paths.run, make_model=link_model)
    if paths.donated.root.exists():
        take_up(paths.donated, ready)
    return ready


def shared_model(recipe: Recipe, study: StudyPaths, sources: tuple[StoredSource, ...], root: Path) -> Path:
    """The model folder of all trials with this `model` section, and these texts where a tokenizer is made of them."""
    made_of = [recipe.model.model_dump_json(), *(sorted(s.fingerprint for s in sources) if recipe.model.config else [])]
    folder = study.models / hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
    if not folder.exists():
        study.models.mkdir(parents=True, exist_ok=True)
        making = Path(tempfile.mkdtemp(prefix=".making-", dir=study.models))
        try:
            make_model_folder(recipe, making / "model", sources, root)
            with contextlib.suppress(OSError):  # another trial was faster, with the same
                (making / "model").rename(folder)
        finally:
            shutil.rmtree(making)
    return folder


def training_metrics(metrics: Path) -> dict[str, float]:
    """What training found at its newest step, and the `seconds` of all its steps."""
    lines = metrics.read_bytes().splitlines() if metrics.exists() else []
    steps = [json.loads(line) for line in lines]
    if not steps:
        return {}
    newest = {k: math.nan if v is None else v for k, v in steps[-1].items() if k in TRAINING_METRICS}
    return newest | {"seconds": sum(s["seconds"] for s in steps)}
