"""The processes that `benchmarks.step` measures: ours, the peer, and what both are given."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import QUICKSTART, child_main

if TYPE_CHECKING:
    from cluster.worker import Task
    from data_services.schema import Batch
    from data_services.stream import BatchReader
    from trainers.negative_queue import Queues
    from trainers.step import ContrastiveStep

QUEUE_ROWS = 8192


@dataclass(frozen=True)
class Peer:
    """Settings of SentenceTransformerTrainer; the defaults here are its own.

    mini_batch  texts encoded at once by the cached loss; None: the plain loss, which encodes the batch at once
    """

    precision: str = "fp32"
    attention: str = "sdpa"
    mini_batch: int | None = 32

    @property
    def line(self) -> str:
        loss = f"cached loss, mini-batch {self.mini_batch}" if self.mini_batch else "plain loss"
        return f"{self.precision}, {self.attention} attention, {loss}"


@dataclass(frozen=True)
class Length:
    """Steps of a run: `warm_up` that don't count, then `timed`."""

    warm_up: int
    timed: int

    @property
    def steps(self) -> int:
        return self.warm_up + self.timed


def prepare(home: str, batch: int, length: dict[str, int]) -> dict[str, Any]:
    """The quickstart's tower from random weights as a Sentence Transformers folder, and our model folder from it."""
    import torch

    from cluster.config import load_recipe
    from cluster.prepare import make_model_folder
    from data_services.sources import open_source
    from trainers.encoders.model_folder import ModelSpec
    from trainers.encoders.text import build_encoder
    from trainers.export import export_sentence_transformer

    root = Path(home)
    recipe = load_recipe(QUICKSTART, ["model.config.dropout=0", "model.token_dropout=0"])
    sources = tuple(open_source(s, root) for s in recipe.data.sources)
    make_model_folder(recipe, root / "tower", sources)
    torch.manual_seed(recipe.seed)
    weights = build_encoder(recipe.model, root / "tower").state_dict()
    export_sentence_transformer(weights, ModelSpec.load(root / "tower"), root / "tower", root / "exported")
    make_model_folder(our_recipe(root, batch, Length(**length), 0), root / "run" / "model", sources)
    return {}


def our_recipe(root: Path, batch: int, length: Length, queue_rows: int, caching: str = "auto") -> Any:
    from cluster.config import parse_recipe
    from cluster.recipe_file import read_yaml

    raw = read_yaml(QUICKSTART)
    return parse_recipe(
        raw
        | {
            "data": raw["data"] | {"batch": batch, "steps": length.steps, "epochs": None},
            "model": {"path": str(root / "exported")},
            "optimizer": raw["optimizer"] | {"warmup_steps": 0, "clip_norm": 1.0},
            "engine": raw.get("engine", {}) | {"caching": caching},
            "queue": {"rows": queue_rows},
            "momentum": {},
            "cluster": {"workers": 1},
        },
        str(QUICKSTART),
    )


def our_task(
    root: Path, batch: int, length: Length, queue_rows: int = 0, caching: str = "auto"
) -> tuple[Task, BatchReader]:
    """A run of one worker without Ray, and its data."""
    from cluster.models import tokenizer_of
    from cluster.paths import RunPaths
    from cluster.worker import Task
    from data_services.sources import open_source
    from data_services.stream import BatchReader, plan_of

    recipe = our_recipe(root, batch, length, queue_rows, caching)
    sources = [open_source(s, root) for s in recipe.data.sources]
    run = RunPaths(root / "run")
    reader = BatchReader(plan_of(recipe.data, sources, recipe.seed), sources, tokenizer_of(run.model))
    return Task(recipe, run, length.steps, {}), reader


class Stopwatch:
    """Seconds by name, and the ends of steps; what happens inside `paused` counts for nothing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.ends: list[float] = []
        self._paused_s = 0.0

    def step_done(self) -> None:
        self.ends.append(time.perf_counter() - self._paused_s)

    @contextmanager
    def paused(self) -> Any:
        began = time.perf_counter()
        yield
        self._paused_s += time.perf_counter() - began

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, its seconds added to `name`."""

        def call(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments, **named)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    def result(self, batch: int, length: Length) -> dict[str, Any]:
        """Pairs a second over the timed steps, and the most memory that the process has held."""
        seconds = self.ends[-1] - self.ends[length.warm_up - 1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"pairs_per_s": batch * length.timed / seconds, "seconds": seconds, "peak_rss_bytes": peak}


def ours(home: str, batch: int, length: dict[str, int], memory: bool = False, caching: str = "auto") -> dict[str, Any]:
    """Our training loop over LocalStream, as a worker runs it; checkpoints aside."""
    from cluster.worker import build_step
    from data_services.stream import LocalStream
    from trainers import loop
    from trainers.collectives import Group
    from trainers.faults import Faults

    steps, watch, group = Length(**length), Stopwatch(), Group()
    task, reader = our_task(Path(home), batch, steps, QUEUE_ROWS if memory else 0, caching)
    contrast = build_step(task, group, {})
    newest: list[Batch] = []
    if memory:
        fill_queue(contrast)
        watch_memory(contrast, watch)

    def stream(start: int) -> Any:
        for made in LocalStream(reader, 1, 0, task.recipe.engine.budget_tokens)(start):
            newest[:] = [made]
            yield made

    def sink(step: int, metrics: Any) -> None:
        watch.step_done()
        if memory:
            with watch.paused():
                score_queue(contrast, newest[0], watch)
        if step + 1 == steps.warm_up:
            watch.seconds.clear()

    loop.run(
        loop.Job(
            step=contrast,
            batches=stream,
            start=0,
            stop=task.steps,
            save=lambda at: None,
            checkpoint=task.recipe.checkpoint,
            group=group,
            sink=sink,
            stop_requested=lambda: False,
            peak_flops=1.0,
            faults=Faults(task.recipe.faults, group),
        )
    )
    result = watch.result(batch, steps) | {"cached": contrast.cached}
    if memory:
        result["shares"] = shares(watch.seconds, result["seconds"])
    return result


