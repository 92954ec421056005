"""What stands beside a model in every table of its evaluation, beside BM25."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.config import Recipe
from cluster.models.folder import fingerprint, open_encoder
from cluster.models.reference import resolve
from cluster.paths import RunPaths, find_run
from data_services.schema import Encoder, UsageError

if TYPE_CHECKING:
    from cluster.registry.store import Version

NONE = "none"
CHAMPION, UNTRAINED = "champion", "untrained"


def baseline_models(model: str, named: Sequence[str], root: Path, stack: ExitStack) -> dict[str, Encoder]:
    """Encoders by the name of their row; they are open as long as `stack`.

    Those that are named (`none`: none); else the champion of the model's registered name, where that is another
    model, or the model before its training, where its run is under the home; for other models there is none.
    """
    if NONE in named:
        if len(named) > 1:
            raise UsageError(f"--baseline {NONE} and other baselines exclude each other")
        return {}
    if named:
        refs = [resolve(name, root) for name in named]
        if len({ref.name for ref in refs}) < len(refs):
            raise UsageError("--baseline names one model twice")
        return {ref.name: stack.enter_context(open_encoder(ref.folder)) for ref in refs}
    folder, run = resolve(model, root).folder, run_of(model, root)
    champion = _champion(_registered_name(model, run), root)
    if champion and fingerprint(champion) != fingerprint(folder):
        return {CHAMPION: stack.enter_context(open_encoder(champion))}
    if run and (run.model / "config.json").is_file():
        return {UNTRAINED: untrained(Recipe.model_validate_json(run.recipe.read_text()), run)}
    return {}


def untrained(recipe: Recipe, run: RunPaths) -> Encoder:
    """A run's model as it was before the first step."""
    import torch

    from cluster.models.folder import tokenizer_of
    from cluster.worker import model_of
    from trainers.encoders.local import LocalEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        return LocalEncoder(model_of(recipe, run.model, {}).tower, tokenizer_of(run.model))


def run_of(model: str, root: Path) -> RunPaths | None:
    """The run that a model came from, where it is under the home."""
    try:
        return find_run(_version(model, root).tags.get("gyre.run", "") if _is_registered(model) else model, root)
    except UsageError:
        return None


def _registered_name(model: str, run: RunPaths | None) -> str | None:
    if _is_registered(model):
        return re.split("[@/]", model.removeprefix("models:/"))[0]
    return Recipe.model_validate_json(run.recipe.read_text()).registered_name if run else None


def _champion(name: str | None, root: Path) -> Path | None:
    if name is None:
        return None
    from cluster.registry.folder import model_folder

    try:
        return model_folder(f"models:/{name}@champion", root)[0]
    except UsageError:  # no such model, or none is champion yet
        return None


def _is_registered(model: str) -> bool:
    return model.startswith("models:")


def _version(model: str, root: Path) -> Version:
    from cluster.registry.folder import model_folder

    return model_folder(model, root)[1]
