"""MODEL as commands take it: a folder, a run (its id, the beginning of one, or its folder), `models:/NAME@ALIAS`,
`models:/NAME/VERSION`, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from cluster.paths import find_run
from data_services.schema import UsageError

_OF_A_MODEL = ("config.json", "modules.json", "gyre_towers.json")


@dataclass(frozen=True)
class ModelRef:
    """A model on this machine: how it was named, and its folder."""

    name: str
    folder: Path


def resolve(model: str, root: Path | None = None) -> ModelRef:
    """MODEL as a folder on this machine. Raises UsageError that says what was tried."""
    if model.startswith("models:"):
        from cluster.registry.folder import model_folder

        folder, version = model_folder(model, root)
        return ModelRef(f"{version.name}/{version.version}", folder)
    path = Path(model).expanduser()
    if any((path / name).is_file() for name in _OF_A_MODEL):
        return ModelRef(path.name, path.absolute())
    if path.is_dir() and not (path / "recipe.json").is_file():
        raise UsageError(f"{path} is no model: it has neither config.json nor modules.json")
    if "/" in model and not path.is_dir():
        from trainers.encoders.model_folder import resolve as download

        return ModelRef(model, download(model, key="MODEL"))
    run = find_run(model, root)
    if not run.export.is_dir():
        raise UsageError(
            f"run {run.run_id} has no exported model yet; finish it: gyre train RECIPE --resume {run.run_id}"
        )
    return ModelRef(run.run_id, run.export)
