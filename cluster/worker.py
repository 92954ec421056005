"""What runs on each training worker: the rooms of `trainers` put together for one recipe, then the loop.

Ray calls it (`cluster/launch.py`), and so can any launcher that sets the usual torch.distributed variables: all it
needs is a `Task` and a stream of batches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Recipe, import_object
from cluster.paths import RunPaths
from data_services.schema import BatchStream, UsageError

if TYPE_CHECKING:
    import torch

    from trainers.checkpoint import Checkpoint
    from trainers.collectives import Group
    from trainers.encoders.text import TextEncoder
    from trainers.step import ContrastiveStep


@dataclass(frozen=True)
class Task:
    """One run, as its workers see it.

    steps          optimizer steps of the whole run
    prompt_tokens  leading tokens that are the prompt, of a query and of a document
    lineage        what a checkpoint says of its origin: plan and fingerprints
    """

    recipe: Recipe
    run: RunPaths
    steps: int
    prompt_tokens: tuple[int, int]
    lineage: Mapping[str, Any]


def train_on_worker(task: Task, batches: BatchStream) -> int:
    """Restores the newest committed checkpoint, trains to the end, exports; returns the step reached.

    Collective over the default process group. A request to stop ends it early, after a checkpoint.
    """
    entered = time.time()
    import torch

    from trainers import loop
    from trainers.checkpoint import CheckpointStore, latest, write_json
    from trainers.collectives import Group
    from trainers.hooks import MetricsLog, StopFile

    group = Group()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", task.recipe.cluster.threads)))
    newest: Checkpoint | None = group.broadcast_object(latest(task.run.checkpoints))
    step = build_step(task, group, newest.state if newest else {})
    if group.rank == 0:
        write_json(task.run.startup, {"entered": entered, "built": time.time()})
    start = restore(step, newest) if newest else 0
    store = CheckpointStore(task.run.checkpoints, task.recipe.checkpoint, group)

    def save(at: int) -> None:
        chosen = {"cached": step.cached, "precision": step.engine.config.precision}
        state = {"step": at, "lineage": task.lineage, **chosen}
        store.save(at, tensors_of(step), state)

    reached = loop.run(
        loop.Job(
            step=step,
            batches=batches,
            start=start,
            stop=task.steps,
            save=save,
            checkpoint=task.recipe.checkpoint,
            group=group,
            sink=MetricsLog(task.run.metrics, start) if group.rank == 0 else lambda step, metrics: None,
            stop_requested=StopFile(task.run.stop_request),
            flops_per_token=step.engine.module.flops_per_token,
            peak_flops=loop.measured_peak_flops(step.engine.compute_dtype, step.engine.device),
        )
    )
    if reached == task.steps:
        export(task, step, group)
    return reached


def build_step(task: Task, group: Group, kept: Mapping[str, Any]) -> ContrastiveStep:
    """Model, engine, momentum encoder, queue and objective of a recipe, on this worker, from the recipe's seed.

    kept  what a checkpoint says of the choices that a run makes once; empty for a new run
    """
    import torch

    from trainers.ema import MomentumEncoder
    from trainers.engine import Engine
    from trainers.negative_queue import NegativeQueue
    from trainers.objectives.contrastive import Contrastive
    from trainers.step import ContrastiveStep, Memory, choose_caching

    recipe = task.recipe

    def fresh() -> TextEncoder:
        torch.manual_seed(recipe.seed)
        return encoder_of(recipe, task.run.model)

    model = fresh()
    precision = kept.get("precision", recipe.engine.precision)
    engine_config = recipe.engine.model_copy(update={"precision": precision})
    engine = Engine(model, engine_config, recipe.optimizer, task.steps)
    memory = None
    if recipe.queue.rows or recipe.momentum.export:
        queue = NegativeQueue(recipe.queue, model.dim, group, engine.device) if recipe.queue.rows else None
        memory = Memory(MomentumEncoder(engine, fresh, recipe.momentum), queue)
    cached = kept.get("cached")
    if cached is None:
        texts = recipe.data.batch * (2 + recipe.data.negatives) / group.size
        settings = recipe.engine
        cached = choose_caching(engine, settings.caching, texts, model.spec.max_tokens, settings.activation_bytes)
    named = recipe.objective.path
    objective = (import_object(named, "objective.path") if named else Contrastive)(recipe.objective, group)
    return ContrastiveStep(
        engine,
        objective,
        memory,
        cached=cached,
        seed=recipe.seed,
        rank=group.rank,
        prompt_tokens=task.prompt_tokens,
    )


def encoder_of(recipe: Recipe, folder: Path) -> TextEncoder:
    """The recipe's tower from its model folder; random weights come from the current torch generator."""
    from trainers.encoders.text import TextEncoder, build_encoder
    from trainers.export import BACKBONE

    named = recipe.model.encoder
    if named is None:
        return build_encoder(recipe.model, folder)
    encoder = import_object(named, "model.encoder")(recipe.model, folder)
    if not isinstance(encoder, TextEncoder):
        raise UsageError(f"model.encoder: {named} returned a {type(encoder).__name__}; it must return a TextEncoder")
    outside = next((name for name, _ in encoder.named_parameters() if not name.startswith(BACKBONE)), None)
    if outside:
        raise UsageError(
            f"model.encoder: {named} has the weight {outside}, which an export can't hold; move it into the backbone"
        )
    return encoder


def tensors_of(step: ContrastiveStep) -> dict[str, torch.Tensor]:
    """Every tensor of this worker that a checkpoint holds, each part under its own prefix."""
    parts = {"engine": step.engine.state()}
    if step.memory:
        parts["momentum"] = step.memory.encoder.state()
        if step.memory.queue is not None:
            parts["queue"] = step.memory.queue.state()
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def restore(step: ContrastiveStep, checkpoint: Checkpoint) -> int:
    """Takes up a checkpoint, of any number of workers; returns the step to go on with. Collective."""
    checkpoint.verify(step.rank)
    step.engine.restore(checkpoint.tensors("engine."))
    if step.memory:
        step.memory.encoder.restore(checkpoint.tensors("momentum."))
        if step.memory.queue is not None:
            step.memory.queue.restore(checkpoint.tensors("queue."))
    return checkpoint.state["step"]


def export(task: Task, step: ContrastiveStep, group: Group) -> None:
    """The trained weights, or their average where the recipe says so, as a Sentence Transformers folder."""
    from trainers.encoders.model_folder import ModelSpec
    from trainers.export import export_sentence_transformer

    source = step.memory.encoder if step.memory and task.recipe.momentum.export else step.engine
    weights = source.full_weights()
    if group.rank == 0:
        export_sentence_transformer(weights, ModelSpec.load(task.run.model), task.run.model, task.run.export)
    group.barrier()
