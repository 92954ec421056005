"""Copies of a run in an object store: its checkpoints, and what a machine that has nothing else goes on with.

    <copy_to>/<run>/recipe.json, model/, …           the run's own files, before any checkpoint that needs them
    <copy_to>/<run>/checkpoints/step-00000050.…/     every worker's file, the state, then the manifest

The local folder stays the place of work. A copy begins where a checkpoint is committed and no other copy is under way:
a slow store gets fewer of them, never half of one that counts. One that fails is told, and the next is tried.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_services.schema import RunError, UsageError
from trainers.beside import Beside
from trainers.checkpoint import COPIED, MANIFEST, STATE, Checkpoint, committed, rank_file, step_of, write_json
from trainers.object_store import ObjectFolder

if TYPE_CHECKING:
    from trainers.collectives import Group

CHECKPOINTS = "checkpoints"


class Copies:
    """Copies checkpoints of one run beside training, the newest first.

    to     the run's folder in the store
    files  {name there: path} of the run's own files, looked up when a copy begins
    """

    def __init__(self, root: Path, to: ObjectFolder, group: Group, files: Callable[[], Mapping[str, Path]]) -> None:
        self._root, self._to, self._group, self._files = root, to, group, files
        self._beside = Beside(group, "copy")
        self._waiting: Checkpoint | None = None
        self.under_way: Checkpoint | None = None
        self._sent: dict[str, tuple[int, int]] = {}
        self._seen = {c.folder.name for c in committed(root)} if group.rank == 0 else set()

    @property
    def busy(self) -> bool:
        return self._beside.busy

    @property
    def in_use(self) -> list[Path]:
        """Folders that are copied, or will be."""
        return [checkpoint.folder for checkpoint in (self.under_way, self._waiting) if checkpoint]

    def offer(self, checkpoint: Checkpoint) -> None:
        """Copies it as soon as no other copy is under way, unless a newer one is offered until then. Collective."""
        self._waiting = checkpoint
        self._begin()

    def advance(self) -> None:
        """As `Beside.advance`, and begins the next. Collective."""
        outcome = self._beside.advance()
        if outcome is None:
            return
        assert self.under_way is not None
        if self._group.rank == 0:
            write_json(self._root / COPIED, {"step": self.under_way.step, "failure": outcome})
        self.under_way = None
        self._begin()

    def settle(self) -> None:
        """Waits until the newest that was offered is copied, or failed. Collective."""
        while self.under_way is not None:
            self.advance()

    def _begin(self) -> None:
        if self._beside.idle and (checkpoint := self._waiting):
            self._waiting, self.under_way = None, checkpoint
            there = self._to / CHECKPOINTS / checkpoint.folder.name
            name = rank_file(self._group.rank, self._group.size)
            self._beside.begin(
                lambda: there.put(checkpoint.folder / name, name),
                lambda parts: self._commit(checkpoint, there),
            )

    def _commit(self, checkpoint: Checkpoint, there: ObjectFolder) -> None:
        """On rank 0, once every worker's file is there."""
        there.put(checkpoint.folder / STATE, STATE)
        self._send_files()
        there.put(checkpoint.folder / MANIFEST, MANIFEST)
        stand = {c.folder.name for c in committed(self._root)} | {checkpoint.folder.name}
        self._seen |= stand
        remove_retired(self._to / CHECKPOINTS, self._seen - stand)

    def _send_files(self) -> None:
        """The run's own files, those that changed since they were sent."""
        for name, path in self._files().items():
            status = path.stat()
            stamp = (status.st_size, status.st_mtime_ns)
            if self._sent.get(name) != stamp:
                try:
                    self._to.put(path, name)
                except OSError:
                    if path.exists():  # else a better model took its place meanwhile
                        raise
                self._sent[name] = stamp


def remove_retired(there: ObjectFolder, folders: set[str]) -> None:
    """Checkpoints that stood here and don't any more go there too: the commit marker first."""
    gone = [name for name in there.sizes() if name.partition("/")[0] in folders]
    for name in sorted(gone, key=lambda name: not name.endswith(f"/{MANIFEST}")):
        there.remove(name)


def fetch(there: ObjectFolder, run: Path, step: int | None = None) -> None:
    """Brings a run's own files here, and its newest committed checkpoint or that of `step`.

    Raises UsageError where the store has no such run or step; RunError where what came is damaged, with the other
    steps that the store has; OSError where it doesn't answer.
    """
    sizes = there.sizes()
    if "recipe.json" not in sizes:
        raise UsageError(f"there is no copy of a run at {there.uri}")
    manifests = sorted(n for n in sizes if n.startswith(f"{CHECKPOINTS}/") and n.endswith(f"/{MANIFEST}"))
    steps = [step_of(name.split("/")[1]) for name in manifests]
    if step is not None and step not in steps:
        raise UsageError(f"the copy at {there.uri} has no checkpoint of step {step}; there are {_listed(steps)}")
    chosen = [m for m, s in zip(manifests, steps, strict=True) if step in (None, s)][-1:]
    folder = chosen[0].rpartition("/")[0] if chosen else None
    if outside := next((name for name in sizes if ".." in name.split("/")), None):
        raise RunError(f"the copy at {there.uri} has an object {outside!r}, which is no file of a run")
    for name in sizes:
        if not name.startswith(f"{CHECKPOINTS}/") or name.rpartition("/")[0] == folder:
            there.get(name, run / name)
    for checkpoint in committed(run / CHECKPOINTS):
        if damage := checkpoint.damage():
            others = _listed([s for s in steps if s != checkpoint.step])
            told = f"the copy of step {checkpoint.step} at {there.uri} is damaged: {damage}"
            raise RunError(f"{told}; --from-step takes another, there are {others}")


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(map(str, steps)) or "none"
