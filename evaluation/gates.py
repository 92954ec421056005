"""Gates: what a model must show before it becomes champion. Evidence is the validation split's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import Field, field_validator

from data_services.schema import Section, UsageError
from evaluation.metrics import parse_metric


class GateConfig(Section):
    """A gate: minima on one metric of the validation split. Without a minimum every model passes."""

    metric: str = Field("ndcg@10", description="ndcg@N, mrr@N or recall@N, of the validation split")
    over_bm25: float | None = Field(None, ge=-1, le=1, description="least difference to BM25 in the same run")
    minimum: float | None = Field(None, ge=0, le=1, description="least value of the metric itself")

    @field_validator("metric")
    @classmethod
    def _known(cls, name: str) -> str:
        parse_metric(name)
        return name


@dataclass(frozen=True)
class GateRow:
    """One requirement: its name, what it asks, and what the model has. A negative margin is the shortfall."""

    gate: str
    required: float
    got: float

    @property
    def margin(self) -> float:
        return self.got - self.required

    @property
    def passed(self) -> bool:
        # The slack forgives the last bits of a difference of two means; a NaN passes nothing.
        return self.margin >= -1e-9


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
        return "; ".join(
            f"{row.gate} is {row.got:.4f} where {row.required:.4f} is required ({row.margin:+.4f})" for row in failed
        )


def check(gate: GateConfig, scores: Mapping[str, Mapping[str, float]], model: str = "trained") -> GateResult:
    """Hold `scores[model]` against the gate; scores is {"bm25": {metric: value}, "trained": {…}, …}.

    UsageError where the gate needs a number that was not measured: a missing one is no pass.
    """
    rows = []
    if gate.over_bm25 is not None:
        got = _score(gate, scores, model) - _score(gate, scores, "bm25")
        rows.append(GateRow(f"{gate.metric} over BM25", gate.over_bm25, got))
    if gate.minimum is not None:
        rows.append(GateRow(gate.metric, gate.minimum, _score(gate, scores, model)))
    return GateResult(tuple(rows))


def _score(gate: GateConfig, scores: Mapping[str, Mapping[str, float]], model: str) -> float:
    measured = scores.get(model, {})
    if gate.metric not in measured:
        has = ", ".join(sorted(measured)) or "nothing"
        raise UsageError(f"the gate needs {gate.metric} of {model!r}, for which {has} was measured")
    return measured[gate.metric]
