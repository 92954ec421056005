"""`gyre train`: one recipe through all rooms, from its sources to a registered model.

The driver prepares (data, model folder, plan), lets Ray Train place the workers and Ray Data execute the plan,
follows the metrics that rank 0 writes to the run's folder, then evaluates, registers and reports. Everything that
must survive lies in that folder; the driver can be killed at any moment and `resume` goes on.
"""

from __future__ import annotations

import importlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Recipe
from cluster.copied import check_store, find_or_fetch
from cluster.doctor import environment
from cluster.evidence.scoring import Scored, score_everywhere
from cluster.evidence.watching import keep_best
from cluster.fit import Progress, Stopped, stopped_by_signal, training
from cluster.model_card import CardFacts, write_card
from cluster.paths import RunPaths, run_home
from cluster.prepare import Prepared, check_resumable, check_sources, data_fingerprint, prepare
from cluster.revision import code_revision
from data_services.schema import RunError, UsageError
from trainers.checkpoint import aside_of, check_whole, committed, latest, set_aside, write_json
from trainers.fault_log import read_faults

if TYPE_CHECKING:
    from cluster.tracking import Tracker

# What the driver needs once it is connected, seconds of imports; starting Ray is mostly waiting.
IMPORTED_AHEAD = ("torch", "transformers.modeling_utils", "mlflow", "ray.train.torch")
# Of `geometry` and `probes` on the terminal; result.json has all.
SHOWN = {
    "geometry": ("alignment", "uniformity_queries", "uniformity_documents", "modality_gap"),
    "probes": ("probe_accuracy", "knn_accuracy", "majority"),
}


@dataclass(frozen=True)
class TrainResult:
    """What a finished run gives.

    metrics, validation  {"bm25" | "untrained" | "trained": {metric: value}} on the held-out and validation split
    workers              of each, a step on average: seconds encoding and waiting for data, up to the last comparison
    faults               how many of each kind were met: not_finite, spike, slow, diverged
    over_bm25            {split: nDCG of trained less BM25, its 95 % interval `low`, `high`, and `p`}, paired bootstrap
    geometry, probes     {split: {"untrained" | "trained": {figure: value}}}, where `evaluation:` asks for them
    """

    run_id: str
    checkpoint: str
    export: str
    model_name: str
    model_version: int
    aliases: tuple[str, ...]
    gate: str
    metrics: dict[str, dict[str, float]]
    validation: dict[str, dict[str, float]]
    over_bm25: dict[str, dict[str, float]]
    throughput: dict[str, float]
    seconds: dict[str, float]
    world_size: int
    zero_stage: int
    geometry: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    probes: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    workers: list[dict[str, Any]] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def train(
    recipe: Recipe, *, resume: str | None = None, from_step: int | None = None, on_progress: Progress | None = None
) -> TrainResult:
    """Trains, evaluates, registers and exports; blocks until done.

    resume       id or folder of a run to go on with; the recipe must be the one it was made with
    from_step    go on with the checkpoint of that step; newer ones are set aside. None: with the newest
    on_progress  receives {"kind": "phase" | "parts" | "step" | "table" | "note", …} as things happen

    Raises UsageError for a recipe or resume that can't be, within seconds where it is the cluster that can't hold the
    workers; RunError for a run that failed or was stopped (its checkpoints stay), or whose checkpoint is damaged.
    """
    from cluster.session import connect

    tell = on_progress or (lambda event: None)
    began = time.time()
    root = run_home(recipe.cluster.storage)
    copy_to = recipe.checkpoint.copy_to
    earlier = find_or_fetch(resume, root, copy_to, from_step) if resume else None
    if from_step is not None and earlier is None:
        raise UsageError("--from-step chooses a checkpoint of a run that goes on: name the run with --resume")
    if earlier:
        check_resumable(earlier, recipe)
        take_up(earlier, from_step, tell)
    if copy_to:
        check_store(copy_to)
    check_sources(recipe, root)
    tell({"kind": "phase", "text": "connecting to Ray"})
    before = stopped_by_signal("stopped before training began; the same command begins it")
    with before, imported_meanwhile(*IMPORTED_AHEAD) as wait_for_imports, connect(recipe.cluster, root):
        wait_for_imports()
        tell({"kind": "phase", "text": "preparing data and model"})
        ready = prepare(
            recipe,
            root,
            earlier,
            lambda n, of: tell({"kind": "parts", "finished": n, "parts": of}),
            lambda what, done, of: tell({"kind": "step", "unit": what, "step": done, "steps": of}),
        )
        write_json(ready.run.environment, environment())
        with training(ready, tell) as follow:
            tracker = open_tracker(ready, root)
            tell({"kind": "phase", "text": f"run {ready.run.run_id}: {ready.plan.steps} steps"})
            with closing_run(tracker):
                first_step = follow(tracker)
                if bad := ready.bad_rows.read():
                    told = f"{len(bad)} rows could not be decoded and were left out, the first: {bad[0].reason}"
                    tell({"kind": "note", "text": f"{told}; see {ready.run.quarantine}"})
                tell({"kind": "phase", "text": "evaluating"})
                again = f"stopped after training; go on with: gyre train RECIPE --resume {ready.run.run_id}"
                with stopped_by_signal(again):
                    result = conclude(ready, tracker, tell, began, first_step)
    return result


