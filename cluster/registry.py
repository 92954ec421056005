"""The model registry: versions with their evidence, the aliases `candidate` and `champion`, promotion, return.

A version's tags carry what a promotion is decided on: the gate of its recipe and the scores of its run. The
registered model's tag HISTORY is the list of champions, oldest first; the alias `champion` is the authority.
"""

from __future__ import annotations

import difflib
import getpass
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlparse

from cluster.paths import home
from cluster.tracking import client, store_errors
from data_services.schema import Refused, UsageError
from evaluation.gates import GateConfig, GateResult, check

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CANDIDATE, CHAMPION = "candidate", "champion"
HISTORY, GATE, SCORES = "gyre.champions", "gyre.gate", "gyre.scores"
MAX_HISTORY = 100

Scores = Mapping[str, Mapping[str, float]]  # {"bm25": {"ndcg@10": …}, "untrained": …, "trained": …}


@dataclass(frozen=True)
class Version:
    """A registered version. scores: {split: {model: {metric: value}}}; gate: the recipe's, None without."""

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    source: str
    scores: dict[str, Any]
    gate: dict[str, Any] | None
    tags: dict[str, str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Move:
    """A moved champion alias: `previous` is None where there was no champion before."""

    name: str
    version: int
    previous: int | None
    by: str
    at: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class GateFailed(Refused):
    """A version's own gate said no; `result` has every requirement and by how much it was missed."""

    def __init__(self, sentence: str, result: GateResult) -> None:
        super().__init__(sentence)
        self.result = result

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(row) | {"margin": row.margin, "passed": row.passed} for row in self.result.rows]


@contextmanager
def _registry(root: Path | None) -> Iterator[MlflowClient]:
    made = client(root)
    with store_errors(made.tracking_uri):
        yield made


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

    The first to pass its gate becomes champion. folder goes to the run's artifacts, under `model`. scores:
    {"validation": rows, "heldout": rows}; the gate looks at validation. Registering a run a second time gives
    the version it has: safe to run again.
    """
    evidence = {SCORES: json.dumps(scores), GATE: gate.model_dump_json() if gate else "null"}
    with _registry(root) as mlflow:
        _ensure_model(mlflow, name)
        found = mlflow.search_model_versions(f"name='{name}' and run_id='{run_id}'")
        if found:
            version = found[0].version
        else:
            mlflow.log_artifacts(run_id, str(folder), "model")
            source = f"{mlflow.get_run(run_id).info.artifact_uri}/model"
            version = mlflow.create_model_version(name, source, run_id, tags={**tags, **evidence}).version
        mlflow.set_registered_model_alias(name, CANDIDATE, version)
        model = mlflow.get_registered_model(name)
        passed = gate is None or check(gate, scores["validation"]).passed
        if passed and CHAMPION not in model.aliases:
            _move_champion(mlflow, model, int(version), _history(model))
        return _version(mlflow.get_model_version(name, version), mlflow.get_registered_model(name).aliases)


def _ensure_model(mlflow: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        mlflow.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def promote(name: str, version: int, root: Path | None = None) -> Move:
    """Moves `champion` to a version that passes the gate it was registered with; remembers the one before.

    Raises GateFailed with what failed and by how much, Refused without evidence, UsageError for a model or
    version that isn't there.
    """
    with _registry(root) as mlflow:
        model = _model(mlflow, name)
        chosen = _find_version(mlflow, model, version)
        result = gate_result(chosen)
        if not result.passed:
            raise GateFailed(f"{name} version {version} is not promoted: {result.sentence}", result)
        history = _history(model)
        if history and history[-1]["version"] == version:
            return _as_move(name, history)
        return _move_champion(mlflow, model, version, history)


def rollback(name: str, root: Path | None = None) -> Move:
    """Moves `champion` back to the version before it. Raises UsageError where there is none."""
    with _registry(root) as mlflow:
        model = _model(mlflow, name)
        history = _history(model)
        if len(history) < 2:
            now = f"version {history[-1]['version']} is its first champion" if history else "it has no champion"
            raise UsageError(f"{name} cannot go back: {now}")
        left, back = history[-1]["version"], history[-2]["version"]
        _find_version(mlflow, model, back)
        mlflow.set_registered_model_tag(name, HISTORY, json.dumps(history[:-1]))
        mlflow.set_registered_model_alias(name, CHAMPION, str(back))
        return Move(name, back, left, _who(), _now())


def list_models(name: str | None = None, root: Path | None = None) -> list[Version]:
    """Versions of one model, or of all, newest first. Raises UsageError for a name that isn't registered."""
    with _registry(root) as mlflow:
        models = [_model(mlflow, name)] if name else _pages(mlflow.search_registered_models)
        found = [
            _version(v, model.aliases)
            for model in sorted(models, key=lambda m: m.name)
            for v in _pages(mlflow.search_model_versions, filter_string=f"name='{model.name}'")
        ]
    return sorted(found, key=lambda v: (v.name, -v.version))


