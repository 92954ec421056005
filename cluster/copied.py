"""A run's copy in an object store: which of its files belong to it, and how a machine that has none goes on with it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.paths import RunPaths, find_run
from data_services.schema import RunError, UsageError

if TYPE_CHECKING:
    from trainers.object_store import ObjectFolder


def files_to_copy(run: RunPaths) -> dict[str, Path]:
    """{name in the copy: file} of all that a resume needs beside a checkpoint, as it stands now."""
    single = (run.recipe, run.data, run.parent, run.tracker, run.metrics, run.ended)
    below = [p for folder in (run.model, run.watched, run.mined) for p in sorted(folder.rglob("*"))]
    found = {p.relative_to(run.root).as_posix(): p for p in (*single, *below) if p.is_file()}
    return {name: p for name, p in found.items() if ".making" not in name and not name.endswith(".tmp")}


def copy_of(copy_to: str, run_id: str) -> ObjectFolder:
    from trainers.object_store import ObjectFolder

    return ObjectFolder(copy_to) / run_id


def check_store(copy_to: str) -> None:
    """Raises RunError, at once, where the object store can't be written."""
    from trainers.object_store import ObjectFolder

    store = ObjectFolder(copy_to, waits_s=())
    with tempfile.NamedTemporaryFile(prefix="gyre-") as probe:
        name = f".{Path(probe.name).name}"
        try:
            store.put(Path(probe.name), name)
            store.remove(name)
        except (OSError, ValueError) as error:  # a bucket whose name can't be one is a ValueError
            raise RunError(f"checkpoint.copy_to: {error}") from error


def find_or_fetch(run: str, root: Path, copy_to: str | None, step: int | None) -> RunPaths:
    """The run here; else its copy, brought here whole. run: for a copy, the whole id.

    step  of the checkpoint that is brought; None: the newest
    """
    try:
        return find_run(run, root)
    except UsageError as missing:
        if copy_to is None or "/" in run:
            raise
        from trainers.copies import fetch

        making, there = RunPaths(root / f".{run}.fetching"), copy_of(copy_to, run)
        shutil.rmtree(making.root, ignore_errors=True)
        try:
            fetch(there, making.root, step)
            if not os.environ.get("MLFLOW_TRACKING_URI"):
                making.tracker.unlink(missing_ok=True)  # a run in a store that this machine doesn't have
            making.root.rename(root / run)
        except UsageError as error:
            raise UsageError(f"{missing}; {error}") from error
        except OSError as error:
            raise RunError(f"{missing}; its copy: {error}") from error
        finally:
            shutil.rmtree(making.root, ignore_errors=True)
        return RunPaths(root / run)