def shares(seconds: dict[str, float], whole: float) -> dict[str, float]:
    """Of a step. Scoring the queue is what the objective takes with it beyond what it takes without."""
    queue = seconds["with_queue"] - seconds["without_queue"] + seconds["enqueue"]
    return {
        "queue": queue / whole,
        "ema": seconds["ema"] / whole,
        "momentum_forward": seconds["forward"] / whole,
    }


def fill_queue(step: ContrastiveStep) -> None:
    """K rows from the start: a queue that is still filling costs less."""
    import torch
    from torch.nn.functional import normalize

    from trainers.objectives.keys import UNKNOWN, Keys

    vectors = normalize(torch.randn(QUEUE_ROWS, step.engine.module.tower.training_dim), dim=1)
    ids = -1 - torch.arange(QUEUE_ROWS)
    unknown = torch.full_like(ids, UNKNOWN)
    # The columns that a batch's documents have.
    queues_of(step).enqueue({"documents": (vectors, Keys(unknown, ids, rejects=unknown, tasks=unknown))}, 0)


def queues_of(step: ContrastiveStep) -> Queues:
    assert step.memory is not None
    assert step.memory.queues is not None
    return step.memory.queues


def watch_memory(step: ContrastiveStep, watch: Stopwatch) -> None:
    assert step.memory is not None
    encoder, queues = step.memory.encoder, queues_of(step)
    encoder.update = watch.timed("ema", encoder.update)  # type: ignore[method-assign]
    encoder.forward = watch.timed("forward", encoder.forward)  # type: ignore[method-assign]
    queues.enqueue = watch.timed("enqueue", queues.enqueue)  # type: ignore[method-assign]
    queues.observe = watch.timed("enqueue", queues.observe)  # type: ignore[method-assign]


def score_queue(step: ContrastiveStep, batch: Batch, watch: Stopwatch) -> None:
    """The loss of this batch's shape, forward and backward, once with the queue and once without."""
    import torch
    from torch.nn.functional import normalize

    from trainers.chunks import keys_of

    texts = len(batch.queries) + len(batch.documents)
    vectors = normalize(torch.randn(texts, step.engine.module.tower.training_dim), dim=1).requires_grad_()
    keys = keys_of(batch, None, vectors.device)
    embedded = step.embedded(batch, vectors, vectors.new_zeros(0), keys, {})

    def loss(queues: Any) -> None:
        # A second backward through the same split of `vectors` needs its graph again.
        queries, documents = vectors.split([len(batch.queries), len(batch.documents)])
        share = step.objective(replace(embedded, queries=queries, documents=documents, queues=queues))
        share.loss.backward()

    watch.timed("with_queue", loss)(embedded.queues)
    watch.timed("without_queue", loss)({})


def peer(home: str, batch: int, length: dict[str, int], peer: dict[str, Any]) -> dict[str, Any]:
    """SentenceTransformerTrainer over the same batches: no evaluation, no checkpoints, no log, no progress bar."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.base.sampler import DefaultBatchSampler
    from sentence_transformers.sentence_transformer import losses
    from torch.utils.data import SequentialSampler
    from transformers import TrainerCallback

    from trainers.objectives.sections.numbers import ends_of

    settings, steps, watch = Peer(**peer), Length(**length), Stopwatch()
    task, reader = our_task(Path(home), batch, steps)

    class Ends(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.step_done()

    def in_order(dataset: Any, batch_size: int, drop_last: bool, **_: Any) -> DefaultBatchSampler:
        return DefaultBatchSampler(SequentialSampler(dataset), batch_size=batch_size, drop_last=drop_last)

    attention = {"attn_implementation": settings.attention}
    model = SentenceTransformer(str(Path(home) / "exported"), device="cpu", model_kwargs=attention)
    loss: Any
    if settings.mini_batch:
        loss = losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=settings.mini_batch)
    else:
        loss = losses.MultipleNegativesRankingLoss(model)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(Path(home) / "peer"),
        per_device_train_batch_size=batch,
        max_steps=steps.steps,
        learning_rate=ends_of(task.recipe.optimizer.lr)[0],
        bf16=settings.precision == "bf16",
        use_cpu=True,
        batch_sampler=in_order,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    data = Dataset.from_dict(pairs(reader, steps))
    SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss, callbacks=[Ends()]).train()
    return watch.result(batch, steps)


def pairs(reader: BatchReader, length: Length) -> dict[str, list[str]]:
    """The pairs of our plan, in its order."""
    from data_services.schema import Column

    (source,) = reader.sources
    columns: dict[str, list[str]] = {"query": [], "positive": []}
    for t in range(length.steps):
        table = source.read(reader.plan.rows(t)[:, 1])
        columns["query"] += table.column(Column.QUERY).to_pylist()
        columns["positive"] += [texts[0] for texts in table.column(Column.POSITIVES).to_pylist()]
    return columns


if __name__ == "__main__":
    child_main({"prepare": prepare, "ours": ours, "peer": peer})
