"""Work of all workers beside training: every worker's share in a thread of its own, then rank 0's end of it.

Threads send nothing. Whether all shares are done, the workers agree on in a number that they add up after each step
anyway (`busy`, in trainers/loop.py), and take the work one stage further there.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainers.collectives import Group


@dataclass
class _UnderWay:
    """work: what this worker's thread does; finish: rank 0's end of it, from every worker's result, once shared."""

    work: Future[Any]
    finish: Callable[[list[Any]], None]
    shared: bool = False


class Beside:
    """One such work at a time. Every method is collective."""

    def __init__(self, group: Group, name: str) -> None:
        self._group, self._thread = group, ThreadPoolExecutor(1, name)
        self._under_way: _UnderWay | None = None

    def begin(self, share: Callable[[], Any], finish: Callable[[list[Any]], None]) -> None:
        """share gives this worker's part, small and no text; finish(parts) is called on rank 0. Both may raise OSError,
        a sentence of the file system."""
        assert self._under_way is None, "one at a time"
        self._under_way = _UnderWay(self._thread.submit(share), finish)

    @property
    def idle(self) -> bool:
        """Whether nothing is under way."""
        return self._under_way is None

    @property
    def busy(self) -> bool:
        """Whether this worker's thread is at work. Not collective."""
        return self._under_way is not None and not self._under_way.work.done()

    def advance(self) -> str | None:
        """One stage further; waits for the threads. None where nothing ended, "" where all is done, else the first
        worker's failure."""
        if (it := self._under_way) is None:
            return None
        parts = self._parts(it.work)
        failure = next((part for part in parts if isinstance(part, str)), "")
        if failure or it.shared:
            self._under_way = None
            return failure
        it.shared, it.work = True, Future()
        if self._group.rank == 0:
            it.work = self._thread.submit(it.finish, parts)
        else:
            it.work.set_result(None)
        return None

    def _parts(self, work: Future[Any]) -> list[Any]:
        """What each worker's thread came to, in rank order: its result, or its failure as a sentence."""
        try:
            mine = work.result()
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            mine = f"worker {self._group.rank}: {' '.join((error.strerror or str(error)).split())}{place}"
        return self._group.gather_objects(mine)
