"""`gyre search`: checks the space, lets Ray Tune run the trials, hands back a recipe."""

from __future__ import annotations

import json
import math
import os
import secrets
import signal
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import ClusterConfig, Recipe, differences
from cluster.fit import AT_ONCE, Progress, Stopped, handling_signals, stopped_by_signal
from cluster.paths import run_home
from cluster.prepare import check_sources, open_data
from cluster.search.config import Choice, Integer
from cluster.search.placement import cpus, trials_at_once
from cluster.search.record import StudyPaths, find_search
from cluster.search.results import SearchResult, best_of, command_for, files_of, pareto_front, states_of, write_best
from cluster.search.space import Space
from cluster.session import connect, nodes_to_be
from data_services.schema import RunError, UsageError
from trainers.checkpoint import write_json

if TYPE_CHECKING:
    from cluster.search.journal import Journal

# Keys that may change when a search is resumed: how much, not what.
FREE_ON_RESUME = (
    "cluster.", "registry.", "search.trials", "search.concurrent", "search.budget", "search.retries",
    "search.stalled_s", "search.final_seeds",
)  # fmt: skip
WORK = "cluster.search.crew:TrainingWork"
MOST_AT_ONCE = 1000
# Read by Ray Tune. Our records are the authority: its own snapshots are not needed, nor its way with signals.
_TUNE = {
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_GLOBAL_CHECKPOINT_S": "1000000000",
    "TUNE_FORCE_TRIAL_CLEANUP_S": "2",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


def search(
    recipe: Recipe,
    *,
    resume: str | None = None,
    where: str = "the recipe",
    work: str = WORK,
    on_progress: Progress | None = None,
) -> SearchResult:
    """Runs the trials of the recipe's `search` section to their end or that of the budget; blocks until done.

    resume       id or folder of a search to go on with: what its trials have done is not done again
    where        begins the sentences about the recipe
    work         module:Name of the `Work` that a trial's workers do
    on_progress  receives {"kind": "phase" | "note" | "parts" | "trial", …} as things happen, see `Journal`

    Raises UsageError for a space that the recipe can't have and for a trial that fits nowhere, before anything is
    started; RunError where the command was stopped, or no trial came to a check.
    """
    tell = on_progress or (lambda event: None)
    began = time.time()
    if recipe.search is None:
        raise UsageError(f"{where} has no search section; add `search:` with a `space`, see docs/search.md")
    space = Space(recipe)
    space.check(where)
    root = run_home(recipe.cluster.storage)
    study = find_search(resume, root) if resume else None
    if study is not None:
        check_same(study, recipe)
    check_sources(recipe, root)
    largest = largest_cluster(space)
    most = recipe.search.concurrent or MOST_AT_ONCE
    again = f"gyre search RECIPE --resume {study.search_id}" if study else "the same command"
    tell({"kind": "phase", "text": "connecting to Ray"})
    os.environ.update({key: value for key, value in _TUNE.items() if key not in os.environ})
    with (
        stopped_by_signal(f"stopped before the search began; {again} begins it"),
        connect(largest, root, cpus=math.ceil(cpus(largest) * (recipe.search.concurrent or 1))) as session,
    ):
        nodes = nodes_to_be(most * (largest.workers + 1) if session.address else 1)
        at_once = trials_at_once(largest, nodes, most)
        tell({"kind": "phase", "text": "preparing data"})
        # Before trials that share the data ask for it, and before each of them finds the same fault in it.
        steps = open_data(recipe, root, lambda n, of: tell({"kind": "parts", "finished": n, "parts": of})).plan.steps
        open_data(space.trial_recipe({}), root)
        study = study or new_study(recipe, root)
        write_json(study.search, {"recipe": recipe.model_dump(mode="json", exclude_unset=True)})
        with stopped_by_signal(resume_with(study)):
            ended_by, journal = run_trials(study, space, root, at_once, work, tell)
            best = best_of(study.trials(), space.objectives)
            final = train_final(study, space, write_best(study, space, best, steps), tell) if best else []
            result = conclude(study, space, journal, ended_by, final, began)
    if result.best is None:
        reasons = [t.outcome.reason for t in result.trials if t.outcome.reason]
        why = ended_by or (f"the first: {reasons[0]}" if reasons else "none was begun")
        raise RunError(f"no trial of search {study.search_id} came to a check; {why}; see {study.report}")
    return result


def resume_with(study: StudyPaths) -> str:
    return f"go on with: gyre search RECIPE --resume {study.search_id}"


def new_study(recipe: Recipe, root: Path) -> StudyPaths:
    study = StudyPaths(root / f"{recipe.name}-search-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}")
    study.root.mkdir(parents=True)
    return study


def check_same(study: StudyPaths, recipe: Recipe) -> None:
    """Raises UsageError where a search would go on with trials that can't be compared with those that it has."""
    earlier = study.recipe()
    population = earlier.search is not None and earlier.search.algorithm == "pbt"  # of as many as it began with
    free = tuple(key for key in FREE_ON_RESUME if not (population and key == "search.trials"))
    if changed := differences(earlier, recipe, free):
        told = "; ".join(f"{key} was {old!r}, is {new!r}" for key, (old, new) in sorted(changed.items()))
        raise UsageError(
            f"search {study.search_id} was made with another recipe: {told}. Resume it with the recipe it was made "
            "with, or start a new search"
        )


def largest_cluster(space: Space) -> ClusterConfig:
    """What the largest trial needs: the trials' `cluster` section with the most workers that the space has."""
    config = space.trial_recipe({}).cluster
    key = "cluster.workers"
    of = space.config.space.get(key)
    if isinstance(of, Choice | Integer):
        return config.model_copy(update={"workers": max(of.grid)})
    return config


def run_trials(
    study: StudyPaths, space: Space, root: Path, at_once: int, work: str, tell: Progress
) -> tuple[str, Journal]:
    """(why it ended before the last trial, else empty; its journal)."""
    from ray import tune

    from cluster.search.algorithms import Ending, how_many, runs_of, scheduler_of, searcher_of
    from cluster.search.journal import Journal, Tracked
    from cluster.search.placement import bundles
    from cluster.search.trial import Trial

    for record in study.trials():  # those that the budget ended go on
        if record.outcome.state == "stopped" and record.outcome.reason:
            study.trial(record.number).outcome.unlink()
    study.stop.unlink(missing_ok=True)
    journal = Journal(study, space, Tracked(study, space, root), runs_of(space), tell)
    ending = Ending(space.config.budget, journal.worker_seconds, study.stop.touch)
    tell({"kind": "phase", "text": f"search {study.search_id}: {how_many(space)} trials, {at_once} at a time"})

    def resources(config: dict[str, Any]) -> tune.PlacementGroupFactory:
        try:
            return tune.PlacementGroupFactory(bundles(space.trial_recipe(config["settings"]).cluster))
        except UsageError:  # the trial will say so
            return tune.PlacementGroupFactory(bundles(space.recipe.cluster))

    def name(trial: Any) -> str:
        generation = trial.config.get("generation")
        return f"{trial.config['number']:04d}" + (f"-{generation}" if generation else "")

    def stop(number: int, _frame: Any) -> None:
        signal.signal(number, AT_ONCE[number])
        ending.end(signal.Signals(number).name)

    with warnings.catch_warnings(), handling_signals(stop):
        warnings.simplefilter("ignore")
        tune.Tuner(
            tune.with_resources(Trial, resources),
            param_space={"study": str(study.root), "root": str(root), "work": work},
            tune_config=tune.TuneConfig(
                search_alg=searcher_of(space, study, journal.replaced),
                scheduler=scheduler_of(space),
                num_samples=runs_of(space),
                max_concurrent_trials=at_once,
                reuse_actors=True,
                trial_name_creator=name,
                trial_dirname_creator=name,
            ),
            run_config=tune.RunConfig(
                name=time.strftime("%Y%m%d-%H%M%S"),
                storage_path=str(study.tune),
                stop=ending,
                failure_config=tune.FailureConfig(max_failures=space.config.retries),
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
                callbacks=[journal],
                verbose=0,
                log_to_file=False,
            ),
        ).fit()
    if ending.reason in signal.Signals.__members__:
        raise Stopped(f"{ending.reason}: {resume_with(study)}")
    journal.close(ending.reason)
    return ending.reason, journal


def train_final(study: StudyPaths, space: Space, recipe: Recipe, tell: Progress) -> list[dict[str, Any]]:
    """The recipe found, trained whole with each of the seeds: {"seed", "run_id", "validation", "heldout"} of each.

    One that an interrupted search had finished isn't trained again.
    """
    from cluster import launch

    done: list[dict[str, Any]] = json.loads(study.final.read_text()) if study.final.exists() else []
    for seed in space.config.final_seeds:
        if any(run["seed"] == seed for run in done):
            continue
        tell({"kind": "phase", "text": f"training the recipe found whole, seed {seed}"})
        trained = launch.train(recipe.model_copy(update={"seed": seed}), on_progress=tell)
        scores = {"validation": trained.validation.get("trained", {}), "heldout": trained.metrics.get("trained", {})}
        done.append({"seed": seed, "run_id": trained.run_id} | scores)
        write_json(study.final, done)
    return done


def conclude(
    study: StudyPaths, space: Space, journal: Journal, ended_by: str, final: list[dict[str, Any]], began: float
) -> SearchResult:
    """Writes the result and closes the tracking store's run."""
    from cluster.search.report import search_page

    trials = study.trials()
    best = best_of(trials, space.objectives)
    earlier = json.loads(study.result.read_text())["best"] if study.result.exists() else None
    before = earlier["number"] if earlier else None
    result = SearchResult(
        search_id=study.search_id,
        folder=str(study.root),
        objectives=space.objectives,
        best=best,
        front=pareto_front(trials, space.objectives),
        recipe=str(study.best) if best else None,
        command=command_for(study) if best else None,
        trials=trials,
        states=states_of(trials),
        worker_seconds=journal.worker_seconds(),
        seconds=time.time() - began,
        ended_by=ended_by,
        final=final,
    )
    write_json(study.result, result.as_dict())
    study.report.write_text(search_page(space, result))
    journal.tracked.conclude(best, before, files_of(study), {"worker_seconds": result.worker_seconds})
    return result
