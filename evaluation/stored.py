"""A finished evaluation as files, so that any two can be compared later.

    <home>/evaluations/<id>/result.json        what was measured, of what, on what: `Result`
    <home>/evaluations/<id>/per_query.parquet  a row for each (task, query, metric): `PerQuery`
    <home>/evaluations/<id>/excerpts.parquet   what its queries and hits show: `Excerpts`

    task      string        name in the suite
    query_id  string        unique in its task
    metric    string        one of the task's
    score     float64       the mean over a metric's rows is the metric
    hits      list<string>  ids of the best documents, best first; empty where a task ranks nothing

A metric that is no mean over queries (F1, say) has no rows. The ids of equal suites (equal fingerprints) are equal, so
that two evaluations pair by them.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from data_services.schema import RunError, Section, UsageError
from evaluation.excerpts import Excerpt

FOLDER = "evaluations"
COMPARISONS = "comparisons"
_RESULT, _PER_QUERY, _EXCERPTS = "result.json", "per_query.parquet", "excerpts.parquet"
_COLUMNS = pa.schema(
    [
        ("task", pa.string()),
        ("query_id", pa.string()),
        ("metric", pa.string()),
        ("score", pa.float64()),
        ("hits", pa.list_(pa.string())),
    ]
)
_SHOWN = pa.schema([(name, pa.string()) for name in ("task", "side", "id", "text", "picture")])


class Overlap(Section):
    """How many of a task's texts the training data holds: as they are, or nearly."""

    texts: int = Field(ge=0, description="distinct texts of the task's side")
    exact: int = Field(ge=0)
    near: int = Field(ge=0, description="not exact, but above the threshold of similarity")

    @property
    def share(self) -> float:
        return (self.exact + self.near) / self.texts if self.texts else 0.0


class TaskResult(Section):
    """One task's scores. {metric: value} throughout; `main` is the metric that stands for the task."""

    kind: str = Field(description="retrieval, reranking, sts, …")
    main: str
    metrics: dict[str, float] = Field(description="of the model")
    counts: dict[str, int] = Field(description="{'queries': …, 'documents': …}: what was scored")
    baselines: dict[str, dict[str, float]] = Field({}, description="{'bm25' | 'untrained' | 'champion' | …: metrics}")
    variants: dict[str, dict[str, float]] = Field(
        {}, description="of the model with other prompts, fewer dimensions or bits: {'dim 128 int8': metrics}"
    )
    slices: dict[str, dict[str, float]] = Field({}, description="of a part of the queries: {'length short': metrics}")
    contamination: dict[str, Overlap] | None = Field(
        None, description="by side of the task ('queries', 'documents', 'texts'); None: the training data isn't known"
    )

    @property
    def contaminated_share(self) -> float | None:
        """Of the side that the training data holds most of; None where the training data isn't known."""
        if self.contamination is None:
            return None
        return max((overlap.share for overlap in self.contamination.values()), default=0.0)


class Result(Section):
    """What was measured. Fingerprints say of what: of the model's files, and of the suite's settings and texts."""

    id: str
    model: str = Field(description="as it was named: a run, NAME/VERSION, a folder, a hub id")
    model_fingerprint: str
    dim: int = Field(ge=1, description="D of the model's vectors")
    suite: str
    suite_fingerprint: str
    made: str = Field(description="ISO 8601, UTC")
    seconds: float
    tasks: dict[str, TaskResult]
    geometry: dict[str, dict[str, float]] = Field({}, description="{task: {'alignment': …, 'uniformity': …}}")
    bias: dict[str, dict[str, float]] = Field({}, description="{probe: {'effect': …, 'p': …}}, see evaluation/bias.py")
    training_data: str | None = Field(None, description="fingerprint of what the model was trained on, where known")


@dataclass(frozen=True)
class PerQuery:
    """A task's scores one by one. query_ids: q of them; scores {metric: [q] float64}; hits: q lists, or none."""

    query_ids: Sequence[str]
    scores: Mapping[str, np.ndarray]
    hits: Sequence[Sequence[str]] = field(default=())

    def table(self, task: str) -> pa.Table:
        hits = list(self.hits) or [[]] * len(self.query_ids)
        parts = [
            pa.table(
                {
                    "task": [task] * len(self.query_ids),
                    "query_id": list(self.query_ids),
                    "metric": [metric] * len(self.query_ids),
                    "score": np.asarray(scores, np.float64),
                    "hits": hits,
                },
                schema=_COLUMNS,
            )
            for metric, scores in self.scores.items()
        ]
        return pa.concat_tables(parts) if parts else _COLUMNS.empty_table()