def gate_result(version: Version) -> GateResult:
    """The version's own gate held against its own scores. Raises Refused where it carries no evidence."""
    if GATE not in version.tags or SCORES not in version.tags:
        raise Refused(f"{version.name} version {version.version} carries no evidence: it was not registered by a run")
    if version.gate is None:
        return GateResult(())
    return check(GateConfig.model_validate(version.gate), version.scores["validation"])


def model_folder(uri: str, root: Path | None = None) -> tuple[Path, Version]:
    """The local folder of `models:/NAME@ALIAS` or `models:/NAME/VERSION`, fetched under the home if remote.

    Raises UsageError that names the models, aliases or versions there are.
    """
    parts = re.fullmatch(r"models:/([^/@]+)(?:@([^/@]+)|/(\d+))", uri)
    if parts is None:
        raise UsageError(f"{uri!r}: write models:/NAME@ALIAS or models:/NAME/VERSION")
    name, alias, number = parts.groups()
    with _registry(root) as mlflow:
        model = _model(mlflow, name)
        if alias is not None and alias not in model.aliases:
            raise UsageError(f"{name} has no alias {alias!r}; it has {', '.join(model.aliases) or 'none'}")
        version = _find_version(mlflow, model, int(model.aliases[alias] if alias else number))
        return _local(version, mlflow, (root or home()) / "models"), version


def _local(version: Version, mlflow: MlflowClient, cache: Path) -> Path:
    place = urlparse(version.source)
    if place.scheme in ("", "file"):
        folder = Path(unquote(place.path))
        if not folder.is_dir():
            raise UsageError(f"{version.name} version {version.version}: its folder {folder} is gone")
        return folder
    target = cache / f"{version.name}-{version.version}"
    if not (target / "complete").is_file():
        target.mkdir(parents=True, exist_ok=True)
        mlflow.download_artifacts(version.run_id, "model", str(target))
        (target / "complete").touch()
    return target / "model"


def _model(mlflow: MlflowClient, name: str) -> RegisteredModel:
    models = {m.name: m for m in _pages(mlflow.search_registered_models)}
    if name not in models:
        close = difflib.get_close_matches(name, list(models), 1)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(models)) or 'none yet'}"
        raise UsageError(f"no registered model {name!r}; {known}")
    return mlflow.get_registered_model(name)


def _find_version(mlflow: MlflowClient, model: RegisteredModel, version: int) -> Version:
    there = _pages(mlflow.search_model_versions, filter_string=f"name='{model.name}'")
    for found in there:
        if int(found.version) == version:
            return _version(found, model.aliases)
    known = ", ".join(str(v) for v in sorted(int(v.version) for v in there))
    raise UsageError(f"{model.name} has no version {version}; it has {known or 'none'}")


def _pages(search: Callable[..., Any], **arguments: Any) -> list[Any]:
    """All results of a paged search."""
    found: list[Any] = []
    page = search(**arguments)
    while True:
        found += page
        if not page.token:
            return found
        page = search(**arguments, page_token=page.token)


def _version(found: ModelVersion, aliases: Mapping[str, Any]) -> Version:
    tags = dict(found.tags)
    return Version(
        name=found.name,
        version=int(found.version),
        aliases=tuple(sorted(a for a, v in aliases.items() if int(v) == int(found.version))),
        run_id=found.run_id or "",
        source=found.source or "",
        scores=json.loads(tags.get(SCORES, "{}")),
        gate=json.loads(tags.get(GATE, "null")),
        tags=tags,
    )


def _history(model: RegisteredModel) -> list[dict[str, Any]]:
    """Champions, oldest first, the present one last.

    A promotion writes the history before it moves the alias, so a kill in between leaves one entry too many;
    an alias that was moved by other means gives an entry of its own.
    """
    history: list[dict[str, Any]] = json.loads(model.tags.get(HISTORY, "[]"))
    champion = int(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None
    if history and history[-1]["version"] != champion:
        before = history[-2]["version"] if len(history) > 1 else None
        if before == champion:
            return history[:-1]
    if champion is not None and (not history or history[-1]["version"] != champion):
        history.append({"version": champion, "by": "unknown", "at": "unknown"})
    return history


def _move_champion(
    mlflow: MlflowClient, model: RegisteredModel, version: int, history: Sequence[dict[str, Any]]
) -> Move:
    longer = [*history, {"version": version, "by": _who(), "at": _now()}]
    mlflow.set_registered_model_tag(model.name, HISTORY, json.dumps(longer[-MAX_HISTORY:]))
    mlflow.set_registered_model_alias(model.name, CHAMPION, str(version))
    return _as_move(model.name, longer)


def _as_move(name: str, history: Sequence[dict[str, Any]]) -> Move:
    last = history[-1]
    previous = history[-2]["version"] if len(history) > 1 else None
    return Move(name, last["version"], previous, last["by"], last["at"])


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return "unknown"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