def take_up(run: RunPaths, step: int | None, tell: Progress) -> None:
    """Makes the checkpoint of that step the newest, or leaves the newest as it is; every file is read.

    Raises UsageError where there is none of that step, RunError where it is damaged.
    """
    every = committed(run.checkpoints)
    there = [c.step for c in every]
    if step is not None and step not in there:
        known = f"there are {', '.join(map(str, there))}" if there else "there are none"
        raise UsageError(f"run {run.run_id} has no checkpoint of step {step}; {known}")
    if not every:
        return
    tell({"kind": "phase", "text": f"verifying the checkpoint of step {there[-1] if step is None else step}"})
    chosen = [c for c in every if step is None or c.step == step][-1]
    check_whole(chosen, every)
    for newer in every[every.index(chosen) + 1 :]:
        set_aside(newer, f"checkpoint {newer.folder} was set aside: training went on from step {step}")
        tell({"kind": "note", "text": f"the checkpoint of step {newer.step} is set aside in {aside_of(newer.folder)}"})


@contextmanager
def closing_run(tracker: Tracker) -> Iterator[None]:
    """Ends the tracker's run as the body ends: finished, failed, or killed where it was stopped."""
    try:
        yield
    except BaseException as error:
        with suppress(RunError):  # a store that fails as well must not hide why the run did
            tracker.finish("KILLED" if isinstance(error, Stopped) else "FAILED")
        raise
    tracker.finish("FINISHED")


@contextmanager
def imported_meanwhile(*modules: str) -> Iterator[Callable[[], None]]:
    """Imports them in a thread while the body runs; none is begun after its end.

    Gives a function that waits for the thread. The body calls it before it imports any of them itself: two
    threads in circular imports see each other's modules half made.
    """
    ended = threading.Event()

    def run() -> None:
        # What can't be imported is met again, and told, where it is used; at the interpreter's end nothing can.
        with suppress(Exception):
            for module in modules:
                if not ended.is_set():
                    importlib.import_module(module)

    thread = threading.Thread(target=run, name="imports")
    try:  # a signal may come while the thread starts
        thread.start()
        yield thread.join
    finally:
        ended.set()


def open_tracker(ready: Prepared, root: Path) -> Tracker:
    """The run's MLflow run: found again where a checkpoint or an earlier driver began one."""
    from cluster.tracking import Tracker

    marker = ready.run.tracker
    if marker.exists():
        return Tracker.resume(json.loads(marker.read_text())["run_id"], root)
    tags = {"gyre.recipe": ready.recipe.fingerprint(), "gyre.data": data_fingerprint(ready.sources)}
    tracker = Tracker.start(ready.recipe.name, ready.run.run_id, tags, root)
    tracker.log_params(ready.recipe)
    write_json(marker, {"run_id": tracker.run_id})
    return tracker


# After training.


