"""`gyre evaluate`: a model over a suite, beside baselines, stored so that it can be compared later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.baselines import baseline_models, run_of
from cluster.contamination import Held, contamination
from cluster.models import fingerprint, open_encoder, resolve
from cluster.paths import home
from cluster.suites import OpenSuite, open_suite
from data_services.schema import Encoder, UsageError
from evaluation.bias import associations
from evaluation.geometry import stability
from evaluation.slices import by_language, by_length
from evaluation.stored import PerQuery, Result, StoredEvaluation, TaskResult, new_id, write
from evaluation.tasks.ranking import Retrieval
from evaluation.vectors import Side, Vectors, variant_vectors

if TYPE_CHECKING:
    from evaluation.tasks.base import Task, TaskScores

DEFAULT_SUITE = "builtin:stdlib-code"
Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class EvaluationJob:
    """What is scored on what.

    split, k   of a suite that is a source; None: heldout or test, 10
    baselines  further models in every table; empty: the champion of its name, or the model before training
    """

    model: str
    suite: str = DEFAULT_SUITE
    split: str | None = None
    k: int | None = None
    baselines: tuple[str, ...] = ()


def evaluate(
    job: EvaluationJob, root: Path | None = None, on_progress: Progress = lambda event: None
) -> StoredEvaluation:
    """Scores a model and its baselines on every task of a suite and stores it under the home.

    Raises UsageError for what isn't there or doesn't fit, RunError for vectors that are none and a full disk.
    """
    root, began = root or home(), time.monotonic()
    ref = resolve(job.model, root)
    suite = open_suite(job.suite, job.split, job.k, root)
    held = contamination(run_of(job.model, root), suite.tasks, root, on_progress)
    with ExitStack() as stack:
        encoder = stack.enter_context(open_encoder(ref.folder))
        others = baseline_models(job.model, job.baselines, root, stack)
        scorer = _Scorer(suite, encoder, others, held, on_progress)
        tasks, dim = dict(scorer.tasks()), dimensions(encoder)
        bias = associations(scorer.vectors) if suite.bias else {}
    result = Result(
        id=new_id(),
        model=ref.name,
        model_fingerprint=fingerprint(ref.folder),
        dim=dim,
        suite=suite.name,
        suite_fingerprint=suite.fingerprint,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        tasks=tasks,
        geometry=scorer.geometry,
        bias=bias,
        training_data=held.training_data,
    )
    return write(root, result, scorer.per_query)


class _Scorer:
    """Every task with the model, its variants and the baselines; texts that tasks share are encoded once."""

    def __init__(
        self,
        suite: OpenSuite,
        encoder: Encoder,
        baselines: Mapping[str, Encoder],
        held: Held,
        on_progress: Progress,
    ) -> None:
        self._suite, self._held, self._tell = suite, held, on_progress
        self.vectors = Vectors(encoder)
        self._baselines = {name: Vectors(other) for name, other in baselines.items()}
        self._variants = {
            v.name: variant_vectors(self.vectors, v, lambda prompts: with_prompts(encoder, prompts))
            for v in suite.variants
        }
        self.per_query: dict[str, PerQuery] = {}
        self.geometry: dict[str, dict[str, float]] = {}

    def tasks(self) -> Iterator[tuple[str, TaskResult]]:
        for done, task in enumerate(self._suite.tasks):
            counts = ", ".join(f"{count:,} {side}" for side, count in task.counts.items())
            told = f"task {done + 1} of {len(self._suite.tasks)}: {task.name} ({task.kind}, {counts})"
            self._tell({"kind": "note", "text": told})
            yield task.name, self._scored(task)

    def _scored(self, task: Task) -> TaskResult:
        scores = task.score(self.vectors)
        self.per_query[task.name] = scores.per_query
        others = {name: task.score(vectors) for name, vectors in self._baselines.items()}
        baselines = task.baselines() | others
        if isinstance(task, Retrieval) and not self.vectors.tokens:
            overlap = {
                f"neighbours_kept_of_{name}": stability(scores.per_query.hits, other.per_query.hits)
                for name, other in others.items()
            }
            self.geometry[task.name] = task.geometry(self.vectors) | overlap
        return TaskResult(
            kind=task.kind,
            main=task.main,
            metrics=scores.metrics,
            counts=task.counts,
            baselines={name: other.metrics for name, other in baselines.items()},
            variants={name: task.score(vectors).metrics for name, vectors in self._variants.items()},
            slices=slices_of(task, scores),
            contamination=self._held.by_task.get(task.name),
        )


def slices_of(task: Task, scores: TaskScores) -> dict[str, dict[str, float]]:
    """The task's metrics by length of its queries, and by language where that is known."""
    single = scores.per_query.scores
    if not task.asked_texts or not single:
        return {}
    return by_length(single, task.asked_texts) | (by_language(single, task.languages) if task.languages else {})


def dimensions(encoder: Encoder) -> int:
    """D of a model's vectors."""
    if getattr(encoder, "gives_tokens", False):
        return int(encoder.encode_tokens(["a"], "query")[0].shape[1])  # type: ignore[attr-defined]
    return int(encoder.encode(["a"], "query").shape[1])


def with_prompts(encoder: Encoder, prompts: Mapping[Side, str]) -> Encoder:
    """The same model with other prompts, by side; a side that isn't named keeps its own."""
    from data_services.tokenizer import FolderTokenizer
    from trainers.encoders.text import LocalEncoder
    from trainers.encoders.towers import LocalTowers

    if isinstance(encoder, LocalTowers):
        towers = (with_prompts(tower, prompts) for tower in (encoder.query, encoder.document))
        return LocalTowers(*towers)  # type: ignore[arg-type]
    if not isinstance(encoder, LocalEncoder) or not isinstance(encoder.tokenize, FolderTokenizer):
        raise UsageError("this model's prompts can't be changed: leave `prompts` out of the suite's variants")
    own = encoder.tokenize
    return LocalEncoder(encoder.encoder, FolderTokenizer(own.folder, own.max_tokens, own.prompts | dict(prompts)))


def rows_of(result: Result, task: str) -> dict[str, dict[str, float]]:
    """A task's table: {baseline, model or `model variant`: metrics}, as `report.results_table` takes it."""
    scored = result.tasks[task]
    variants = {f"{result.model} {name}": metrics for name, metrics in scored.variants.items()}
    return scored.baselines | {result.model: scored.metrics} | variants
