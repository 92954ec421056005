"""`gyre promote`: a version's evidence is gathered, held against every gate, and the alias moves or doesn't."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.registry.champion import Move, champion_of, move_champion
from cluster.registry.folder import verify, version_folder
from cluster.registry.store import GATE, SCORES, SIGNED, Version, find_model, find_version, registry
from data_services.schema import Refused, UsageError
from evaluation.gates import (
    GateConfig,
    GateResult,
    check_model,
    check_scores,
    check_sign_offs,
    check_suite,
    together,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from evaluation.stored import StoredEvaluation

Tell = Callable[[dict[str, Any]], None]
"""Takes the events of `console.Progress`."""


@dataclass(frozen=True)
class Held:
    """A version held against its gates, beside the champion of that moment (None: there was none).

    evaluations  ids of the stored evaluations that were looked at, the version's and the champion's
    """

    version: Version
    champion: int | None
    result: GateResult
    evaluations: tuple[str, ...]

    def evidence(self) -> dict[str, Any]:
        return {"gates": rows_of(self.result), "evaluations": list(self.evaluations)}


class GateFailed(Refused):
    """A gate said no; `result` has every requirement and by how much it was missed."""

    def __init__(self, sentence: str, result: GateResult) -> None:
        super().__init__(sentence)
        self.result = result

    def rows(self) -> list[dict[str, Any]]:
        return rows_of(self.result)


def rows_of(result: GateResult) -> list[dict[str, Any]]:
    return [asdict(row) for row in result.rows]


def promote(
    name: str,
    version: int,
    *,
    gates: Sequence[GateConfig] = (),
    sign_off: str | None = None,
    override: str | None = None,
    root: Path | None = None,
    tell: Tell = lambda event: None,
) -> Move:
    """Makes a version champion if it passes the gate it was registered with and `gates`, a team's own.

    sign_off  a name that is put on record as having signed this version, whatever becomes of it
    override  why it becomes champion although a gate says no; recorded

    Raises GateFailed with what failed and by how much; Refused without evidence, or where another promotion was faster;
    UsageError for a model or version that isn't there, or a gate that can't be measured; RunError where its files
    aren't those that were registered. Safe to run again, always: the alias moves last, and only from the champion that
    the version was held against.
    """
    if override is not None and not override.strip():
        raise UsageError("--override needs a reason, which is recorded")
    with registry(root) as mlflow:
        if sign_off is not None:
            _sign(mlflow, name, version, sign_off)
        model = find_model(mlflow, name)
        if champion_of(model) == version:
            return _as_it_is(find_version(mlflow, model, version))
        held = hold(mlflow, name, version, gates, root, tell)
        if not held.result.passed and override is None:
            raise GateFailed(f"{name} version {version} is not promoted: {held.result.sentence}", held.result)
        reason = None if held.result.passed else override
        return move_champion(mlflow, name, version, held.champion, held.evidence(), reason)


def hold(
    mlflow: MlflowClient,
    name: str,
    version: int,
    gates: Sequence[GateConfig] = (),
    root: Path | None = None,
    tell: Tell = lambda event: None,
) -> Held:
    """Measures what the gates ask for, and doesn't move anything."""
    model = find_model(mlflow, name)
    chosen = find_version(mlflow, model, version)
    champion = champion_of(model)
    own = gate_of(chosen)
    folder = version_folder(mlflow, chosen, root)
    verify(folder, chosen)
    every = [gate for gate in (own, *gates) if gate is not None]
    results = [check_scores(gate, chosen.scores.get("validation", {})) for gate in every if gate.asks_of_run]
    evaluations: dict[str, None] = {}
    for gate in every:
        if gate.suite is not None:
            found, before = _evaluated(name, (version, champion), gate.suite, root, tell)
            evaluations |= dict.fromkeys(e.result.id for e in (found, before) if e is not None)
            results.append(check_suite(gate, found, before))
    if any(gate.asks_of_model for gate in every):
        from cluster.model_facts import measure

        tell({"kind": "phase", "text": "measuring the model"})
        facts = measure(
            folder,
            latency=any(gate.latency_p95_ms is not None for gate in every),
            parity=any(gate.export_parity is not None for gate in every),
        )
        results += [check_model(gate, facts) for gate in every]
    results += [check_sign_offs(gate, chosen.signed_off_by) for gate in every]
    return Held(chosen, champion, together(results), tuple(evaluations))


def gate_of(version: Version) -> GateConfig | None:
    """The gate of the version's recipe. Raises Refused where it carries no evidence."""
    if GATE not in version.tags or SCORES not in version.tags:
        raise Refused(f"{version.name} version {version.version} carries no evidence: it was not registered by a run")
    return None if version.gate is None else GateConfig.model_validate(version.gate)


def gate_result(version: Version) -> GateResult:
    """The run's scores held against the part of the version's own gate that looks at them."""
    gate = gate_of(version)
    return GateResult(()) if gate is None else check_scores(gate, version.scores["validation"])


def read_gates(path: Path) -> GateConfig:
    """A team's gate from a YAML file, with the keys of a recipe's `registry.gate`."""
    from cluster.recipe_file import read_yaml
    from cluster.sections import parse_section

    return parse_section(GateConfig, read_yaml(path), str(path))


def _evaluated(
    name: str, versions: tuple[int, int | None], suite: str, root: Path | None, tell: Tell
) -> tuple[StoredEvaluation, StoredEvaluation | None]:
    """The version and the champion on the suite: stored evaluations where there are some, else made now."""
    from cluster.evidence.comparison import evaluation_of

    version, champion = versions
    found = evaluation_of(f"models:/{name}/{version}", suite, root, tell)
    return found, None if champion is None else evaluation_of(f"models:/{name}/{champion}", suite, root, tell)


def _sign(mlflow: MlflowClient, name: str, version: int, who: str) -> None:
    if not who.strip():
        raise UsageError("--sign-off needs a name")
    signed = find_version(mlflow, find_model(mlflow, name), version).signed_off_by
    mlflow.set_model_version_tag(name, str(version), SIGNED, json.dumps([*dict.fromkeys([*signed, who])]))


def _as_it_is(version: Version) -> Move:
    """The promotion that made the champion what it is."""
    known = version.promotion or {}
    return Move(
        version.name,
        version.version,
        known.get("previous"),
        known.get("by", "unknown"),
        known.get("at", "unknown"),
        known.get("override"),
    )
