"""Registered versions as they are stored: their aliases, evidence and lineage, by name and number."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.tracking import client, store_errors
from data_services.schema import UsageError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

CANDIDATE, CHAMPION = "candidate", "champion"

# Tags of a version. What a promotion is decided on, and what it left behind:
GATE, SCORES, SIGNED, PROMOTION, FINGERPRINT = (
    "gyre.gate",
    "gyre.scores",
    "gyre.signed_off_by",
    "gyre.promotion",
    "gyre.model",
)
# Where it comes from, in the order in which one asks.
LINEAGE = {
    "run": "gyre.run",
    "data": "gyre.data",
    "config": "gyre.recipe",
    "parent": "gyre.parent",
    "checkpoint": "gyre.checkpoint",
    "code": "gyre.code",
}


@dataclass(frozen=True)
class Version:
    """A registered version.

    scores   {split: {model: {metric: value}}}
    gate     the recipe's, None without
    lineage  run, data fingerprint, config fingerprint, parent weights, checkpoint, code revision: those on record
    """

    name: str
    version: int
    aliases: tuple[str, ...]
    run_id: str
    source: str
    scores: dict[str, Any]
    gate: dict[str, Any] | None
    tags: dict[str, str]

    @property
    def lineage(self) -> dict[str, str]:
        return {part: self.tags[tag] for part, tag in LINEAGE.items() if tag in self.tags}

    @property
    def promotion(self) -> dict[str, Any] | None:
        """Its last promotion: by, at, previous, override, gates, evaluations; None where it never was champion."""
        return json.loads(self.tags.get(PROMOTION, "null"))

    @property
    def signed_off_by(self) -> list[str]:
        return json.loads(self.tags.get(SIGNED, "[]"))

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"lineage": self.lineage, "promotion": self.promotion}


@contextmanager
def registry(root: Path | None) -> Iterator[MlflowClient]:
    """A client, whose failures come as one sentence."""
    made = client(root)
    with store_errors(made.tracking_uri):
        yield made


def list_models(name: str | None = None, root: Path | None = None) -> list[Version]:
    """Versions of one model, or of all, newest first. Raises UsageError for a name that isn't registered."""
    with registry(root) as mlflow:
        models = [find_model(mlflow, name)] if name else pages(mlflow.search_registered_models)
        found = [
            version_of(v, model.aliases)
            for model in sorted(models, key=lambda m: m.name)
            for v in pages(mlflow.search_model_versions, filter_string=f"name='{model.name}'")
        ]
    return sorted(found, key=lambda v: (v.name, -v.version))


def find_model(mlflow: MlflowClient, name: str) -> RegisteredModel:
    """Raises UsageError with the nearest name there is."""
    models = {m.name: m for m in pages(mlflow.search_registered_models)}
    if name not in models:
        close = difflib.get_close_matches(name, list(models), 1)
        known = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(models)) or 'none yet'}"
        raise UsageError(f"no registered model {name!r}; {known}")
    return mlflow.get_registered_model(name)


def find_version(mlflow: MlflowClient, model: RegisteredModel, version: int) -> Version:
    """Raises UsageError with the versions there are."""
    there = pages(mlflow.search_model_versions, filter_string=f"name='{model.name}'")
    for found in there:
        if int(found.version) == version:
            return version_of(found, model.aliases)
    known = ", ".join(str(v) for v in sorted(int(v.version) for v in there))
    raise UsageError(f"{model.name} has no version {version}; it has {known or 'none'}")


def pages(search: Callable[..., Any], **arguments: Any) -> list[Any]:
    """All results of a paged search."""
    found: list[Any] = []
    page = search(**arguments)
    while True:
        found += page
        if not page.token:
            return found
        page = search(**arguments, page_token=page.token)


def version_of(found: ModelVersion, aliases: Mapping[str, Any]) -> Version:
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
