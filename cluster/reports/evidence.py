"""What a run's folder tells: its steps, its scores, and what was seen of the model. Nothing of it is computed again."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from cluster.config import Recipe
from cluster.evidence.watching import scores_of
from cluster.paths import RunPaths
from data_services.schema import UsageError
from evaluation.look import Look
from evaluation.significance import Difference, paired_bootstrap

POINTS = 300  # of a curve: more can't be told apart
Point = tuple[float, float]


@dataclass(frozen=True)
class Steps:
    """What was logged of each step. numbers [n]; values {metric: [n] float64}, NaN where a step has none."""

    numbers: np.ndarray
    values: Mapping[str, np.ndarray]

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def curve(self, name: str) -> list[Point]:
        """(step, value), means over equally many steps where there are many; empty where there is nothing."""
        if name not in self.values:
            return []
        there = np.isfinite(self.values[name])
        numbers, values = self.numbers[there], self.values[name][there]
        parts = np.array_split(np.arange(len(values)), min(POINTS, len(values))) if len(values) else []
        return [(float(numbers[part].mean()), float(values[part].mean())) for part in parts]

    def path(self, x: str, y: str, most: int) -> tuple[list[Point], list[str]]:
        """Points (x, y) of evenly spaced steps, the first and last among them, each with its step's name."""
        if x not in self.values or y not in self.values:
            return [], []
        there = np.flatnonzero(np.isfinite(self.values[x]) & np.isfinite(self.values[y]))
        chosen = there[np.unique(np.linspace(0, len(there) - 1, min(most, len(there))).astype(int))]
        points = [(float(self.values[x][i]), float(self.values[y][i])) for i in chosen]
        return points, [f"step {self.numbers[i]}" for i in chosen]

    def total(self, name: str) -> float:
        return float(np.nansum(self.values[name])) if name in self.values else 0.0


@dataclass(frozen=True)
class RunEvidence:
    """A run's files. result: None of a run that hasn't ended; environment, startup: empty where it has none.

    differences  {split: {model: the trained model less it}} by `metric`, over the same queries
    """

    paths: RunPaths
    recipe: Recipe
    steps: Steps
    result: dict[str, Any] | None
    looks: dict[str, Look]
    differences: dict[str, dict[str, Difference]]
    watched: dict[int, dict[str, float]]
    environment: dict[str, Any]
    startup: dict[str, Any]

    @property
    def metric(self) -> str:
        """The one that stands for a split."""
        return f"ndcg@{self.recipe.evaluation.k}"

    @property
    def splits(self) -> dict[str, dict[str, dict[str, float]]]:
        """{split: its table}, the held-out one first."""
        if self.result is None:
            return {}
        named = ((self.recipe.evaluation.heldout, "metrics"), (self.recipe.evaluation.validation, "validation"))
        return {split: self.result[key] for split, key in named if split and self.result[key]}


def read_run(run: RunPaths) -> RunEvidence:
    """Raises UsageError where the run was made by another version of gyre, or a file of it is damaged."""
    try:
        recipe = Recipe.model_validate_json(run.recipe.read_text())
        splits = [s for s in (recipe.evaluation.heldout, recipe.evaluation.validation) if s]
        looks = {split: Look.model_validate_json(run.look(split).read_text()) for split in _there(run.look, splits)}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"run {run.run_id} is of another version of gyre: {where}: {first['msg']}") from error
    metric = f"ndcg@{recipe.evaluation.k}"
    return RunEvidence(
        paths=run,
        recipe=recipe,
        steps=read_steps(run.metrics),
        result=_json(run.result),
        looks=looks,
        differences={s: differences(run.evaluation(s), metric) for s in _there(run.evaluation, splits)},
        watched=scores_of(run),
        environment=_json(run.environment) or {},
        startup=_json(run.startup) or {},
    )


def read_steps(metrics: Path) -> Steps:
    """A line cut short by a kill is none."""
    text = metrics.read_text() if metrics.exists() else ""
    lines = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    names = dict.fromkeys(name for line in lines for name in line if name != "step")
    values = {name: np.array([line.get(name, math.nan) for line in lines], np.float64) for name in names}
    return Steps(np.array([line["step"] for line in lines], np.int64), values)


def differences(per_query: Path, metric: str) -> dict[str, Difference]:
    """{model: the trained model less it} of a split, by paired bootstrap over its queries."""
    import pyarrow.parquet as pq

    table = pq.read_table(per_query)
    columns = [name for name in table.column_names if name.endswith(f" {metric}")]
    scores = {name.removesuffix(f" {metric}"): table[name].to_numpy() for name in columns}
    trained = scores.pop("trained", None)
    if trained is None or len(trained) < 2:
        return {}
    return {other: paired_bootstrap(trained, its) for other, its in scores.items()}


def _there(path_of: Any, splits: Sequence[str]) -> list[str]:
    return [split for split in splits if path_of(split).is_file()]


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is damaged: {error}") from error
