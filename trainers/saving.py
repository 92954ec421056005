"""Writing checkpoints beside training: the state is copied at a step, a thread of each worker writes the copy.

    step t       save: every worker copies its tensors to host memory, its thread begins to write them
    step t + i   the first step after which no worker writes any more: rank 0's thread commits, then retires old ones
    step t + j   the outcome of that is known everywhere: a failure ends the run, what was committed before stays

At most one checkpoint is under way: the next one waits for it, and so do the end of training and a stop. A worker that
lost its lease (another attempt of the run has started) can't commit.
"""

from __future__ import annotations

import copy
import json
import secrets
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError
from trainers.beside import Beside
from trainers.checkpoint import (
    LEASE,
    STATE,
    committed,
    described,
    folder_name,
    latest,
    rank_file,
    remove,
    write_json,
    write_manifest,
    write_tensors,
)
from trainers.config import CheckpointConfig
from trainers.retention import Scores, kept

if TYPE_CHECKING:
    from torch import Tensor

    from trainers.collectives import Group
    from trainers.copies import Copies


class CheckpointStore:
    """Writes and retires the checkpoints of one attempt of a run.

    scores  says which checkpoints are the best, for `keep_best`
    copies  of them in an object store, where the recipe wants some
    clock   seconds since 1970; rank 0's is written into the manifests, and decides what stays every so many hours
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        group: Group,
        scores: Scores = lambda steps: {},
        copies: Copies | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Collective."""
        self.root, self.config, self.group = root, config, group
        self._scores, self._copies, self._clock = scores, copies, clock
        self._beside = Beside(group, "checkpoint")
        self._step = 0  # of what is under way
        self.attempt: str = group.broadcast_object(secrets.token_hex(3))
        if group.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            write_json(root / LEASE, {"attempt": self.attempt})

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begins to write the checkpoint of `step`; not `asynchronous`, also ends it. Collective.

        tensors: this worker's, by name, on the CPU, that nothing else changes any more. state: JSON of the whole run,
        rank 0's is written. Raises RunError as `advance`, for the checkpoint before too.
        """
        self._settle()
        state = copy.deepcopy(state)  # as it is now: what a thread writes, later steps must not change
        self._step, copied = step, self._copies.in_use if self._copies else []
        self._beside.begin(
            lambda: self._write_share(self._folder, tensors), lambda shares: self._commit(shares, state, copied)
        )
        if not self.config.asynchronous:
            self._settle()

    @property
    def busy(self) -> tuple[bool, bool]:
        """Whether this worker's threads are at work: to write, to copy. Not collective."""
        return self._beside.busy, self._copies is not None and self._copies.busy

    def advance(self, busy: tuple[bool, bool] = (False, False)) -> None:
        """Takes what is under way to its next stage, where no worker is `busy` with it. Collective.

        Raises RunError on every worker when any of them could not write; what was committed before stays. A copy that
        failed is told in the folder of the checkpoints.
        """
        if not busy[0]:
            self._advance()
        if self._copies and not busy[1]:
            self._copies.advance()

    def settle(self) -> None:
        """Waits until nothing is under way, copies neither. Collective; raises as `advance`."""
        self._settle()
        if self._copies:
            self._copies.settle()

    @property
    def _folder(self) -> Path:
        return self.root / folder_name(self._step, self.attempt)

    def _settle(self) -> None:
        while not self._beside.idle:
            self._advance()

    def _advance(self) -> None:
        failure = self._beside.advance()
        if failure:
            self._give_up(failure)
        elif failure == "" and self._copies:
            self._copies.offer(self.group.broadcast_object(latest(self.root) if self.group.rank == 0 else None))

    def _give_up(self, failure: str) -> None:
        if self.group.rank == 0:
            remove(self._folder)
        good = latest(self.root)
        last = f"the last good one is step {good.step}, {good.folder}" if good else "there is none before it"
        raise RunError(f"the checkpoint of step {self._step} could not be written ({failure}); {last}")

    # What threads do.

    def _write_share(self, folder: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file(self.group.rank, self.group.size)
        write_tensors(path, tensors)
        return described(path)

    def _commit(self, shares: list[tuple[int, int]], state: Mapping[str, Any], copied: list[Path]) -> None:
        write_json(self._folder / STATE, dict(state))
        files = {STATE: described(self._folder / STATE)}
        files |= {rank_file(rank, len(shares)): share for rank, share in enumerate(shares)}
        holder = json.loads((self.root / LEASE).read_text())["attempt"]
        if holder != self.attempt:
            raise OSError(f"attempt {holder} of this run has taken over from {self.attempt}")
        write_manifest(self._folder, self._step, self._clock(), files)
        self._retire(copied)

    def _retire(self, copied: list[Path]) -> None:
        """Removes checkpoints that needn't stay, and what other attempts left unfinished. copied: in use still."""
        stay = {c.folder for c in kept(committed(self.root), self.config, self._scores)} | set(copied)
        for folder in self.root.glob("step-*"):
            if folder not in stay:
                remove(folder)
