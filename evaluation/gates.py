"""Gates: what a model must show before it becomes champion.

A gate asks for three kinds of evidence: the scores of the model's own run (`check_scores`), its evaluation on a suite
beside the champion's (`check_suite`), and the model itself as it would be served (`check_model`). Each gives rows of
one `GateResult`. What a gate asks for and nobody measured is an error, not a pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from pydantic import Field, field_validator, model_validator

from data_services.schema import Section, UsageError
from evaluation.compare import check_same_suite, compare_task
from evaluation.metrics import parse_metric
from evaluation.stored import StoredEvaluation, TaskResult

NO_CHAMPION = "no champion yet"


class NonInferiority(Section):
    """`non_inferior:` on no task may the model be worse than the champion by more than a margin."""

    margin: float = Field(0.01, ge=0, description="of the task's main metric, which the champion may be better by")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="one-sided, that the loss is smaller than the margin")
    tasks: list[str] | None = Field(None, min_length=1, description="None: every task of the suite")


class Improvement(Section):
    """`improvement:` on one task the model must be better than the champion."""

    task: str = Field(description="of the suite")
    metric: str | None = Field(None, description="None: the task's main metric")
    by: float = Field(0.0, ge=0, description="least improvement")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="one-sided, that the improvement is larger than `by`")


class GateConfig(Section):
    """A gate: every requirement that is set must hold. Without any, every model passes."""

    metric: str = Field("ndcg@10", description="ndcg@N, mrr@N or recall@N, of the run's validation split")
    over_bm25: float | None = Field(None, ge=-1, le=1, description="least difference to BM25 in the same run")
    minimum: float | None = Field(None, ge=0, le=1, description="least value of the metric itself")

    suite: str | None = Field(None, description="on which version and champion are evaluated, if they aren't yet")
    minimums: dict[str, dict[str, float]] = Field({}, description="{task of the suite: {metric: least value}}")
    non_inferior: NonInferiority | None = Field(None, description="not worse than the champion, task by task")
    improvement: Improvement | None = Field(None, description="better than the champion on a primary metric")
    contamination: float | None = Field(
        None, ge=0, le=1, description="largest share of a task's texts that the training data may hold"
    )

    latency_p95_ms: float | None = Field(None, gt=0, description="of one text at a time, 32 words, on this machine")
    size_mb: float | None = Field(None, gt=0, description="of the model's files, 10^6 bytes")
    export_parity: float | None = Field(
        None, gt=0, description="largest difference of an element between gyre's vectors and Sentence Transformers'"
    )
    safetensors: bool = Field(False, description="weights are safetensors, and no file is a pickle")
    licence: list[str] | None = Field(None, description="the model card's licence is one of these; []: any")
    signed_off_by: list[str] = Field([], description="who must have signed: `gyre promote … --sign-off NAME`")

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        parse_metric(name)
        return name

    @model_validator(mode="after")
    def _on_a_suite(self) -> GateConfig:
        asked = [key for key in ("minimums", "non_inferior", "improvement") if getattr(self, key)]
        asked += ["contamination"] * (self.contamination is not None)
        if asked and self.suite is None:
            raise ValueError(f"{asked[0]} is measured on a suite: name one in `suite`")
        if self.suite is not None and not asked:
            raise ValueError(
                "suite is named, and nothing is asked of it: set minimums, non_inferior, improvement or contamination"
            )
        return self

    @property
    def asks_of_run(self) -> bool:
        """Whether it looks at the run's own scores."""
        return self.over_bm25 is not None or self.minimum is not None

    @property
    def asks_of_model(self) -> bool:
        """Whether it looks at the model's files."""
        measured = (self.latency_p95_ms, self.size_mb, self.export_parity, self.licence)
        return self.safetensors or any(x is not None for x in measured)


