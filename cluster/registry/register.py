"""An exported folder becomes a version of a registered model, with the evidence a promotion is decided on."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.models.folder import fingerprint
from cluster.registry.champion import champion_of, move_champion
from cluster.registry.flavour import write_mlflow_model
from cluster.registry.store import CANDIDATE, FINGERPRINT, GATE, SCORES, Version, registry, version_of
from data_services.schema import Refused
from evaluation.gates import GateConfig, check_scores

if TYPE_CHECKING:
    from mlflow import MlflowClient

Scores = Mapping[str, Mapping[str, float]]  # {"bm25": {"ndcg@10": …}, "untrained": …, "trained": …}


def register(
    name: str,
    folder: Path,
    *,
    run_id: str,
    scores: Mapping[str, Scores],
    gate: GateConfig | None,
    tags: Mapping[str, str],
    root: Path | None = None,
) -> Version:
    """Registers an exported folder as a new version of `name` with alias `candidate`.

    The first whose gate its own scores can pass becomes champion. folder goes to the run's artifacts, under `model`,
    as an MLflow model. scores: {"validation": rows, "heldout": rows}; the gate looks at validation.

    A version appears once all its files are there. Registering a run a second time gives the version it has: safe to
    run again, wherever the first time ended.
    """
    evidence = {
        SCORES: json.dumps(scores),
        GATE: gate.model_dump_json() if gate else "null",
        FINGERPRINT: fingerprint(folder),
    }
    with registry(root) as mlflow:
        _ensure_model(mlflow, name)
        found = mlflow.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if found:
            version = found[0].version
        else:
            with tempfile.TemporaryDirectory(prefix=".mlflow-", dir=folder.parent) as place:
                write_mlflow_model(folder, Path(place) / "model")
                mlflow.log_artifacts(run_id, str(Path(place) / "model"), "model")
            source = f"{mlflow.get_run(run_id).info.artifact_uri}/model"
            version = mlflow.create_model_version(name, source, run_id, tags={**tags, **evidence}).version
        mlflow.set_registered_model_alias(name, CANDIDATE, version)
        if champion_of(mlflow.get_registered_model(name)) is None and _passes_alone(gate, scores["validation"]):
            _try_first(mlflow, name, int(version))
        return version_of(mlflow.get_model_version(name, version), mlflow.get_registered_model(name).aliases)


def _passes_alone(gate: GateConfig | None, validation: Scores) -> bool:
    """Whether the run's scores are all that the gate asks for, and pass it."""
    if gate is None:
        return True
    alone = not (gate.suite or gate.asks_of_model or gate.signed_off_by)
    return alone and check_scores(gate, validation).passed


def _try_first(mlflow: MlflowClient, name: str, version: int) -> None:
    try:
        move_champion(mlflow, name, version, None, {"evidence": "the first version that passed its gate"})
    except Refused:
        return  # another run's version became the first meanwhile


def _ensure_model(mlflow: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
