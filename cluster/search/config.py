"""`search:` what is varied, how trials are chosen and stopped, what they may cost. Reading it imports nothing heavy."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from data_services.schema import Section

Scalar = bool | int | float | str
Mode = Literal["max", "min"]


class Distribution(Section):
    """What every key of the space has."""

    when: dict[str, list[Scalar]] = Field(
        {}, description="the key is set only where these other keys of the space, each a choice, have one of the values"
    )


class Uniform(Distribution):
    """A number between two others, all equally likely."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(description="least value")
    high: float = Field(description="largest value")
    points: int | None = Field(None, ge=2, description="values of a grid, evenly spaced; only `algorithm: grid` asks")

    @model_validator(mode="after")
    def _ascends(self) -> Uniform:
        return _ascending(self)

    @property
    def grid(self) -> list[Any]:
        return [self.low + (self.high - self.low) * i / ((self.points or 2) - 1) for i in range(self.points or 2)]


class LogUniform(Distribution):
    """A number between two others, its logarithm evenly spread: for rates and temperatures."""

    kind: Literal["loguniform"] = "loguniform"
    low: float = Field(gt=0, description="least value")
    high: float = Field(gt=0, description="largest value")
    points: int | None = Field(None, ge=2, description="values of a grid, in equal ratios; only `algorithm: grid` asks")

    @model_validator(mode="after")
    def _ascends(self) -> LogUniform:
        return _ascending(self)

    @property
    def grid(self) -> list[Any]:
        ratio, points = math.log(self.high / self.low), self.points or 2
        return [self.low * math.exp(ratio * i / (points - 1)) for i in range(points)]


class Integer(Distribution):
    """A whole number from `low` to `high`, both included."""

    kind: Literal["int"] = "int"
    low: int = Field(description="least value")
    high: int = Field(description="largest value, included")
    step: int = Field(1, gt=0, description="between neighbours; high lies a multiple of it above low")
    log: bool = Field(False, description="small ones as likely as large ones by their logarithm; needs step 1, low 1")

    @model_validator(mode="after")
    def _ascends(self) -> Integer:
        if self.log and (self.low < 1 or self.step != 1):
            raise ValueError(f"log needs low of at least 1 and step 1, not {self.low} and {self.step}")
        if (self.high - self.low) % self.step:
            raise ValueError(f"high ({self.high}) isn't low ({self.low}) plus a multiple of step ({self.step})")
        return _ascending(self)

    @property
    def grid(self) -> list[Any]:
        return list(range(self.low, self.high + 1, self.step))


class Choice(Distribution):
    """One of several values, or of several whole sections, each under a name."""

    kind: Literal["choice"] = "choice"
    values: Annotated[list[Scalar], Field(min_length=2)] | Annotated[dict[str, Any], Field(min_length=2)] = Field(
        description="a list of plain values, or {name: value} where they are sections, lists or null"
    )

    @model_validator(mode="after")
    def _differ(self) -> Choice:
        if isinstance(self.values, list) and len({(type(v), v) for v in self.values}) < len(self.values):
            raise ValueError(f"{self.values} has a value twice")
        return self

    @property
    def grid(self) -> list[Any]:
        """The values themselves, or their names."""
        return list(self.values)

    def value(self, chosen: Any) -> Any:
        """What a chosen value or name stands for."""
        return self.values[chosen] if isinstance(self.values, dict) else chosen


AnyDistribution = Annotated[Uniform | LogUniform | Integer | Choice, Field(discriminator="kind")]


def _ascending(distribution: Any) -> Any:
    if distribution.low >= distribution.high:
        raise ValueError(f"low ({distribution.low}) must lie below high ({distribution.high})")
    return distribution


class Budget(Section):
    """`search.budget:` when the search ends though trials are left; those under way are stopped."""

    worker_seconds: float | None = Field(
        None, gt=0, description="seconds times training workers held, all trials together"
    )
    seconds: float | None = Field(None, gt=0, description="of the search, from its first trial on")


class PopulationConfig(Section):
    """`search.population:` of `algorithm: pbt`, where trials take over from each other and change on the way."""

    generations: int = Field(4, ge=2, description="equal parts of a trial's steps; trials are compared after each")
    replaced: float = Field(
        0.25, gt=0, le=0.5, description="share of the trials that is replaced by forks of as many of the best"
    )
    resampled: float = Field(
        0.25, ge=0, le=1, description="how often a fork draws a key anew, else it is multiplied by 0.8 or 1.2"
    )