@dataclass(frozen=True)
class Excerpts:
    """What a task's queries, and the documents among their hits, show; by their ids."""

    queries: Mapping[str, Excerpt] = field(default_factory=dict)
    documents: Mapping[str, Excerpt] = field(default_factory=dict)

    def of(self, queries: Iterable[str], documents: Iterable[str]) -> Excerpts:
        """Those of some alone."""
        asked, found = set(queries), set(documents)
        return Excerpts(
            {id: shown for id, shown in self.queries.items() if id in asked},
            {id: shown for id, shown in self.documents.items() if id in found},
        )

    def table(self, task: str) -> pa.Table:
        sides = (("query", self.queries), ("document", self.documents))
        rows = [(task, side, id, shown.text, shown.picture) for side, its in sides for id, shown in its.items()]
        return pa.table(list(map(list, zip(*rows, strict=True))) or [[]] * len(_SHOWN), schema=_SHOWN)


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation in its folder; the scores of single queries are read when they are asked for."""

    folder: Path
    result: Result

    def per_query(self, task: str, metric: str | None = None) -> PerQuery:
        """A task's scores one by one, by query id, of one metric or of all that have them; empty without any."""
        wanted = [("task", "=", task), *([("metric", "=", metric)] if metric else [])]
        path = self.folder / _PER_QUERY
        try:
            table = pq.read_table(path, filters=wanted, schema=_COLUMNS)
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"evaluation {self.result.id} is damaged, evaluate again: {path}: {error}") from error
        scores: dict[str, np.ndarray] = {}
        ids: list[str] = []
        hits: list[list[str]] = []
        for name in table["metric"].unique().to_pylist():
            rows = table.filter(pc.equal(table["metric"], name)).sort_by("query_id")
            found = rows["query_id"].to_pylist()
            if ids and found != ids:
                raise UsageError(f"evaluation {self.result.id} is damaged, evaluate again: {name} has other queries")
            ids, hits, scores[name] = found, rows["hits"].to_pylist(), rows["score"].to_numpy()
        return PerQuery(ids, scores, hits)

    def excerpts(self, task: str) -> Excerpts:
        """Empty of an evaluation that has none."""
        path = self.folder / _EXCERPTS
        if not path.is_file():
            return Excerpts()
        try:
            rows = pq.read_table(path, filters=[("task", "=", task)], schema=_SHOWN).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UsageError(f"evaluation {self.result.id} is damaged, evaluate again: {path}: {error}") from error
        shown = [(row["side"], row["id"], Excerpt(row["text"], row["picture"])) for row in rows]
        return Excerpts(*({id: its for side, id, its in shown if side == name} for name in ("query", "document")))


def new_id() -> str:
    """Sorts by time; no two are equal."""
    return f"{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"


def write(
    root: Path, result: Result, per_query: Mapping[str, PerQuery], excerpts: Mapping[str, Excerpts] | None = None
) -> StoredEvaluation:
    """Writes <root>/evaluations/<result.id>, whole or not at all. RunError where the disk fails."""
    folder = root / FOLDER / result.id
    making = folder.with_name(f".{result.id}.making-{os.getpid()}")
    try:
        making.mkdir(parents=True)
        (making / _RESULT).write_text(result.model_dump_json(indent=2) + "\n")
        tables = [scores.table(task) for task, scores in per_query.items()]
        pq.write_table(pa.concat_tables([_COLUMNS.empty_table(), *tables]), making / _PER_QUERY)
        shown = [its.table(task) for task, its in (excerpts or {}).items()]
        pq.write_table(pa.concat_tables([_SHOWN.empty_table(), *shown]), making / _EXCERPTS)
        making.rename(folder)
    except OSError as error:
        raise RunError(f"the evaluation can't be written to {folder}: {error}") from error
    finally:
        shutil.rmtree(making, ignore_errors=True)
    return StoredEvaluation(folder, result)


def read(folder: Path) -> StoredEvaluation:
    """The evaluation in a folder. UsageError where there is none, or it is damaged."""
    if not (folder / _RESULT).is_file() or not (folder / _PER_QUERY).is_file():
        raise UsageError(f"{folder} holds no evaluation; `gyre evaluate MODEL --suite SUITE` makes one")
    try:
        return StoredEvaluation(folder, Result.model_validate_json((folder / _RESULT).read_text()))
    except (ValidationError, UnicodeDecodeError) as error:
        told = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise UsageError(f"{folder / _RESULT} is damaged, evaluate again: {told}") from error


def find(
    root: Path, model_fingerprint: str | None = None, suite_fingerprint: str | None = None
) -> list[StoredEvaluation]:
    """The stored evaluations under a home, newest first: all, or those of a model, or of a suite."""
    folders = sorted((p for p in (root / FOLDER).glob("*/") if not p.name.startswith(".")), reverse=True)
    stored = [read(folder) for folder in folders if (folder / _RESULT).is_file()]
    return [
        s
        for s in stored
        if model_fingerprint in (None, s.result.model_fingerprint)
        and suite_fingerprint in (None, s.result.suite_fingerprint)
    ]