@dataclass(frozen=True)
class GateRow:
    """One requirement: its name, what it asks, what the model has, and by how much that is better (negative: worse).

    margin is None where there is nothing to subtract.
    """

    gate: str
    required: float | str
    got: float | str
    margin: float | None
    passed: bool

    @property
    def sentence(self) -> str:
        by = "" if self.margin is None else f" ({self.margin:+.4f})"
        return f"{self.gate} is {shown(self.got)} where {shown(self.required)} is required{by}"


@dataclass(frozen=True)
class GateResult:
    """`passed`, and the row of every requirement; `sentence` says which failed and by how much."""

    rows: tuple[GateRow, ...]

    @property
    def passed(self) -> bool:
        return all(row.passed for row in self.rows)

    @property
    def sentence(self) -> str:
        failed = [row for row in self.rows if not row.passed]
        if not failed:
            return "every gate passed" if self.rows else "no gate is set"
        return "; ".join(row.sentence for row in failed)


@dataclass(frozen=True)
class ModelFacts:
    """The model as it would be served. licence: of its card, "" without; pickles: files that are some.

    latency_p95_ms, export_parity  None where no gate asked for them: they need the model to be loaded
    """

    size_mb: float
    safetensors: int
    pickles: tuple[str, ...]
    licence: str
    latency_p95_ms: float | None = None
    export_parity: float | None = None


def at_least(gate: str, required: float, got: float) -> GateRow:
    # The slack forgives the last bits of a difference of two means; a NaN passes nothing.
    return GateRow(gate, required, got, got - required, got - required >= -1e-9)


def at_most(gate: str, required: float, got: float) -> GateRow:
    return GateRow(gate, required, got, required - got, required - got >= -1e-9)


def check_scores(gate: GateConfig, scores: Mapping[str, Mapping[str, float]], model: str = "trained") -> GateResult:
    """Hold `scores[model]` against the gate; scores is {"bm25": {metric: value}, "trained": {…}, …}.

    UsageError where the gate needs a number that was not measured.
    """
    rows = []
    if gate.over_bm25 is not None:
        got = _score(gate, scores, model) - _score(gate, scores, "bm25")
        rows.append(at_least(f"{gate.metric} over BM25", gate.over_bm25, got))
    if gate.minimum is not None:
        rows.append(at_least(gate.metric, gate.minimum, _score(gate, scores, model)))
    return GateResult(tuple(rows))


def check_suite(gate: GateConfig, model: StoredEvaluation, champion: StoredEvaluation | None) -> GateResult:
    """Hold an evaluation on the gate's suite against the gate, and against the champion's, None where there is none.

    UsageError where a task or metric of the gate isn't in the suite, or the training data isn't known and the gate
    bounds how much of the suite it holds.
    """
    if champion is not None:
        check_same_suite(champion, model)
    tasks = model.result.tasks
    rows = [
        at_least(f"{task} {metric}", least, _metric(_task(tasks, task), task, metric))
        for task, wanted in gate.minimums.items()
        for metric, least in wanted.items()
    ]
    if gate.non_inferior is not None:
        rows += [_not_worse(gate.non_inferior, task, model, champion) for task in gate.non_inferior.tasks or tasks]
    if gate.improvement is not None:
        rows.append(_better(gate.improvement, model, champion))
    if gate.contamination is not None:
        rows += [at_most(f"{n} contamination", gate.contamination, _contaminated(t, n)) for n, t in tasks.items()]
    return GateResult(tuple(rows))


def check_model(gate: GateConfig, facts: ModelFacts | None) -> GateResult:
    """Hold the model's files, its speed and its card against the gate; facts may be None where it asks for none."""
    rows: list[GateRow] = []
    for name, most in (("latency_p95_ms", gate.latency_p95_ms), ("size_mb", gate.size_mb)):
        if most is not None:
            rows.append(at_most(name, most, _fact(facts, name)))
    if gate.export_parity is not None:
        parity = _fact(facts, "export_parity")
        rows.append(GateRow("export_parity", gate.export_parity, parity, None, parity <= gate.export_parity))
    if gate.safetensors:
        assert facts is not None, "a gate that asks of the model gets its facts"
        got = f"pickle {facts.pickles[0]}" if facts.pickles else f"{facts.safetensors} safetensors"
        rows.append(GateRow("weights", "safetensors only", got, None, not facts.pickles and facts.safetensors > 0))
    if gate.licence is not None:
        assert facts is not None, "a gate that asks of the model gets its facts"
        fine = bool(facts.licence) and (not gate.licence or facts.licence in gate.licence)
        rows.append(GateRow("licence", " or ".join(gate.licence) or "any", facts.licence or "none", None, fine))
    return GateResult(tuple(rows))