def conclude(ready: Prepared, tracker: Tracker, tell: Progress, began: float, first_step: float) -> TrainResult:
    """Scores every model on every split, registers the export with that evidence, writes the result."""
    from cluster import registry

    recipe, run = ready.recipe, ready.run
    newest = latest(run.checkpoints)
    assert newest is not None, "a finished run has its last checkpoint"
    for step, watched in keep_best(run, recipe, newest.step, tell).items():
        tracker.log_result({f"watched.{name}": value for name, value in watched.items()}, step)
    scored = score_everywhere(ready)
    scores = {split: found.rows for split, found in scored.items()}
    for split, rows in scores.items():
        tracker.log_result({f"{split}.{model}.{name}": v for model, row in rows.items() for name, v in row.items()})
    evaluation = recipe.evaluation
    validation, heldout = (scores.get(split or "", {}) for split in (evaluation.validation, evaluation.heldout))
    if heldout:
        tell_scores(scored[evaluation.heldout or ""], f"{evaluation.heldout} split", tell)
    tell({"kind": "phase", "text": "registering"})
    newest = latest(run.checkpoints)
    assert newest is not None, "a finished run has its last checkpoint"
    lineage = {
        "run": run.run_id,
        "data": data_fingerprint(ready.sources),
        "config": recipe.fingerprint(),
        "parent": run.parent.read_text() if run.parent.is_file() else "unknown",
        "checkpoint": newest.folder.name,
        "code": code_revision(),
    }
    write_card(run.export, CardFacts(recipe, scores, lineage))
    version = registry.register(
        recipe.registered_name,
        run.export,
        run_id=tracker.run_id,
        scores={"validation": validation, "heldout": heldout},
        gate=recipe.registry.gate,
        tags={registry.LINEAGE[part]: value for part, value in lineage.items()},
        root=ready.root,
    )
    result = TrainResult(
        run_id=run.run_id,
        checkpoint=str(newest.folder),
        export=str(run.export),
        model_name=version.name,
        model_version=version.version,
        aliases=version.aliases,
        gate=registry.gate_result(version).sentence,
        metrics=heldout,
        validation=validation,
        over_bm25={split: found.over_bm25 for split, found in scored.items()},
        throughput=throughput(run.metrics),
        seconds={"to_first_step": first_step - began, "total": time.time() - began},
        world_size=recipe.cluster.workers,
        zero_stage=recipe.engine.zero_stage,
        geometry={split: found.geometry for split, found in scored.items() if found.geometry},
        probes={split: found.probes for split, found in scored.items() if found.probes},
        workers=json.loads(run.workers.read_text()) if run.workers.exists() else [],
        faults=dict(Counter(fault["kind"] for fault in read_faults(run.faults))),
    )
    write_json(run.result, result.as_dict())
    tracker.log_artifacts(run.recipe)
    tracker.log_artifacts(run.result)
    return result


def tell_scores(scored: Scored, title: str, tell: Progress) -> None:
    """The table, and below it what the recipe asks of the vectors."""
    tell({"kind": "table", "title": title, "rows": scored.rows})
    for name, figures in SHOWN.items():
        rows = {model: {key: row[key] for key in figures} for model, row in getattr(scored, name).items()}
        if rows:
            tell({"kind": "table", "title": f"{name}, {title}", "rows": rows})


def throughput(metrics: Path) -> dict[str, float]:
    """Means over the run's steps, the first five left out: they warm up caches and allocators."""
    with open(metrics) as file:
        steps = [json.loads(line) for line in file]
    steady = steps[5:] or steps
    seconds = sum(s["seconds"] for s in steady)
    return {
        "pairs_per_s": sum(s["pairs_per_s"] * s["seconds"] for s in steady) / seconds,
        "tokens_per_s": sum(s["tokens_per_s"] * s["seconds"] for s in steady) / seconds,
        "data_wait_fraction": sum(s["data_wait_s"] for s in steady) / seconds,
        "padding_share": sum(s["padding_share"] for s in steady) / len(steady),
        "mfu": sum(s["mfu"] * s["seconds"] for s in steady) / seconds,
        "peak_memory_bytes": max(s["peak_memory_bytes"] for s in steps),
    }