class SearchConfig(Section):
    """`search:` trainings of this recipe with other values, and which of them goes on. `gyre train` leaves it aside."""

    space: dict[str, AnyDistribution] = Field(
        min_length=1, description="dotted keys of the recipe, with what each may be; a source by position or name"
    )
    trial: dict[str, Any] = Field(
        {}, description="dotted keys set in every trial and not in what comes out: fewer steps, a smaller model"
    )
    algorithm: Literal["tpe", "random", "grid", "pbt"] = Field(
        "tpe",
        description="how settings are chosen: Optuna's tree-structured Parzen estimator, at random, all of them, or "
        "population based training, where they change on the way",
    )
    trials: int | None = Field(None, gt=0, description="None: 20; with grid, every point; with pbt 8, the population")
    population: PopulationConfig = Field(PopulationConfig(), description="only `algorithm: pbt` asks")
    start: list[dict[str, Any]] = Field(
        [], description="settings to try first, each {key: value} of the space; keys left out are drawn"
    )
    seed: int | None = Field(None, ge=0, lt=2**31, description="of what is drawn; None: the recipe's seed")
    objectives: dict[str, Mode] = Field(
        {},
        description="what makes a trial better, the first also stops trials: a metric of the validation split, one "
        "of training's last step, seconds or worker_seconds; none: {ndcg@k: max}",
    )
    stop_early: bool = Field(True, description="ASHA: at each check only the best 1/reduction of all so far goes on")
    first_check: float = Field(1 / 9, gt=0, le=1, description="share of a trial's steps after which it is validated")
    reduction: float = Field(3.0, gt=1, description="each check comes this many times later than the one before")
    queries: int | None = Field(
        None, gt=1, description="of the validation split that a check scores, a fixed draw; None: all"
    )
    concurrent: int | None = Field(
        None, gt=0, description="trials at once, at most; None: what a running cluster holds, one on this machine"
    )
    retries: int = Field(1, ge=0, description="of a trial whose workers died; what would fail again isn't tried again")
    stalled_s: float = Field(600.0, gt=0, description="a trial that takes no step for so long has failed")
    budget: Budget = Field(Budget(), description="when the search ends though trials are left")
    final_seeds: list[Annotated[int, Field(ge=0, lt=2**63)]] = Field(
        [], description="the best settings are trained whole with each of these seeds, and scored on the held-out split"
    )

    @model_validator(mode="after")
    def _agree(self) -> SearchConfig:
        for key, distribution in self.space.items():
            if self.algorithm == "grid" and getattr(distribution, "points", 0) is None:
                raise ValueError(f"space.{key}.points is missing: a grid needs to know how many values to try")
            for other, values in distribution.when.items():
                self._check_condition(key, other, values)
        if both := sorted(self.trial.keys() & self.space.keys()):
            raise ValueError(f"{both[0]} stands in both `trial` and `space`; remove it from one")
        if len(set(self.final_seeds)) < len(self.final_seeds):
            raise ValueError(f"final_seeds {self.final_seeds} has one twice")
        return self

    @model_validator(mode="after")
    def _suits_its_algorithm(self) -> SearchConfig:
        ours = self.algorithm == "pbt"
        for key in ("stop_early", "first_check", "reduction") if ours else ("population",):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(f"{key} is given, and algorithm {self.algorithm} has no use for it; remove it")
        if ours and self.trials == 1:
            raise ValueError("trials is 1, and algorithm pbt compares those of a population; give 2 or more")
        if ours and (conditional := next((key for key, of in self.space.items() if of.when), None)):
            raise ValueError(f"space.{conditional}.when: algorithm pbt changes every key by itself; remove it")
        return self

    def _check_condition(self, key: str, other: str, values: list[Scalar]) -> None:
        parent = self.space.get(other)
        if not isinstance(parent, Choice):
            known = ", ".join(k for k, d in self.space.items() if isinstance(d, Choice) and k != key) or "there is none"
            raise ValueError(f"space.{key}.when names {other}, which is no choice of the space ({known})")
        if list(self.space).index(other) >= list(self.space).index(key):
            raise ValueError(f"space.{key}.when names {other}, which must stand before it")
        if wrong := [v for v in values if v not in parent.grid]:
            raise ValueError(f"space.{key}.when: {other} is never {wrong[0]!r}; it can be {parent.grid}")
