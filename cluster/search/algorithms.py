"""What chooses settings and what ends trials: Ray Tune's Optuna search and ASHA, as a search section asks for them."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import BaseSampler, RandomSampler, TPESampler
from ray.tune import Stopper
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.stopper import NoopStopper

from cluster.search.config import Budget
from cluster.search.population import Population
from cluster.search.record import StudyPaths
from cluster.search.space import Settings, Space
from cluster.search.trial import FAILED, TIME, checks_of

DEFAULT_TRIALS, DEFAULT_POPULATION = 20, 8
START_SHARE = 4  # a quarter of the trials is drawn at random before the estimator has a say, and at most
MOST_AT_RANDOM = 10
LOOK_S = 0.5  # between two looks at what was spent


class NumberedSearch(OptunaSearch):
    """Numbers the trials in the order in which they are chosen: the number is a trial's name on the disk.

    first  settings to begin with, in order: the warm starts, or all of a grid, or those of a search that is resumed,
           whose trials report again what was recorded of them
    """

    def __init__(self, space: Space, sampler: BaseSampler, first: list[Settings]) -> None:
        metrics: list[str] = [*space.objectives]
        modes: list[str] = [*space.objectives.values()]
        one = len(metrics) == 1
        super().__init__(
            space=space.draw,
            metric=metrics[0] if one else metrics,
            mode=modes[0] if one else modes,
            points_to_evaluate=first,
            sampler=sampler,
        )
        self._numbered = 0

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        settings = super().suggest(trial_id)
        if settings is None:
            return None
        self._numbered += 1
        return {"number": self._numbered - 1, "settings": settings}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if FAILED not in result:
            super().on_trial_result(trial_id, result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        super().on_trial_complete(trial_id, result, error or FAILED in (result or {}))

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from what was recorded of its trials."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from what was recorded of its trials")


def how_many(space: Space) -> int:
    """Trials of the whole search; of a population, whose forks come on top, its size."""
    if space.config.algorithm == "pbt":
        return space.config.trials or DEFAULT_POPULATION
    if space.config.algorithm == "grid":
        points = len(space.grid())
        return min(points, space.config.trials or points)
    return space.config.trials or DEFAULT_TRIALS


def runs_of(space: Space) -> int:
    """Trials as Ray Tune counts them: in a population each generation of a trial is one."""
    return how_many(space) * (space.config.population.generations if space.config.algorithm == "pbt" else 1)


def seed_of(space: Space) -> int:
    """Of what is drawn."""
    return space.recipe.seed % 2**31 if space.config.seed is None else space.config.seed


def searcher_of(space: Space, study: StudyPaths, replaced: Callable[[int], None]) -> Searcher:
    """What chooses the trials, those that a resumed search has recorded first. replaced: see `Population`."""
    if space.config.algorithm == "pbt":
        return Population(space, study, how_many(space), seed_of(space), replaced)
    return search_of(space, [record.settings for record in study.trials()])


def search_of(space: Space, recorded: list[Settings]) -> NumberedSearch:
    """What chooses the trials of any algorithm but pbt; `recorded`: settings of a search that is resumed, in order."""
    config, seed = space.config, seed_of(space)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    first = space.grid() if config.algorithm == "grid" else config.start
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: BaseSampler = RandomSampler(seed + len(recorded))
        if config.algorithm == "tpe":
            at_random = min(MOST_AT_RANDOM, max(1, how_many(space) // START_SHARE))
            # Together and not key by key; trials under way count as bad ones, so that others keep their distance.
            sampler = TPESampler(
                seed=seed + len(recorded), n_startup_trials=at_random, multivariate=True, group=True, constant_liar=True
            )
        return NumberedSearch(space, sampler, recorded + first[len(recorded) :])


def scheduler_of(space: Space) -> TrialScheduler:
    """What ends trials early: by the first objective, against all trials that were seen at the same check."""
    config = space.config
    if not config.stop_early or config.algorithm == "pbt":
        return FIFOScheduler()
    metric, mode = next(iter(space.objectives.items()))
    last: Any = checks_of(10**9, config)[-1][1]
    return ASHAScheduler(TIME, metric, mode, max_t=last, grace_period=1, reduction_factor=config.reduction)


class Ending(Stopper):
    """Ends the whole search: when its budget is spent, or when `end` is called, by a signal say.

    Tune asks many times a second, so that a budget is kept to a second or so.

    spent    worker-seconds of all trials so far, those under way included
    letting  is called once, before Tune lets go of the trials
    """

    def __init__(self, budget: Budget, spent: Callable[[], float], letting: Callable[[], Any]) -> None:
        self._budget, self._spent, self._letting = budget, spent, letting
        self._began = self._looked = time.monotonic()
        self.reason = ""

    def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        if not self.reason and (reason := self._over()):
            self.end(reason)
        return bool(self.reason)

    def end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self._letting()

    def _over(self) -> str:
        now, budget = time.monotonic(), self._budget
        if now - self._looked < LOOK_S:
            return ""
        self._looked = now
        if budget.seconds is not None and now - self._began >= budget.seconds:
            return f"search.budget.seconds ({budget.seconds:g}) was spent"
        if budget.worker_seconds is not None and self._spent() >= budget.worker_seconds:
            return f"search.budget.worker_seconds ({budget.worker_seconds:g}) was spent"
        return ""

    def __reduce__(self) -> Any:
        """Tune keeps a pickle of what it is given, to go on from; ours goes on from its own records."""
        return NoopStopper, ()
