"""Evaluation beside training: the validation split is scored with the weights of some steps, and no step waits for it.

    RUN/watched/step-S/model/       the weights after step S, as an exported model; the best's alone are kept
    RUN/watched/step-S/scores.json  {metric: value}, written last
    RUN/watched/step-S/failed.txt   why there are none

Rank 0 scores one step after another in a process of its own (`cluster/evidence/beside.py`). What is left when
training ends is scored then, with the last weights, and the best of all by `evaluation.best_by` is what is exported.
"""

from __future__ import annotations

import json
import queue
import shutil
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from cluster.config import Recipe
from cluster.evidence.beside import main_beside, run_beside
from cluster.paths import RunPaths
from evaluation.retrieval import EvaluationConfig

SCORES, FAILED, MODEL = "scores.json", "failed.txt", "model"
Progress = Callable[[dict[str, Any]], None]


class Watcher:
    """Called after every step on every worker: where the step is due it snapshots the weights, and scores on rank 0.

    snapshot  writes the weights as an exported model to a folder; collective
    """

    def __init__(
        self, run: RunPaths, config: EvaluationConfig, steps: int, rank: int, snapshot: Callable[[Path], None]
    ) -> None:
        self._run, self._config, self._steps, self._rank, self._snapshot = run, config, steps, rank, snapshot
        self._due: queue.Queue[int] = queue.Queue()
        self._stalled = False
        if config.every_steps is not None and rank == 0:
            threading.Thread(target=self._score_in_turn, daemon=True).start()

    def resume(self, start: int) -> None:
        """Scores what an earlier attempt at this run left."""
        for step in range(start + 1):
            if self._config.watches(step, self._steps) and (step_folder(self._run, step) / MODEL).exists():
                self._due.put(step)

    def __call__(self, step: int) -> None:
        if step and self._config.watches(step, self._steps):
            folder = step_folder(self._run, step)
            if not (folder / MODEL).exists() and not (folder / SCORES).exists():
                self._snapshot(folder / MODEL)  # else an attempt that came further wrote the same
            self._due.put(step)

    def stalled(self) -> bool:
        """On rank 0: whether `patience` scores after the best were no better."""
        metric, patience = self._config.best_by, self._config.patience
        if self._rank == 0 and metric is not None and patience is not None:
            # Once said it holds: a score that comes in after the request to stop changes nothing.
            self._stalled = self._stalled or is_stalled(scores_of(self._run), metric, patience)
        return self._stalled

    def _score_in_turn(self) -> None:
        while True:
            step = self._due.get()
            folder = step_folder(self._run, step)
            if not (folder / SCORES).exists():
                run_beside("cluster.evidence.watching", self._run, step, folder / FAILED)
            keep_best_model(self._run, self._config.best_by)


def step_folder(run: RunPaths, step: int) -> Path:
    return run.watched / f"step-{step:08d}"


def scores_of(run: RunPaths) -> dict[int, dict[str, float]]:
    """{step: {metric: value}} of the steps that are scored, in their order."""
    files = sorted(run.watched.glob(f"step-*/{SCORES}"))
    return {int(file.parent.name.removeprefix("step-")): json.loads(file.read_text()) for file in files}


def scores_by(run: RunPaths, config: EvaluationConfig, last: int, steps: Collection[int]) -> dict[int, float | None]:
    """Of those of `steps` that are scored beside training: the value of `best_by`, None while it isn't there.

    last  step of the run. A step that couldn't be scored is left out.
    """
    metric, scores = config.best_by, scores_of(run)
    if metric is None:
        return {}
    watched = [step for step in steps if config.watches(step, last) and not (step_folder(run, step) / FAILED).exists()]
    return {step: scores[step][metric] if step in scores else None for step in watched}


def best_of(scores: Mapping[int, Mapping[str, float]], metric: str) -> int | None:
    """The step of the highest value, of equal ones the first."""
    return max(scores, key=lambda step: (scores[step][metric], -step), default=None)


def is_stalled(scores: Mapping[int, Mapping[str, float]], metric: str, patience: int) -> bool:
    best = best_of(scores, metric)
    return best is not None and sum(step > best for step in scores) >= patience


def keep_best_model(run: RunPaths, metric: str | None) -> None:
    """Removes the weights of every scored step but the best; of all where nothing is chosen by them."""
    scores = scores_of(run)
    best = best_of(scores, metric) if metric else None
    for step in scores:
        if step != best:
            shutil.rmtree(step_folder(run, step) / MODEL, ignore_errors=True)


def score_step(run: RunPaths, step: int, model: Path | None = None) -> None:
    """Scores the weights of a step on the validation split. model: their folder, where it isn't the step's own."""
    from cluster.models.folder import exported_encoder
    from cluster.prepare import pools_of
    from data_services.sources import open_source, retrieval_pool
    from evaluation.retrieval import evaluate_encoder
    from trainers.checkpoint import write_json

    recipe, folder = Recipe.model_validate_json(run.recipe.read_text()), step_folder(run, step)
    assert recipe.evaluation.validation is not None, "checked with the recipe"
    pool = retrieval_pool(open_source(pools_of(recipe)[recipe.evaluation.validation], run.root.parent))
    scores = evaluate_encoder(
        exported_encoder(model or folder / MODEL), *pool, recipe.evaluation.k, recipe.evaluation.recall_at
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / SCORES, scores.metrics)


def keep_best(run: RunPaths, recipe: Recipe, last: int, tell: Progress) -> dict[int, dict[str, float]]:
    """After training: scores what isn't yet, the last weights too, and makes the best the export. All scores.

    Safe to run again: a step is scored once, and the export is replaced whole.
    """
    from trainers.export import whole_folder

    config = recipe.evaluation
    if config.every_steps is None:
        return {}
    for model in sorted(run.watched.glob(f"step-*/{MODEL}")):
        if not (model.parent / SCORES).exists():
            score_step(run, int(model.parent.name.removeprefix("step-")))
    if not (step_folder(run, last) / SCORES).exists():
        score_step(run, last, run.export)
    scores = scores_of(run)
    best = best_of(scores, config.best_by) if config.best_by else last
    if best is not None and best != last and (model := step_folder(run, best) / MODEL).exists():
        assert config.best_by is not None, "else the last is kept"
        told = f"{config.best_by} {scores[best][config.best_by]:.4f}, {scores[last][config.best_by]:.4f} at the last"
        tell({"kind": "note", "text": f"the export is the model after step {best}: {told}"})
        with whole_folder(run.export) as making:
            shutil.copytree(model, making, dirs_exist_ok=True)
    keep_best_model(run, config.best_by)
    return scores


def main() -> None:
    main_beside(score_step, lambda run, step: step_folder(run, step) / FAILED)


if __name__ == "__main__":
    main()
