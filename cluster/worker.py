"""What runs on each training worker: the rooms of `trainers` put together for one recipe, then the loop.

Ray calls it (`cluster/launch.py`), and so can any launcher that sets the usual torch.distributed variables: all it
needs is a `Task` and a stream of batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from cluster.config import Recipe
from cluster.copied import copy_of, files_to_copy
from cluster.evidence.watching import Watcher, scores_by
from cluster.paths import RunPaths
from cluster.refresh import Refresher
from data_services.imports import import_object
from data_services.schema import BatchStream

if TYPE_CHECKING:
    import torch

    from trainers.checkpoint import Checkpoint
    from trainers.collectives import Group
    from trainers.copies import Copies
    from trainers.encoders.spec import ModelSpec
    from trainers.encoders.text import TextEncoder
    from trainers.hooks import MetricsSink
    from trainers.model import Trained
    from trainers.objectives.embedded import Objective
    from trainers.pace import WorkerPace
    from trainers.step import ContrastiveStep


@dataclass(frozen=True)
class Task:
    """One run, as its workers see it.

    steps          optimizer steps of the whole run
    lineage        what a checkpoint says of its origin: plan and fingerprints
    """

    recipe: Recipe
    run: RunPaths
    steps: int
    lineage: Mapping[str, Any]


def train_on_worker(task: Task, batches: BatchStream) -> int:
    """Restores the newest whole checkpoint, trains to the end, exports; returns the step reached.

    Collective over the default process group. A request to stop ends it early, after a checkpoint.
    """
    from trainers.checkpoint import write_json

    training = Training(task)
    reached = training.run(batches, task.steps)
    ended_early = training.ended_early()
    if reached == task.steps or ended_early:
        training.write_model(task.run.export, task.recipe.momentum.export)
        if training.group.rank == 0 and ended_early:
            write_json(task.run.ended, {"step": reached})
    return reached


class Training:
    """A run on this worker, from its newest whole checkpoint on. Collective over the default process group.

    reached  steps taken of the run
    """

    def __init__(self, task: Task) -> None:
        entered = time.time()
        import torch

        from data_services.order.plan import Plan
        from trainers import loop
        from trainers.checkpoint import newest_whole, write_json
        from trainers.collectives import Group
        from trainers.fault_log import FaultLog
        from trainers.faults import Faults
        from trainers.hooks import MetricsLog
        from trainers.saving import CheckpointStore

        self.task, self.group = task, Group()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", task.recipe.cluster.threads)))
        newest = newest_whole(task.run.checkpoints, self.group)
        self.step = build_step(task, self.group, newest.state if newest else {})
        self._chosen = choices_of(self.step)
        kept = newest.state.get("faults") if newest else None
        log = FaultLog(task.run.faults)
        sources = [source.name for source in Plan.from_state(task.lineage["plan"]).sources]
        self._faults = Faults(task.recipe.faults, self.group, log, kept, sources, self._write_paces)
        first, built = self.group.rank == 0, time.time()
        self.reached = restore(self.step, newest) if newest else 0
        self._refresher = Refresher(task.run, task.recipe, task.steps, self.group.rank, self._snapshot)
        self._refresher.resume(self.reached)
        self._watcher = Watcher(task.run, task.recipe.evaluation, task.steps, self.group.rank, self._watched)
        self._watcher.resume(self.reached)
        scores = partial(scores_by, task.run, task.recipe.evaluation, task.steps)
        self._store = CheckpointStore(
            task.run.checkpoints, task.recipe.checkpoint, self.group, scores, copies_of(task, self.group)
        )
        self._sink: MetricsSink = MetricsLog(task.run.metrics, self.reached) if first else lambda step, metrics: None
        if first:
            began = {"process": psutil.Process().create_time(), "entered": entered, "built": built}
            ready = {"restored": time.time(), "start": self.reached}
            write_json(task.run.startup, {**began, **ready, **self._chosen})
        engine = self.step.engine
        self._peak_flops = loop.measured_peak_flops(engine.compute_dtype, engine.device)

    def run(self, batches: BatchStream, stop: int) -> int:
        """Trains to step `stop` and checkpoints there; returns the step reached, which a request to stop makes
        earlier."""
        from trainers import loop
        from trainers.hooks import StopFile
        from trainers.stuck import StuckWatch

        asked = StopFile(self.task.run.stop_request)
        stacks = self.task.run.stacks / f"worker-{self.group.rank:05d}.txt"
        with StuckWatch(stacks, self.task.recipe.faults.timeout_s) as watch:
            self.reached = loop.run(
                loop.Job(
                    step=self.step,
                    batches=batches,
                    start=self.reached,
                    stop=stop,
                    save=self._save,
                    saving=self._store,
                    after_step=self._after_step,
                    checkpoint=self.task.recipe.checkpoint,
                    group=self.group,
                    sink=self._sink,
                    stop_requested=lambda: asked() or self._watcher.stalled(),
                    peak_flops=self._peak_flops,
                    faults=self._faults,
                    beat=watch.beat,
                )
            )
        return self.reached

    def write_model(self, folder: Path, averaged: bool) -> None:
        """What is trained so far as an exported model; see `write_model`."""
        write_model(self.task, self.step, self.group, folder, averaged)

    def ended_early(self) -> bool:
        """Whether scores beside training that got no better ended it. Collective."""
        return self.group.broadcast_object(self._watcher.stalled())

    def _after_step(self, taken: int) -> None:
        self._refresher(taken)
        self._watcher(taken)

    def _watched(self, folder: Path) -> None:
        self.write_model(folder, self.task.recipe.momentum.export)

    def _snapshot(self, folder: Path) -> None:
        self.write_model(folder, averaged=True)

    def _write_paces(self, paces: list[WorkerPace]) -> None:
        from trainers.checkpoint import write_json

        write_json(self.task.run.workers, [pace.as_dict() for pace in paces])

    def _save(self, at: int) -> None:
        state = {"step": at, "lineage": self.task.lineage, "faults": self._faults.state(), **self._chosen}
        self._store.save(at, tensors_of(self.step), state)


def copies_of(task: Task, group: Group) -> Copies | None:
    """Of the run's checkpoints, where the recipe wants some."""
    from trainers.copies import Copies

    if (copy_to := task.recipe.checkpoint.copy_to) is None:
        return None
    run = task.run
    return Copies(run.checkpoints, copy_of(copy_to, run.run_id), group, partial(files_to_copy, run))


