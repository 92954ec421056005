"""What a search found: which trial is best, which ones no other beats, the recipe, and what it cost."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from cluster.config import Recipe
from cluster.search.config import Mode
from cluster.search.fork import course_of
from cluster.search.record import StudyPaths, TrialRecord
from cluster.search.space import Space
from cluster.search.space import shown as shown_settings


@dataclass(frozen=True)
class SearchResult:
    """What `gyre search` gives.

    best            the best trial by the first objective; None where no trial came to its first check
    front           numbers of the completed trials that no other beats in every objective, best of the first one first
    recipe          best.yaml, and `command` that trains it
    states          number of trials by how they ended
    worker_seconds  of all trials; `seconds` of the command
    ended_by        why it ended before the last trial; empty where it didn't
    final           each final run: its seed, id, and scores on the held-out split
    """

    search_id: str
    folder: str
    objectives: dict[str, Mode]
    best: TrialRecord | None
    front: list[int]
    recipe: str | None
    command: str | None
    trials: list[TrialRecord]
    states: dict[str, int]
    worker_seconds: float
    seconds: float
    ended_by: str
    final: list[dict[str, Any]]

    def as_dict(self) -> dict[str, Any]:
        trials = [trial.as_dict() for trial in self.trials]
        return asdict(self) | {"trials": trials, "best": self.best.as_dict() if self.best else None}


def best_of(trials: Sequence[TrialRecord], objectives: Mapping[str, Mode]) -> TrialRecord | None:
    """The best by the first objective among those that came furthest; equal ones: the earlier.

    A value of an early check isn't compared with one of a later check: training goes on to improve it.
    """
    seen = [trial for trial in trials if trial.checks and trial.outcome.state != "failed"]
    if not seen:
        return None
    name, mode = next(iter(objectives.items()))
    furthest = max(_share(trial) for trial in seen)
    sign = 1 if mode == "max" else -1
    return max((t for t in seen if _share(t) >= furthest), key=lambda t: (sign * t.last[name], -t.number))


def pareto_front(trials: Sequence[TrialRecord], objectives: Mapping[str, Mode]) -> list[int]:
    """Numbers of the completed trials that no other equals or beats in every objective while it beats them in one."""
    signs = [(name, 1 if mode == "max" else -1) for name, mode in objectives.items()]
    points = {t.number: tuple(s * t.last[n] for n, s in signs) for t in trials if t.outcome.state == "completed"}
    front = [n for n, p in points.items() if not any(_dominates(other, p) for other in points.values())]
    return sorted(front, key=lambda n: (-points[n][0], n))


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a != b and all(x >= y for x, y in zip(a, b, strict=True))


def _share(trial: TrialRecord) -> float:
    return trial.checks[-1].step / trial.checks[-1].steps


def command_for(study: StudyPaths) -> str:
    return f"gyre train {shlex.quote(str(study.best))}"


def write_best(study: StudyPaths, space: Space, best: TrialRecord, steps: int) -> Recipe:
    """best.yaml: the whole recipe with the settings of `best`, and how it came about. steps: of the whole recipe."""
    course = course_of(study.ancestry(best.number))
    recipe = space.chosen_recipe(course, steps)
    measured = ", ".join(f"{name} {best.last[name]:.4g}" for name in space.objectives)
    aside = [f"#   {key}: {value!r} in the trials, not here" for key, value in space.config.trial.items()]
    lines = [
        f"# Found by search {study.search_id}, trial {best.number}: {shown_settings(best.settings)}",
        f"# In the trial, after step {best.checks[-1].step} of {best.checks[-1].steps}: {measured}",
        *(f"#   until step {b.step} of {b.steps}: {shown_settings(a.settings)}" for a, b in pairwise(course)),
        *aside,
        f"# Train it: {command_for(study)}",
    ]
    body = yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
    making = study.best.with_suffix(".making")
    making.write_text("\n".join(lines) + "\n" + body)
    making.replace(study.best)
    return recipe


def states_of(trials: Sequence[TrialRecord]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for trial in trials:
        counts[trial.outcome.state] = counts.get(trial.outcome.state, 0) + 1
    return counts


def result_so_far(study: StudyPaths, objectives: Mapping[str, Mode]) -> SearchResult:
    """Of a search that ended, is under way, or was interrupted, from its folder; `seconds` is 0 until it ends."""
    trials = study.trials()
    best = best_of(trials, objectives)
    ended = json.loads(study.result.read_text()) if study.result.exists() else None
    return SearchResult(
        search_id=study.search_id,
        folder=str(study.root),
        objectives=dict(objectives),
        best=best,
        front=pareto_front(trials, objectives),
        recipe=str(study.best) if study.best.exists() else None,
        command=command_for(study) if study.best.exists() else None,
        trials=trials,
        states=states_of(trials),
        worker_seconds=sum(trial.worker_seconds for trial in trials),
        seconds=ended["seconds"] if ended else 0.0,
        ended_by=ended["ended_by"] if ended else "it is under way, or was interrupted",
        final=json.loads(study.final.read_text()) if study.final.exists() else [],
    )


def files_of(study: StudyPaths) -> list[Path]:
    """What the tracking store keeps a copy of."""
    return [path for path in (study.search, study.best, study.result, study.report) if path.exists()]
