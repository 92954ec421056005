"""Writing checkpoints beside training: the state is copied at a step, a thread of each worker writes the copy.

    step t       save: every worker copies its tensors to host memory, its thread begins to write them
    step t + i   the first step after which no worker writes any more: rank 0's thread commits, then retires old ones
    step t + j   the outcome of that is known everywhere: a failure ends the run, what was committed before stays

Which of these a step is, the workers agree on in a number that they add up after each step anyway (`busy`, in
trainers/loop.py); threads send nothing. At most one checkpoint is under way: the next one waits for it, and so do the
end of training and a stop. A worker that lost its lease (another attempt of the run has started) can't commit.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_services.schema import RunError
from trainers.checkpoint import (
    LEASE,
    STATE,
    committed,
    described,
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


@dataclass
class UnderWay:
    """A checkpoint that is being written.

    work    this worker's thread: the size and checksum of its file; once `shared`, of rank 0 the commit
    shared  whether every worker's file is written
    """

    step: int
    folder: Path
    state: Mapping[str, Any]
    work: Future[Any]
    shared: bool = False


class CheckpointStore:
    """Writes and retires the checkpoints of one attempt of a run.

    scores  says which checkpoints are the best, for `keep_best`
    clock   seconds since 1970; rank 0's is written into the manifests, and decides what stays every so many hours
    """

    def __init__(
        self,
        root: Path,
        config: CheckpointConfig,
        group: Group,
        scores: Scores = lambda steps: {},
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Collective."""
        self.root, self.config, self.group = root, config, group
        self._scores, self._clock = scores, clock
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._under_way: UnderWay | None = None
        self.attempt: str = group.broadcast_object(secrets.token_hex(3))
        if group.rank == 0:
            root.mkdir(parents=True, exist_ok=True)
            write_json(root / LEASE, {"attempt": self.attempt})

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begins to write the checkpoint of `step`; not `asynchronous`, also ends it. Collective.

        tensors: this worker's, by name, on the CPU, that nothing else changes any more. state: JSON of the whole run,
        rank 0's is written. Raises RunError as `advance`, for the checkpoint before too.
        """
        self.settle()
        folder = self.root / f"step-{step:08d}.{self.attempt}"
        self._under_way = UnderWay(step, folder, state, self._thread.submit(self._write_share, folder, tensors))
        if not self.config.asynchronous:
            self.settle()

    @property
    def busy(self) -> bool:
        """Whether this worker's thread is at work."""
        return self._under_way is not None and not self._under_way.work.done()

    def advance(self) -> None:
        """Takes the checkpoint under way, if any, to its next stage, once no worker is busy with this one. Collective.

        Raises RunError on every worker when any of them could not write; what was committed before stays.
        """
        if (writing := self._under_way) is None:
            return
        outcomes = self._everywhere(writing.work)
        if failure := next((o for o in outcomes if isinstance(o, str)), ""):
            self._give_up(writing, failure)
        elif writing.shared:
            self._under_way = None
        else:
            writing.shared, writing.work = True, Future()
            if self.group.rank == 0:
                writing.work = self._thread.submit(self._commit, writing, outcomes)
            else:
                writing.work.set_result(None)

    def settle(self) -> None:
        """Waits until nothing is under way. Collective; raises as `advance`."""
        while self._under_way is not None:
            self.advance()

    def _everywhere(self, work: Future[Any]) -> list[Any]:
        """What each worker's thread came to, in rank order: a result, or a failure as a sentence. Waits for them."""
        try:
            mine = work.result()
        except OSError as error:
            mine = f"worker {self.group.rank}: {error.strerror or error}: {error.filename or self.root}"
        return self.group.gather_objects(mine)

    def _give_up(self, writing: UnderWay, failure: str) -> None:
        self._under_way = None
        if self.group.rank == 0:
            remove(writing.folder)
        good = latest(self.root)
        last = f"the last good one is step {good.step}, {good.folder}" if good else "there is none before it"
        raise RunError(f"the checkpoint of step {writing.step} could not be written ({failure}); {last}")

    # What the thread does.

    def _write_share(self, folder: Path, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / rank_file(self.group.rank, self.group.size)
        write_tensors(path, tensors)
        return described(path)

    def _commit(self, writing: UnderWay, shares: list[tuple[int, int]]) -> None:
        folder = writing.folder
        write_json(folder / STATE, dict(writing.state))
        files = {STATE: described(folder / STATE)}
        files |= {rank_file(rank, len(shares)): share for rank, share in enumerate(shares)}
        holder = json.loads((self.root / LEASE).read_text())["attempt"]
        if holder != self.attempt:
            raise OSError(f"attempt {holder} of this run has taken over from {self.attempt}")
        write_manifest(folder, writing.step, self._clock(), files)
        self._retire()

    def _retire(self) -> None:
        """Removes checkpoints that needn't stay, and what other attempts left unfinished."""
        stay = {c.folder for c in kept(committed(self.root), self.config, self._scores)}
        for folder in self.root.glob("step-*"):
            if folder not in stay:
                remove(folder)
