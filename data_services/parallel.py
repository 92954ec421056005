"""Parts of a source converted at once: by Ray tasks where a cluster is up, else by a pool of processes, or in turn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

from data_services.convert import convert_part, part_folder
from data_services.readers.blocks import Part, Want
from data_services.schema import RunError

# Starting a process costs half a second: so many bytes are worth it.
POOL_BYTES = 256 << 20


def convert_parts(parts: Sequence[Part], want: Want, source: str, folder: Path) -> Iterator[int]:
    """Converts the parts that aren't there yet, and gives the number of finished ones: at first, and after each."""
    pending = [part for part in parts if not part_folder(folder, part, want).exists()]
    finished = len(parts) - len(pending)
    yield finished
    files = all(part.files for part in pending)
    if files and len(pending) > 1 and _ray_is_up():
        way = _by_ray
    elif files and len(pending) > 1 and _bytes(pending) >= POOL_BYTES:
        way = _by_pool
    else:
        way = _in_turn
    for _ in way([(part, want, source, folder) for part in pending]):
        finished += 1
        yield finished


_Task = tuple[Part, Want, str, Path]


def _in_turn(tasks: Sequence[_Task]) -> Iterator[None]:
    for task in tasks:
        convert_part(*task)
        yield


def _by_pool(tasks: Sequence[_Task]) -> Iterator[None]:
    workers = min(len(tasks), len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    if workers == 1:
        yield from _in_turn(tasks)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: set[Future[None]] = {pool.submit(convert_part, *task) for task in tasks}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                    yield
        except BrokenProcessPool as error:
            raise RunError(
                "a process that converts data died, perhaps for lack of memory; what is finished is kept: start again "
                "(a script that calls this needs `if __name__ == '__main__':`)"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _ray_is_up() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


def _by_ray(tasks: Sequence[_Task]) -> Iterator[None]:
    import ray
    import ray.exceptions

    remote = ray.remote(num_cpus=1)(convert_part)
    waiting = [remote.remote(*task) for task in tasks]
    try:
        while waiting:
            done, waiting = ray.wait(waiting)
            ray.get(done[0])
            yield
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RunError(
            f"a Ray task that converts source {tasks[0][2]} failed: {reason}; what is finished is kept"
        ) from error
    finally:
        for task in waiting:
            ray.cancel(task)


def _bytes(parts: Iterable[Part]) -> int:
    """Bytes of the files that parts read."""
    return sum({file.uri: file.size for part in parts for file in part.files}.values())
