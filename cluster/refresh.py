"""Mining beside training: a process that rank 0 starts, and what that process does.

It is a process of its own, since loading a model draws random numbers, and training's must be what they are without it.
One that died with its run is started again by the next: the snapshot of the weights is there before any checkpoint of
its step, so that a run which goes on reads what it would have read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.config import Recipe
from cluster.paths import RunPaths
from data_services.refresh import FAILED, MINED, step_folder
from data_services.schema import RunError, UsageError
from data_services.store import StoredSource

if TYPE_CHECKING:
    from data_services.mining.texts import TextTable


class Refresher:
    """Called after every step on every worker: snapshots the weights where a mining is due, and starts it on rank 0.

    snapshot  writes the weights as an exported model to a folder; collective
    """

    def __init__(self, run: RunPaths, recipe: Recipe, steps: int, rank: int, snapshot: Callable[[Path], None]) -> None:
        self._run, self._config, self._steps = run, recipe.mine, steps
        self._rank, self._snapshot = rank, snapshot

    def resume(self, start: int) -> None:
        """Starts what an earlier attempt at this run didn't finish."""
        for step in range(start + 1):
            if step and self._config.due(step, self._steps):
                self._mine(step)

    def __call__(self, step: int) -> None:
        if self._config.due(step, self._steps):
            model = step_folder(self._run.mined, step) / "model"
            if not model.exists():  # else an attempt that came further wrote the same
                self._snapshot(model)
            self._mine(step)

    def _mine(self, step: int) -> None:
        folder = step_folder(self._run.mined, step)
        if self._rank or (folder / MINED).exists():
            return
        (folder / FAILED).unlink(missing_ok=True)
        command = [sys.executable, "-m", "cluster.refresh", str(self._run.root), str(step), str(os.getpid())]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        threading.Thread(target=_watch, args=(process, folder), daemon=True).start()


def _watch(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Leaves a sentence where the process died without one: readers wait for it."""
    code = process.wait()
    if code and not (folder / FAILED).exists():
        (folder / FAILED).write_text(f"the process that mined ended with code {code}")


def mine_step(run: RunPaths, step: int) -> None:
    """Mines every source of the run with its weights after `step`; there is all of it at the end, or nothing."""
    from data_services.sources import open_source
    from trainers.checkpoint import write_json

    recipe = Recipe.model_validate_json(run.recipe.read_text())
    folder = step_folder(run.mined, step)
    sources = [open_source(source, run.root.parent) for source in recipe.data.sources]
    fingerprints = []
    for number, source in enumerate(sources):
        # Of this process alone: the miner of an attempt that was killed may live on for a moment.
        work = folder / f"{number}.making-{os.getpid()}"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        _mine_source(source, recipe, folder, work)
        fingerprints.append(_fingerprint(sorted((work / "source").iterdir())))
        try:
            (work / "source").rename(folder / str(number))
        except OSError:
            if not (folder / str(number)).exists():  # else an earlier attempt came so far, with the same
                raise
    write_json(folder / MINED, {"of": [s.fingerprint for s in sources], "fingerprints": fingerprints})
    for work in folder.glob("*.making-*"):
        shutil.rmtree(work, ignore_errors=True)


def _mine_source(source: StoredSource, recipe: Recipe, folder: Path, work: Path) -> None:
    from cluster.models import exported_encoder
    from data_services.embed import EmbedConfig, embed
    from data_services.mine import MiningTexts, find_negatives, write_source
    from data_services.mining.scorers import VectorMiner
    from data_services.mining.search import LocalSearch, shards
    from data_services.mining.vectors import Vectors, kept

    config = recipe.mine
    texts, encoder = MiningTexts.of(source, [], work), exported_encoder(folder / "model")

    def encoded(table: TextTable, side: Literal["query", "document"]) -> Vectors:
        config = EmbedConfig(field=side)
        return kept(work / f"{side}.f32", lambda into: embed(table, lambda: encoder, into, config))

    queries, documents = encoded(texts.queries, "query"), encoded(texts.documents, "document")
    search = LocalSearch(shards(queries, documents, config.search))
    mined = find_negatives(texts, VectorMiner(queries, documents, search), config.filters)
    write_source(texts, mined, work / "source")


def _fingerprint(files: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def main() -> None:
    run, step, parent = RunPaths(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    try:
        mine_step(run, step)
    except (UsageError, RunError, OSError) as error:
        if os.getppid() != parent:  # the next attempt has a miner of its own
            os._exit(1)
        (step_folder(run.mined, step) / FAILED).write_text(" ".join(str(error).split()))
        sys.exit(1)


def _end_with(parent: int) -> None:
    """A worker that was killed takes its miner along: the next attempt starts its own."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


if __name__ == "__main__":
    main()
