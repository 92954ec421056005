"""`gyre evaluate`: a model over a suite, beside baselines, stored so that it can be compared later."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cluster.evidence.baselines import baseline_models, run_of
from cluster.evidence.contamination import Held, contamination
from cluster.evidence.sharded import ShardedVectors
from cluster.evidence.suites import OpenSuite, open_suite
from cluster.models.folder import fingerprint, open_encoder
from cluster.models.reference import resolve
from cluster.paths import home
from data_services.schema import Encoder, Tokenize, UsageError
from evaluation import mteb_adapter
from evaluation.bias import associations
from evaluation.geometry import stability
from evaluation.slices import by_language, by_length
from evaluation.stored import Excerpts, PerQuery, Result, StoredEvaluation, TaskResult, new_id, write
from evaluation.tasks.base import excerpts_of
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
    workers    Ray actors that encode and search a large corpus; 1 without a cluster: this process
    """

    model: str
    suite: str = DEFAULT_SUITE
    split: str | None = None
    k: int | None = None
    baselines: tuple[str, ...] = ()
    workers: int = 1


@dataclass(frozen=True)
class _Measured:
    """What a suite gives: the fields of `stored.Result` that aren't of the model, and the single scores."""

    suite: str
    suite_fingerprint: str
    tasks: dict[str, TaskResult]
    per_query: dict[str, PerQuery] = field(default_factory=dict)
    excerpts: dict[str, Excerpts] = field(default_factory=dict)
    geometry: dict[str, dict[str, float]] = field(default_factory=dict)
    bias: dict[str, dict[str, float]] = field(default_factory=dict)
    training_data: str | None = None


_Measure = Callable[[Encoder, Mapping[str, Encoder]], _Measured]


def evaluate(
    job: EvaluationJob, root: Path | None = None, on_progress: Progress = lambda event: None
) -> StoredEvaluation:
    """Scores a model and its baselines on every task of a suite and stores it under the home.

    Raises UsageError for what isn't there or doesn't fit, RunError for vectors that are none, data that mteb can't
    load and a full disk.
    """
    root, began = root or home(), time.monotonic()
    ref = resolve(job.model, root)
    made = fingerprint(ref.folder)
    if job.suite.startswith(mteb_adapter.PREFIX):
        measure = _mteb(job, ref.name, made, root)
    else:
        measure = _suite(job, ref.folder, root, on_progress)
    with ExitStack() as stack:
        encoder = stack.enter_context(open_encoder(ref.folder))
        found = measure(encoder, baseline_models(job.model, job.baselines, root, stack))
        dim = dimensions(encoder)
    result = Result(
        id=new_id(),
        model=ref.name,
        model_fingerprint=made,
        dim=dim,
        suite=found.suite,
        suite_fingerprint=found.suite_fingerprint,
        made=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - began,
        tasks=found.tasks,
        geometry=found.geometry,
        bias=found.bias,
        training_data=found.training_data,
    )
    return write(root, result, found.per_query, found.excerpts)


def _suite(job: EvaluationJob, folder: Path, root: Path, on_progress: Progress) -> _Measure:
    """Our own tasks: their data is read before a model is."""
    suite = open_suite(job.suite, job.split, job.k, root)
    held = contamination(run_of(job.model, root), suite.tasks, root, on_progress)

    def measure(encoder: Encoder, baselines: Mapping[str, Encoder]) -> _Measured:
        vectors = ShardedVectors(encoder, folder, root, job.workers, on_progress)
        scorer = _Scorer(suite, vectors, encoder, baselines, held, on_progress)
        tasks = dict(scorer.tasks())
        bias = associations(scorer.vectors) if suite.bias else {}
        return _Measured(
            suite.name,
            suite.fingerprint,
            tasks,
            scorer.per_query,
            scorer.excerpts,
            scorer.geometry,
            bias,
            held.training_data,
        )

    return measure


def _mteb(job: EvaluationJob, name: str, revision: str, root: Path) -> _Measure:
    """mteb's tasks; its result files go to <home>/mteb."""
    if job.split is not None or job.k is not None:
        raise UsageError("--split and --k are for a source; mteb's tasks have splits and cutoffs of their own")
    tasks = mteb_adapter.tasks_named(job.suite.removeprefix(mteb_adapter.PREFIX).split(","))

    def scored(encoder: Encoder, name: str) -> dict[str, TaskResult]:
        model = mteb_adapter.MtebModel(encoder, f"gyre/{name.replace('/', '-')}", revision[:16])
        return mteb_adapter.score(model, tasks, root / "mteb")

    def measure(encoder: Encoder, baselines: Mapping[str, Encoder]) -> _Measured:
        found = scored(encoder, name)
        others = {other: scored(model, other) for other, model in baselines.items()}
        beside = {
            task: result.model_copy(update={"baselines": {o: scores[task].metrics for o, scores in others.items()}})
            for task, result in found.items()
        }
        return _Measured(job.suite, mteb_adapter.fingerprint(tasks), beside)

    return measure


class _Scorer:
    """Every task with the model, its variants and the baselines; texts that tasks share are encoded once."""

    def __init__(
        self,
        suite: OpenSuite,
        vectors: Vectors,
        encoder: Encoder,
        baselines: Mapping[str, Encoder],
        held: Held,
        on_progress: Progress,
    ) -> None:
        self._suite, self._held, self._tell = suite, held, on_progress
        self.vectors = vectors
        self._baselines = {name: Vectors(other) for name, other in baselines.items()}
        self._variants = {
            v.name: variant_vectors(self.vectors, v, lambda prompts: with_prompts(encoder, prompts))
            for v in suite.variants
        }
        self.per_query: dict[str, PerQuery] = {}
        self.excerpts: dict[str, Excerpts] = {}
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
        self.excerpts[task.name] = excerpts_of(task, scores.per_query)
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
    from trainers.encoders.local import LocalEncoder

    tokenize = _prompted(encoder.tokenize, prompts) if isinstance(encoder, LocalEncoder) else None
    if tokenize is None:
        raise UsageError("this model's prompts can't be changed: leave `prompts` out of the suite's variants")
    assert isinstance(encoder, LocalEncoder), "others have no prompts"
    return LocalEncoder(encoder.encoder, tokenize)


def _prompted(tokenize: Tokenize, prompts: Mapping[Side, str]) -> Tokenize | None:
    """What reads texts with other prompts; None where nothing in it has prompts."""
    from data_services.inputs import Routed
    from data_services.tokenizer import FolderTokenizer
    from data_services.vision_text import VisionText

    if isinstance(tokenize, FolderTokenizer):
        return FolderTokenizer(tokenize.folder, tokenize.max_tokens, tokenize.prompts | dict(prompts))
    if isinstance(tokenize, VisionText):
        return replace(tokenize, text=cast(FolderTokenizer, _prompted(tokenize.text, prompts)))
    if not isinstance(tokenize, Routed):
        return None
    made = {name: _prompted(reader, prompts) for name, reader in tokenize.readers.items()}
    found = {name: new or tokenize.readers[name] for name, new in made.items()}
    return Routed(found, tokenize.by) if any(made.values()) else None


def rows_of(result: Result, task: str) -> dict[str, dict[str, float]]:
    """A task's table: {baseline, model or `model variant`: metrics}, as `report.results_table` takes it."""
    scored = result.tasks[task]
    variants = {f"{result.model} {name}": metrics for name, metrics in scored.variants.items()}
    return scored.baselines | {result.model: scored.metrics} | variants
