"""The space of a search: checked against the typed recipe before anything starts, drawn from, turned into recipes."""

from __future__ import annotations

import copy
import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from cluster.config import Recipe, parse_recipe
from cluster.recipe_file import set_key
from cluster.search.config import Choice, Integer, LogUniform, Mode, SearchConfig, Uniform
from data_services.schema import UsageError
from evaluation.metrics import metric_names

if TYPE_CHECKING:
    import optuna

# What is chosen for one trial: by dotted key, in the order of the space. A choice among sections has its name here.
Settings = dict[str, Any]
SOURCES = "data.sources"
# What a trial can be judged by beside the metrics of the validation split: of its last step, and what it cost.
TRAINING_METRICS = ("loss", "accuracy", "alignment", "uniformity", "queue_hardness", "pairs_per_s", "peak_memory_bytes")
COSTS = ("seconds", "worker_seconds")


@dataclass(frozen=True)
class Stretch:
    """Settings from `step` of a run's `steps` on, until the next stretch."""

    settings: Settings
    step: int = 0
    steps: int = 1


@dataclass(frozen=True)
class Space:
    """What may be varied of a recipe, which has a `search` section."""

    recipe: Recipe

    @property
    def config(self) -> SearchConfig:
        assert self.recipe.search is not None, "made of a recipe with a search section"
        return self.recipe.search

    def trial_recipe(self, settings: Settings) -> Recipe:
        """The recipe that a trial trains. Raises UsageError for values that don't go together."""
        return self.trial_course([Stretch(settings)])

    def trial_course(self, course: Sequence[Stretch]) -> Recipe:
        """The recipe of a trial whose settings change on the way. Raises UsageError."""
        values = self._scheduled(course, course[-1].steps)
        return self._with({**self._for_trials, **values}, shown(course[-1].settings))

    def chosen_recipe(self, course: Sequence[Stretch], steps: int = 1) -> Recipe:
        """The recipe with these settings and nothing of `search.trial`. Raises UsageError.

        steps  of its run: a source's weight changes at a step. Only asked for where settings change
        """
        return self._with(self._scheduled(course, steps), shown(course[-1].settings))

    def draw(self, trial: optuna.Trial) -> None:
        """Optuna's define-by-run function: asks for every key that is on, in order."""
        settings: Settings = {}
        for key, of in self.config.space.items():
            if not _on(of, settings):
                continue
            match of:
                case Choice():
                    settings[key] = trial.suggest_categorical(key, of.grid)
                case Integer():
                    settings[key] = trial.suggest_int(key, of.low, of.high, step=of.step, log=of.log)
                case LogUniform() | Uniform():
                    settings[key] = trial.suggest_float(key, of.low, of.high, log=isinstance(of, LogUniform))

    def grid(self) -> list[Settings]:
        """Every combination of every key's points, keys that are off left out."""
        return list(self._combinations(list(self.config.space), {}))

    @property
    def objectives(self) -> dict[str, Mode]:
        return self.config.objectives or {f"ndcg@{self.recipe.evaluation.k}": "max"}

    def check(self, where: str) -> None:
        """Sets each end of each distribution, alone, in the recipe; and tries `trial` and `start`.

        Raises UsageError, which begins with `where`, naming the key and the value that the typed recipe refuses.
        """
        if not self.recipe.evaluation.validation:
            raise UsageError(f"{where}: a search needs evaluation.validation, which is empty; name a split")
        known = [*metric_names(self.recipe.evaluation.k), *TRAINING_METRICS, *COSTS]
        if wrong := next((name for name in self.objectives if name not in known), None):
            raise UsageError(f"{where}: search.objectives has {wrong}; there are {', '.join(known)}")
        keys = list(self.config.space)
        for short, long in itertools.permutations(keys, 2):
            if long.startswith(short + ".") and short not in self.config.space[long].when:
                raise UsageError(
                    f"{where}: search.space has {short} and {long}, which is part of it: say in {long}.when for which "
                    f"values of {short} it is set"
                )
        self._with(self._for_trials, f"{where}, search.trial")
        for key, of in self.config.space.items():
            for value in of.grid if isinstance(of, Choice) else (of.low, of.high):
                settings = {other: values[0] for other, values in self._conditions(key)} | {key: value}
                self._with({**self._for_trials, **self._values(settings)}, f"{where}, search.space")
            if self.config.algorithm == "pbt":
                self._check_changes(key, where)
        for number, start in enumerate(self.config.start):
            self._check_start(start, f"{where}, search.start.{number}")

    def _check_changes(self, key: str, where: str) -> None:
        """Raises UsageError where the recipe has no schedule for the key."""
        first, *_, last = self.config.space[key].grid
        try:
            self.trial_course([Stretch({key: first}), Stretch({key: last}, 1, 2)])
        except UsageError as error:
            raise UsageError(
                f"{where}: search.space.{key} can't change during a run, as algorithm pbt asks: a temperature, "
                "hardest_share, a loss's weight, momentum.decay, optimizer.lr or a source's weight can; leave it "
                "out, or take another algorithm"
            ) from error

    def _check_start(self, settings: Settings, where: str) -> None:
        for key, value in settings.items():
            of = self.config.space.get(key)
            if of is None:
                near = difflib.get_close_matches(key, self.config.space, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(self.config.space)}"
                raise UsageError(f"{where}: {key} isn't in search.space; {hint}")
            if isinstance(of, Choice):
                if value not in of.grid:
                    raise UsageError(f"{where}: {key} is {value!r}, which isn't one of {of.grid}")
            elif not isinstance(value, int | float) or not of.low <= value <= of.high:
                raise UsageError(f"{where}: {key} is {value!r}, outside {of.low} … {of.high}")
        on = {key for key, of in self.config.space.items() if _on(of, settings)}
        if off := [key for key in settings if key not in on]:
            raise UsageError(f"{where}: {off[0]} is given, but its `when` doesn't hold there; remove it")

    @property
    def _for_trials(self) -> dict[str, Any]:
        """What every trial has otherwise. The held-out split isn't even opened for one, and nothing is copied."""
        return {**self.config.trial, "evaluation.heldout": None, "checkpoint.copy_to": None}

    def _conditions(self, key: str) -> Iterator[tuple[str, list[Any]]]:
        """(key, values it must have) for `key` to be on: its own conditions and those of theirs, first ones first."""
        for other, values in self.config.space[key].when.items():
            yield from self._conditions(other)
            yield other, values

    def _combinations(self, keys: list[str], settings: Settings) -> Iterator[Settings]:
        if not keys:
            yield settings
            return
        of = self.config.space[keys[0]]
        if not _on(of, settings):
            yield from self._combinations(keys[1:], settings)
            return
        for value in of.grid:
            yield from self._combinations(keys[1:], settings | {keys[0]: value})

    def _scheduled(self, course: Sequence[Stretch], steps: int) -> dict[str, Any]:
        """What stands in the recipe for settings that change: a number where one doesn't, else its schedule."""
        values = self._values(course[0].settings)
        for key in values if len(course) > 1 else ():
            changes = [(course[0], values[key])]
            for stretch in course[1:]:
                if (value := self._values(stretch.settings)[key]) != changes[-1][1]:
                    changes.append((stretch, value))
            if len(changes) > 1:
                values[key] = _schedule(key, changes, steps)
        return values

    def _values(self, settings: Settings) -> dict[str, Any]:
        """What stands in the recipe for the settings, shorter keys before those that are part of them."""
        order = [key for key in self.config.space if key in settings]
        values = {}
        for key in sorted(order, key=lambda key: key.count(".")):
            of = self.config.space[key]
            values[key] = of.value(settings[key]) if isinstance(of, Choice) else settings[key]
        return values

    def _with(self, values: Mapping[str, Any], where: str) -> Recipe:
        raw = self.recipe.model_dump(mode="json", exclude_unset=True, exclude={"search"})
        for key, value in values.items():
            set_key(raw, self._by_position(key, where), copy.deepcopy(value), f"{where}, {key}")
        return parse_recipe(raw, where)

    def _by_position(self, key: str, where: str) -> str:
        """`data.sources.nli.weight` as `data.sources.0.weight`, where the first source is nli.parquet, say."""
        if not key.startswith(SOURCES + "."):
            return key
        rest = key.removeprefix(SOURCES + ".")
        if rest.split(".")[0].isdigit():
            return key
        names = [source_name(source.shown) for source in self.recipe.data.sources]
        found = [(i, name) for i, name in enumerate(names) if rest.startswith(name + ".")]
        if len(found) != 1:
            several = f"{len(found)} sources are called so" if found else f"the sources are {', '.join(names)}"
            raise UsageError(f"{where}: {key} names no single source: {several}; write its position, from 0 on")
        position, name = found[0]
        return f"{SOURCES}.{position}{rest.removeprefix(name)}"


def _schedule(key: str, changes: Sequence[tuple[Stretch, Any]], steps: int) -> Any:
    """The weight of a source by step, every other number by the share of the run that is done."""
    if key.startswith(SOURCES + "."):
        shares = {round(steps * its.step / its.steps): value for its, value in changes}
        return [{"from_step": step, "share": share} for step, share in shares.items()]
    return {"pieces": [{"after": its.step / its.steps, "value": value} for its, value in changes]}


def source_name(path: str) -> str:
    """The last part of a path or address, without its ending."""
    return PurePath(path.rpartition(":")[2]).stem


def shown(settings: Mapping[str, Any]) -> str:
    """`temperature=0.043 rows=512`"""
    names = short_names(settings)
    return " ".join(f"{names[key]}={value_text(value)}" for key, value in settings.items())


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """The last name of each key where no other ends so, else the whole key."""
    lasts = {key: key.rpartition(".")[2] for key in keys}
    return {key: last if list(lasts.values()).count(last) == 1 else key for key, last in lasts.items()}


def value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _on(of: Any, settings: Settings) -> bool:
    return all(other in settings and settings[other] in values for other, values in of.when.items())
