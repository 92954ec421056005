"""The alias `champion`: moved by compare and set under a lock, remembered, moved back.

The alias is the authority. The registered model's tag HISTORY is the list of champions, oldest first; the tag PROMOTION
of each version says who made it champion, when, on what evidence, and which version it replaced.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.registry.lock import alone, who
from cluster.registry.store import CHAMPION, PROMOTION, find_model, find_version, registry
from data_services.schema import Refused, UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

HISTORY = "gyre.champions"
MAX_HISTORY_CHARS = 5000  # of a registered model's tag in MLflow's tables


@dataclass(frozen=True)
class Move:
    """A moved champion alias. previous: None where there was none; override: why a gate was passed over."""

    name: str
    version: int
    previous: int | None
    by: str
    at: str
    override: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def champion_of(model: RegisteredModel) -> int | None:
    return int(model.aliases[CHAMPION]) if CHAMPION in model.aliases else None


def move_champion(
    mlflow: MlflowClient,
    name: str,
    version: int,
    expected: int | None,
    evidence: Mapping[str, Any],
    override: str | None = None,
) -> Move:
    """Makes `version` champion in the place of `expected`, the champion that the evidence was held against.

    Raises Refused where another is champion by now. The alias moves last: whoever is killed before that has changed
    nothing that counts, and the same call does it whole.
    """
    with alone(mlflow, name) as still_mine:
        model = mlflow.get_registered_model(name)
        now = champion_of(model)
        if now != expected:
            raise Refused(
                f"{name} version {version} is not promoted: while it was held against "
                f"{_named(expected)}, {_named(now)} became champion; nothing was moved, run it again"
            )
        move = Move(name, version, now, who(), _now(), override)
        mlflow.set_model_version_tag(name, str(version), PROMOTION, json.dumps(move.as_dict() | dict(evidence)))
        still_mine()
        _write_history(mlflow, name, [*history_of(model), {"version": version, "by": move.by, "at": move.at}])
        still_mine()
        mlflow.set_registered_model_alias(name, CHAMPION, str(version))
    return move


def rollback(name: str, root: Path | None = None) -> Move:
    """Moves `champion` back to the version before it. Raises UsageError where there is none."""
    with registry(root) as mlflow:
        find_model(mlflow, name)
        with alone(mlflow, name) as still_mine:
            model = find_model(mlflow, name)
            history = history_of(model)
            if len(history) < 2:
                now = f"version {history[-1]['version']} is its first champion" if history else "it has no champion"
                raise UsageError(f"{name} cannot go back: {now}")
            left, back = history[-1]["version"], history[-2]["version"]
            find_version(mlflow, model, back)
            move = Move(name, back, left, who(), _now())
            undone = {"to": back, "by": move.by, "at": move.at}
            mlflow.set_model_version_tag(name, str(left), "gyre.rolled_back", json.dumps(undone))
            still_mine()
            # The alias first: a kill after it leaves a history that ends in the version that was left, which is read
            # as one whose promotion wasn't finished.
            mlflow.set_registered_model_alias(name, CHAMPION, str(back))
            _write_history(mlflow, name, history[:-1])
            return move


def history_of(model: RegisteredModel) -> list[dict[str, Any]]:
    """Champions, oldest first, the present one last.

    A promotion writes the history before it moves the alias, so a kill in between leaves one entry too many;
    an alias that was moved by other means gives an entry of its own.
    """
    history: list[dict[str, Any]] = json.loads(model.tags.get(HISTORY, "[]"))
    champion = champion_of(model)
    if history and history[-1]["version"] != champion:
        before = history[-2]["version"] if len(history) > 1 else None
        if before == champion:
            return history[:-1]
    if champion is not None and (not history or history[-1]["version"] != champion):
        history.append({"version": champion, "by": "unknown", "at": "unknown"})
    return history


def _write_history(mlflow: MlflowClient, name: str, history: Sequence[dict[str, Any]]) -> None:
    """As much of its end as a tag holds."""
    kept = list(history)
    while len(text := json.dumps(kept)) > MAX_HISTORY_CHARS:
        del kept[0]
    mlflow.set_registered_model_tag(name, HISTORY, text)


def _named(version: int | None) -> str:
    return "no champion" if version is None else f"version {version}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