def build_step(task: Task, group: Group, kept: Mapping[str, Any]) -> ContrastiveStep:
    """Model, engine, momentum encoder, queue and objective of a recipe, on this worker, from the recipe's seed.

    kept  what a checkpoint says of the choices that a run makes once; empty for a new run
    """
    import torch

    from trainers.ema import MomentumEncoder
    from trainers.encoders.spec import ModelSpec
    from trainers.engine import Engine
    from trainers.negative_queue import Queues
    from trainers.objectives.compose import sides_compared
    from trainers.step import ContrastiveStep, Memory, choose_caching

    recipe = task.recipe
    compares = sides_compared(recipe.losses)
    objective = objective_of(recipe, ModelSpec.load(task.run.model), group)
    torch.manual_seed(recipe.seed)
    model = model_of(recipe, task.run.model, objective.learned)
    choices = {key: kept[key] for key in ("precision", "reduction") if key in kept}
    engine = Engine(model, recipe.engine.model_copy(update=choices), recipe.optimizer, task.steps)
    memory = None
    if recipe.queue.by_name or recipe.momentum.export or compares:
        dim = model.tower.training_dim
        queues = Queues(recipe.queue, dim, group, engine.device) if recipe.queue.by_name else None
        memory = Memory(MomentumEncoder(engine, recipe.momentum), queues)
    cached = kept.get("cached")
    if cached is None:
        texts = recipe.data.batch * (1 + recipe.data.positives + recipe.data.most_negatives) / group.size
        settings, length = recipe.engine, model.tower.spec.max_tokens
        cached = choose_caching(engine, settings.caching, texts, length, settings.activation_bytes)
    agreement = int(recipe.fingerprint()[:15], 16)
    return ContrastiveStep(
        engine,
        objective,
        memory,
        cached=cached,
        seed=recipe.seed,
        group=group,
        agreement=agreement,
        head_weight=recipe.masked_lm.weight if recipe.masked_lm else 0.0,
        compares=compares,
    )