def check_sign_offs(gate: GateConfig, signed: Sequence[str]) -> GateResult:
    """Whether everyone has signed who must."""
    return GateResult(
        tuple(
            GateRow("signed off by", who, who if who in signed else "not signed", None, who in signed)
            for who in gate.signed_off_by
        )
    )


def together(results: Iterable[GateResult]) -> GateResult:
    """The rows of several, each once."""
    return GateResult(tuple(dict.fromkeys(row for result in results for row in result.rows)))


def _not_worse(gate: NonInferiority, task: str, model: StoredEvaluation, champion: StoredEvaluation | None) -> GateRow:
    _task(model.result.tasks, task)
    return _bounded(f"{task} not worse", -gate.margin, task, None, gate.confidence, model, champion)


def _better(gate: Improvement, model: StoredEvaluation, champion: StoredEvaluation | None) -> GateRow:
    _metric(_task(model.result.tasks, gate.task), gate.task, gate.metric or model.result.tasks[gate.task].main)
    row = _bounded(f"{gate.task} better", gate.by, gate.task, gate.metric, gate.confidence, model, champion)
    return row if row.margin is None else replace(row, passed=row.margin > 0)  # an equal model is no improvement


def _bounded(
    name: str,
    required: float,
    task: str,
    metric: str | None,
    confidence: float,
    model: StoredEvaluation,
    champion: StoredEvaluation | None,
) -> GateRow:
    """The lower end of the one-sided interval of the difference to the champion, held against `required`."""
    if champion is None:
        return GateRow(name, required, NO_CHAMPION, None, True)
    found = compare_task(champion, model, task, metric, changed=0, confidence=2 * confidence - 1)
    if found.difference is None:
        raise UsageError(
            f"the gate compares {found.metric} of {task} by query, which has no value for each of several queries: "
            "choose another task or metric, or a minimum for this one"
        )
    return at_least(f"{name} ({found.metric}, {confidence:.0%})", required, found.difference.low)


def _score(gate: GateConfig, scores: Mapping[str, Mapping[str, float]], model: str) -> float:
    measured = scores.get(model, {})
    if gate.metric not in measured:
        has = ", ".join(sorted(measured)) or "nothing"
        raise UsageError(f"the gate needs {gate.metric} of {model!r}, for which {has} was measured")
    return measured[gate.metric]


def _task(tasks: Mapping[str, TaskResult], name: str) -> TaskResult:
    if name not in tasks:
        raise UsageError(f"the gate names task {name!r}, which the suite hasn't; it has {', '.join(tasks)}")
    return tasks[name]


def _metric(task: TaskResult, name: str, metric: str) -> float:
    if metric not in task.metrics:
        raise UsageError(f"the gate needs {metric} of {name}, which measures {', '.join(sorted(task.metrics))}")
    return task.metrics[metric]


def _contaminated(task: TaskResult, name: str) -> float:
    share = task.contaminated_share
    if share is None:
        raise UsageError(
            f"the gate bounds contamination, and it isn't known what the model was trained on ({name}): evaluate a "
            "registered version of a run, whose data is on record"
        )
    return share


def _fact(facts: ModelFacts | None, name: str) -> float:
    value = getattr(facts, name, None)
    if value is None:
        raise ValueError(f"{name} was not measured, and the gate asks for it")
    return value


def shown(value: float | str) -> str:
    """A figure as tables have it."""
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if 1e-4 <= abs(value) < 1e4 or value == 0 or math.isnan(value) else f"{value:.3g}"
