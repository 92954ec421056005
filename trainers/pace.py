"""How long each worker works for itself: a worker that is slower than the others holds all of them up.

The wall time of a step is the same on every worker, since all wait for the slowest. What differs is the time up to
the first exchange of a step, in which a worker encodes its own share of the batch, and the wait for its data.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainers.collectives import Group


class Stopwatch:
    """Time between `start` and `stop` on a device, without waiting for the device at either."""

    def __init__(self, device: torch.device) -> None:
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else []
        self._began = self._ended = 0.0

    def start(self) -> None:
        if self._events:
            self._events[0].record()
        self._began = time.perf_counter()

    def stop(self) -> None:
        if self._events:
            self._events[1].record()
        self._ended = time.perf_counter()

    @property
    def seconds(self) -> float:
        """To be asked once the device is past `stop`."""
        return self._events[0].elapsed_time(self._events[1]) / 1000 if self._events else self._ended - self._began


@dataclass(frozen=True)
class WorkerPace:
    """Of one worker, a step on average: seconds that it encoded, and that it waited for its batch."""

    rank: int
    node: str
    pid: int
    encode_s: float
    data_wait_s: float

    @property
    def seconds(self) -> float:
        return self.encode_s + self.data_wait_s

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Pace:
    """This worker's times since the last comparison."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._encode_s = self._data_wait_s = 0.0
        self._steps = 0

    def add(self, encode_s: float, data_wait_s: float) -> None:
        self._encode_s += encode_s
        self._data_wait_s += data_wait_s
        self._steps += 1

    def compare(self) -> list[WorkerPace]:
        """Every worker's means since the last call, in rank order. Collective."""
        steps = max(1, self._steps)
        means = self._encode_s / steps, self._data_wait_s / steps
        self._encode_s = self._data_wait_s = 0.0
        self._steps = 0
        return self._group.gather_objects(WorkerPace(self._group.rank, platform.node(), os.getpid(), *means))


def slowest(paces: list[WorkerPace]) -> tuple[WorkerPace, float]:
    """The slowest worker, and how many times the median of the others it takes; alone: once."""
    slow = max(paces, key=lambda pace: pace.seconds)
    others = [pace.seconds for pace in paces if pace is not slow]
    return slow, slow.seconds / max(statistics.median(others), 1e-9) if others else 1.0
