"""Population based training (Jaderberg et al., arXiv:1711.09846), as a searcher of Ray Tune.

All trials of a population train one generation, an equal part of their steps. Then the worst are replaced by forks of
the best, whose settings are the parent's with each key drawn anew or multiplied by 0.8 or 1.2.

Ray Tune's own PopulationBasedTraining changes a trial in its place and ends the actors of those that wait, and with
them the workers. Here a generation of a trial is a trial to Tune, so that workers stay warm; and what is decided is a
function of seed and scores, so that a search that was killed decides the same again.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.samplers import RandomSampler
from ray.tune.search import Searcher

from cluster.search.config import AnyDistribution, Choice, Integer, LogUniform
from cluster.search.fork import donate
from cluster.search.record import Check, Parent, StudyPaths
from cluster.search.space import Settings, Space
from cluster.search.trial import FAILED, checks_of

FACTORS = (0.8, 1.2)
FINISHED: Any = Searcher.FINISHED  # a word, where a suggestion is expected


class Population(Searcher):
    """Suggests each trial once a generation: {"number", "settings", "parent", "generation"}, which begin at 1.

    count    trials in the population
    replace  is called with the number of each trial that a fork takes the place of
    """

    def __init__(self, space: Space, study: StudyPaths, count: int, seed: int, replace: Callable[[int], None]) -> None:
        (metric, mode), *_ = space.objectives.items()
        super().__init__(metric=metric, mode=mode)
        self._space, self._study, self._seed, self._replace = space, study, seed, replace
        self._metric_name, self._sign = metric, 1 if mode == "max" else -1
        self._settings = dict(enumerate(first_settings(space, count, seed)))
        self._parents: dict[int, Parent] = {}
        self._generation, self._members = 1, list(self._settings)
        self._due, self._training = deque(self._members), dict[str, int]()
        self._scores: dict[int, float] = {}

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        """None while a generation isn't whole."""
        if not self._due:
            return None if self._training else FINISHED
        number = self._training[trial_id] = self._due.popleft()
        chosen = {"number": number, "settings": self._settings[number], "parent": self._parents.get(number)}
        return chosen | {"generation": self._generation}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        number = self._training.pop(trial_id)
        if self._study.stop.exists():  # the search ends here, and a resumed one decides
            return
        if not error and result is not None and FAILED not in result:
            self._scores[number] = self._sign * result[self._metric_name]
        if not self._training and not self._due and self._generation < self._space.config.population.generations:
            self._go_on()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: a search is resumed from what was recorded of its trials."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        raise NotImplementedError("a search is resumed from what was recorded of its trials")

    def _go_on(self) -> None:
        """To the next generation. A trial that failed is replaced in any case; where all did, that is the end."""
        ranked = sorted((n for n in self._members if n in self._scores), key=lambda n: -self._scores[n])
        failed = [n for n in self._members if n not in self._scores]
        few = min(math.ceil(self._space.config.population.replaced * len(self._members)), len(ranked) // 2)
        losers = ranked[len(ranked) - few :]
        taken = {n: self._fork(n, ranked[: max(few, 1)]) for n in (*failed, *losers)} if ranked else {}
        for number in losers:
            self._replace(number)
        self._members = [taken.get(n, n) for n in self._members if ranked]
        self._scores.clear()
        self._generation += 1
        self._due.extend(self._members)

    def _fork(self, loser: int, best: list[int]) -> int:
        """The number of the trial that takes the loser's place."""
        draw = random.Random(f"{self._seed} {self._generation} {loser}")
        parent, child = draw.choice(best), len(self._settings)
        space, resampled = self._space.config.space, self._space.config.population.resampled
        changed = {
            key: drawn(space[key], draw) if draw.random() < resampled else moved(space[key], value, draw)
            for key, value in self._settings[parent].items()
        }
        self._settings[child] = changed
        self._parents[child] = donate(self._study, parent, self._check_of(parent), child, changed)
        return child

    def _check_of(self, number: int) -> Check:
        """What was found of a trial at the end of the generation; where a search is resumed it may have more."""
        checks = self._study.trial(number).read().checks
        return next(c for c in checks if dict(checks_of(c.steps, self._space.config))[c.step] == self._generation)


def first_settings(space: Space, count: int, seed: int) -> list[Settings]:
    """The warm starts, and others at random."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=RandomSampler(seed))
    for start in space.config.start[:count]:
        study.enqueue_trial(start)
    asked = [study.ask() for _ in range(count)]
    for trial in asked:
        space.draw(trial)
    return [trial.params for trial in asked]


def drawn(of: AnyDistribution, draw: random.Random) -> Any:
    """A value of a distribution."""
    if isinstance(of, Choice):
        return draw.choice(of.grid)
    if isinstance(of, LogUniform) or (isinstance(of, Integer) and of.log):
        value = math.exp(draw.uniform(math.log(of.low), math.log(of.high)))
        return inside(of, value)
    return draw.choice(of.grid) if isinstance(of, Integer) else draw.uniform(of.low, of.high)


def moved(of: AnyDistribution, value: Any, draw: random.Random) -> Any:
    """A neighbour of a value: 0.8 or 1.2 times it within its ends, the choice before or after it."""
    if isinstance(of, Choice):
        at = of.grid.index(value) + draw.choice((-1, 1))
        return of.grid[min(max(at, 0), len(of.grid) - 1)]
    return inside(of, value * draw.choice(FACTORS))


def inside(of: AnyDistribution, value: float) -> Any:
    """The nearest number that a distribution has."""
    assert not isinstance(of, Choice), "of numbers"
    if isinstance(of, Integer):
        value = of.low + round((value - of.low) / of.step) * of.step
    return min(max(value, of.low), of.high)