def choices_of(step: ContrastiveStep) -> dict[str, Any]:
    """What a run chose for itself once; checkpoints keep it, see `build_step`."""
    config = step.engine.config
    return {"cached": step.cached, "precision": config.precision, "reduction": config.reduction}


def objective_of(recipe: Recipe, spec: ModelSpec, group: Group) -> Objective:
    """The recipe's losses and what lies around them."""
    from trainers.objectives.compose import Sum, loss_class, with_views
    from trainers.objectives.config import CustomSection

    def make(section: Any) -> Any:
        return import_object(section.path, "path") if isinstance(section, CustomSection) else loss_class(section)

    terms = Sum(recipe.losses, group, recipe.graded_weights, make)
    return with_views(terms, group, recipe.matryoshka, recipe.layers, len(spec.layers))


def model_of(recipe: Recipe, folder: Path, learned: Mapping[str, float]) -> Trained:
    """What is trained: the recipe's tower or towers, the objective's scalars, the auxiliary head."""
    from trainers.encoders.towers import Layout, build_towers
    from trainers.model import Trained

    if Layout.load(folder):
        return Trained(build_towers(recipe.model, folder, lambda _, at: encoder_of(recipe, at)), learned)
    tower = encoder_of(recipe, folder)
    if recipe.masked_lm is None:
        return Trained(tower, learned)
    from transformers import AutoTokenizer

    from trainers.objectives.masked_lm import MaskedLMHead

    tokenizer = AutoTokenizer.from_pretrained(folder)
    table: Any = tower.backbone.get_input_embeddings()
    special, mask_id = tokenizer.all_special_ids, tokenizer.mask_token_id
    return Trained(tower, learned, MaskedLMHead(recipe.masked_lm, table, tower.spec.hidden, mask_id, special))


def encoder_of(recipe: Recipe, folder: Path) -> TextEncoder:
    """The recipe's tower from its model folder; random weights come from the current torch generator."""
    from trainers.encoders.custom import checked
    from trainers.encoders.spec import ModelSpec
    from trainers.encoders.text import build_encoder

    named = recipe.model.encoder
    if named is None:
        return build_encoder(recipe.model, folder)
    made = import_object(named, "model.encoder")(recipe.model, folder)
    return checked(made, recipe.model, ModelSpec.load(folder))


def tensors_of(step: ContrastiveStep) -> dict[str, torch.Tensor]:
    """Every tensor of this worker that a checkpoint holds, each part under its own prefix."""
    parts = {"engine": step.engine.state()}
    if step.memory:
        parts["momentum"] = step.memory.encoder.state()
        if step.memory.queues is not None:
            parts["queue"] = step.memory.queues.state()
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def restore(step: ContrastiveStep, checkpoint: Checkpoint) -> int:
    """Takes up a whole checkpoint, of any number of workers; returns the step to go on with. Collective."""
    step.engine.restore(checkpoint.tensors("engine."))
    if step.memory:
        step.memory.encoder.restore(checkpoint.tensors("momentum."))
        if step.memory.queues is not None:
            step.memory.queues.restore(checkpoint.tensors("queue."))
    return checkpoint.state["step"]


def write_model(task: Task, step: ContrastiveStep, group: Group, folder: Path, averaged: bool) -> None:
    """The trained weights as a Sentence Transformers folder. averaged: the momentum encoder's, where there is one."""
    from trainers.encoders.spec import ModelSpec
    from trainers.encoders.towers import Layout, export_towers
    from trainers.export import export_sentence_transformer
    from trainers.model import TOWER

    source = step.memory.encoder if step.memory and averaged else step.engine
    weights = {name.removeprefix(TOWER): w for name, w in source.full_weights().items() if name.startswith(TOWER)}
    model, made_of = task.recipe.model, task.run.model
    if group.rank == 0:
        if Layout.load(made_of):
            export_towers(weights, made_of, folder, model)
        else:
            export_sentence_transformer(weights, ModelSpec.load(made_of), made_of, folder, model)
    group.barrier()
