"""A persistent pool of gloo ranks: one set of processes per world size, kept for the whole test session.

A test hands over a top-level function; every rank calls it as `function(*arguments)` with torch.distributed
initialised over `world_size` ranks, and the results come back in rank order.
"""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def free_port() -> int:
    """One that nothing listened on just now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _serve(rank: int, world_size: int, port: int, pipe: Any) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": "1",
    }
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    while (job := pipe.recv()) is not None:
        function, arguments = job
        try:
            torch.manual_seed(0)
            pipe.send((True, function(*arguments)))
        except BaseException:  # noqa: BLE001  the rank must outlive any test's failure
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class GlooPool:
    """`pool(2, function, *arguments)` runs on two ranks and returns [result of rank 0, result of rank 1]."""

    def __init__(self) -> None:
        self._ranks: dict[int, list[tuple[Any, Any]]] = {}

    def __call__(self, world_size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        ranks = self._ranks.get(world_size) or self._start(world_size)
        for _, pipe in ranks:
            pipe.send((function, arguments))
        answers = []
        for process, pipe in ranks:
            while not pipe.poll(1):
                if not process.is_alive():
                    self._stop(world_size)
                    raise AssertionError(f"a rank of {world_size} died with exit code {process.exitcode}")
            answers.append(pipe.recv())
        failed = [text for ok, text in answers if not ok]
        if failed:
            self._stop(world_size)  # ranks may be out of step with each other: start afresh
            raise AssertionError("a rank failed:\n" + "\n".join(failed))
        return [value for _, value in answers]

    def _start(self, world_size: int) -> list[tuple[Any, Any]]:
        context, port, ranks = mp.get_context("spawn"), free_port(), []
        for rank in range(world_size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world_size, port, there), daemon=True)
            process.start()
            ranks.append((process, here))
        self._ranks[world_size] = ranks
        return ranks

    def _stop(self, world_size: int) -> None:
        for process, _ in self._ranks.pop(world_size, []):
            process.kill()
            process.join()

    def close(self) -> None:
        for world_size in list(self._ranks):
            self._stop(world_size)
