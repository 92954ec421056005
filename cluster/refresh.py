"""Mining beside training: a process that rank 0 starts, and what that process does.

A process that died with its run is started again by the next: the snapshot of the weights is there before any
checkpoint of its step, so that a run which goes on reads what it would have read.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cluster.config import Recipe
from cluster.evidence.beside import main_beside, run_beside
from cluster.paths import RunPaths
from data_services.refresh import FAILED, MINED, step_folder
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
        work = ("cluster.refresh", self._run, step, folder / FAILED)
        threading.Thread(target=run_beside, args=work, daemon=True).start()


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
    from cluster.models.folder import exported_encoder
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
    main_beside(mine_step, lambda run, step: step_folder(run.mined, step) / FAILED)


if __name__ == "__main__":
    main()
