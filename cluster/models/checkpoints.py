"""The checkpoints of a run, looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cluster.paths import find_run
from data_services.schema import RunError


@dataclass(frozen=True)
class SavedStep:
    """A committed checkpoint. damage: one sentence, empty where every file is as it was written."""

    step: int
    world_size: int
    folder: Path
    size_bytes: int
    damage: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def checkpoints(run: str, root: Path | None = None) -> list[SavedStep]:
    """The committed checkpoints of a run, oldest first, every file verified."""
    from trainers.checkpoint import committed

    found = find_run(run, root)
    saved = []
    for checkpoint in committed(found.checkpoints):
        damage = ""
        try:
            checkpoint.verify()
        except RunError as error:
            damage = str(error)
        size = sum(p.stat().st_size for p in checkpoint.folder.iterdir())
        saved.append(SavedStep(checkpoint.step, checkpoint.world_size, checkpoint.folder, size, damage))
    return saved
