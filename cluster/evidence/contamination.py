"""How much of a suite a model has seen: its texts in the data of the model's run."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config import Recipe
from cluster.paths import RunPaths
from data_services.items import Item
from data_services.schema import UsageError
from evaluation.stored import Overlap

if TYPE_CHECKING:
    from data_services.store import StoredSource
    from evaluation.tasks.base import Task

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Held:
    """by_task {task: {side: Overlap}}; training_data: fingerprint of what was looked through, None: nothing was."""

    by_task: dict[str, dict[str, Overlap]] = field(default_factory=dict)
    training_data: str | None = None


def contamination(run: RunPaths | None, tasks: Sequence[Task], root: Path, on_progress: Progress) -> Held:
    """Looks for every text of the tasks in the data of a run; says so where that can't be done."""
    sources = training_sources(run, root, on_progress) if run else None
    if sources is None:
        return Held()
    from cluster.prepare import data_fingerprint
    from data_services.overlap import TextIndex, look_through

    on_progress({"kind": "note", "text": "looking for the suite's texts in the training data"})
    sides = {task.name: {side: _texts(items) for side, items in task.sides().items()} for task in tasks}
    index = TextIndex(text for of_task in sides.values() for texts in of_task.values() for text in texts)
    look_through(index, sources)
    found = {}
    for task in tasks:
        counts = {side: index.counts(texts) for side, texts in sides[task.name].items()}
        found[task.name] = {side: Overlap(texts=n, exact=exact, near=near) for side, (n, exact, near) in counts.items()}
    return Held(found, data_fingerprint(sources))


def _texts(items: Sequence[Item]) -> list[str]:
    """Images and sounds aren't looked for."""
    return [item for item in items if isinstance(item, str)]


def training_sources(run: RunPaths, root: Path, on_progress: Progress) -> tuple[StoredSource, ...] | None:
    """What a run was trained on, where it is still there and the same."""
    from data_services.sources import open_source

    try:
        recipe = Recipe.model_validate_json(run.recipe.read_text())
        sources = tuple(open_source(source, root) for source in recipe.data.sources)
        trained_on = json.loads(run.data.read_text())
    except (UsageError, OSError, ValueError) as error:
        on_progress({"kind": "note", "text": f"contamination isn't known: {error}"})
        return None
    if {source.name: source.fingerprint for source in sources} != trained_on:
        on_progress({"kind": "note", "text": f"contamination isn't known: the data of run {run.run_id} has changed"})
        return None
    return sources
